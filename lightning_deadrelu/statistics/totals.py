"""The counts of one window, and what is kept of each unit from one window to the next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

_SUMS = ("fired", "samples", "elements", "magnitude")
# what the third and fourth row of Totals.maxima hold
UNKNOWN, CONSTANT, VARIES = 0, 1, 2
FINITE, INFINITE, NAN = 0, 1, 2


def narrowed(numbers: Tensor) -> Tensor:
    """Copy whole numbers into the smallest type that holds them all; truth values stay what they are.

    Example:
        >>> narrowed(torch.tensor([-1, 300]))
        tensor([ -1, 300], dtype=torch.int16)
    """
    if numbers.dtype == torch.bool or not numbers.numel():
        return numbers.clone()
    low, high = map(int, numbers.aminmax())
    limits = ((dtype, torch.iinfo(dtype)) for dtype in (torch.int8, torch.int16, torch.int32))
    return numbers.to(next((dtype for dtype, it in limits if it.min <= low and high <= it.max), torch.int64), copy=True)


@dataclass(frozen=True, eq=False)
class Totals:
    """The counts of one window; see :class:`UnitLiveness`.

    Args:
        fired: Elements that fired, shape ``(units,)``, int64; merges by sum.
        samples: Samples by site and observation, shape ``(sites, window)``, int64; merges by sum.
        elements: Elements per unit by site, shape ``(sites,)``, int64; merges by sum.
        magnitude: Sum of the absolute output, shape ``(units,)``; merges by sum.
        maxima: Shape ``(6, units)``; merges by maximum. The rows: peak; last observation that fired, or -1; 2
            where the output varied, 1 where it was constant, 0 where a single element says nothing; 0 where the
            input was finite, 1 where infinite, 2 where not a number; observations begun when a gradient last proved
            that the unit fired, or -1; 1 where there was a gradient in a batch that was observed.
    """

    fired: Tensor
    samples: Tensor
    elements: Tensor
    magnitude: Tensor
    maxima: Tensor

    def to_host(self) -> Totals:
        """Bring to the CPU in one transfer; what is there already is not copied."""
        return self.to_host_with()[0]

    def to_host_with(self, *beside: Tensor) -> tuple[Totals, list[Tensor]]:
        """Bring to the CPU, and other tensors along, in one transfer: as bytes, so that no count is rounded.

        Args:
            *beside: The widest numbers first, so that all lie where their type may lie.
        """
        if self.maxima.device.type == "cpu":
            return self, list(beside)
        own = fields(self)
        parts = [*(getattr(self, f.name) for f in own), *beside]
        host = torch.cat([part.flatten().view(torch.uint8) for part in parts]).cpu()
        flat = host.split([part.numel() * part.element_size() for part in parts])
        copies = [raw.view(part.dtype).view(part.shape) for raw, part in zip(flat, parts, strict=True)]
        return Totals(*copies[: len(own)]), copies[len(own) :]

    def sums(self) -> Tensor:
        """Lay what merges by sum end to end, as float64, which holds counts exactly up to 2^53."""
        return torch.cat([getattr(self, name).flatten().double() for name in _SUMS])

    def saved(self) -> dict[str, Any]:
        """Return copies that take little room."""
        whole = {name: narrowed(getattr(self, name)) for name in ("fired", "samples", "elements")}
        marks = [narrowed(row.long()) for row in self.maxima[1:]]
        return whole | {"magnitude": self.magnitude.clone(), "peak": self.maxima[0].clone(), "marks": marks}

    @classmethod
    def loaded(cls, state: Mapping[str, Any]) -> Totals:
        """Put together what :meth:`saved` returned."""
        whole = {name: state[name].long() for name in ("fired", "samples", "elements")}
        maxima = torch.stack([state["peak"], *(row.to(state["peak"].dtype) for row in state["marks"])])
        return cls(**whole, magnitude=state["magnitude"], maxima=maxima)

    def merged(self, sums: Tensor, maxima: Tensor) -> Totals:
        """Put merged values in place of this rank's."""
        own = [getattr(self, name) for name in _SUMS]
        parts = sums.split([mine.numel() for mine in own])
        pairs = zip(_SUMS, own, parts, strict=True)
        return Totals(**{name: part.to(mine.dtype).view(mine.shape) for name, mine, part in pairs}, maxima=maxima)


@dataclass(frozen=True, eq=False)
class UnitHistory:
    """What outlives a window, one entry for each unit of all sites.

    Args:
        age: Samples since the unit last gave a sign of life, int64.
        ever: Whether it ever has.
        dead: Whether it was dead when last judged.
        revived: Whether it ever fired again after it had been dead.
        fired: Elements that fired, over all windows in which any did, int64.
        seen: Elements of those windows, int64.
        last_fired: The step of the last observation in which the unit fired, int32; -1 if it never did.
    """

    age: Tensor
    ever: Tensor
    dead: Tensor
    revived: Tensor
    fired: Tensor
    seen: Tensor
    last_fired: Tensor

    @classmethod
    def empty(cls, units: int = 0) -> UnitHistory:
        """Start with units of which nothing is known."""
        none, zero = torch.zeros(units, dtype=torch.bool), torch.zeros(units, dtype=torch.int64)
        never = torch.full((units,), -1, dtype=torch.int32)
        return cls(zero, none, none.clone(), none.clone(), zero.clone(), zero.clone(), never)

    def saved(self) -> dict[str, Tensor]:
        """Return copies that take little room."""
        return {name: narrowed(values) for name, values in vars(self).items()}

    @classmethod
    def loaded(cls, state: Mapping[str, Tensor]) -> UnitHistory:
        """Put together what :meth:`saved` returned."""
        return cls(**{name: state[name].to(like.dtype) for name, like in vars(cls.empty()).items()})

    def extended(self, units: int) -> UnitHistory:
        """Add unknown units at the end, up to ``units``."""
        if units == len(self.age):
            return self
        new = UnitHistory.empty(units - len(self.age))
        return UnitHistory(*(torch.cat([getattr(self, f.name), getattr(new, f.name)]) for f in fields(self)))
