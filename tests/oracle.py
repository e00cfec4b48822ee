"""Whether an attribution is true, by numbers alone: change what it names, and see what else changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lightning_deadrelu.attribution import Tracer
from lightning_deadrelu.attribution.result import Attribution
from lightning_deadrelu.model.rectifiers import Rectifier
from lightning_deadrelu.model.sites import Site, clean
from lightning_deadrelu.model.slices import Slice
from lightning_deadrelu.observe.probe import Probe

Run = Callable[[], Any]


class Seen(NamedTuple):
    """One call of a site: its input and output, the units in front."""

    site: Site
    x: Tensor
    out: Tensor


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [item for one in value for item in tensors(one)] if isinstance(value, (list, tuple)) else []


def flat(value: Any) -> list[Tensor]:
    return [one.detach().clone() for one in tensors(value)]


def front(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Put the units in front; a view where the dimensions of the units lie side by side."""
    moved = x.movedim(dims, tuple(range(len(dims))))
    return moved.flatten(0, len(dims) - 1) if len(dims) > 1 else moved


def attribute(model: nn.Module, run: Run) -> dict[Site, Attribution]:
    """Trace one run."""
    seed()
    probe = Probe(model, lambda *call: None)
    tracer = Tracer(model)
    probe.router.subscribe_calls(tracer)
    with probe:
        for out in tensors(run()):
            if out.requires_grad:
                out.cos().sum()
    assert probe.failure is None
    assert tracer.error is None, tracer.error
    return tracer.attributions()


def seed() -> None:
    torch.manual_seed(1)
    np.random.seed(1)


def observe(model: nn.Module, run: Run, change: Callable[[Site, Tensor, tuple[int, ...]], None]) -> Any:
    """Run; ``change`` may overwrite what each rectifier puts out. Returns the calls and the outputs."""
    seen: list[Seen] = []

    def sink(site: Site, rectifier: Rectifier, x: Tensor, out: Tensor, dims: tuple[int, ...]) -> None:
        before = front(x, dims).clone()
        seen.append(Seen(site, before, front(out, dims).clone()))
        change(site, out, dims)

    seed()
    with torch.no_grad(), Probe(model, sink) as probe:
        result = flat(run())
    assert probe.failure is None
    return seen, result


def put(out: Tensor, dims: tuple[int, ...], unit: int, values: Tensor | float) -> None:
    """Overwrite one unit."""
    sizes = [out.shape[dim] for dim in dims]
    place = torch.unravel_index(torch.tensor(unit), sizes)
    out.movedim(dims, tuple(range(len(dims))))[tuple(int(one) for one in place)] = values


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    model = getattr(model, "_orig_mod", model)
    return {clean(name): tensor for name, tensor in (*model.named_parameters(), *model.named_buffers())}


@contextmanager
def rewritten(model: nn.Module, slices: Iterable[Slice], new: Callable[[Tensor], Tensor | float]) -> Any:
    """Put other values in the entries of some slices for a while."""
    tensors = tensors_of(model)
    slices = list(slices)
    old = {one.name: tensors[one.name].detach().clone() for one in slices}
    for one in slices:
        one.write_(tensors[one.name], new(one.read(tensors[one.name])))
    try:
        yield
    finally:
        with torch.no_grad():
            for name, values in old.items():
                tensors[name].copy_(values)


@contextmanager
def kept_statistics(model: nn.Module) -> Any:
    """Undo what a forward does to the buffers."""
    old = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(old[name])


def same(a: Any, b: Any) -> bool:
    return len(a) == len(b) and all(
        x.shape == y.shape and ((x == y) | (x.isnan() & y.isnan())).all() for x, y in zip(a, b, strict=True)
    )


def noisy(values: Tensor) -> Tensor:
    return values + torch.rand_like(values) + 0.5


def others(tensor: Tensor, one: Slice) -> Tensor:
    """Mark the entries of a tensor that a slice does not name."""
    mask = torch.ones(tensor.shape, dtype=torch.bool)
    one.write_(mask, False)
    return mask


def check(model: nn.Module, run: Run, units: int = 2) -> dict[Site, Attribution]:
    """Hold every attribution of a model against what really happens.

    Args:
        model: The model.
        run: One deterministic step, given a seed.
        units: How many units of each site to try.
    """
    with kept_statistics(model):
        known = attribute(model, run)
        seen, _ = observe(model, run, lambda *call: None)
    for site, one in known.items():
        if not any(call.site == site for call in seen):
            continue
        chosen = {0, site.units - 1, *torch.randperm(site.units)[:units].tolist()} if site.units else set()
        for unit in sorted(chosen)[: units + 1]:
            with kept_statistics(model):
                check_incoming(model, run, site, one, unit)
            with kept_statistics(model):
                check_outgoing(model, run, site, one, unit)
            with kept_statistics(model):
                check_outlet(model, run, site, one, unit)
    return known


def mine(slices: Iterable[Slice], site: Site, unit: int) -> list[Slice]:
    return [one.of(torch.arange(site.units) == unit) for one in slices]


def changes_only(site: Site, unit: int, before: list[Seen], after: list[Seen]) -> bool:
    """Whether at a site's first call no other unit's input differs."""
    rest = torch.arange(site.units) != unit
    first, now = (next(call.x for call in calls if call.site == site) for calls in (before, after))
    return same([first[rest]], [now[rest]])


def replay(site: Site, unit: int, before: list[Seen]) -> Callable[[Site, Tensor, tuple[int, ...]], None]:
    """Let a unit put out what it did before, whatever its input."""
    outs = iter([call.out[unit] for call in before if call.site == site])

    def change(other: Site, out: Tensor, dims: tuple[int, ...]) -> None:
        if other == site:
            put(out, dims, unit, next(outs))

    return change


def check_incoming(model: nn.Module, run: Run, site: Site, known: Attribution, unit: int) -> None:
    """Entries that feed a unit change nothing but through that unit, and no other entries of theirs change it."""
    assert bool(known.incoming) != bool(known.no_incoming), known
    slices = mine(known.incoming, site, unit)
    if not slices:
        return
    plain, result = observe(model, run, lambda *call: None)
    with rewritten(model, slices, noisy):
        after, _ = observe(model, run, lambda *call: None)
        assert changes_only(site, unit, plain, after), f"{site}: another unit is fed"
        after, now = observe(model, run, replay(site, unit, plain))
    assert same(result, now), f"{site}: its entries have another effect"
    for a, b in zip(plain, after, strict=True):
        rest = torch.arange(len(a.x)) != (unit if a.site == site else -1)
        assert same([a.x[rest]], [b.x[rest]]), f"{site}: its entries also feed {b.site}"
    tensors = tensors_of(model)
    old = {one.name: tensors[one.name].detach().clone() for one in slices}
    by_name = {name: [one for one in slices if one.name == name] for name in old}
    with torch.no_grad():
        for name, ones in by_name.items():
            rest = torch.stack([others(tensors[name], one) for one in ones]).all(0)
            tensors[name][rest] = noisy(tensors[name][rest])
    after, _ = observe(model, run, lambda *call: None)
    with torch.no_grad():
        for name, values in old.items():
            tensors[name].copy_(values)
    a, b = (next(call.x for call in calls if call.site == site) for calls in (plain, after))
    assert same([a[unit]], [b[unit]]), f"{site}: other entries feed it too"


def check_outgoing(model: nn.Module, run: Run, site: Site, known: Attribution, unit: int) -> None:
    """Without what reads a unit, it has no effect; while it is silent, what reads it has none."""
    assert bool(known.outgoing) != bool(known.no_outgoing), known
    slices = mine(known.outgoing, site, unit)
    if known.no_outgoing:
        return

    def shout(other: Site, out: Tensor, dims: tuple[int, ...]) -> None:
        if other == site:
            put(out, dims, unit, 7.5)

    def hush(other: Site, out: Tensor, dims: tuple[int, ...]) -> None:
        if other == site:
            put(out, dims, unit, 0.0)

    with rewritten(model, slices, lambda values: 0.0):
        before, after = observe(model, run, hush), observe(model, run, shout)
    assert_same_effects(site, unit, before, after, "it is also read by something else")
    before = observe(model, run, hush)
    with rewritten(model, slices, noisy):
        after = observe(model, run, hush)
    assert_same_effects(site, unit, before, after, "what reads it also reads something else")


def assert_same_effects(site: Site, unit: int, before: Any, after: Any, why: str) -> None:
    assert same(before[1], after[1]), f"{site} {unit}: {why}"
    for a, b in zip(before[0], after[0], strict=True):
        rest = torch.arange(len(a.x)) != unit if "+" in b.site.source[-1] else slice(None)  # behind another rectifier
        assert same([a.x[rest]], [b.x[rest]]), f"{site} {unit}: {why}: {b.site}"


def check_outlet(model: nn.Module, run: Run, site: Site, known: Attribution, unit: int) -> None:
    """A term added at the outlet arrives as it is, and nowhere else."""
    assert (known.outlet is None) == bool(known.no_outlet), known
    if known.outlet is None:
        return
    path, channels, dim = known.outlet
    module = {clean(name): module for name, module in model.named_modules()}[path]

    def add(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        term = torch.zeros(output.shape[dim])
        term[channels[unit]] = 0.25
        return output + term.view([-1, *[1] * (-dim - 1)])

    plain, result = observe(model, run, lambda *call: None)
    handle = module.register_forward_hook(add)
    after, _ = observe(model, run, lambda *call: None)
    assert changes_only(site, unit, plain, after), f"{site}: the outlet feeds another unit"
    a, b = (next(call.x for call in calls if call.site == site)[unit] for calls in (plain, after))
    torch.testing.assert_close(b, a + 0.25)
    _, now = observe(model, run, replay(site, unit, plain))
    handle.remove()
    assert same(result, now), f"{site}: the outlet has another effect"
