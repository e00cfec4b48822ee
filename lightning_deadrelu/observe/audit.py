"""Audit any module for dead units, without a Trainer."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_deadrelu.observe.watch import Watch
from lightning_deadrelu.statistics import LivenessReport, Rules, UnitHistory, judge


def find_dead_units(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    min_samples: int = 299,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> LivenessReport:
    """Find the units of a model that never fire on some data, and leave the model as it was.

    It runs under ``no_grad``, on the model's device and in the mode it finds: in training mode BatchNorm
    uses the batch's statistics, in evaluation mode its own, which is another function. Modes, buffers,
    random number generators and hooks are afterwards as before. Units of frozen layers count too.

    Args:
        model: Any module.
        batches: The data. A mapping is passed as ``model(**batch)``, a tuple or list as ``model(batch[0])``,
            anything else as ``model(batch)``.
        min_samples: A unit silent for fewer samples is not called dead.
        include: Shell patterns over site names, or kinds such as ``"gelu"``; by default all rectifiers.
        exclude: Patterns or kinds to leave out.
        forward: Called as ``forward(model, batch)`` in place of the rule above.

    Raises:
        ValueError: If there is no batch, or a pattern matches no site.
        TypeError: If ``include`` or ``exclude`` is a string, or ``model`` no module, or ``batches`` one batch alone.
        RuntimeError: If the audit itself failed.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        >>> _ = nn.init.constant_(model[0].bias, -100.0)
        >>> find_dead_units(model, [torch.rand(300, 4)]).dead_fraction
        1.0
    """
    if min_samples < 1:
        raise ValueError(f"`min_samples={min_samples}`: a verdict needs at least 1 sample. Try `min_samples=299`.")
    _check_data(model, batches)
    watch = Watch(model, include=include, exclude=exclude, rules=Rules(min_samples, redundancy=True))
    seen = False
    with _as_found(model), torch.no_grad(), watch:
        for batch in batches:
            seen = True
            (forward or _forward)(model, _to_device(batch, model))
    if not seen:
        raise ValueError("`batches` is empty: without data nothing can be said. Pass at least one batch.")
    if watch.probe.failure:
        raise RuntimeError("The audit itself failed; the model ran through.") from watch.probe.failure
    watch.check_patterns()
    totals = watch.liveness.totals().to_host()
    return judge(totals, UnitHistory.empty(), watch.layout, watch.liveness.rules, unwatched=watch.unwatched())[0]


def _check_data(model: object, batches: object) -> None:
    """Refuse arguments in the wrong places, and one batch that would be taken apart as if it were many."""
    call = f"`find_dead_units({type(model).__name__}, {type(batches).__name__})`"
    if not isinstance(model, nn.Module):
        swapped = isinstance(batches, nn.Module)
        mend = "Swap them: `find_dead_units(model, batches)`" if swapped else "Pass an `nn.Module`"
        raise TypeError(f"{call}: the first argument is the model, and this is none. {mend}.")
    if isinstance(batches, (Tensor, Mapping)):
        raise TypeError(f"{call}: this is one batch, and would be taken apart. Try `find_dead_units(model, [batch])`.")
    if isinstance(batches, nn.Module) or not isinstance(batches, Iterable):
        raise TypeError(f"{call}: the second argument holds no batches. Pass a `DataLoader`, or a list of batches.")


def trace(model: nn.Module, batch: Any, forward: Callable[[nn.Module, Any], Any] | None = None) -> Watch:
    """Watch one batch, follow it from layers to rectifiers, and leave the model as it was.

    Args:
        model: Any module.
        batch: As one of those that :func:`find_dead_units` takes.
        forward: As there.

    Raises:
        RuntimeError: If the audit itself failed.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        >>> trace(model, torch.rand(2, 4)).attributions["1"].bias.name
        '0.bias'
    """
    watch = Watch(model)
    watch.trace()
    run(watch, model, batch, forward)
    return watch


def run(
    watch: Watch,
    model: nn.Module,
    batch: Any,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    then: Callable[[Any], None] = lambda output: None,
) -> None:
    """Run one batch with gradients, watched, and leave the model as it was.

    Args:
        watch: Counts.
        model: Any module.
        batch: As one of those that :func:`find_dead_units` takes.
        forward: As there.
        then: Called with what the forward returns, before buffers are put back.

    Raises:
        RuntimeError: If the watch itself failed.
    """
    with _as_found(model), torch.enable_grad():
        with watch:
            output = (forward or _forward)(model, _to_device(batch, model))
        then(output)
    if watch.probe.failure:
        raise RuntimeError("The audit itself failed; the model ran through.") from watch.probe.failure


def _forward(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0]) if isinstance(batch, (tuple, list)) else model(batch)


def _to_device(batch: Any, model: nn.Module) -> Any:
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), None)
    return apply_to_collection(batch, Tensor, lambda tensor: tensor.to(device)) if device else batch


@contextmanager
def _as_found(model: nn.Module) -> Iterator[None]:
    """Put buffers, modes and random number generators back when done, also after an error."""
    buffers = [
        (module._buffers, name, buffer, _copy(buffer))
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    modes = [(module, module.training) for module in model.modules()]
    numpy = sys.modules.get("numpy")
    states = random.getstate(), numpy.random.get_state() if numpy else None
    devices = {p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")}
    with torch.random.fork_rng(
        devices=[d.index for d in devices if d.index is not None], device_type=_accelerator(devices)
    ):
        try:
            yield
        finally:
            random.setstate(states[0])
            if numpy:
                numpy.random.set_state(states[1])
            for module, training in modes:
                module.training = training
            for owner, name, buffer, values in buffers:
                owner[name] = buffer
                if buffer is not None and values is not None:
                    buffer.copy_(values)


def _copy(buffer: Tensor | None) -> Tensor | None:
    return None if buffer is None or nn.parameter.is_lazy(buffer) else buffer.detach().clone()


def _accelerator(devices: set[torch.device]) -> str:
    return next((device.type for device in devices), "cuda")
