"""Samples on which a whole layer is silent, and units that say the same as another."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

_FIRST, _SECOND = 0x9E3779B1, 0x85EBCA77  # odd factors that spread bits, as those of common hash functions
_LOW = 2**32 - 1
_FEW = 4096  # weights that are kept
_SAME = 2.0**-16  # relative; sums in single precision are closer
_FEWEST = 2  # elements on which a unit has to fire: any two that fire once each are proportional


def silent_samples(x: Tensor, dims: tuple[int, ...], hinge: float = 0.0, valid: Tensor | None = None) -> Tensor:
    """Count the samples on which no unit of a layer fires, a whole number without dimensions.

    Args:
        x: A rectifier's input, with at least one dimension that holds no units. What is not a number is not silent.
        dims: The dimensions that hold the units, counted from the end.
        hinge: What an input has to exceed to fire.
        valid: Boolean, True for data and False for padding, of the shape of ``x`` without the units, or None.

    Example:
        >>> silent_samples(torch.tensor([[1.0, -1.0], [-2.0, -3.0], [0.0, -1.0]]), (-1,))
        tensor(2)
    """
    whole = tuple(dim for dim in range(-x.ndim, 0) if dim in dims or (-1 not in dims and dim > min(dims)))
    silent = x.amax(whole) <= hinge
    if valid is not None:
        silent = silent & samples_in(valid, dims)
    return silent.sum()


def samples_in(valid: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Tell which samples hold data: rows where the last dimension holds units, else images.

    Args:
        valid: Boolean, True for data and False for padding, of the shape of an input without the units.
        dims: The dimensions of the input that hold the units, counted from the end.
    """
    positions = 0 if -1 in dims else -min(dims) - len(dims)
    return valid.flatten(valid.ndim - positions).any(-1) if positions else valid


def projection(out: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Add up each unit's output with weights that differ from element to element, shape ``(units,)``.

    Beside the plain sum it tells a unit from all that are no multiple of it, whatever the order of their outputs.

    Args:
        out: A rectifier's output, with at least one dimension that holds no units; 0 where there is padding.
        dims: The dimensions that hold the units, counted from the end.

    Example:
        >>> low, high, mirrored = projection(torch.tensor([[1.0, 2.0, 3.0], [3.0, 6.0, 1.0]]), (-1,)).tolist()
        >>> round(high / low, 4), mirrored == low
        (2.0, False)
    """
    out = out if out.dtype == torch.float64 else out.float()
    before, units = out.ndim + min(dims), [dim % out.ndim for dim in dims]
    for dim in reversed(range(before, out.ndim)):
        if dim not in units:
            out = out.movedim(dim, -1) @ _weights(out.shape[dim], out)
    rows = out.flatten(0, before - 1) if before else out[None]
    return rows.flatten(1).T.mv(_weights(rows.shape[0], rows))  # `len` would tie compiled code to one size


def projection_of_choices(chosen: Tensor, units: int) -> Tensor:
    """Add up the weights of the elements that choose each unit, shape ``(units,)``.

    Args:
        chosen: The number of the unit that each element chooses, one dimension.
        units: How many there are.

    Example:
        >>> first, second, nobody = projection_of_choices(torch.tensor([0, 1, 1, 0]), 3).tolist()
        >>> first != second, nobody
        (True, 0.0)
    """
    weights = _weights(len(chosen), chosen.new_empty(0, dtype=torch.float32))
    return weights.new_zeros(units).scatter_add_(0, chosen, weights)


def _weights(number: int, like: Tensor) -> Tensor:
    """Spread numbers from 0.5 to 1.5; few are kept, since making them takes more calls than using them."""
    if type(like) is Tensor and number <= _FEW:  # a compiler's stand-ins must not be kept
        return _kept_weights(number, like.device, like.dtype)
    return _spread(number, like.device, like.dtype)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _kept_weights(number: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return _spread(number, device, dtype)


def _spread(number: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Hash the places: of multiples of one number, the first and fourth would weigh what second and third do."""
    mixed = (torch.arange(1, number + 1, device=device) * _FIRST) & _LOW
    mixed = ((mixed ^ (mixed >> 15)) * _SECOND) & _LOW
    return (mixed ^ (mixed >> 13)).to(dtype) / 2**32 + 0.5


def duplicates(fired: Tensor, size: Tensor, projected: Tensor, peak: Tensor) -> Tensor:
    """Tell whose output is a multiple of that of a unit before, boolean, shape ``(units,)``.

    Such units fire on the same elements, and their sums, weighted sums and peaks are in one proportion.

    Args:
        fired: Elements on which each unit fired, shape ``(units,)``.
        size: Sum of each unit's output, in any scale, shape ``(units,)``.
        projected: As :func:`projection` adds it up, shape ``(units,)``.
        peak: Each unit's largest output, shape ``(units,)``.

    Example:
        >>> out = torch.tensor([[1.0, 2.0, 3.0], [3.0, 6.0, 1.0]])
        >>> duplicates((out > 0).sum(0), out.sum(0), projection(out, (-1,)), out.amax(0))
        tensor([False,  True, False])
    """
    told = (fired >= _FEWEST) & (size > 0) & size.isfinite() & projected.isfinite() & peak.isfinite()
    places = told.nonzero().flatten()
    hits, slant, top = (value[places].double() for value in (fired, projected / size, peak / size))
    order = torch.argsort(slant, stable=True)
    order = order[torch.argsort(hits[order], stable=True)]
    same = hits[order].diff() == 0
    for ratio in (slant[order], top[order]):
        same &= ratio.diff().abs() <= _SAME * ratio[1:].abs()
    groups = torch.cat([same.new_zeros(1)[: len(order)], same]).logical_not().cumsum(0)
    first = torch.full((len(order) + 1,), len(told), dtype=torch.int64).scatter_reduce(0, groups, places[order], "amin")
    found = torch.zeros_like(told)
    found[places[order]] = places[order] > first[groups]
    return found
