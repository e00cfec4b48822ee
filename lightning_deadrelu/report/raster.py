"""What became of each unit, window by window: a bounded history, and its picture; knows no logger and draws no text."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_deadrelu.report.metrics import EVENTS, headline_metrics, site_metrics
from lightning_deadrelu.statistics import LivenessReport, SiteReport
from lightning_deadrelu.statistics.unit_state import State, states_of

MOST_ROWS, MOST_COLUMNS = 256, 512
Picture = np.ndarray[Any, np.dtype[np.uint8]]
"""Red, green and blue, shape ``(height, width, 3)``."""

_GOLDEN = (math.sqrt(5) - 1) / 2


def units_shown(units: int) -> Tensor:
    """Choose the units that a raster shows, at most 256: all, or one of each stretch of neighbours.

    A row that merged units would either hide deaths (a majority) or exaggerate them (the worst); a sample does
    neither: the area of a colour is the share of the units, and each row is what became of a real unit. Within
    its stretch the place varies, so that a pattern in the layer (heads, groups) is not met at one phase.

    Example:
        >>> units_shown(4), len(units_shown(1000)), units_shown(1000)[:4]
        (tensor([0, 1, 2, 3]), 256, tensor([ 0,  6,  8, 15]))
    """
    if units <= MOST_ROWS:
        return torch.arange(units)
    row = torch.arange(MOST_ROWS, dtype=torch.float64)
    jitter = row * _GOLDEN % 1 if units >= 2 * MOST_ROWS else torch.zeros(())  # in short stretches, rows would coincide
    return ((row + jitter) * (units / MOST_ROWS)).long()


@dataclass(frozen=True, eq=False)
class SiteRaster:
    """The history of one site.

    Args:
        name: The site.
        kind: ``"relu"``, ...
        units: How many units the site has.
        rows: Which of them are shown, shape ``(rows,)``, int64.
        states: :class:`State` by row and column, shape ``(rows, windows)``, uint8.
        steps: The step of the last window in each column.
    """

    name: str
    kind: str
    units: int
    rows: Tensor
    states: Tensor
    steps: tuple[int, ...]

    @property
    def staircase(self) -> Tensor:
        """The states with the rows in the order of their first deaths, the earliest below, shape ``(rows, windows)``.

        So what is dead at the bottom is as high as the share of the units that have died.

        Example:
            >>> states = torch.tensor([[State.DEAD, State.DEAD], [State.ALIVE, State.ALIVE], [State.ALIVE, State.DEAD]])
            >>> SiteRaster("act", "relu", 3, torch.arange(3), states, (9, 19)).staircase.tolist()
            [[1, 1], [1, 7], [7, 7]]
        """
        windows = self.states.shape[1]
        dead = self.states >= State.DEAD
        first = torch.where(dead, torch.arange(windows), windows).amin(1) if windows else torch.zeros(len(self.rows))
        order = np.lexsort((-self.states.sum(1).numpy(), -dead.sum(1).numpy(), first.numpy()))
        return self.states[torch.from_numpy(order[::-1].copy())]


@dataclass(frozen=True, eq=False)
class RasterState:
    """What a checkpoint holds of a raster.

    Args:
        windows: Windows added so far.
        stride: Windows in each column.
        steps: The step of the last window in each column.
        sites: Name, kind and number of units of each site.
        states: Of all rows one after another, compressed, uint8.
        curves: Names of the curves of the model, and of those of the sites.
        values: Of all these curves one after another, as the bytes of float64, compressed, uint8.
    """

    windows: int
    stride: int
    steps: list[int]
    sites: list[tuple[str, str, int]]
    states: Tensor
    curves: tuple[list[str], list[str]]
    values: Tensor


@dataclass(eq=False)
class _Track:
    kind: str
    units: int
    rows: Tensor
    columns: Tensor  # (512, rows): a window is written in one stretch

    @classmethod
    def of(cls, kind: str, units: int) -> _Track:
        rows = units_shown(units)
        return cls(kind, units, rows, torch.zeros(MOST_COLUMNS, len(rows), dtype=torch.uint8))

    def halve(self) -> None:
        """Merge neighbours; what is free then is as if never judged."""
        merged = self.columns.view(MOST_COLUMNS // 2, 2, -1).amax(1)
        self.columns[: len(merged)] = merged
        self.columns[len(merged) :] = State.NOT_JUDGED


class Raster:
    """The states of all units over the windows of a run, and the headline curves, in bounded memory.

    A site has at most 256 rows (see :func:`units_shown`) and 512 columns. Once the columns are full, neighbours merge
    two by two and from then on each column takes twice as many windows, so that the axis stays even. In a merged
    column the most telling state counts, in the order of :class:`State`: repaired, dead, not finite, frozen,
    dormant, rare, always on, alive, not judged. Curves merge alike: what counts events adds up, of all else the
    later value stays. A site that appears late is "not judged" before.

    Example:
        >>> raster = Raster()
        >>> raster.add(LivenessReport((), step=9))
        >>> raster.windows, raster.steps, raster.curves["dead_fraction"]
        (1, (9,), (0.0,))
    """

    def __init__(self) -> None:
        self._tracks: dict[str, _Track] = {}
        self._steps: list[int] = []
        self._curves: dict[str, list[float]] = {}
        self._site_curves: dict[str, list[float]] = {}
        self.stride = 1
        """Windows in each column; the last may hold fewer."""
        self.windows = 0
        """Windows added so far."""

    @property
    def steps(self) -> tuple[int, ...]:
        """The step of the last window in each column."""
        return tuple(self._steps)

    @property
    def curves(self) -> Mapping[str, tuple[float, ...]]:
        """The metrics of the whole model by name (``"dead_fraction"``, ...), a value for each column."""
        return {key: tuple(curve) for key, curve in self._curves.items()}

    @property
    def site_curves(self) -> Mapping[str, tuple[float, ...]]:
        """The dead fraction by site, in the order of execution; of smooth sites the dormant one; NaN where absent."""
        return {key: tuple(curve) for key, curve in self._site_curves.items()}

    @property
    def sites(self) -> Mapping[str, SiteRaster]:
        """The history of each site, in the order of first execution."""
        used = len(self._steps)
        return {
            name: SiteRaster(name, track.kind, track.units, track.rows, track.columns[:used].T, self.steps)
            for name, track in self._tracks.items()
        }

    def add(self, report: LivenessReport, edited: Mapping[str, Sequence[int]] = MappingProxyType({})) -> None:
        """Append a closed window."""
        fresh = self.windows % self.stride == 0
        if fresh and len(self._steps) == MOST_COLUMNS:
            self._halve()
        self.windows += 1
        if fresh:
            self._steps.append(report.step)
        self._steps[-1] = report.step
        for site in report.sites:
            self._mark(site, edited.get(site.name, ()))
        self._follow(self._curves, headline_metrics(report, sum(map(len, edited.values()))))
        self._follow(self._site_curves, site_metrics(report))

    def _mark(self, site: SiteReport, edited: Sequence[int]) -> None:
        track = self._tracks.get(site.name)
        if track is None or track.units != site.units:  # another layer took the name
            track = self._tracks[site.name] = _Track.of(site.kind, site.units)
        track.kind = site.kind
        states = states_of(site, track.rows)
        if edited:
            states[torch.isin(track.rows, torch.tensor(list(edited)))] = State.REPAIRED
        column = track.columns[len(self._steps) - 1]
        torch.maximum(column, states, out=column)

    def _follow(self, curves: dict[str, list[float]], values: Mapping[str, float]) -> None:
        """Put values into the last column; what has none there gets NaN."""
        for key in dict.fromkeys([*curves, *values]):
            curve = curves.setdefault(key, [])
            curve += [math.nan] * (len(self._steps) - len(curve))
            curve[-1] = _later(key, curve[-1], values.get(key, math.nan))

    def _halve(self) -> None:
        self.stride *= 2
        self._steps = self._steps[1::2]
        for track in self._tracks.values():
            track.halve()
        for curves in (self._curves, self._site_curves):
            for key, curve in curves.items():
                curve[:] = [_later(key, *pair) for pair in zip(curve[::2], curve[1::2], strict=True)]

    # -- resume ------------------------------------------------------------------------------------------

    @property
    def state(self) -> RasterState:
        """What :meth:`restore` goes on from; states and curves are compressed."""
        used = len(self._steps)
        sites = [(name, track.kind, track.units) for name, track in self._tracks.items()]
        states = [track.columns[:used].T.flatten() for track in self._tracks.values()]  # runs along time pack well
        values = [*self._curves.values(), *self._site_curves.values()]
        return RasterState(
            self.windows,
            self.stride,
            list(self._steps),
            sites,
            _packed(torch.cat(states) if states else torch.zeros(0, dtype=torch.uint8)),
            (list(self._curves), list(self._site_curves)),
            _packed(torch.tensor(values, dtype=torch.float64).flatten().view(torch.uint8)),
        )

    def restore(self, state: RasterState) -> None:
        """Go on from a state."""
        self.windows, self.stride, self._steps = state.windows, state.stride, list(state.steps)
        used, at, states = len(self._steps), 0, _unpacked(state.states)
        self._tracks = {}
        for name, kind, units in state.sites:
            track = self._tracks[name] = _Track.of(kind, units)
            size = used * len(track.rows)
            track.columns[:used] = states[at : at + size].view(len(track.rows), used).T
            at += size
        values = iter(_unpacked(state.values).view(torch.float64).view(-1, max(used, 1)).tolist())
        self._curves, self._site_curves = ({key: next(values) for key in keys} for keys in state.curves)


def _later(key: str, before: float, after: float) -> float:
    """Merge two values of a curve."""
    if math.isnan(after) or math.isnan(before):
        return before if math.isnan(after) else after
    return before + after if key in EVENTS else after


def _packed(raw: Tensor) -> Tensor:
    """Compress bytes; a tensor loads with ``weights_only=True`` everywhere."""
    return torch.frombuffer(bytearray(zlib.compress(raw.numpy().tobytes(), 1)), dtype=torch.uint8)


def _unpacked(packed: Tensor) -> Tensor:
    raw = bytearray(zlib.decompress(packed.cpu().numpy().tobytes()))
    return torch.frombuffer(raw, dtype=torch.uint8) if raw else torch.zeros(0, dtype=torch.uint8)


# -- pictures --------------------------------------------------------------------------------------------


def image_of(site: SiteRaster, least: tuple[int, int] = (1, 1)) -> Picture:
    """Paint a site's history as a staircase, units down and windows across; few become larger patches.

    Args:
        site: The history.
        least: Height and width in pixels that small histories are scaled up to, by whole numbers.

    Returns:
        Shape ``(height, width, 3)``, uint8.

    Example:
        >>> states = torch.tensor([[State.ALIVE, State.DEAD]], dtype=torch.uint8)
        >>> image_of(SiteRaster("act", "relu", 1, torch.tensor([0]), states, (9, 19)), least=(2, 4)).shape
        (2, 4, 3)
    """
    palette = np.array([tuple(bytes.fromhex(state.colour[1:])) for state in State], dtype=np.uint8)
    return enlarged(palette[site.staircase.numpy()], least)


def enlarged(picture: Picture, least: tuple[int, int]) -> Picture:
    """Repeat rows and columns by whole numbers, up to at least a height and a width."""
    height, width = (math.ceil(want / max(have, 1)) for want, have in zip(least, picture.shape[:2], strict=True))
    return picture.repeat(height, 0).repeat(width, 1)
