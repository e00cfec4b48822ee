"""Find the units of a trained model that have had no gradient, and since when, from its optimizer's state alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_deadrelu.explain.death_dates import live_units, momentum_of, steps_without_gradient, tolerance
from lightning_deadrelu.model.sites import clean
from lightning_deadrelu.render.names import shortened_names
from lightning_deadrelu.render.scale import round_ticks
from lightning_deadrelu.render.table import Column, text_table

_LINEAR, _CONVOLUTIONS = (nn.Linear,), (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_LEAST = {True: (30.0, 3.0), False: (60.0, 6.0)}  # steps, and tolerances: SGD does not know a unit's own scale
_CLOSE = 10  # steps; no estimate is better
_TITLE = "\nSteps since the last gradient, an estimate:"
_WIDTH, _BARS = 80, 40  # characters
_COLUMNS = (
    Column("layer", "layer", text=True),
    Column("units", "units"),
    Column("without", "no gradient"),
    Column("shortest", "shortest"),
    Column("median", "median"),
    Column("longest", "longest"),
    Column("tolerance", "+-"),
)


@dataclass(frozen=True, eq=False)
class LayerAutopsy:
    """How long each unit of a layer has had no gradient.

    Args:
        name: The layer's path.
        units: How many it has.
        ages: Steps of the optimizer since the last gradient, an estimate, int64, shape ``(units,)``; 0 for units that
            have gradients, or had some so lately that their momentum does not tell them from these.
        tolerance: By how many steps the ages may be off.
    """

    name: str
    units: int
    ages: Tensor
    tolerance: int

    @property
    def without_gradient(self) -> Tensor:
        """Which units have had none for long, bool."""
        return self.ages > 0

    def to_dict(self) -> dict[str, Any]:
        """Turn into plain values that ``json.dumps`` takes."""
        return {"name": self.name, "units": self.units, "ages": self.ages.tolist(), "tolerance": self.tolerance}


@dataclass(frozen=True, eq=False)
class Autopsy:
    """What :func:`autopsy` found; prints as a table and a histogram of 80 columns.

    Args:
        layers: The layers that could be dated, in the order of the model.
    """

    layers: tuple[LayerAutopsy, ...]

    @property
    def ages(self) -> Tensor:
        """Steps since the last gradient, of all units without one, int64."""
        return torch.cat([torch.zeros(0, dtype=torch.int64), *(one.ages[one.without_gradient] for one in self.layers)])

    def to_dict(self) -> dict[str, Any]:
        """Turn into plain values that ``json.dumps`` takes."""
        return {"layers": [layer.to_dict() for layer in self.layers]}

    def __str__(self) -> str:
        if not self.layers:
            return (
                "No layer can be dated: that takes the state of Adam, of AdamW, or of SGD with momentum, without weight"
                " decay inside the gradient."
            )
        units, ages = sum(layer.units for layer in self.layers), self.ages
        found = f"{len(ages):,} of {units:,} units have had no gradient for long"
        if not len(ages):
            return f"{found}."
        return "\n".join([f"{found}, by the optimizer's momentum.", _TITLE, self._table(), *_histogram(ages)])

    def _table(self) -> str:
        shown = [layer for layer in self.layers if layer.without_gradient.any()]
        names = shortened_names([layer.name for layer in shown], 30)
        return text_table(_COLUMNS, [_row(name, layer) for name, layer in zip(names, shown, strict=True)], _WIDTH)


def autopsy(model: nn.Module, optimizers: Optimizer | Sequence[Optimizer]) -> Autopsy:
    """Say which units have had no gradient, and for how many steps, without data and without running the model.

    The optimizer's momentum of a dead unit fades by a known factor at each step. The units of linear and convolutional
    layers are looked at, whatever follows these; a unit without gradient is dead, or nothing reads it. Left out is what
    momentum does not tell: with weight decay inside the gradient (``Adam(weight_decay=...)``), of units that were
    edited, and of those that had a gradient in the last 30 steps or so (SGD: 60). A penalty on the weights gives all
    units gradients.

    Args:
        model: Whose weights.
        optimizers: What trained it, with its state.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> _ = nn.init.ones_(model[0].weight), nn.init.constant_(model[0].bias[:2], -100.0)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> for _ in range(100):
        ...     optimizer.zero_grad()
        ...     (model(torch.rand(16, 4)) - torch.randn(16, 1)).square().mean().backward()
        ...     optimizer.step()
        >>> autopsy(model, optimizer).layers[0].ages
        tensor([100, 100,   0,   0,   0,   0,   0,   0])
    """
    held = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
    return Autopsy(tuple(_dated(model, held)))


def _dated(model: nn.Module, optimizers: Sequence[Optimizer]) -> Iterator[LayerAutopsy]:
    for name, layer in model.named_modules():
        if not isinstance(layer, _LINEAR + _CONVOLUTIONS):
            continue
        momentum = momentum_of(optimizers, layer.weight)
        if momentum is None:
            continue
        live = live_units(momentum)
        off = tolerance(momentum, live)
        ages = steps_without_gradient(momentum, live).nan_to_num(0.0)
        least, times = _LEAST[momentum.is_adaptive]
        ages[ages < max(least, times * off)] = 0.0
        yield LayerAutopsy(clean(name), len(ages), ages.long(), round(off))


def _row(name: str, layer: LayerAutopsy) -> dict[str, str | int]:
    ages = layer.ages[layer.without_gradient]
    steps = {"shortest": int(ages.min()), "median": int(ages.median()), "longest": int(ages.max())}
    return {"layer": name, "units": layer.units, "without": len(ages), "tolerance": layer.tolerance, **steps}


def _histogram(ages: Tensor) -> list[str]:
    """Draw how many units lost their gradient how many steps ago, in a line for each interval."""
    low, high = int(ages.min()), int(ages.max())
    ticks = round_ticks(low, high, 12)
    step = max(int(ticks[-1] - ticks[-2]), _CLOSE) if len(ticks) > 1 else _CLOSE
    counts = torch.bincount((ages - 1) // step)[(low - 1) // step :].tolist()
    starts = range((low - 1) // step * step + 1, high + 1, step)
    labels = [f"{start:,} to {start + step - 1:,}" for start in starts]
    size = max(map(len, labels))
    bars = ("█" * max(round(_BARS * count / max(counts)), count > 0) for count in counts)
    lines = (f"{label:>{size}}  {bar} {count or ''}" for label, bar, count in zip(labels, bars, counts, strict=True))
    return ["\nUnits by these steps:", *(line.rstrip() for line in lines)]
