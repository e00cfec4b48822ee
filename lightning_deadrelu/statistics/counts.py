"""From activations to counts, on the device."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_deadrelu.model.layout import Layout
from lightning_deadrelu.model.rectifiers import Rectifier
from lightning_deadrelu.statistics.accumulators import Accumulator, Reductions
from lightning_deadrelu.statistics.redundancy import projection, projection_of_choices, samples_in, silent_samples
from lightning_deadrelu.warn import warn

RELU = Rectifier("relu", plain=True)
_EXACT_IN_FLOAT32 = 2**24
_FEW_POSITIONS = 49
_WIDE = frozenset({torch.float32, torch.float64})


class Counts(NamedTuple):
    """What one call of a rectifier tells about each unit; all but peak and samples may be left out, as None and 0.

    Args:
        fired: Elements above the hinge, shape ``(units,)``, whole numbers.
        magnitude: Sum of the absolute output, shape ``(units,)``.
        peak: Largest input, measured from the hinge, shape ``(units,)``; NaN may hide it.
        trough: Smallest input, measured from the hinge, shape ``(units,)``.
        samples: Rows or images.
        elements: Inputs per unit that sum and count are of.
        blind: Samples on which no unit fires, a whole number without dimensions.
        projection: As :func:`~lightning_deadrelu.statistics.redundancy.projection` tells, shape ``(units,)``.
    """

    fired: Tensor | None
    magnitude: Tensor | None
    peak: Tensor
    trough: Tensor | None
    samples: int | Tensor
    elements: int | Tensor
    blind: Tensor | None = None
    projection: Tensor | None = None

    @property
    def without_rates(self) -> Counts:
        """The same, but neither sums nor elements: of who fired, only that they did."""
        return self._replace(magnitude=None, elements=0, blind=None, projection=None)

    def joined(self, other: Counts) -> Counts:
        """Merge with another call of one site and observation; the peak passes over NaN, the trough keeps it."""
        return Counts(
            _merged(_whole_sum, self.fired, other.fired),
            _merged(_wide_sum, self.magnitude, other.magnitude),
            self.peak.fmax(other.peak),
            _merged(torch.minimum, self.trough, other.trough),
            self.samples + other.samples,
            self.elements + other.elements,
            _merged(_whole_sum, self.blind, other.blind),
            _merged(_wide_sum, self.projection, other.projection),
        )


def _merged(merge: Callable[[Tensor, Tensor], Tensor], one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return (other if one is None else one) if one is None or other is None else merge(one, other)


def _whole_sum(one: Tensor, other: Tensor) -> Tensor:
    return one.long() + other.long()


def _wide_sum(one: Tensor, other: Tensor) -> Tensor:
    """Add with room to spare, so that no bit tells in which order it was done."""
    return one + other if one.device.type == "mps" else one.double() + other


class FlatCounts:
    """The counts of some observations, those of all sites end to end.

    Args:
        layout: All sites.
        observations: The counts of each, by number of the site.
        like: Of the type and on the device of what stands for a site that has none.
    """

    def __init__(self, layout: Layout, observations: Sequence[Mapping[int, Counts]], like: Tensor) -> None:
        self._layout, self._observations, self._like = layout, observations, like

    def of(self, name: str, nothing: float) -> Tensor | None:
        """Lay out one field of :class:`Counts`; counts of different types as int64, which float32 would round.

        Args:
            name: Of the field.
            nothing: What stands where it is missing.

        Returns:
            Shape ``(observations, units)``; None where it is missing everywhere.
        """
        rows = self._rows(name)
        types = {value.dtype for row in rows for value in row if value is not None}
        if not types:
            return None
        if name == "fired" and len(types) > 1:
            rows, types = [[None if v is None else v.long() for v in row] for row in rows], {torch.int64}
        if any(value is None for row in rows for value in row):
            missing = self._like.new_full((self._layout.units,), nothing, dtype=types.pop())
            rows = [self._filled(row, missing) for row in rows]
        return torch.cat([value for row in rows for value in row]).view(len(rows), self._layout.units)

    def _filled(self, row: Sequence[Tensor | None], missing: Tensor) -> list[Tensor]:
        if not any(value is not None for value in row):
            return [missing]
        sizes = [site.units for site in self._layout]
        return [missing[:units] if value is None else value for value, units in zip(row, sizes, strict=True)]

    def of_sites(self, name: str) -> Tensor:
        """Lay out one field that is a number of each site, shape ``(observations, sites)``; 0 where it is missing."""
        zero = self._like.new_zeros((), dtype=torch.int64)
        values = [zero if value is None else value for row in self._rows(name) for value in row]
        return torch.stack(values).view(len(self._observations), len(self._layout))

    def _rows(self, name: str) -> list[list[Any]]:
        sites = range(len(self._layout))
        return [[getattr(calls[n], name) if n in calls else None for n in sites] for calls in self._observations]


def count(
    x: Tensor,
    out: Tensor,
    dims: tuple[int, ...] = (-1,),
    rectifier: Rectifier = RELU,
    valid: Tensor | None = None,
    rates: bool = True,
    redundancy: bool = False,
    room: Accumulator | None = None,
) -> Counts:
    """Reduce one call of a rectifier to a few numbers per unit, on the device and without waiting for it.

    The peak tells who fired, in one read of the input, unless an input is not a number. On a CPU, where it costs
    nothing to look for that, the peak is all that is read without ``rates``. On a GPU one kernel reads everything at
    once, where Triton is installed and the input lies in memory without gaps.

    Args:
        x: The rectifier's input, any shape, not empty.
        out: Its output, of the same shape.
        dims: The dimensions that hold the units, counted from the end.
        rectifier: What it is.
        valid: Boolean, True for data and False for padding, of the shape of ``x`` without the units, or None.
        rates: Whether more is wanted than the peak.
        redundancy: Whether, where rates are wanted, what concerns the whole layer is wanted too.
        room: Where a kernel adds it up; by default in memory of its own.

    Example:
        >>> x = torch.tensor([[1.0, -1.0], [2.0, -3.0]])
        >>> counts = count(x, x.relu())
        >>> counts.fired, counts.peak
        (tensor([2., 0.]), tensor([ 2., -1.]))
    """
    if x.ndim == len(dims):
        x, out, valid = x[None], out[None], None if valid is None else valid[None]
    plan = _planned(x.shape, dims, x.is_cpu, x.stride(dims[-1]) == 1)
    samples, elements = (plan.samples, plan.elements) if valid is None else (samples_in(valid, dims).sum(), valid.sum())
    padding = None if valid is None else ~valid.reshape([1 if n - x.ndim in dims else s for n, s in enumerate(x.shape)])
    fits = runs_kernels(x) and rectifier.plain and not rectifier.hinge
    once = _read_once(x, dims, rectifier.cap, valid, room) if fits else None
    redundancy = redundancy and rates
    if once is not None and not redundancy:
        return Counts(*once, samples, elements)
    highest = x if padding is None else x.masked_fill(padding, -math.inf)
    if not rates and _may_look(x):
        peak = _reduced(Tensor.amax, highest, plan)
        if torch.equal(peak, peak):  # which holds of anything but NaN
            return Counts(None, None, peak - rectifier.hinge if rectifier.hinge else peak, None, samples, 0)
    lowest = x if padding is None else x.masked_fill(padding, math.inf)
    out = out if padding is None else out.masked_fill(padding, 0.0)
    extra = _redundancy(highest, out, dims, rectifier, valid) if redundancy else ()
    if once is not None:
        return Counts(*once, samples, elements, *extra)
    # the output first: it was written last, and may still be in the cache
    fired, magnitude = _fired(highest, out, plan, rectifier), _magnitude(out, plan, rectifier)
    peak, trough = _reduced(Tensor.amax, highest, plan), _reduced(Tensor.amin, lowest, plan)
    if rectifier.hinge:
        peak, trough = peak - rectifier.hinge, trough - rectifier.hinge
    return Counts(fired, magnitude, peak, trough, samples, elements, *extra)


def count_indices(x: Tensor, units: int, valid: Tensor | None = None, redundancy: bool = False) -> Counts:
    """Count how often each unit was chosen, on the device and without waiting for it.

    Args:
        x: Numbers of units, any shape; others than 0 to ``units`` - 1 choose nobody.
        units: How many there are.
        valid: Boolean, True for data and False for padding, of the shape of ``x``, perhaps without its last
            dimension, or None.
        redundancy: Whether what concerns the whole layer is wanted too: what chooses nobody is a silent sample.

    Example:
        >>> counts = count_indices(torch.tensor([0, 2, 2, -1]), 4)
        >>> counts.fired, counts.elements
        (tensor([1, 0, 2, 0]), 4)
    """
    chosen, elements = x.long().flatten(), x.numel()
    chosen = chosen.where((chosen >= 0) & (chosen < units), units)
    if valid is not None:
        shown = valid.view(*valid.shape, *[1] * (x.ndim - valid.ndim)).expand(x.shape).flatten()
        chosen, elements = chosen.where(shown, units + 1), shown.sum()  # type: ignore[assignment]
    fired = chosen.new_zeros(units + 2).scatter_add_(0, chosen, torch.ones_like(chosen))
    fired, silent = fired[:units], fired[units]
    peak, trough = (fired > 0).float(), (fired == elements).float()
    extra = (silent, projection_of_choices(chosen, units + 2)[:units]) if redundancy else ()
    return Counts(fired, fired.float(), peak, trough, elements, elements, *extra)


def _redundancy(
    x: Tensor, out: Tensor, dims: tuple[int, ...], rectifier: Rectifier, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Count the layer's silent samples, and add up what tells multiples."""
    return silent_samples(x, dims, rectifier.hinge, valid), projection(out if rectifier.plain else out.abs(), dims)


def _may_look(x: Tensor) -> bool:
    """Whether to look at a number waits for nothing."""
    return x.is_cpu


def runs_kernels(x: Tensor) -> bool:
    """Tell whether a tensor is where kernels of ours run."""
    return x.is_cuda


class _ReadOnce:
    """The kernel that reads an input once: imported when first needed, and left alone once it has failed."""

    def __init__(self) -> None:
        self._failed = False
        self._reduce: Callable[..., Reductions | None] | None = None

    def __call__(
        self, x: Tensor, dims: tuple[int, ...], cap: float, valid: Tensor | None, room: Accumulator | None
    ) -> Reductions | None:
        if self._failed:
            return None
        try:
            if self._reduce is None:
                from lightning_deadrelu.statistics.triton_counts import reduce_once

                self._reduce = reduce_once
            return self._reduce(x, dims, cap, valid, room)
        except Exception as error:  # Triton is not there, or finds no compiler or driver to work with
            self._failed = True
            if not isinstance(error, ImportError):
                warn(f"Counting on the GPU takes several reads in place of one: {error!r}")
            return None


_read_once = _ReadOnce()


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
def _planned(shape: torch.Size, dims: tuple[int, ...], on_cpu: bool, side_by_side: bool) -> _Plan:
    """Plan once per shape, and whether units lie side by side: for small inputs to plan costs as much as to count."""
    over = tuple(dim for dim in range(-len(shape), 0) if dim not in dims)
    images = tuple(dim for dim in over if dim < min(dims))
    positions = tuple(dim for dim in over if dim > min(dims))
    elements = math.prod(shape[dim] for dim in over)
    samples = elements if -1 in dims else math.prod(shape[dim] for dim in images)
    stages: tuple[tuple[int, ...], ...] = (over,)
    if on_cpu and images and positions:  # several times faster than both at once
        many = math.prod(shape[dim] for dim in positions) > _FEW_POSITIONS
        stages = (positions, images) if many or side_by_side else (images, positions)
    return _Plan(over, stages, samples, elements)


def _reduced(reduction: Callable[..., Tensor], x: Tensor, plan: _Plan) -> Tensor:
    *first, last = plan.stages
    for dims in first:
        x = reduction(x, dims, True)
    x = reduction(x, last, bool(first))
    return x if x.ndim == 1 else x.flatten()


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
        self.numbers = torch.empty(2**20, dtype=torch.float32, device="cpu")  # 4 MiB, which stay in the cache

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
