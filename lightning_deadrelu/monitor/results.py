"""What may be read of a monitor, during a run and after it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_deadrelu.attribution import Attributions
from lightning_deadrelu.explain.finding import Finding
from lightning_deadrelu.explain.postmortem import DeathEvent
from lightning_deadrelu.monitor.monitor import Monitor
from lightning_deadrelu.repair.event import Event
from lightning_deadrelu.report.run_report import RunReport
from lightning_deadrelu.statistics import LivenessReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Results:
    """What every way to run a monitor shows of it."""

    _monitor: Monitor | None  # from the start of a run on
    _past: RunReport  # of a run that is over, in a copy
    report: LivenessReport | None
    """The latest verdict; None before the first."""

    def _clear(self, name: str) -> None:
        self._monitor, self.report = None, None
        self._past = RunReport(LivenessReport(()), name=name)

    @property
    def run_report(self) -> RunReport:
        """All that is known of the run so far, in one object."""
        return self._monitor.run_report if self._monitor else self._past

    @property
    def events(self) -> tuple[Event, ...]:
        """What was done to which units, when and why; the last 1,000."""
        return self.run_report.events

    @property
    def deaths(self) -> tuple[DeathEvent, ...]:
        """When units died, where and why; 100 events at most, the largest of all and the latest."""
        return self.run_report.deaths

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What the check-up found, the surest first; empty without one, and before the first observed batch."""
        return self.run_report.findings

    @property
    def attribution(self) -> Attributions | None:
        """Which parameters feed and read each site, where there is a remedy or gradient evidence; prints as a table.

        None before the first observed batch. For a look alone, take ``remedy=Reset(dry_run=True)``.
        """
        return self._monitor.attribution if self._monitor else None

    @property
    def failure(self) -> Exception | None:
        """Why the model is watched no longer; None while all is well."""
        return self._monitor.guard.failure if self._monitor else None

    def summary(self) -> str:
        """Tell what became of each site over the run, in the order of execution, under a sentence that says it all."""
        from lightning_deadrelu.report import summary

        return summary(self.run_report)

    def plot(self) -> tuple[Figure, tuple[Axes, ...]]:
        """Draw the run: dead units over time, and what became of the units of the worst sites; needs matplotlib.

        Returns:
            The figure and its axes, the curves first.
        """
        from lightning_deadrelu.report import plot_run

        return plot_run(self.run_report)
