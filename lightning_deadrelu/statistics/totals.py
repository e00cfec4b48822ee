"""The counts of one window, and what is kept of each unit from one window to the next."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from lightning_deadrelu.model.layout import Layout

FINITE, INFINITE, NAN = 0, 1, 2
"""What :attr:`Totals.nonfinite` holds."""
NOTHING = {
    "peak": -math.inf,
    "last_fired": -1.0,
    "nonfinite": FINITE,
    "latest_peak": -math.inf,
    "latest_depth": -math.inf,
    "proved": -1.0,
    "moved": 0.0,
}
"""The rows of :attr:`Totals.maxima` by name, in order, and what each holds before anything was counted."""
_ROWS = {name: number for number, name in enumerate(NOTHING)}
_SUMS = ("fired", "samples", "elements", "blind", "magnitude", "projection")
_AT_THE_CAP = 1 - 1e-4  # of a mean output, which is rounded


@dataclass(frozen=True, eq=False)
class Totals:
    """The counts of one window; see :class:`UnitLiveness`.

    Args:
        fired: Elements that fired, of those below, shape ``(units,)``, int64; merges by sum.
        samples: Samples by site and observation, shape ``(sites, window)``, int64; merges by sum.
        elements: Elements per unit by site and observation, shape ``(sites, window)``, int64; merges by sum. They are
            0 where the peaks alone were read.
        blind: Samples of these on which no unit of the site fired, shape ``(sites, window)``, int64; merges by sum.
        magnitude: Sum of the absolute output of these elements, shape ``(units,)``; merges by sum.
        projection: The same, each element with a weight of its own, shape ``(units,)``, or ``(0,)`` where nobody asks
            for what concerns whole layers; merges by sum.
        maxima: What merges by maximum, shape ``(7, units)``; the properties below name its rows.
    """

    fired: Tensor
    samples: Tensor
    elements: Tensor
    blind: Tensor
    magnitude: Tensor
    projection: Tensor
    maxima: Tensor

    @property
    def peak(self) -> Tensor:
        """Largest input, measured from the hinge."""
        return self._row("peak")

    @property
    def last_fired(self) -> Tensor:
        """Number of the last observation in which the unit fired; -1 if it did in none."""
        return self._row("last_fired")

    @property
    def nonfinite(self) -> Tensor:
        """0 where all inputs were finite, 1 where one was infinite, 2 where one was not a number."""
        return self._row("nonfinite")

    @property
    def latest_peak(self) -> Tensor:
        """Largest input of the last observation that has elements, measured from the hinge."""
        return self._row("latest_peak")

    @property
    def latest_depth(self) -> Tensor:
        """Smallest input of the last observation that has elements, from the hinge, with the sign changed."""
        return self._row("latest_depth")

    @property
    def proved(self) -> Tensor:
        """Observations begun when a gradient last proved that the unit fired; -1 if none did."""
        return self._row("proved")

    @property
    def moved(self) -> Tensor:
        """1 where there was a gradient in a batch that was observed."""
        return self._row("moved")

    def _row(self, name: str) -> Tensor:
        return self.maxima[_ROWS[name]]

    @property
    def blind_share(self) -> list[float | None]:
        """Share of the samples whose rates were read on which no unit fired, for each site; None where none was."""
        rated = (self.samples * (self.elements > 0)).sum(1)
        return [
            silent / samples if samples else None
            for silent, samples in zip(self.blind.sum(1).tolist(), rated.tolist(), strict=True)
        ]

    def constant(self, layout: Layout) -> Tensor:
        """Tell whose output was the same for all inputs of one observation, boolean, shape ``(units,)``.

        It is the last of the window, or the first where that is still to come.

        It takes two elements or more, of all ranks together. The outputs of a unit at its cap are all the same; few
        inputs may meet there by chance, so that such a unit has to have been at the cap throughout the window.

        Args:
            layout: The layout of the counts, which are on the CPU.
        """
        numbers = torch.arange(self.elements.shape[1])
        ran = torch.where(self.elements > 0, numbers, 0).amax(1, keepdim=True)
        latest = self.elements.gather(1, ran).flatten().tolist()
        found = torch.zeros_like(self.fired, dtype=torch.bool)
        peak, depth = self.latest_peak.numpy(), self.latest_depth.numpy()
        for number, (site, place) in enumerate(zip(layout, layout.places, strict=True)):
            if latest[number] < 2:
                continue
            with np.errstate(invalid="ignore", over="ignore"):  # where inputs were infinite, or nearly so
                np.equal(peak[place] + depth[place], 0, out=found[place].numpy())
            if math.isfinite(site.cap):
                always = self.magnitude[place] >= _AT_THE_CAP * site.cap * float(self.elements[number].sum())
                found[place] |= (-self.latest_depth[place] >= site.cap) & always
        return found

    def to_host(self) -> Totals:
        """Bring to the CPU in one transfer; what is there already is not copied."""
        return self.to_host_with()[0]

    def to_host_with(self, *beside: Tensor) -> tuple[Totals, list[Tensor]]:
        """Bring to the CPU, and other tensors along, in one transfer: as bytes, so that no count is rounded.

        Args:
            *beside: Tensors on the same device.
        """
        if self.maxima.device.type == "cpu":
            return self, list(beside)
        own = fields(self)
        copies = host_copies([*(getattr(self, f.name) for f in own), *beside])
        return Totals(*copies[: len(own)]), copies[len(own) :]

    def sums(self) -> Tensor:
        """Lay what merges by sum end to end, as float64, which holds counts exactly up to 2^53."""
        return torch.cat([getattr(self, name).flatten().double() for name in _SUMS])

    def merged(self, sums: Tensor, maxima: Tensor) -> Totals:
        """Put merged values in place of this rank's."""
        own = [getattr(self, name) for name in _SUMS]
        parts = sums.split([mine.numel() for mine in own])
        pairs = zip(_SUMS, own, parts, strict=True)
        return Totals(**{name: part.to(mine.dtype).view(mine.shape) for name, mine, part in pairs}, maxima=maxima)


def host_copies(parts: Sequence[Tensor]) -> list[Tensor]:
    """Copy tensors of one device to the host, in one transfer.

    Example:
        >>> host_copies([torch.ones(3), torch.ones(1, dtype=torch.float64)])[1]
        tensor([1.], dtype=torch.float64)
    """
    order = sorted(range(len(parts)), key=lambda place: -parts[place].element_size())  # all lie where their type may
    wide_first = [parts[place] for place in order]
    host = torch.cat([part.flatten().view(torch.uint8) for part in wide_first]).cpu()
    copies = list(parts)
    for place, raw in zip(order, host.split([part.numel() * part.element_size() for part in wide_first]), strict=True):
        copies[place] = raw.view(parts[place].dtype).view(parts[place].shape)
    return copies


@dataclass(frozen=True, eq=False)
class UnitHistory:
    """What outlives a window, one entry for each unit of all sites.

    Args:
        age: Samples since the unit last gave a sign of life, int64.
        ever: Whether it ever has.
        dead: Whether it was dead when last judged.
        revived: Whether it ever fired again after it had been dead.
        fired: Elements that fired so far, int64.
        seen: Elements observed up to the end of the last window in which the unit fired, int64.
        last_fired: The step of the last observation in which the unit fired, int32; -1 if it never did.
        elements: Elements counted so far, by site, shape ``(sites,)``, int64; not of observations of peaks alone.
        ran: Whether the site has run at all, shape ``(sites,)``.
    """

    age: Tensor
    ever: Tensor
    dead: Tensor
    revived: Tensor
    fired: Tensor
    seen: Tensor
    last_fired: Tensor
    elements: Tensor
    ran: Tensor

    @classmethod
    def empty(cls, units: int = 0, sites: int = 0) -> UnitHistory:
        """Start with units of which nothing is known."""
        none, zero = torch.zeros(units, dtype=torch.bool), torch.zeros(units, dtype=torch.int64)
        never, elements = torch.full((units,), -1, dtype=torch.int32), torch.zeros(sites, dtype=torch.int64)
        return cls(zero, none, none.clone(), none.clone(), zero.clone(), zero.clone(), never, elements, elements > 0)

    def extended(self, units: int, sites: int) -> UnitHistory:
        """Add unknown units at the end, for the sites that were met since, up to so many units and sites."""
        if sites == len(self.elements):
            return self
        new = UnitHistory.empty(units - len(self.age), sites - len(self.elements))
        return UnitHistory(*(torch.cat([getattr(self, f.name), getattr(new, f.name)]) for f in fields(self)))

    def with_deaths_of(self, later: UnitHistory) -> UnitHistory:
        """Take over who is dead from a verdict on a window that goes on, so that no death is reported twice.

        Args:
            later: What :func:`judge` returned with that verdict.
        """
        whole = self.extended(len(later.age), len(later.elements))
        return replace(whole, dead=later.dead, revived=later.revived)
