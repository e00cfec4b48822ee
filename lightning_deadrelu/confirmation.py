"""Look once more at some units, in one observation, before they are edited."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_deadrelu.remedies.base import LEVELS
from lightning_deadrelu.sites import Rectifier

MOST_ROWS = 256
"""Of a layer's input that are kept for a moment."""
_MOST_NUMBERS = 2**22  # of one call that are sorted; more are thinned out evenly


class Evidence(NamedTuple):
    """What one observation tells of the asked units, those of all sites end to end.

    Args:
        fired: 1 where a unit fired, else 0, shape ``(units,)``; merges by maximum.
        sums: Quantiles of the units' inputs, summed over calls, shape ``(levels, units)``; merges by sum.
        calls: In how many calls each unit took part, shape ``(units,)``; merges by sum.
    """

    fired: Tensor
    sums: Tensor
    calls: Tensor

    @property
    def quantiles(self) -> Tensor:
        """The mean over calls and ranks, not a number where there was no call."""
        return self.sums / self.calls

    @classmethod
    def nothing(cls, units: int, device: torch.device) -> Evidence:
        """Start without a call."""
        zeros = torch.zeros(len(LEVELS) + 2, units, dtype=torch.float64, device=device)
        return cls(zeros[0], zeros[1:-1], zeros[-1])

    def part(self, place: slice) -> Evidence:
        """Cut one site out, on the CPU."""
        return Evidence(*(tensor[..., place].cpu() for tensor in self))


class Confirmation:
    """Collect the evidence.

    Args:
        asked: The units asked about, boolean, shape ``(units,)``, by the number of their site in the layout.
        device: Where to collect.

    Example:
        >>> confirmation = Confirmation({0: torch.tensor([True, False])}, torch.device("cpu"))
        >>> confirmation(0, Rectifier("relu"), torch.tensor([[-1.0, 2.0], [-3.0, 2.0]]), (-1,))
        >>> confirmation.evidence.fired, confirmation.evidence.quantiles[[0, -1], 0]
        (tensor([0.], dtype=torch.float64), tensor([-3., -1.], dtype=torch.float64))
    """

    def __init__(self, asked: Mapping[int, Tensor], device: torch.device) -> None:
        self._columns: dict[int, Tensor] = {}
        self._places: dict[int, slice] = {}
        self._rows: dict[int, list[Tensor]] = {}
        start = 0
        for number, units in asked.items():
            columns = units.nonzero().flatten()
            self._columns[number] = columns.to(device)
            self._places[number] = slice(start, start := start + len(columns))
        self.evidence = Evidence.nothing(start, device)

    def __call__(
        self, number: int, rectifier: Rectifier, x: Tensor, dims: tuple[int, ...], valid: Tensor | None = None
    ) -> None:
        """Take one call of a site's rectifier.

        Args:
            number: Of the site.
            rectifier: What it is.
            x: Its input.
            dims: The dimensions that hold the units, counted from the end.
            valid: Boolean, True for data and False for padding, of the shape of ``x`` without the units.
        """
        if number not in self._columns:
            return
        over = [dim for dim in range(-x.ndim, 0) if dim not in dims]
        rows = x.detach().permute(*over, *dims).flatten(len(over)) if over else x.detach().reshape(1, -1)
        rows = rows.reshape(-1, rows.shape[-1]).to(self.evidence.fired.device)
        rows = rows.index_select(1, self._columns[number]).double() - rectifier.hinge
        rows = rows if valid is None else rows[valid.flatten()]
        if not len(rows):
            return
        place = self._places[number]
        self.evidence.fired[place].logical_or_((rows > 0).any(0))
        thinned = rows[:: max(1, rows.numel() // _MOST_NUMBERS)]
        levels = torch.tensor(LEVELS, dtype=torch.float64).to(rows.device, non_blocking=True)
        self.evidence.sums[:, place].add_(torch.quantile(thinned, levels, dim=0))
        self.evidence.calls[place].add_(1)

    def listen(self, number: int, x: Tensor) -> None:
        """Keep some rows of the input of the layer that feeds a site.

        Args:
            number: Of the site.
            x: Shape ``(..., features)``.
        """
        rows = x.flatten(0, -2) if x.ndim > 1 else x[None]
        self._rows.setdefault(number, []).append(_thinned(rows))

    def rows(self, number: int) -> Tensor | None:
        """Return what was kept, at most :data:`MOST_ROWS` rows, shape ``(rows, features)``."""
        parts = [part for part in self._rows.get(number, ()) if len(part)]
        return _thinned(torch.cat(parts)).double() if parts else None

    def of(self, number: int, evidence: Evidence) -> Evidence:
        """Cut one site out of evidence that was merged over ranks."""
        return evidence.part(self._places[number])


def _thinned(rows: Tensor) -> Tensor:
    return rows[:: max(1, -(-len(rows) // MOST_ROWS))]
