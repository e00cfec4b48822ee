"""From a window's counts to a verdict, the causes of deaths, and the history of the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from lightning_deadrelu.explain.postmortem import DeathEvent
from lightning_deadrelu.explain.postmortem.recorder import FlightRecorder
from lightning_deadrelu.model.rectifiers import WATCHPOINT
from lightning_deadrelu.model.trainable import Gradients, trainable_sites
from lightning_deadrelu.monitor.host import Host
from lightning_deadrelu.monitor.merge import Counted
from lightning_deadrelu.monitor.settings import Settings
from lightning_deadrelu.monitor.state import Window
from lightning_deadrelu.observe.gradient_evidence import GradientEvidence
from lightning_deadrelu.observe.ranks import Ranks
from lightning_deadrelu.observe.watch import Watch
from lightning_deadrelu.report.history import RunHistory
from lightning_deadrelu.statistics import LivenessReport, Totals, UnitHistory, judge
from lightning_deadrelu.statistics.judge import unseen


class Verdict(NamedTuple):
    """A verdict on a window.

    Args:
        whole: What happened in the whole window; what is kept, explained and repaired goes by this.
        news: The same, but what is new is so since the last verdict, which may have been in this window.
        after: What is known of the units from now on, if the window ends here.
    """

    whole: LivenessReport
    news: LivenessReport
    after: UnitHistory


class Verdicts:
    """Judge window after window."""

    def __init__(
        self,
        settings: Settings,
        host: Host,
        watch: Watch,
        evidence: GradientEvidence | None,
        gradients: Gradients,
        ranks: Ranks,
    ) -> None:
        self._settings, self._host, self._watch, self._ranks = settings, host, watch, ranks
        self._evidence, self._gradients = evidence, gradients
        self.units = UnitHistory.empty()
        """What is known of the units from the windows before."""
        self.recorder = FlightRecorder(watch, 3 * settings.every_n_steps * settings.window)
        """Keeps what a post-mortem needs."""
        self.history = RunHistory()
        """Keeps the states of all units, window by window."""
        self.raster = self.history.raster
        """These states, with the open window where there was a verdict in it."""
        self._gone: set[str] = set()  # sites that stopped to run, as was said
        self._matched = False  # whether the patterns were held against the sites

    def judge(self, counted: Counted, window: Window, step: int) -> Verdict:
        """Judge a window, which may go on."""
        self.match_patterns()
        totals = (
            self._evidence.without_refuted(counted.totals, self._watch.layout) if self._evidence else counted.totals
        )
        whole, after = self._judge_since(self.units, totals, window, step)
        reported = window.reported
        news = whole if reported is None else self._judge_since(reported, totals, window, step)[0]
        return Verdict(whole, news, after)

    def _judge_since(
        self, before: UnitHistory, totals: Totals, window: Window, step: int
    ) -> tuple[LivenessReport, UnitHistory]:
        layout, host = self._watch.layout, self._host
        return judge(
            totals,
            before,
            layout,
            self._settings.rules,
            trainable=trainable_sites(layout.sites, host.model, host.optimizers, self._gradients.never),
            step=step,
            steps=window.steps,
            unwatched=self._watch.unwatched(),
        )

    def keep_open(self, verdict: Verdict, counted: Counted, edited: Mapping[str, Sequence[int]]) -> None:
        """Explain and show a window that goes on, until it is judged anew."""
        self.recorder.keep_open(self._explained(verdict, counted))
        self.raster = self.history.with_open(verdict.whole, edited)

    def close(self, verdict: Verdict, counted: Counted, edited: Mapping[str, Sequence[int]]) -> tuple[DeathEvent, ...]:
        """Explain a window that has ended, and keep it."""
        self._tell_unseen(counted.totals)
        self.units = verdict.after
        deaths = self._explained(verdict, counted)
        self.recorder.close_window(counted.totals, counted.readings, deaths)
        self.history.close(verdict.whole, edited)
        self.raster = self.history.raster
        return deaths

    def _tell_unseen(self, totals: Totals) -> None:
        """Say once of each site that it has stopped to run, and that its last verdict stays in the fractions."""
        names = zip(self._watch.layout.names, unseen(totals, self.units), strict=True)
        gone = [name for name, missing in names if missing and name not in self._gone]
        self._gone.update(gone)
        if gone:
            listed = ", ".join(f"`{name}`" for name in gone)
            self._host.warn(f"{listed} did not run in this window; the last verdict stands in all fractions meanwhile.")

    def _explained(self, verdict: Verdict, counted: Counted) -> tuple[DeathEvent, ...]:
        totals, _, readings = counted
        fed = replace(verdict.whole, sites=tuple(site for site in verdict.whole.sites if site.kind != WATCHPOINT))
        return self.recorder.explain(fed, totals, readings, self.history.peaks.of, self._host.optimizers)

    def match_patterns(self) -> None:
        """Refuse patterns that match nothing, and warn about a model with nothing to watch; once."""
        if self._matched:
            return
        self._matched = True
        try:
            self._watch.check_patterns(self._ranks.gather(lambda: self._watch.ran))
        except ValueError as error:
            raise self._host.refusal(f"{self._settings.call}: {error}") from error
        if not any(site.units for site in self._watch.sites):
            self._host.warn(f"no rectifier ran in the observed batches, so there is nothing to watch.{self._instead()}")

    def _instead(self) -> str:
        """Say what is there in place of a rectifier that could be watched."""
        unseen = [f" `{name}`: {why}." for name, why in self._watch.unwatched().items()]
        if smooth := sorted({site.kind for site in self._watch.sites if site.smooth}):
            unseen.append(
                f" Smooth activations ran ({', '.join(smooth)}), of which no unit can be dead; to have them watched for"
                f" dormancy, try `include={smooth}`."
            )
        return "".join(unseen) or " Take the monitor out, or give it a model with a ReLU."
