"""What a monitor saves of a run, and how it goes on from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning_deadrelu.checkpoint import FORMAT, decode
from lightning_deadrelu.monitor.merge import Counted
from lightning_deadrelu.monitor.settings import Settings
from lightning_deadrelu.monitor.state import MonitorState, RunState, exchange_as_in
from lightning_deadrelu.repair.activation_swap import rectifiers
from lightning_deadrelu.statistics import Totals

if TYPE_CHECKING:
    from lightning_deadrelu.monitor.monitor import Monitor


def run_state(monitor: Monitor, counted: Counted) -> RunState:
    """Gather what a resumed run goes on from."""
    return RunState(
        progress=monitor.progress,
        selection=monitor.settings.selection,
        sites=list(monitor.watch.sites),
        totals=counted.totals,
        units=monitor.verdicts.units,
        never_trained=monitor.gradients.save(monitor.host.model),
        evidence=monitor.evidence.state(monitor.watch) if monitor.evidence else None,
        repair=monitor.repair.state,
        history=monitor.verdicts.history.state,
        recorder=monitor.verdicts.recorder.state,
        announced=monitor.announcer.announced,
        report=monitor.report,
        connectivity=monitor.watch.tracer.state if monitor.repair.traces else None,
    )


def restore(monitor: Monitor, saved: Mapping[str, Any]) -> None:
    """Go on from a checkpoint, as far as it tells."""
    exchange_as_in(saved, monitor.host.model)
    monitor.watch.substitutes = rectifiers(monitor.host.model)
    if saved.get("format") != FORMAT:
        monitor.host.warn("the checkpoint is of another version of the monitor; all ages start at zero.")
    elif (run := decode(MonitorState, saved).run) is None:
        monitor.host.warn("the monitor had failed when the checkpoint was saved; all ages start at zero.")
    else:
        _restore_run(monitor, run)
        _restore_units(monitor, run)


def _restore_run(monitor: Monitor, run: RunState) -> None:
    monitor.progress, monitor.announcer.announced = run.progress, run.announced
    monitor.checkup = None if run.progress.checked else monitor.checkup
    monitor.gradients.load(run.never_trained, monitor.host.model, monitor.host.optimizers)
    monitor.repair.restore(run.repair)
    monitor.verdicts.history.restore(run.history)
    monitor.report = run.report


def _restore_units(monitor: Monitor, run: RunState) -> None:
    if run.selection != monitor.settings.selection:  # the sites are others, and so are their numbers
        monitor.open_window()
        monitor.repair.forget()
        monitor.repair.trace_anew()
        monitor.host.warn("other layers are selected than in the checkpoint, so all ages start at zero.")
        return
    monitor.watch.adopt(run.sites)
    if run.connectivity:
        monitor.watch.tracer.restore(run.connectivity)
    if monitor.evidence and run.evidence:
        monitor.evidence.restore(run.evidence, monitor.watch.sites)
    monitor.verdicts.units = run.units
    monitor.verdicts.recorder.restore(run.recorder)
    if _is_counted_otherwise(run.totals, monitor.settings):
        monitor.open_window()
    elif monitor.host.is_first_rank:  # it holds the counts of all ranks
        monitor.watch.liveness.load(run.totals)


def _is_counted_otherwise(totals: Totals, settings: Settings) -> bool:
    """Whether the open window has another length, or what concerns whole layers is asked for in a part of it alone."""
    redundancy = bool(len(totals.projection))
    return totals.samples.shape[-1] != settings.window or redundancy != settings.rules.redundancy
