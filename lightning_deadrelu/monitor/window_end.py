"""What happens where an observation or a window ends, and where a verdict is asked for within one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lightning_deadrelu.explain.finding import ranked
from lightning_deadrelu.explain.postmortem.incoming_weights import incoming_of
from lightning_deadrelu.explain.starving import starving
from lightning_deadrelu.guarded import unless_failed
from lightning_deadrelu.monitor.merge import Counted, merged
from lightning_deadrelu.statistics import LivenessReport

if TYPE_CHECKING:
    from lightning_deadrelu.monitor.monitor import Monitor


def close_observation(monitor: Monitor) -> None:
    """End an observation; also after a failure, as other ranks do."""
    progress, probe = monitor.progress, monitor.watch.probe
    progress.observing = False
    progress.window.close_observation(progress.step)
    if probe.failure:
        monitor.guard.fail(probe.failure)
    _note_observation(monitor)
    _conclude_checkup(monitor)
    if not monitor.guard.ended:
        with monitor.guard():
            monitor.repair.confirm(progress.step, progress.batches - 1)


@unless_failed
def check_mask(monitor: Monitor) -> None:
    """Refuse a mask that has spoken of no layer in the first batch."""
    watch = monitor.watch
    if monitor.progress.batches == 1 and watch.valid is not None and watch.dims and not watch.mask_fits:
        shape = tuple(watch.valid.shape)
        monitor.skip_rest()  # a loop may go on
        raise monitor.host.refusal(
            f"`{monitor.settings.call}(mask=...)`: it returned shape {shape}, and no layer's activations have that"
            " shape, followed by units, so that padding would be counted as data. Return `(batch, time)` as the"
            " model sees them, or drop it with `mask=None`."
        )


@unless_failed
def _note_observation(monitor: Monitor) -> None:
    watch, progress = monitor.watch, monitor.progress
    watch.liveness.observation = progress.window.observations
    monitor.verdicts.recorder.observed(progress.step)
    if not monitor.ranks.joint and (watch.sites or watch.probe.out_of_range):
        monitor.verdicts.match_patterns()


@unless_failed
def _conclude_checkup(monitor: Monitor) -> None:
    checkup, host, monitor.checkup = monitor.checkup, monitor.host, None
    if checkup:
        found = checkup.conclude(
            monitor.watch, host.model, host.optimizers, clipped=host.clips, scheduled=host.schedules
        )
        monitor.progress.findings, monitor.progress.checked = found, True
        monitor.announcer.tell_findings(found, checkup.error)


def judge_open(monitor: Monitor, *, again: bool) -> LivenessReport | None:
    """Judge a window that goes on, or would.

    Args:
        monitor: The monitor.
        again: Whether the next verdict tells of this window only what has changed since.
    """
    counted = _counted(monitor)
    return None if counted is None else _show_open(monitor, counted, again)


@unless_failed
def _show_open(monitor: Monitor, counted: Counted, again: bool) -> LivenessReport:
    verdicts, window = monitor.verdicts, monitor.progress.window
    verdict = verdicts.judge(counted, window, monitor.progress.step)
    verdicts.keep_open(verdict, counted, monitor.repair.edited)
    _publish(monitor, verdict.news, closed=False)
    if again:
        window.reported = verdicts.units.with_deaths_of(verdict.after)
        window.reported_edits = _total(monitor.repair.edited)
    return verdict.news


def close(monitor: Monitor) -> LivenessReport | None:
    """Judge a window that has ended, repair what it shows, and start the next."""
    counted = _counted(monitor)
    report = None if counted is None else _show_closed(monitor, counted)
    if monitor.settings.remedies:
        _settle(monitor)
    monitor.open_window()
    return report


@unless_failed
def _show_closed(monitor: Monitor, counted: Counted) -> LivenessReport:
    verdict = monitor.verdicts.judge(counted, monitor.progress.window, monitor.progress.step)
    deaths = monitor.verdicts.close(verdict, counted, monitor.repair.edited)
    monitor.announcer.tell_deaths(deaths)
    if monitor.settings.checkup:
        _look_for_starving(monitor, verdict.whole)
    monitor.repair.decide(verdict.whole, counted.losses)
    _publish(monitor, verdict.news, closed=True)
    monitor.repair.edited = {}
    return verdict.news


def _look_for_starving(monitor: Monitor, report: LivenessReport) -> None:
    """Say once of each layer that its optimizer starves units, which a check-up before the first step cannot see."""
    host, layout, progress = monitor.host, monitor.watch.layout, monitor.progress
    sources = zip(layout.names, incoming_of(layout.sites, host.model), strict=True)
    known = {finding.where for finding in progress.findings if finding.cause == "muon_rows"}
    found = starving(report, {name: source.weight for name, source in sources if name not in known}, host.optimizers)
    if found:
        progress.findings = ranked([*progress.findings, *found])
        monitor.announcer.tell_findings(found, None)


def _counted(monitor: Monitor) -> Counted | None:
    """Merge the window for a verdict; whether or not it comes about, all ranks go on in step."""
    monitor.progress.judged, monitor.progress.window.unjudged = True, False
    with monitor.guard():
        return merged(monitor)
    return None


def _settle(monitor: Monitor) -> None:
    """Make sure that all ranks want the same edits: they do unless one has failed since the counts were merged."""
    if not monitor.guard.ended:
        with monitor.guard():
            monitor.ranks.settle()
            monitor.repair.mark_in_step()
    if monitor.guard.failure:
        monitor.repair.forget()


def _publish(monitor: Monitor, report: LivenessReport, *, closed: bool) -> None:
    monitor.report, monitor.progress.score = report, report.dead_fraction
    monitor.host.show_score(monitor.progress.score)
    monitor.host.publish(
        monitor.run_report,
        edited=_total(monitor.repair.edited) - monitor.progress.window.reported_edits,
        at_risk=monitor.verdicts.history.at_risk_fraction,
        crossed=monitor.announcer.tell_crossed(report),
        closed=closed,
    )


def _total(edited: Mapping[str, Sequence[int]]) -> int:
    return sum(map(len, edited.values()))
