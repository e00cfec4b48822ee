"""Read some evenly strided entries of a large tensor, and none of the others. Pure."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

_GOLDEN = (math.sqrt(5) - 1) / 2


class Cut(NamedTuple):
    """Some evenly strided entries.

    Args:
        number: How many.
        stride: Without a common factor with the size, so that all columns of a matrix are met.
        layout: The strides of a tensor that lies in one piece; empty for any other.
    """

    number: int
    stride: int
    layout: tuple[int, ...]


def cut_of(gradient: Tensor, entries: int) -> Cut | None:
    """Choose so many entries of a tensor; None where there are no more."""
    size = gradient.numel()
    if size <= entries:
        return None
    stride = coprime(_between_rows(size / entries, size // len(gradient)), size)
    return Cut(entries, stride, gradient.stride() if is_dense(gradient) else ())


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


def coprime(stride: int, size: int) -> int:
    """Return the largest number up to ``stride`` that has no factor in common with ``size``.

    Example:
        >>> coprime(16, 4096)
        15
    """
    return next(number for number in range(stride, 0, -1) if math.gcd(number, size) == 1)


def is_dense(gradient: Tensor) -> bool:
    """Whether a tensor lies in one piece."""
    last = gradient.ndim == 4 and gradient.is_contiguous(memory_format=torch.channels_last)
    return last or gradient.is_contiguous()


def entries_of(gradient: Tensor, cut: Cut | None) -> Tensor:
    """Read the entries chosen, of a tensor of that size."""
    if cut is None:
        return gradient.reshape(-1)
    if gradient.stride() != cut.layout:
        return gradient.reshape(-1)[:: cut.stride][: cut.number]
    return gradient.as_strided((cut.number,), (cut.stride,))


def spread(x: Tensor, most: int) -> Tensor:
    """Return evenly strided entries of a tensor, at most so many, without reading the others.

    Args:
        x: Any shape.
        most: How many.

    Example:
        >>> spread(torch.arange(12).view(3, 4), 3)
        tensor([0, 1, 2])
    """
    return entries_of(x, cut_of(x, most))
