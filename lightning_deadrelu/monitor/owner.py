"""What the callback and the monitor of a loop do alike: start a monitor, stop it, and save it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_deadrelu.checkpoint import encode
from lightning_deadrelu.guarded import RankFailure, guarded, why_it_ends
from lightning_deadrelu.monitor.host import Host
from lightning_deadrelu.monitor.monitor import Monitor
from lightning_deadrelu.monitor.results import Results
from lightning_deadrelu.monitor.settings import Settings
from lightning_deadrelu.monitor.state import MonitorState, exchange_as_in
from lightning_deadrelu.observe.ranks import Ranks
from lightning_deadrelu.repair.activation_swap import records
from lightning_deadrelu.warn import warn


class MonitorOwner(Results):
    """Has a monitor from the start of a run on."""

    _settings: Settings
    _pending: dict[str, Any] | None = None  # what a checkpoint held, until the run starts

    def _start(self, host: Host) -> None:
        """Start a monitor, which goes on from a checkpoint if one was loaded."""
        self._monitor = _monitor_on_all_ranks(host, self._settings)
        if self._monitor:
            self._monitor.start(self._pending)
            self._show(self._monitor.report)
            self._pending = None
        else:
            self._run_unwatched(host)

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


def _monitor_on_all_ranks(host: Host, settings: Settings) -> Monitor | None:
    """Make a monitor; None on all ranks if it fails on one."""
    monitor = None
    with guarded(lambda error: warn(f"{settings.name}: {why_it_ends(error)}")):
        monitor = Monitor(settings, host)
    try:
        Ranks(host.device, lambda: host.is_joint, lambda: monitor is None).settle()
    except RankFailure:
        return None
    return monitor
