"""What became of each unit, window by window: a bounded history, and its picture; knows no logger and draws no text."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_deadrelu.report.metrics import EVENTS, headline_metrics, site_metrics
from lightning_deadrelu.statistics import LivenessReport, SiteReport

MOST_ROWS, MOST_COLUMNS = 256, 512
_GOLDEN = (math.sqrt(5) - 1) / 2


class State(IntEnum):
    """What a unit was in a window, in the order of what is worth telling: where windows merge, the later one wins."""

    NOT_JUDGED = 0
    ALIVE = 1
    ALWAYS_ON = 2
    RARE = 3
    DORMANT = 4
    FROZEN = 5
    NOT_FINITE = 6
    DEAD = 7
    REMEDIED = 8

    @property
    def label(self) -> str:
        """The name in words.

        Example:
            >>> State.ALWAYS_ON.label
            'always on'
        """
        return self.name.lower().replace("_", " ")

    @property
    def colour(self) -> str:
        """The colour as ``#rrggbb``, of Okabe and Ito's, which colour-blind readers can tell apart."""
        return _COLOURS[self]


_COLOURS = {
    State.NOT_JUDGED: "#8C8C8C",
    State.ALIVE: "#BBD6E4",
    State.ALWAYS_ON: "#0072B2",
    State.RARE: "#E69F00",
    State.DORMANT: "#009E73",
    State.FROZEN: "#CC79A7",
    State.NOT_FINITE: "#F0E442",
    State.DEAD: "#D55E00",
    State.REMEDIED: "#000000",
}

_STATES = (("always_on", State.ALWAYS_ON), ("rare", State.RARE), ("frozen", State.FROZEN))
_SMOOTH_STATES = (("dormant", State.DORMANT),)


def states_of(site: SiteReport, rows: Tensor | None = None) -> Tensor:
    """Name the state of each unit, shape ``(units,)``, uint8; a unit is in the most telling state that fits.

    Args:
        site: The verdict.
        rows: Numbers of the units that are asked for; None for all.
    """

    def shown(mask: Tensor) -> np.ndarray[Any, np.dtype[np.bool_]]:
        return mask.numpy() if rows is None else mask.numpy()[rows.numpy()]

    states = np.full(site.units if rows is None else len(rows), State.ALIVE, np.uint8)
    for name, state in _SMOOTH_STATES if site.smooth else _STATES:
        states[shown(getattr(site, name))] = state
    states[not site.samples if site.smooth else ~shown(site.judged)] = State.NOT_JUDGED
    states[shown(site.nonfinite)] = State.NOT_FINITE
    states[shown(site.dead)] = State.DEAD
    return torch.from_numpy(states)


def rows_of(units: int) -> Tensor:
    """Choose the units that a raster shows, at most 256: all, or one of each stretch of neighbours.

    A row that merged units would either hide deaths (a majority) or exaggerate them (the worst); a sample does
    neither: the area of a colour is the share of the units, and each row is what became of a real unit. Within
    its stretch the place varies, so that a pattern in the layer (heads, groups) is not met at one phase.

    Args:
        units: How many the site has.

    Example:
        >>> rows_of(4), len(rows_of(1000)), rows_of(1000)[:4]
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
    def remedied_columns(self) -> list[int]:
        """The columns in which a shown unit was edited."""
        return (self.states == State.REMEDIED).any(0).nonzero().flatten().tolist()


@dataclass(eq=False)
class _Track:
    kind: str
    units: int
    rows: Tensor
    columns: Tensor  # (512, rows): a window is written in one stretch

    @classmethod
    def of(cls, kind: str, units: int) -> _Track:
        rows = rows_of(units)
        return cls(kind, units, rows, torch.zeros(MOST_COLUMNS, len(rows), dtype=torch.uint8))

    def halve(self) -> None:
        """Merge neighbours; what is free then is as if never judged."""
        merged = self.columns.view(MOST_COLUMNS // 2, 2, -1).amax(1)
        self.columns[: len(merged)] = merged
        self.columns[len(merged) :] = State.NOT_JUDGED


class Raster:
    """The states of all units over the windows of a run, and the headline curves, in bounded memory.

    A site has at most 256 rows (see :func:`rows_of`) and 512 columns. Once the columns are full, neighbours merge
    two by two and from then on each column takes twice as many windows, so that the axis stays even. In a merged
    column the most telling state counts, in the order of :class:`State`: remedied, dead, not finite, frozen,
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
        self._stride = 1
        self._windows = 0

    @property
    def windows(self) -> int:
        """Windows added so far."""
        return self._windows

    @property
    def stride(self) -> int:
        """Windows in each column; the last may hold fewer."""
        return self._stride

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
        return {name: self._site(name, track) for name, track in self._tracks.items()}

    def _site(self, name: str, track: _Track) -> SiteRaster:
        return SiteRaster(name, track.kind, track.units, track.rows, track.columns[: len(self._steps)].T, self.steps)

    def add(self, report: LivenessReport, edited: Mapping[str, Sequence[int]] = MappingProxyType({})) -> None:
        """Append a closed window.

        Args:
            report: Its verdict.
            edited: Units edited since the last window, by the site's name.
        """
        fresh = self._windows % self._stride == 0
        if fresh and len(self._steps) == MOST_COLUMNS:
            self._halve()
        self._windows += 1
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
            states[torch.isin(track.rows, torch.tensor(list(edited)))] = State.REMEDIED
        column = track.columns[len(self._steps) - 1]
        torch.maximum(column, states, out=column)

    def _follow(self, curves: dict[str, list[float]], values: Mapping[str, float]) -> None:
        """Put values into the last column; what has none there gets NaN."""
        for key in dict.fromkeys([*curves, *values]):
            curve = curves.setdefault(key, [])
            curve += [math.nan] * (len(self._steps) - len(curve))
            curve[-1] = _later(key, curve[-1], values.get(key, math.nan))

    def _halve(self) -> None:
        self._stride *= 2
        self._steps = self._steps[1::2]
        for track in self._tracks.values():
            track.halve()
        for curves in (self._curves, self._site_curves):
            for key, curve in curves.items():
                curve[:] = [_later(key, *pair) for pair in zip(curve[::2], curve[1::2], strict=True)]

    # -- to be continued ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return plain values and tensors, compressed, from which :meth:`load_state_dict` goes on."""
        used = len(self._steps)
        sites = [[name, track.kind, track.units] for name, track in self._tracks.items()]
        states = [track.columns[:used].T.flatten() for track in self._tracks.values()]  # runs along time pack well
        curves = [list(self._curves), list(self._site_curves)]
        values = [*self._curves.values(), *self._site_curves.values()]
        return {
            "windows": self._windows,
            "stride": self._stride,
            "steps": list(self._steps),
            "sites": sites,
            "states": _packed(torch.cat(states) if states else torch.zeros(0, dtype=torch.uint8)),
            "curves": curves,
            "values": _packed(torch.tensor(values, dtype=torch.float64).flatten().view(torch.uint8)),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned.

        Args:
            state: It.
        """
        self._windows, self._stride, self._steps = state["windows"], state["stride"], list(state["steps"])
        used, at, states = len(self._steps), 0, _unpacked(state["states"])
        self._tracks = {}
        for name, kind, units in state["sites"]:
            track = self._tracks[name] = _Track.of(kind, units)
            size = used * len(track.rows)
            track.columns[:used] = states[at : at + size].view(len(track.rows), used).T
            at += size
        values = iter(_unpacked(state["values"]).view(torch.float64).view(-1, max(used, 1)).tolist())
        self._curves, self._site_curves = ({key: next(values) for key in keys} for keys in state["curves"])


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


def image_of(site: SiteRaster, least: tuple[int, int] = (192, 512)) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Paint a site's history, units down and windows across.

    Few units or windows become larger patches; a thin white line parts rows that are tall enough.

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
    palette = np.array([_rgb(state.colour) for state in State], dtype=np.uint8)
    picture: np.ndarray[Any, np.dtype[np.uint8]] = palette[site.states.numpy()]
    height, width = (max(want // max(have, 1), 1) for want, have in zip(least, picture.shape[:2], strict=True))
    picture = picture.repeat(height, 0).repeat(width, 1)
    if height >= 8:
        picture[height - 1 : -1 : height] = 255
    return picture


def _rgb(colour: str) -> tuple[int, ...]:
    """Split a colour.

    Example:
        >>> _rgb("#D55E00")
        (213, 94, 0)
    """
    return tuple(bytes.fromhex(colour[1:]))
