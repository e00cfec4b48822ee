"""From activations to counts, on the device."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_deadrelu.model.rectifiers import Rectifier

RELU = Rectifier("relu", plain=True)
_EXACT_IN_FLOAT32 = 2**24
_FEW_POSITIONS = 16
_WIDE = frozenset({torch.float32, torch.float64})


class Counts(NamedTuple):
    """What one call of a rectifier tells about each unit.

    Args:
        fired: Elements above the hinge, shape ``(units,)``, whole numbers.
        magnitude: Sum of the absolute output, shape ``(units,)``.
        peak: Largest input, measured from the hinge, shape ``(units,)``.
        trough: Smallest input, measured from the hinge, shape ``(units,)``.
        samples: Rows or images.
        elements: Inputs per unit.
    """

    fired: Tensor
    magnitude: Tensor
    peak: Tensor
    trough: Tensor
    samples: int | Tensor
    elements: int | Tensor

    def joined(self, other: Counts) -> Counts:
        """Merge with another call of one site and observation; the peak passes over NaN, the trough keeps it."""
        return Counts(
            self.fired.long() + other.fired.long(),
            self.magnitude + other.magnitude,
            self.peak.fmax(other.peak),
            self.trough.minimum(other.trough),
            self.samples + other.samples,
            self.elements + other.elements,
        )


def count(
    x: Tensor,
    out: Tensor,
    dims: tuple[int, ...] = (-1,),
    rectifier: Rectifier = RELU,
    valid: Tensor | None = None,
) -> Counts:
    """Reduce one call of a rectifier to a few numbers per unit, on the device and without waiting for it.

    Args:
        x: The rectifier's input, any shape, not empty.
        out: Its output, of the same shape.
        dims: The dimensions that hold the units, counted from the end.
        rectifier: What it is.
        valid: Boolean, True for data and False for padding, of the shape of ``x`` without the unit
            dimension, or None.

    Example:
        >>> x = torch.tensor([[1.0, -1.0], [2.0, -3.0]])
        >>> counts = count(x, x.relu())
        >>> counts.fired, counts.peak
        (tensor([2., 0.]), tensor([ 2., -1.]))
    """
    if x.ndim == len(dims):
        x, out = x[None], out[None]
    plan = _planned(x.shape, dims, x.device.type == "cpu")
    samples, elements, lowest = plan.samples, plan.elements, x
    if valid is not None:
        samples = elements = valid.sum()  # type: ignore[assignment]
        padding = ~valid[..., None]
        x, lowest, out = (t.masked_fill(padding, v) for t, v in ((x, -math.inf), (x, math.inf), (out, 0.0)))
    # the output first: it was written last, and may still be in the cache
    fired, magnitude = _fired(x, out, plan, rectifier), _magnitude(out, plan, rectifier)
    peak, trough = _reduced(Tensor.amax, x, plan), _reduced(Tensor.amin, lowest, plan)
    if rectifier.hinge:
        peak, trough = peak - rectifier.hinge, trough - rectifier.hinge
    return Counts(fired, magnitude, peak, trough, samples, elements)


class _Plan(NamedTuple):
    """How to reduce all inputs of one shape to one number per unit.

    Args:
        over: The dimensions to reduce, counted from the end.
        stages: The same, in the order in which they go fastest.
        samples: Rows where the last dimension holds units, else images.
        elements: Inputs per unit.
    """

    over: tuple[int, ...]
    stages: tuple[tuple[int, ...], ...]
    samples: int
    elements: int


@lru_cache(maxsize=1024)
def _planned(shape: torch.Size, dims: tuple[int, ...], on_cpu: bool) -> _Plan:
    """Plan once per shape: for small activations, to plan costs as much as to count."""
    over = tuple(dim for dim in range(-len(shape), 0) if dim not in dims)
    images = tuple(dim for dim in over if dim < min(dims))
    positions = tuple(dim for dim in over if dim > min(dims))
    elements = math.prod(shape[dim] for dim in over)
    samples = elements if -1 in dims else math.prod(shape[dim] for dim in images)
    stages: tuple[tuple[int, ...], ...] = (over,)
    if on_cpu and images and positions:  # several times faster than both at once
        many = math.prod(shape[dim] for dim in positions) > _FEW_POSITIONS
        stages = (positions, images) if many else (images, positions)
    return _Plan(over, stages, samples, elements)


def _reduced(reduction: Callable[..., Tensor], x: Tensor, plan: _Plan) -> Tensor:
    for dims in plan.stages:
        x = reduction(x, dims, True)
    return x.flatten()


def _fired(x: Tensor, out: Tensor, plan: _Plan, rectifier: Rectifier) -> Tensor:
    """Count who fired; the sum of signs, which are 0 for NaN, is ten times faster than that of booleans."""
    if not rectifier.plain:
        return (x > rectifier.hinge).sum(plan.over).flatten()
    if out.device.type == "cpu" and out.dtype == torch.float32 and -out.ndim in plan.over:
        return _sum_of_signs(out, plan)
    exact = out.numel() <= _EXACT_IN_FLOAT32 or out.device.type == "mps"
    return out.sign().sum(plan.over, dtype=torch.float32 if exact else torch.float64).flatten()


class _Scratch(threading.local):
    """Working memory of a thread: on a CPU, fresh pages for a copy cost more than the arithmetic."""

    def __init__(self) -> None:
        self.numbers = torch.empty(2**20, device="cpu")  # 4 MiB, which stay in the cache

    def like(self, x: Tensor) -> Tensor:
        """Lay the memory out as a tensor that has no gaps."""
        return self.numbers.as_strided(x.shape, x.stride())


_scratch = _Scratch()


def _sum_of_signs(out: Tensor, plan: _Plan) -> Tensor:
    rows = _scratch.numbers.numel() * len(out) // out.numel()
    dense = out.is_contiguous() or (out.ndim == 4 and out.is_contiguous(memory_format=torch.channels_last))
    if not rows or not dense:
        return out.sign().sum(plan.over, dtype=torch.float64).flatten()
    parts = [out] if rows >= len(out) else out.split(rows)
    sums = [_reduced(Tensor.sum, torch.sign(part, out=_scratch.like(part)), plan) for part in parts]
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum(0, dtype=torch.float64)


def _magnitude(out: Tensor, plan: _Plan, rectifier: Rectifier) -> Tensor:
    size = out if rectifier.plain else out.abs()
    return _reduced(Tensor.sum if out.dtype in _WIDE else _sum_in_float32, size, plan)


def _sum_in_float32(x: Tensor, dims: tuple[int, ...], keepdim: bool) -> Tensor:
    return x.sum(dims, keepdim, dtype=torch.float32)
