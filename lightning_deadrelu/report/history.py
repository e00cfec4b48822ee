"""What is kept of a run for people to look at, in bounded memory."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from lightning_deadrelu.report.raster import Raster, RasterState
from lightning_deadrelu.statistics import LivenessReport
from lightning_deadrelu.statistics.forecast import Peaks, at_risk_fraction


@dataclass(frozen=True, eq=False)
class RunHistoryState:
    """What a checkpoint holds of a run's history."""

    raster: RasterState
    peaks: dict[str, Tensor]
    at_risk_fraction: float


class RunHistory:
    """The history of all units over the windows of a run, and a forecast of who is about to fall silent."""

    def __init__(self) -> None:
        self.raster = Raster()
        self.at_risk_fraction = 0.0
        """Share of the units whose peak falls towards zero, at the last window's end."""
        self.peaks = Peaks()
        """Largest inputs of the last windows by site, shape ``(windows, units)``, the latest last."""

    def close(self, report: LivenessReport, edited: Mapping[str, Sequence[int]]) -> None:
        """Take in a window that has ended."""
        self.raster.add(report, edited)
        self.at_risk_fraction = at_risk_fraction(report, self.peaks.add(report))

    def with_open(self, report: LivenessReport, edited: Mapping[str, Sequence[int]]) -> Raster:
        """Return the history with a window that has not ended, which a resumed run will end."""
        raster = copy.deepcopy(self.raster)
        raster.add(report, edited)
        return raster

    @property
    def state(self) -> RunHistoryState:
        """What :meth:`restore` goes on from."""
        return RunHistoryState(self.raster.state, dict(self.peaks), self.at_risk_fraction)

    def restore(self, state: RunHistoryState) -> None:
        """Go on from a state."""
        self.raster.restore(state.raster)
        self.peaks.restore(state.peaks)
        self.at_risk_fraction = state.at_risk_fraction
