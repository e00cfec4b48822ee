"""Count one call of a rectifier in one read of its input: a Triton kernel, used on CUDA where Triton is installed.

Eager reductions read the input and the output several times. Everything that is counted follows from the input alone
where the output is ``max(input, 0)``, at most clipped.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
_ROWS, _COLUMNS = 16, 128  # of a tile
_PROGRAMS = 1024  # at most, so that each reads many tiles before it adds to the sums of all


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
    floats, whole = _empty_sums(layout.units, x.device)
    mask = None if valid is None else valid.reshape(-1).contiguous()
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _launch(x, layout, mask, cap, floats, whole)
    missing = whole[1] > 0
    peak, trough = torch.where(missing, math.nan, floats[0]), torch.where(missing, math.nan, -floats[1])
    return Reductions(whole[0], floats[2], peak, trough)


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


def _empty_sums(units: int, device: torch.device) -> tuple[Tensor, Tensor]:
    floats = torch.full((3, units), -math.inf, device=device)
    floats[2] = 0
    return floats, torch.zeros(2, units, dtype=torch.int32, device=device)


def _launch(x: Tensor, layout: _Layout, mask: Tensor | None, cap: float, floats: Tensor, whole: Tensor) -> None:
    outer, units, inner = layout
    if inner == 1:
        across = triton.cdiv(units, _COLUMNS)
        tiles = triton.cdiv(outer, _ROWS)
        splits = max(1, min(tiles, _PROGRAMS // across))
        _reduce_rows[(across, splits)](
            x, mask if mask is not None else x, floats, whole, outer, units, cap, triton.cdiv(tiles, splits),
            MASKED=mask is not None, ROWS=_ROWS, COLUMNS=_COLUMNS,
        )  # fmt: skip
        return
    block = _ROWS * _COLUMNS
    tiles = triton.cdiv(outer * inner, block)
    splits = max(1, min(tiles, triton.cdiv(_PROGRAMS, units)))
    _reduce_channels[(units, splits)](
        x, floats, whole, outer, units, inner, cap, triton.cdiv(tiles, splits), BLOCK=block
    )


@triton.jit
def _reduce_rows(
    x, mask, floats, whole, rows, units, cap, tiles,
    MASKED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    peak = tl.full((ROWS, COLUMNS), float("-inf"), tl.float32)
    depth = tl.full((ROWS, COLUMNS), float("-inf"), tl.float32)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    fired = tl.zeros((ROWS, COLUMNS), tl.int32)
    missing = tl.zeros((ROWS, COLUMNS), tl.int32)
    first = tl.program_id(1).to(tl.int64) * tiles * ROWS
    for tile in range(tiles):
        row = first + tile * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < units)[None, :]
        if MASKED:
            inside = inside & (tl.load(mask + row, row < rows, other=0) != 0)[:, None]
        value = tl.load(x + row[:, None] * units + column[None, :], inside, other=0).to(tl.float32)
        absent = value != value
        counted = inside & (absent == 0)
        peak = tl.maximum(peak, tl.where(counted, value, float("-inf")))
        depth = tl.maximum(depth, tl.where(counted, -value, float("-inf")))
        total += tl.where(absent, value, tl.minimum(tl.maximum(value, 0.0), cap))
        fired += (value > 0).to(tl.int32)
        missing += absent.to(tl.int32)
    known = column < units
    tl.atomic_max(floats + column, tl.max(peak, 0), known)
    tl.atomic_max(floats + units + column, tl.max(depth, 0), known)
    tl.atomic_add(floats + 2 * units + column, tl.sum(total, 0), known)
    tl.atomic_add(whole + column, tl.sum(fired, 0), known)
    tl.atomic_add(whole + units + column, tl.sum(missing, 0), known)


@triton.jit
def _reduce_channels(x, floats, whole, outer, units, inner, cap, tiles, BLOCK: tl.constexpr):
    unit = tl.program_id(0)
    peak = tl.full((BLOCK,), float("-inf"), tl.float32)
    depth = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    fired = tl.zeros((BLOCK,), tl.int32)
    missing = tl.zeros((BLOCK,), tl.int32)
    first = tl.program_id(1).to(tl.int64) * tiles * BLOCK
    for tile in range(tiles):
        number = first + tile * BLOCK + tl.arange(0, BLOCK)
        inside = number < outer * inner
        place = (number // inner) * units * inner + unit * inner + number % inner
        value = tl.load(x + place, inside, other=0).to(tl.float32)
        absent = value != value
        counted = inside & (absent == 0)
        peak = tl.maximum(peak, tl.where(counted, value, float("-inf")))
        depth = tl.maximum(depth, tl.where(counted, -value, float("-inf")))
        total += tl.where(absent, value, tl.minimum(tl.maximum(value, 0.0), cap))
        fired += (value > 0).to(tl.int32)
        missing += absent.to(tl.int32)
    tl.atomic_max(floats + unit, tl.max(peak, 0))
    tl.atomic_max(floats + units + unit, tl.max(depth, 0))
    tl.atomic_add(floats + 2 * units + unit, tl.sum(total, 0))
    tl.atomic_add(whole + unit, tl.sum(fired, 0))
    tl.atomic_add(whole + units + unit, tl.sum(missing, 0))
