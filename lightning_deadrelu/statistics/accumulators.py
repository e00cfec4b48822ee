"""Room on a GPU for what one read of each layer's input adds up, laid out once for many observations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_deadrelu.model.layout import Layout

_FLOATS = 3  # of the four rows: all but the count


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


class Accumulator(NamedTuple):
    """Where a read of one input is added up.

    Args:
        bits: Of peak, trough and magnitude as float32, and the count; int32, shape ``(4, units)``, its last dimension
            without gaps.
        reductions: The same as numbers, in the same memory.
    """

    bits: Tensor
    reductions: Reductions


class Accumulators:
    """An accumulator for each site and observation; those of one observation lie end to end.

    Example:
        >>> from lightning_deadrelu.model.sites import Site
        >>> accumulators, layout = Accumulators(), Layout((Site("relu", False, "relu", (), 3),))
        >>> accumulators.lend(layout, 0, 0, torch.ones(2, 3)).reductions.peak
        tensor([-inf, -inf, -inf])
        >>> accumulators.lend(layout, 0, 0, torch.ones(2, 3)) is None
        True
    """

    def __init__(self) -> None:
        self._lent: dict[int, _Block] = {}  # by observation
        self._free: list[_Block] = []
        self._layout = Layout()

    def lend(self, layout: Layout, site: int, observation: int, x: Tensor) -> Accumulator | None:
        """Lend an accumulator; None if it was lent since all were released, or sites were added.

        Args:
            layout: All sites.
            site: Number of the site.
            observation: Number of the observation.
            x: The input that is to be read.
        """
        block = self._lent.get(observation)
        if block is None:
            if layout is not self._layout:
                self._layout, self._free = layout, []
            block = self._free.pop() if self._free else _Block([one.units for one in layout], x.device)
            self._lent[observation] = block
        if site in block.lent or site >= len(block.each):
            return None
        block.lent.add(site)
        return block.each[site]

    def release(self, *, reuse: bool) -> None:
        """Forget what was lent.

        Args:
            reuse: Whether nobody needs any more what was added up there.
        """
        for block in self._lent.values():
            if reuse and len(block.each) == len(self._layout):
                block.empty()
                self._free.append(block)
        self._lent = {}


class _Block:
    """The accumulators of one observation."""

    def __init__(self, sizes: Sequence[int], device: torch.device) -> None:
        self._bits = _empty(sum(sizes), device)
        self.each = [_accumulator(bits) for bits in self._bits.split(list(sizes), 1)]
        """By number of the site."""
        self.lent: set[int] = set()
        """Numbers of the sites whose accumulator is lent."""

    def empty(self) -> None:
        """Forget what was added up."""
        self._bits.copy_(_nothing(self._bits.device))
        self.lent.clear()


def fresh(units: int, device: torch.device) -> Accumulator:
    """Make an accumulator of its own, for a call that is alone.

    Example:
        >>> fresh(2, torch.device("cpu")).reductions.fired
        tensor([0, 0], dtype=torch.int32)
    """
    return _accumulator(_empty(units, device))


@torch.inference_mode(False)  # what is added up in place later may be no inference tensor
def _empty(units: int, device: torch.device) -> Tensor:
    return _nothing(device).repeat(1, units)


@lru_cache
@torch.inference_mode(False)
def _nothing(device: torch.device) -> Tensor:
    """Return what stands in accumulators before anything is added, shape ``(4, 1)``."""
    return torch.tensor([[-math.inf], [math.inf], [0.0], [0.0]], device=device).view(torch.int32)


def _accumulator(bits: Tensor) -> Accumulator:
    peak, trough, magnitude = bits[:_FLOATS].view(torch.float32)
    return Accumulator(bits, Reductions(bits[_FLOATS], magnitude, peak, trough))
