"""Count one call of a rectifier in one read of its input: a Triton kernel, used on CUDA where Triton is installed.

Eager reductions read the input and the output several times. Everything that is counted follows from the input alone
where the output is ``max(input, 0)``, at most clipped.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
_TILE = 1024  # elements that a program reads at a time; this and the next as they were fastest on an H200
_COLUMNS = 128  # of a tile, where neighbours in memory are units
_PROGRAMS, _PROGRAMS_OF_CHANNELS = 1024, 4096  # about as many: each reads some tiles before it adds to the sums of all


class Reductions(NamedTuple):
    """What one read tells of each unit; shapes ``(units,)``.

    Args:
        fired: Elements above zero, int32.
        magnitude: Sum of the output, float32; NaN if an input is.
        peak: Largest input, float32; NaN if an input is.
        trough: Smallest input, float32; NaN if an input is.
    """

    fired: Tensor
    magnitude: Tensor
    peak: Tensor
    trough: Tensor


def reduce_once(
    x: Tensor, dims: tuple[int, ...] = (-1,), cap: float = math.inf, valid: Tensor | None = None
) -> Reductions | None:
    """Reduce the input of a rectifier to what :func:`~lightning_deadrelu.statistics.count` needs, in one read.

    Args:
        x: The input, any shape, not empty.
        dims: The dimensions that hold the units, counted from the end.
        cap: Where the output is clipped; infinity for none.
        valid: Boolean, True for data and False for padding, of the shape of ``x`` without the unit dimension, or None.

    Returns:
        None where the memory of ``x`` is laid out in another way than in rows of units or blocks of channels.
    """
    layout = _layout_of(x, dims) if x.dtype in _DTYPES else None
    if layout is None or (valid is not None and dims != (-1,)):
        return None
    mask = None if valid is None else valid.reshape(-1).contiguous()
    with torch.cuda.device_of(x):  # Triton launches on the current device
        sums = _nothing(layout.units, x.device).clone()
        _launch(x, layout, mask, cap, sums)
    peak, depth, magnitude, _ = sums.view(torch.float32)
    return Reductions(sums[3], magnitude, peak, -depth)


class _Layout(NamedTuple):
    """How units lie in memory: ``outer`` blocks of ``units`` stretches of ``inner`` neighbouring elements."""

    outer: int
    units: int
    inner: int


def _layout_of(x: Tensor, dims: tuple[int, ...]) -> _Layout | None:
    """Tell the layout; None where there are gaps, or the dimensions do not lie next to each other."""
    strides = x.stride()
    order = sorted(range(x.ndim), key=lambda dim: (-strides[dim], dim))
    if not x.permute(order).is_contiguous():
        return None
    at = sorted(order.index(dim % x.ndim) for dim in dims)
    if at != list(range(at[0], at[0] + len(at))) or [order[i] for i in at] != sorted(dim % x.ndim for dim in dims):
        return None
    sizes = [x.shape[dim] for dim in order]
    return _Layout(math.prod(sizes[: at[0]]), math.prod(sizes[at[0] : at[-1] + 1]), math.prod(sizes[at[-1] + 1 :]))


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _nothing(units: int, device: torch.device) -> Tensor:
    """Return what is copied before a read: the bits of highest, of lowest with its sign turned, of sum, and a count."""
    sums = torch.zeros(4, units, dtype=torch.int32, device=device)
    sums[:2].view(torch.float32).fill_(-math.inf)
    return sums


def _launch(x: Tensor, layout: _Layout, mask: Tensor | None, cap: float, sums: Tensor) -> None:
    outer, units, inner = layout
    if inner == 1:
        rows, across = _TILE // _COLUMNS, triton.cdiv(units, _COLUMNS)
        tiles = triton.cdiv(outer, rows)
        splits = max(1, min(tiles, _PROGRAMS // across))
        _reduce_rows[(across, splits)](
            x, mask if mask is not None else x, sums, outer, units, cap, triton.cdiv(tiles, splits),
            MASKED=mask is not None, ROWS=rows, COLUMNS=_COLUMNS,
        )  # fmt: skip
        return
    columns = min(triton.next_power_of_2(inner), _TILE)
    rows, across = _TILE // columns, triton.cdiv(inner, columns)
    tiles = triton.cdiv(outer, rows) * across
    splits = max(1, min(tiles, triton.cdiv(_PROGRAMS_OF_CHANNELS, units)))
    _reduce_channels[(units, splits)](
        x, sums, outer, units, inner, cap, across, triton.cdiv(tiles, splits), ROWS=rows, COLUMNS=columns
    )


@triton.jit
def _reduce_rows(
    x, mask, sums, rows, units, cap, tiles, MASKED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    peak = tl.full((ROWS, COLUMNS), float("-inf"), tl.float32)
    depth = tl.full((ROWS, COLUMNS), float("-inf"), tl.float32)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    fired = tl.zeros((ROWS, COLUMNS), tl.int32)
    first = tl.program_id(1).to(tl.int64) * tiles * ROWS
    for tile in range(tiles):
        row = first + tile * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < units)[None, :]
        if MASKED:
            inside = inside & (tl.load(mask + row, row < rows, other=0) != 0)[:, None]
        value = tl.load(x + row[:, None] * units + column[None, :], inside, other=0).to(tl.float32)
        peak, depth, total, fired = _take(value, inside, cap, peak, depth, total, fired)
    _add(sums, units, column, column < units, tl.max(peak, 0), tl.max(depth, 0), tl.sum(total, 0), tl.sum(fired, 0))


@triton.jit
def _reduce_channels(x, sums, outer, units, inner, cap, across, tiles, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    unit = tl.program_id(0)
    peak = tl.full((ROWS, COLUMNS), float("-inf"), tl.float32)
    depth = tl.full((ROWS, COLUMNS), float("-inf"), tl.float32)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    fired = tl.zeros((ROWS, COLUMNS), tl.int32)
    for tile in range(tiles):
        number = tl.program_id(1) * tiles + tile  # divided as a whole: dividing element by element takes longest
        row = (number // across) * ROWS + tl.arange(0, ROWS)
        column = (number % across) * COLUMNS + tl.arange(0, COLUMNS)
        inside = (row < outer)[:, None] & (column < inner)[None, :]
        stretch = x + (row.to(tl.int64) * units + unit) * inner
        value = tl.load(stretch[:, None] + column[None, :], inside, other=0).to(tl.float32)
        peak, depth, total, fired = _take(value, inside, cap, peak, depth, total, fired)
    highest, lowest = tl.max(tl.max(peak, 1), 0), tl.max(tl.max(depth, 1), 0)
    _add(sums, units, unit, unit < units, highest, lowest, tl.sum(tl.sum(total, 1), 0), tl.sum(tl.sum(fired, 1), 0))


@triton.jit
def _take(value, inside, cap, peak, depth, total, fired):
    """Take a tile in; what is not a number shows in the sum alone, and nothing else makes a sum of outputs one."""
    peak = tl.maximum(peak, tl.where(inside, value, float("-inf")))
    depth = tl.maximum(depth, tl.where(inside, -value, float("-inf")))
    total += tl.where(value != value, value, tl.minimum(tl.maximum(value, 0.0), cap))
    fired += (value > 0).to(tl.int32)
    return peak, depth, total, fired


@triton.jit
def _add(sums, units, unit, known, peak, depth, total, fired):
    missing = total != total
    _raise(sums + unit, tl.where(missing, float("nan"), peak), known)
    _raise(sums + units + unit, tl.where(missing, float("nan"), depth), known)
    tl.atomic_add((sums + 2 * units + unit).to(tl.pointer_type(tl.float32), bitcast=True), total, known)
    tl.atomic_add(sums + 3 * units + unit, fired, known)


@triton.jit
def _raise(place, value, known):
    """Raise a float by its bits: as whole numbers they are ordered alike above zero, in reverse below; NaN is above."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)  # -0.0 becomes 0.0, which has the order's lowest bits above zero
    below = value < 0
    tl.atomic_max(place, bits, known & (below == 0))
    tl.atomic_min(place.to(tl.pointer_type(tl.uint32), bitcast=True), bits.to(tl.uint32, bitcast=True), known & below)
