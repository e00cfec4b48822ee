"""Sites and masks against what the dispatcher saw, for every family of models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import families
import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, Family
from hypothesis import given, settings
from hypothesis import strategies as st
from models import CASES, Case, Mlp, PreNormBlock, inputs_of, net
from recorder import Recorder, Rectified, fires, no_fast_path
from torch import Tensor, nn

from lightning_deadrelu.model.rectifiers import Rectifier
from lightning_deadrelu.model.sites import Site, names_of
from lightning_deadrelu.observe.probe import Probe
from lightning_deadrelu.statistics import count


class Seen(NamedTuple):
    """One call as the probe reports it."""

    site: Site
    x: Tensor
    dims: tuple[int, ...]
    fired: Tensor


def watched(model: nn.Module, run: Callable[[], Any]) -> tuple[list[Seen], Probe, Any]:
    """Run under a probe; each call as it was at that moment."""
    seen: list[Seen] = []

    def sink(site: Site, rectifier: Rectifier, x: Tensor, out: Tensor, dims: tuple[int, ...]) -> None:
        if not rectifier.smooth:
            seen.append(Seen(site, x.clone(), dims, count(x, out, dims, rectifier).fired > 0))

    probe = Probe(model, sink)
    with probe:
        result = run()
    assert probe.failure is None
    return seen, probe, result


def recorded(run: Callable[[], Any]) -> tuple[list[Rectified], Any]:
    """Run under the dispatcher's recorder."""
    with Recorder() as recorder:
        result = run()
    return recorder.calls, result


def step(case: Case) -> tuple[nn.Module, Callable[[], Any]]:
    """Build a case and one training step of it, both the same at each call."""
    torch.manual_seed(0)
    model, inputs = case.build(), inputs_of(case)
    with torch.no_grad():
        case.run(model, *inputs) if any(map(nn.parameter.is_lazy, model.parameters())) else None

    def run() -> Any:
        torch.manual_seed(1)
        result = case.run(model, *inputs)
        first = result[0] if isinstance(result, (list, tuple)) else result
        if first.requires_grad:
            first.sum().backward()
        return [first.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    return model, run


@pytest.fixture(autouse=True)
def _one_thread_and_no_fast_path() -> Any:
    torch.set_num_threads(1)
    with no_fast_path():
        yield


def same(a: Any, b: Any) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x.as_subclass(Tensor), y.as_subclass(Tensor)) for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("name", CASES)
def test_zoo(name: str) -> None:
    case = CASES[name]
    truth, expected_result = recorded(step(case)[1])
    seen, probe, result = watched(*step(case))
    assert same(result, expected_result)

    words = case.calls.split()
    assert len(truth) == len(words)
    expected = [(word, call) for word, call in zip(words, truth, strict=True) if word[0] not in "-?"]
    sites = list(dict.fromkeys(call.site for call in seen))
    spell = dict(zip(sites, names_of(sites), strict=True))
    assert [f"{spell[call.site]}@{','.join(map(str, call.dims))}" for call in seen] == [word for word, _ in expected]
    assert same([call.x for call in seen], [call.x for _, call in expected])
    for mine, (_, true) in zip(seen, expected, strict=True):
        assert torch.equal(mine.fired, fires(true.x, true.hinge, mine.dims))
    assert set(probe.unwatched) == {word[1:] for word in words if word[0] == "?"}


def family_step(family: Family) -> tuple[nn.Module, Callable[[], Any]]:
    """Build a model of transformers and one training step of it, both the same at each call."""
    torch.manual_seed(0)
    model, inputs = families.build(family).train(), families.inputs_of(family)

    def run() -> Any:
        torch.manual_seed(1)
        outputs = model(**inputs).values()
        flat = [item for out in outputs for item in (out if isinstance(out, (list, tuple)) else [out])]
        result = next(out for out in flat if isinstance(out, Tensor) and out.is_floating_point())
        result.sum().backward() if result.requires_grad else None
        return [result.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    return model, run


def widths(model: nn.Module, source: tuple[str, ...]) -> set[int]:
    """How many outputs the producers have, as their modules say."""
    fields = {"out_features", "out_channels", "num_features", "num_channels", "embedding_dim", "nf"}
    paths = {name.rpartition(".")[0] for name in source}
    modules = [module for path, module in model.named_modules() if path and path in paths]
    return {vars(module)[field] for module in modules for field in fields & vars(module).keys()}


COMPARED: dict[str, tuple[int, int, int]] = {}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_family(name: str) -> None:
    truth, expected_result = recorded(family_step(FAMILIES[name])[1])
    model, run = family_step(FAMILIES[name])
    seen, probe, result = watched(model, run)
    assert same(result, expected_result)

    assert truth
    assert not probe.unwatched
    assert same([call.x for call in seen], [call.x for call in truth])
    for mine, true in zip(seen, truth, strict=True):
        assert mine.site.traced or mine.site.source == ("#0",)  # a residual stream from outside the module
        assert torch.equal(mine.fired, fires(true.x, true.hinge, mine.dims))
        known = widths(model, mine.site.source)
        sliced = any("/" in part for part in mine.site.source)
        assert mine.site.units in known or not known or (sliced and mine.site.units < max(known))
    sites = {call.site for call in seen}
    assert len(names_of(sites)) == len(sites)
    COMPARED[name] = len(truth), len(sites), sum(site.traced for site in sites)


@pytest.mark.slow
def test_how_many_families_were_compared() -> None:
    """A figure to quote; holds where all of this file ran."""
    if set(COMPARED) == set(FAMILIES):
        calls, sites, traced = (sum(figure) for figure in zip(*COMPARED.values(), strict=True))
        assert (len(COMPARED), calls, sites, traced) == (133, 594, 589, 586)


class Skipping(nn.Module):
    """A stem, and blocks of which some are left out."""

    def __init__(self, block: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Linear(4, 4), nn.ModuleList(block() for _ in range(4))
        self.skipped: tuple[int, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for number, block in enumerate(self.blocks):
            x = x if number in self.skipped else block(x)
        return x


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "plain": Mlp,
    "norm first": PreNormBlock,
    "relu first, without norm": net(lambda m, x: x + m.fc(F.relu(x)), fc=lambda: nn.Linear(4, 4)),
    "relu module first": net(lambda m, x: x + m.fc(m.act(x)), fc=lambda: nn.Linear(4, 4), act=nn.ReLU),
    "relu after the sum": net(lambda m, x: F.relu(x + m.fc(x)), fc=lambda: nn.Linear(4, 4)),
}


@pytest.mark.parametrize("skipped", [(1,), (2,), (1, 2), (3,)])
@pytest.mark.parametrize("block", BLOCKS)
def test_a_skipped_block_leaves_the_other_sites_alone(block: str, skipped: tuple[int, ...]) -> None:
    model, x = Skipping(BLOCKS[block]), torch.randn(3, 4)
    all_sites = [call.site for call in watched(model, lambda: model(x))[0]]
    model.skipped = skipped
    assert [call.site for call in watched(model, lambda: model(x))[0]] == [
        site for number, site in enumerate(all_sites) if number not in skipped
    ]


class Wandering(nn.Module):
    """Each step of the forward reads one of the tensors made so far, by an operation; all three are told anew."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.plan: list[tuple[str, int, int]] = []

    def forward(self, x: Tensor) -> Tensor:
        made = [self.layers[0](x)]  # what no parameter feeds is no layer
        for operation, one, other in self.plan:
            x, y = made[one % len(made)], made[other % len(made)]
            made.append(self.step(operation, x, y, self.layers[other % 3]))
        return made[-1]

    def step(self, operation: str, x: Tensor, y: Tensor, layer: nn.Module) -> Tensor:
        match operation:
            case "layer":
                return layer(x)
            case "same weights":
                return F.linear(x, weight=layer.weight, bias=layer.bias)
            case "relu":
                return F.relu(x)
            case "add":
                return x + y
            case "scale":
                return y * 0.5
            case "halves swapped":
                return torch.cat(x.chunk(2, -1)[::-1], -1)
            case _:
                return -x


_OPERATIONS = ("layer", "same weights", "relu", "add", "scale", "halves swapped", "negated")
_PLANS = st.lists(st.tuples(st.sampled_from(_OPERATIONS), st.integers(0, 9), st.integers(0, 9)), max_size=9)


@settings(max_examples=60)
@given(plans=st.lists(_PLANS, min_size=2, max_size=5), widths=st.lists(st.integers(1, 3), min_size=5, max_size=5))
def test_a_forward_that_changes_from_batch_to_batch_has_the_sites_of_one_looked_at_for_the_first_time(
    plans: list[list[tuple[str, int, int]]], widths: list[int]
) -> None:
    """What was settled in earlier batches must not speak for later ones."""
    model, seen = Wandering(), list[Seen]()

    def sink(site: Site, rectifier: Rectifier, x: Tensor, out: Tensor, dims: tuple[int, ...]) -> None:
        seen.append(Seen(site, x.clone(), dims, count(x, out, dims, rectifier).fired > 0))

    probe = Probe(model, sink)
    for plan, width in zip([*plans, *plans], widths * 2, strict=False):
        model.plan, x = [*plan, ("relu", 9, 0)], torch.randn(width, 4)
        truth, _ = recorded(lambda x=x: model(x))
        fresh = watched(model, lambda x=x: model(x))[0]
        seen.clear()
        with probe:
            model(x)
        assert probe.failure is None
        assert [call[::2] for call in seen] == [call[::2] for call in fresh]  # site and dims
        assert same([call.x for call in seen], [call.x for call in truth])
        for mine, true in zip(seen, truth, strict=True):
            assert torch.equal(mine.fired, fires(true.x, true.hinge, mine.dims))


class Stack(nn.Module):
    """Layers drawn at random: each is a spelling, and what it does to the shape is known by construction."""

    def __init__(self, dims: int, words: list[str]) -> None:
        super().__init__()
        self.words, self.shared = words, nn.ReLU()
        self.layers = nn.ModuleList()
        self.expected: list[tuple[int, ...]] = []
        width, linear = 4, dims == 0
        for word in words:
            layer, width, linear = self.draw(word, dims, width, linear)
            self.layers.append(layer)
            if word in RECTIFIERS:
                self.expected.append((-1,) if linear else (-dims - 1,))

    def draw(self, word: str, dims: int, width: int, linear: bool) -> tuple[nn.Module, int, bool]:
        if word == "flatten":
            return nn.Flatten() if linear else nn.Sequential(self.pool(dims), nn.Flatten()), width, True
        if word in ("layer", "residual"):
            out = width if word == "residual" else width % 5 + 2
            return nn.Linear(width, out) if linear else self.conv(dims)(width, out, 3, padding=1), out, linear
        if word == "norm":
            return nn.LayerNorm(width) if linear else self.norm(dims)(width), width, linear
        if word == "pool":
            return nn.Identity() if linear else getattr(nn, f"MaxPool{dims}d")(3, 1, 1), width, linear
        return (nn.Dropout(0.5) if word == "dropout" else nn.ReLU(inplace=word == "in place")), width, linear

    @staticmethod
    def conv(dims: int) -> Any:
        return getattr(nn, f"Conv{dims}d")

    @staticmethod
    def norm(dims: int) -> Any:
        return getattr(nn, f"BatchNorm{dims}d")

    @staticmethod
    def pool(dims: int) -> nn.Module:
        return getattr(nn, f"AdaptiveAvgPool{dims}d")(1)

    def forward(self, x: Tensor) -> Tensor:
        for word, layer in zip(self.words, self.layers, strict=True):
            x = self.one(word, layer, x)
        return x

    def one(self, word: str, layer: nn.Module, x: Tensor) -> Tensor:
        if word == "residual":
            return x + layer(x)
        if word == "there and back":
            order = [0, *range(2, x.ndim), 1]
            return (x.permute(order) * 2.0).permute([order.index(i) for i in range(x.ndim)]).contiguous()
        forms = {"shared": self.shared, "functional": F.relu, "method": Tensor.relu, "clamp": lambda x: x.clamp(min=0)}
        return forms.get(word, layer)(x)


RECTIFIERS = ("module", "in place", "shared", "functional", "method", "clamp")
WORDS = ("layer", "residual", "norm", "pool", "dropout", "there and back", "flatten", *RECTIFIERS)


@pytest.mark.slow
@settings(max_examples=150)
@given(dims=st.integers(0, 3), words=st.lists(st.sampled_from(WORDS), max_size=12))
def test_random_stacks(dims: int, words: list[str]) -> None:
    def step() -> tuple[Stack, Callable[[], Any]]:
        torch.manual_seed(0)
        stack, x = Stack(dims, ["layer", *words, "layer"]), torch.randn(3, 4, *[4] * dims)

        def run() -> Any:
            torch.manual_seed(1)
            return [stack(x).detach()]

        return stack, run

    truth, expected_result = recorded(step()[1])
    stack, run = step()
    seen, probe, result = watched(stack, run)
    assert same(result, expected_result)
    assert not probe.unwatched
    assert same([call.x for call in seen], [call.x for call in truth])
    assert [call.dims for call in seen] == stack.expected
    assert len({call.site for call in seen}) == len(seen)
    for mine, true in zip(seen, truth, strict=True):
        assert torch.equal(mine.fired, fires(true.x, true.hinge, mine.dims))
