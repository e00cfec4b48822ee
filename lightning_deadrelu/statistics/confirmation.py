"""Look once more at some units, in one observation, before they are edited."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_deadrelu.model.rectifiers import Rectifier

LEVELS = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)
"""The shares of which quantiles are kept of each unit's inputs."""
MOST_ROWS = 256
"""Of a layer's input that are kept for a moment."""
_MOST_NUMBERS = 2**22  # of one call that are sorted; more are thinned out evenly


class SilenceSample(NamedTuple):
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
    def nothing(cls, units: int, device: torch.device) -> SilenceSample:
        """Start without a call."""
        zeros = torch.zeros(len(LEVELS) + 2, units, dtype=torch.float64, device=device)
        return cls(zeros[0], zeros[1:-1], zeros[-1])

    def to_host(self) -> SilenceSample:
        """Copy to the CPU in one transfer."""
        host = torch.cat([self.fired[None], self.sums, self.calls[None]]).cpu()
        return SilenceSample(host[0], host[1:-1], host[-1])

    def part(self, place: slice) -> SilenceSample:
        """Cut one site out."""
        return SilenceSample(*(tensor[..., place] for tensor in self))


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
        self._samples: dict[int, _Sample] = {}
        self._rows: dict[int, int] = {}  # of a site's input, in all calls, padding included
        # not waited for: nothing here may make the host wait for the device
        self._levels = torch.tensor(LEVELS, dtype=torch.float64).to(device, non_blocking=True)
        start = 0
        for number, units in asked.items():
            columns = units.nonzero().flatten()
            self._columns[number] = columns.to(device, non_blocking=True)
            self._places[number] = slice(start, start := start + len(columns))
        self.evidence = SilenceSample.nothing(start, device)

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
        front = _units_last(x.detach(), dims)
        total = math.prod(front.shape[: -len(dims)])
        if not total:
            return
        self._rows[number] = self._rows.get(number, 0) + total
        place, columns = self._places[number], self._columns[number].to(x.device)
        fired = _fires(front, rectifier.hinge, len(dims), valid)[columns]
        self.evidence.fired[place].logical_or_(fired.to(self.evidence.fired.device))
        rows = torch.arange(0, total, -(-total * len(columns) // _MOST_NUMBERS) or 1, device=x.device)
        few = _cut(front, rows, columns, len(dims)).to(self.evidence.sums) - rectifier.hinge
        data = _data(rows, valid).to(few.device)
        self.evidence.sums[:, place].add_(_quantiles(few, data, self._levels))
        self.evidence.calls[place].add_(data.any())

    def listen(self, number: int, x: Tensor, valid: Tensor | None = None) -> None:
        """Keep some rows of the input of the layer that feeds a site.

        Args:
            number: Of the site.
            x: Shape ``(..., features)``.
            valid: Boolean, True for data and False for padding. Where it is not of the shape of ``x`` without the
                features, possibly flattened, it speaks of something else, and all rows count.
        """
        fits = valid is not None and x.shape[:-1] in (valid.shape, (valid.numel(),))
        front = _units_last(x.detach(), (-1,))
        self._samples.setdefault(number, _Sample()).add(front, valid if fits else None)

    def rows(self, number: int) -> Tensor | None:
        """Return what was kept, at most :data:`MOST_ROWS` rows, shape ``(rows, features)``.

        None also where the site had another number of rows than the layer: then its input is not the layer's output,
        but for instance the mean over tokens.
        """
        sample = self._samples.get(number)
        if sample is None or sample.rows is None or self._rows.get(number, sample.seen) != sample.seen:
            return None
        rows = sample.rows[sample.data].double()
        return rows if len(rows) else None

    def of(self, number: int, evidence: SilenceSample) -> SilenceSample:
        """Cut one site out of evidence that was merged over ranks."""
        return evidence.part(self._places[number])


class _Sample:
    """Rows evenly spaced over all that were added; never more than :data:`MOST_ROWS` are held."""

    def __init__(self) -> None:
        self.rows: Tensor | None = None
        self.data = torch.empty(0, dtype=torch.bool)
        self.seen, self._stride = 0, 1

    def add(self, x: Tensor, valid: Tensor | None) -> None:
        total = math.prod(x.shape[:-1])
        kept = x.new_empty(0, x.shape[-1]) if self.rows is None else self.rows
        data = self.data.to(x.device)
        while -(-(self.seen + total) // self._stride) > MOST_ROWS:
            kept, data, self._stride = kept[::2], data[::2], self._stride * 2
        places = range(-self.seen % self._stride, total, self._stride)
        chosen = torch.arange(len(places), device=x.device) * self._stride + places.start
        # copied: a view would keep the whole activation alive, and change with it
        self.rows = torch.cat([kept, x[_coordinates(chosen, x.shape[:-1])]])
        self.data = torch.cat([data, _data(chosen, valid)])
        self.seen += total


def _units_last(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """View a tensor with the dimensions of its units behind all others, of which there is at least one."""
    x = x if x.ndim > len(dims) else x[None]
    return x.permute(*[dim for dim in range(-x.ndim, 0) if dim not in dims], *dims)


def _data(rows: Tensor, valid: Tensor | None) -> Tensor:
    """Tell which of some rows hold data, boolean, shape ``(rows,)``."""
    if valid is None:
        return torch.ones_like(rows, dtype=torch.bool)
    return valid.flatten().to(rows.device)[rows]


def _quantiles(values: Tensor, data: Tensor, levels: Tensor) -> Tensor:
    """Interpolate each column's quantiles over the rows that hold data, shape ``(levels, columns)``; 0 without any.

    As ``torch.quantile``, which makes the host wait, and cannot leave rows out.
    """
    ordered = values.where(data[:, None], torch.inf).sort(0).values  # what holds no data comes last
    places = levels * (data.sum() - 1).clamp(min=0)
    low, high = places.floor().long(), places.ceil().long()
    quantiles = torch.lerp(ordered[low], ordered[high], (places - low)[:, None])
    unknown = (values.isnan() & data[:, None]).any(0)
    return quantiles.masked_fill(unknown, torch.nan).where(data.any(), 0.0)


def _coordinates(rows: Tensor, shape: Sequence[int]) -> tuple[Tensor, ...]:
    """Unravel the numbers of rows, as ``torch.unravel_index`` does, without a copy from the host."""
    places = []
    for size in reversed(shape):
        places.append(rows % size)
        rows = rows // size
    return tuple(reversed(places))


def _fires(front: Tensor, hinge: float, count: int, valid: Tensor | None) -> Tensor:
    """Tell which units fire on any row, shape ``(units,)``. What is not a number does not, and hides no other row."""
    above = front > hinge  # compared in its own precision, as the rectifier does
    if valid is not None:
        above &= valid.to(front.device).reshape(*front.shape[:-count], *[1] * count)
    return above.any(tuple(range(front.ndim - count))).flatten()


def _cut(front: Tensor, rows: Tensor, columns: Tensor, count: int) -> Tensor:
    """Copy some units' inputs out of some rows, and nothing else, shape ``(rows, columns)``."""
    across = _coordinates(rows[:, None], front.shape[:-count])
    along = _coordinates(columns[None], front.shape[-count:])
    return front[(*across, *along)]
