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

from lightning_deadrelu.statistics.accumulators import Accumulator, Reductions, fresh

_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
_TILE = 1024  # elements that a program reads at a time; this and the next as they were fastest on an H200
_COLUMNS = 128  # of a tile, where neighbours in memory are units
_PROGRAMS, _PROGRAMS_OF_CHANNELS = 1024, 4096  # about as many: each reads some tiles before it adds to the sums of all


def reduce_once(
    x: Tensor,
    dims: tuple[int, ...] = (-1,),
    cap: float = math.inf,
    valid: Tensor | None = None,
    room: Accumulator | None = None,
) -> Reductions | None:
    """Reduce the input of a rectifier to what :func:`~lightning_deadrelu.statistics.count` needs, in one read.

    Args:
        x: The input, any shape, not empty.
        dims: The dimensions that hold the units, counted from the end.
        cap: Where the output is clipped; infinity for none.
        valid: Boolean, True for data and False for padding, of the shape of ``x`` without the unit dimension, or None.
        room: Where to add it up; by default in one of its own.

    Returns:
        None where the memory of ``x`` is laid out in another way than in rows of units or blocks of channels.
    """
    layout = _layout_of(x.shape, x.stride(), dims) if x.dtype in _DTYPES else None
    if layout is None or (valid is not None and dims != (-1,)):
        return None
    if room is None or room.bits.device != x.device:
        room = fresh(layout.units, x.device)
    mask = None if valid is None else valid.reshape(-1).contiguous()
    if x.is_cuda and x.get_device() != torch.cuda.current_device():  # on which Triton launches
        with torch.cuda.device_of(x):
            _launch(x, layout, mask, cap, room.bits)
    else:
        _launch(x, layout, mask, cap, room.bits)
    return room.reductions


class _Layout(NamedTuple):
    """How units lie in memory: ``outer`` blocks of ``units`` stretches of ``inner`` neighbouring elements."""

    outer: int
    units: int
    inner: int


@lru_cache(maxsize=1024)
def _layout_of(shape: torch.Size, strides: tuple[int, ...], dims: tuple[int, ...]) -> _Layout | None:
    """Tell the layout; None where there are gaps, or the dimensions do not lie next to each other."""
    ndim, expected = len(shape), 1
    order = sorted(range(ndim), key=lambda dim: (-strides[dim], dim))
    for dim in reversed(order):
        if shape[dim] != 1 and strides[dim] != expected:
            return None
        expected *= shape[dim]
    at = sorted(order.index(dim % ndim) for dim in dims)
    if at != list(range(at[0], at[0] + len(at))) or [order[i] for i in at] != sorted(dim % ndim for dim in dims):
        return None
    sizes = [shape[dim] for dim in order]
    return _Layout(math.prod(sizes[: at[0]]), math.prod(sizes[at[0] : at[-1] + 1]), math.prod(sizes[at[-1] + 1 :]))


def _launch(x: Tensor, layout: _Layout, mask: Tensor | None, cap: float, bits: Tensor) -> None:
    outer, units, inner = layout
    pitch = bits.stride(0)
    if inner == 1:
        rows, across = _TILE // _COLUMNS, triton.cdiv(units, _COLUMNS)
        tiles = triton.cdiv(outer, rows)
        splits = max(1, min(tiles, _PROGRAMS // across))
        _reduce_rows[(across, splits)](
            x, mask if mask is not None else x, bits, pitch, outer, units, cap, triton.cdiv(tiles, splits),
            MASKED=mask is not None, ROWS=rows, COLUMNS=_COLUMNS,
        )  # fmt: skip
        return
    columns = min(triton.next_power_of_2(inner), _TILE)
    rows, across = _TILE // columns, triton.cdiv(inner, columns)
    tiles = triton.cdiv(outer, rows) * across
    splits = max(1, min(tiles, triton.cdiv(_PROGRAMS_OF_CHANNELS, units)))
    _reduce_channels[(units, splits)](
        x, bits, pitch, outer, units, inner, cap, across, triton.cdiv(tiles, splits), ROWS=rows, COLUMNS=columns
    )


@triton.jit
def _reduce_rows(
    x, mask, bits, pitch, rows, units, cap, tiles, MASKED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    peak = tl.full((ROWS, COLUMNS), float("-inf"), tl.float32)
    trough = tl.full((ROWS, COLUMNS), float("inf"), tl.float32)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    fired = tl.zeros((ROWS, COLUMNS), tl.int32)
    first = tl.program_id(1).to(tl.int64) * tiles * ROWS
    for tile in range(tiles):
        row = first + tile * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < units)[None, :]
        if MASKED:
            inside = inside & (tl.load(mask + row, row < rows, other=0) != 0)[:, None]
        value = tl.load(x + row[:, None] * units + column[None, :], inside, other=0).to(tl.float32)
        peak, trough, total, fired = _take(value, inside, cap, peak, trough, total, fired)
    known = column < units
    _add(bits + column, pitch, known, tl.max(peak, 0), tl.min(trough, 0), tl.sum(total, 0), tl.sum(fired, 0))


@triton.jit
def _reduce_channels(
    x, bits, pitch, outer, units, inner, cap, across, tiles, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    unit = tl.program_id(0)
    peak = tl.full((ROWS, COLUMNS), float("-inf"), tl.float32)
    trough = tl.full((ROWS, COLUMNS), float("inf"), tl.float32)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    fired = tl.zeros((ROWS, COLUMNS), tl.int32)
    for tile in range(tiles):
        number = tl.program_id(1) * tiles + tile  # divided as a whole: dividing element by element takes longest
        row = (number // across) * ROWS + tl.arange(0, ROWS)
        column = (number % across) * COLUMNS + tl.arange(0, COLUMNS)
        inside = (row < outer)[:, None] & (column < inner)[None, :]
        stretch = x + (row.to(tl.int64) * units + unit) * inner
        value = tl.load(stretch[:, None] + column[None, :], inside, other=0).to(tl.float32)
        peak, trough, total, fired = _take(value, inside, cap, peak, trough, total, fired)
    highest, lowest = tl.max(tl.max(peak, 1), 0), tl.min(tl.min(trough, 1), 0)
    sums = tl.sum(tl.sum(total, 1), 0), tl.sum(tl.sum(fired, 1), 0)
    _add(bits + unit, pitch, unit < units, highest, lowest, sums[0], sums[1])


@triton.jit
def _take(value, inside, cap, peak, trough, total, fired):
    """Take a tile in; what is not a number shows in the sum alone, and nothing else makes a sum of outputs one."""
    peak = tl.maximum(peak, tl.where(inside, value, float("-inf")))
    trough = tl.minimum(trough, tl.where(inside, value, float("inf")))
    total += tl.where(value != value, value, tl.minimum(tl.maximum(value, 0.0), cap))
    fired += (value > 0).to(tl.int32)
    return peak, trough, total, fired


@triton.jit
def _add(place, pitch, known, peak, trough, total, fired):
    missing = total != total
    _raise(place, tl.where(missing, float("nan"), peak), known)
    _lower(place + pitch, tl.where(missing, float("nan"), trough), known)
    tl.atomic_add((place + 2 * pitch).to(tl.pointer_type(tl.float32), bitcast=True), total, known)
    tl.atomic_add(place + 3 * pitch, fired, known)


# Floats are compared by their bits: as whole numbers they are ordered alike above zero, in reverse below, and NaN is
# beyond infinity. -0.0 is made 0.0 first, which has the order's lowest bits above zero.


@triton.jit
def _raise(place, value, known):
    bits = (value + 0.0).to(tl.int32, bitcast=True)
    below = value < 0
    tl.atomic_max(place, bits, known & (below == 0))
    tl.atomic_min(place.to(tl.pointer_type(tl.uint32), bitcast=True), bits.to(tl.uint32, bitcast=True), known & below)


@triton.jit
def _lower(place, value, known):
    bits = (value + 0.0).to(tl.int32, bitcast=True)
    bits = tl.where(value != value, -1, bits)  # a NaN with a sign is below minus infinity
    below = bits < 0
    tl.atomic_min(place, bits, known & (below == 0))
    tl.atomic_max(place.to(tl.pointer_type(tl.uint32), bitcast=True), bits.to(tl.uint32, bitcast=True), known & below)
