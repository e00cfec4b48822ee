"""What the callback and the monitor of a loop do alike: run a monitor, save it, and show what it found."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn
from typing_extensions import Self

from lightning_deadrelu.attribution import Attributions
from lightning_deadrelu.checkpoint import encode
from lightning_deadrelu.explain.finding import Finding
from lightning_deadrelu.explain.postmortem import DeathEvent
from lightning_deadrelu.guarded import RankFailure, guarded, why_it_ends
from lightning_deadrelu.monitor.host import Host
from lightning_deadrelu.monitor.monitor import Monitor
from lightning_deadrelu.monitor.settings import Settings
from lightning_deadrelu.monitor.state import MonitorState, exchange_as_in
from lightning_deadrelu.observe.ranks import Ranks
from lightning_deadrelu.repair.activation_swap import records
from lightning_deadrelu.repair.event import Event
from lightning_deadrelu.report import RunReport, plot_run, summary
from lightning_deadrelu.statistics import LivenessReport
from lightning_deadrelu.warn import warn

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class MonitorOwner:
    """Has a monitor from the start of a run on; what a copy of it finds is shown as well."""

    _settings: Settings
    _pending: dict[str, Any] | None = None  # what a checkpoint held, until the run starts
    _monitor: Monitor | None  # from the start of a run on
    _shown: Monitor | None  # this, or that of a copy where this has not run
    _unmade: Exception | None  # why there is none where a run has started
    _past: RunReport  # of a run that is over, in a copy
    _originals: tuple[weakref.ref[MonitorOwner], ...] = ()  # of which this is a copy, the last first
    report: LivenessReport | None
    """The latest verdict; None before the first."""

    # -- a run -------------------------------------------------------------------------------------------

    def _start(self, host: Host) -> None:
        """Start a monitor, which goes on from a checkpoint if one was loaded."""
        self._monitor = self._monitor_on_all_ranks(host)
        if self._monitor:
            self._monitor.start(self._pending)
            self._show(self._monitor.report)
            self._pending = None
        else:
            self._run_unwatched(host)

    def _monitor_on_all_ranks(self, host: Host) -> Monitor | None:
        """Make a monitor; None on all ranks if it fails on one."""
        monitor = None
        with guarded(self._tell_unmade):
            monitor = Monitor(self._settings, host)
        try:
            Ranks(host.device, lambda: host.is_joint, lambda: monitor is None).settle()
        except RankFailure as error:
            self._unmade = self._unmade or error
            return None
        return monitor

    def _tell_unmade(self, error: Exception) -> None:
        self._unmade = error
        warn(f"{self._settings.name}: {why_it_ends(error)}")

    def _run_unwatched(self, host: Host) -> None:
        """Keep what checkpoints and other callbacks need all the same."""
        exchange_as_in(self._pending or {}, host.model)
        self._pending = self._pending or encode(MonitorState(records(host.model)))
        host.show_score(0.0)

    def _abort(self) -> None:
        if self._monitor:  # terms in flight are out of the model, but go into a checkpoint that is saved now
            self._monitor.abort()

    def _stop(self) -> None:
        if self._monitor:
            self._monitor.stop()

    def _tell_outcome(self, model: nn.Module) -> None:
        if self._monitor:
            with self._monitor.guard():
                self._monitor.announcer.tell_outcome(self.run_report, model)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run goes on from; while they train, all ranks have to ask for it together."""
        if self._pending is not None:  # loaded, and not yet taken up
            return self._pending
        return self._monitor.state() if self._monitor else {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on, when the run starts, from what was saved."""
        self._pending = dict(state_dict)

    # -- what it shows, and its copies -------------------------------------------------------------------

    def _clear(self, name: str) -> None:
        self._monitor, self._shown, self._unmade, self.report = None, None, None, None
        self._past = RunReport(LivenessReport(()), name=name)

    def _show(self, report: LivenessReport | None) -> None:
        """Show a verdict, also in the originals that have not run: a library that copies leaves its user with these."""
        self._shown, self.report = self._monitor, report
        for original in filter(None, (reference() for reference in self._originals)):
            if original._monitor is None:
                original._shown, original.report = self._monitor, report

    def __getstate__(self) -> dict[str, Any]:
        # Lightning binds `log` to the model; a copy must not copy that, nor watch
        state = {key: value for key, value in vars(self).items() if key not in ("log", "log_dict", "_originals")}
        past = replace(self.run_report, attribution={})
        return state | {"_monitor": None, "_shown": None, "_unmade": None, "_past": past}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        memo[id(self)] = copied = self.__copy__()
        vars(copied).update(deepcopy(self.__getstate__(), memo))
        return copied

    def __copy__(self) -> Self:
        copied = type(self).__new__(type(self))
        vars(copied).update(self.__getstate__())
        copied._originals = (weakref.ref(self), *self._originals)
        return copied

    @property
    def run_report(self) -> RunReport:
        """All that is known of the run so far, in one object."""
        return self._shown.run_report if self._shown else self._past

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
        """What the check-up found, the surest first, and whom Muon starves; empty without it, and before a batch."""
        return self.run_report.findings

    @property
    def attribution(self) -> Attributions | None:
        """Which parameters feed and read each site, where there is a remedy or gradient evidence; prints as a table.

        None before the first observed batch. For a look alone, take ``remedy=Reset(dry_run=True)``.
        """
        return self._shown.attribution if self._shown else None

    @property
    def failure(self) -> Exception | None:
        """Why the model is watched no longer; None while all is well."""
        return self._shown.guard.failure if self._shown else self._unmade

    def summary(self) -> str:
        """Tell what became of each site over the run, in the order of execution, under a sentence that says it all."""
        return self._why_nothing() or summary(self.run_report)

    def _why_nothing(self) -> str:
        """Say why there is no verdict, and when there will be one; empty if there is."""
        if self.report is not None:
            return ""
        if self.failure:
            return f"`monitor.summary()`: there is no verdict, because {why_it_ends(self.failure)}"
        if self._shown is None:
            return (
                "`monitor.summary()`: this monitor has seen no training yet, or a copy of it in another process has."
                " Call it after `fit`; what a copy finds is in the loggers, and in files with `report_dir=...`."
            )
        settings = self._shown.settings
        batches = settings.every_n_steps * (settings.window - 1) + 1
        return (
            f"`monitor.summary()`: there is no verdict yet; the first comes after {batches} training batches, or when"
            " training or its first epoch ends."
        )

    def plot(self) -> tuple[Figure, tuple[Axes, ...]]:
        """Draw the run: dead units over time, and what became of the units of the worst sites; needs matplotlib.

        Returns:
            The figure and its axes, the curves first.
        """
        return plot_run(self.run_report)
