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
    """An accumulator for each site and observation; those of an observation lie end to end, and are emptied by one copy.

    Example:
        >>> from lightning_deadrelu.model.sites import Site
        >>> accumulators, layout = Accumulators(), Layout((Site("relu", False, "relu", (), 3),))
        >>> [accumulators.lend(layout, 0, 0, torch.device("cpu")) is None for _ in range(2)]
        [False, True]
    """

    def __init__(self) -> None:
        self._lent: dict[int, _Block] = {}  # by observation
        self._free: list[_Block] = []
        self._layout = Layout()

    def lend(self, layout: Layout, site: int, observation: int, device: torch.device) -> Accumulator | None:
        """Lend an accumulator; None if it was lent since all were released, or sites were added meanwhile.

        Args:
            layout: All sites.
            site: Number of the site.
            observation: Number of the observation.
            device: Where the inputs are.
        """
        block = self._lent.get(observation)
        if block is None:
            if layout is not self._layout:
                self._layout, self._free = layout, []
            block = self._free.pop() if self._free else _Block([one.units for one in layout], device)
            self._lent[observation] = block
        return block.each.pop(site, None)

    def release(self, running: int | None = None) -> None:
        """Take back what was lent, of which nobody has more use.

        Args:
            running: The observation of a batch that has not come to its end, for which what was lent stays so.
        """
        held = self._lent.pop(running, None) if running is not None else None
        for block in self._lent.values():
            block.empty()
        self._free += self._lent.values()
        self._lent = {}
        if held is not None and running is not None:
            self._lent[running] = held


class _Block:
    """The accumulators of an observation, by number of the site."""

    def __init__(self, sizes: Sequence[int], device: torch.device) -> None:
        self._bits = _empty(sum(sizes), device)
        self._all = dict(enumerate(map(_accumulator, self._bits.split(list(sizes), 1))))
        self.each = self._all.copy()
        """Those that are not lent."""

    def empty(self) -> None:
        """Forget what was added up."""
        self._bits.copy_(_nothing(self._bits.device))
        self.each = self._all.copy()


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
