"""Read some evenly strided entries of a large tensor, and none of the others. Pure."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

_GOLDEN = (math.sqrt(5) - 1) / 2


class Stride(NamedTuple):
    """Evenly strided entries of a tensor of one size.

    Args:
        size: Entries of the tensor.
        entries: How many of them are read.
        step: The distance between them; without a factor in common with the size, so that all columns are met.
    """

    size: int
    entries: int
    step: int


@lru_cache(maxsize=1024)
def stride_of(shape: tuple[int, ...], entries: int) -> Stride:
    """Choose at most so many entries of a tensor that has any.

    Example:
        >>> stride_of((3, 4), 4)
        Stride(size=12, entries=4, step=1)
    """
    size = math.prod(shape)
    if size <= entries:
        return Stride(size, size, 1)
    return Stride(size, entries, coprime(_between_rows(size / entries, size // shape[0]), size))


def _between_rows(stride: float, row: int) -> int:
    """Shorten a stride of more than a row, so that it does not meet every second row alone: by a golden section.

    Example:
        >>> _between_rows(1024, row=512), _between_rows(100, row=512)
        (828, 100)
    """
    rows = stride / row
    if rows < 1:
        return int(stride)
    best = max(
        part for part in (math.floor(rows) - 1 + _GOLDEN, math.floor(rows) + 1 - _GOLDEN, _GOLDEN) if part <= rows
    )
    return max(int(best * row), 1)


@lru_cache(maxsize=1024)
def coprime(stride: int, size: int) -> int:
    """Return the largest number up to ``stride`` that has no factor in common with ``size``.

    Example:
        >>> coprime(16, 4096)
        15
    """
    return next(number for number in range(stride, 0, -1) if math.gcd(number, size) == 1)


def entries_of(x: Tensor, stride: Stride) -> Tensor:
    """Read the chosen entries: a view, unless the tensor does not lie in one piece."""
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return x.as_strided((stride.entries,), (stride.step,))
    return x.reshape(-1)[:: stride.step][: stride.entries]


def subsample(x: Tensor, most: int) -> Tensor:
    """Return evenly strided entries of a tensor, at most so many, without reading the others.

    Example:
        >>> subsample(torch.arange(12).view(3, 4), 3)
        tensor([0, 1, 2])
    """
    return entries_of(x, stride_of(tuple(x.shape), most))
