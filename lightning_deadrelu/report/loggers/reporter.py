"""When which logger gets what."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from functools import partial

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_warn

from lightning_deadrelu.guarded import guarded
from lightning_deadrelu.report.loggers.adapters import Adapter, adapter_of
from lightning_deadrelu.report.loggers.media import is_due, media_of
from lightning_deadrelu.report.metrics import metrics_of
from lightning_deadrelu.report.run_report import RunReport
from lightning_deadrelu.statistics import LivenessReport
from lightning_deadrelu.statistics.report_table import headline

_LONGEST_TITLE = 63  # W&B takes less than 64 characters


class Reporter:
    """Send reports to a Trainer's loggers, one ``log_metrics`` call for each report and logger.

    A logger that fails is left out from then on, with a warning: a broken chart must not end a run. One that
    fails with pictures goes on getting scalars.

    Args:
        name: Prefix of the keys.
        media_every_n_windows: Pictures, tables and firing rates are sent at windows 1, 2, 4, 8, ... and then at each
            such window, rarer in long runs; 0 for never. They are made once for all loggers.
        alerts: Whether W&B alerts when :meth:`alert` is called.
        alert_wait: Seconds between alerts, at least; what comes too early joins the next.
        latents: Whether what is usual for sparse autoencoders is sent, too.
    """

    def __init__(
        self,
        name: str,
        media_every_n_windows: int = 50,
        alerts: bool = False,
        alert_wait: float = 600.0,
        latents: bool = False,
    ) -> None:
        self._name, self._latents = name, latents
        self._every = media_every_n_windows
        self._alerts = alerts
        self._wait = alert_wait
        self._alerted = -alert_wait
        self._waiting: list[str] = []  # sites that no alert has named yet
        self._adapters: dict[int, Adapter] = {}  # each holds its logger, so no other gets its id
        self._drawn = -1  # the last step that was drawn

    def _served(self, loggers: Iterable[Logger]) -> list[Adapter]:
        return [self._adapters.setdefault(id(one), adapter_of(one, self._name)) for one in loggers]

    def prepare(self, loggers: Iterable[Logger], is_global_zero: bool = True) -> None:
        """Do what trackers need once: make ``trainer/global_step`` the x-axis in W&B.

        Args:
            loggers: The Trainer's loggers.
            is_global_zero: Whether this is rank 0; elsewhere a run is a dummy.
        """
        for adapter in self._served(loggers) if is_global_zero else ():
            adapter.attempt("metrics", adapter.prepare, rank_zero_warn)

    def __call__(
        self,
        report: LivenessReport,
        loggers: Iterable[Logger],
        is_global_zero: bool = True,
        remedied_units: int = 0,
        at_risk_fraction: float = 0.0,
        useful_units: int = 0,
    ) -> None:
        """Log a report.

        Args:
            report: The verdict; its ``step`` is the x-axis.
            loggers: Where to.
            is_global_zero: Whether this is rank 0.
            remedied_units: Units edited since the last report.
            at_risk_fraction: Share of the units that sink towards silence.
            useful_units: Repaired units that were found to matter to the loss.
        """
        metrics = metrics_of(report, self._name, remedied_units, at_risk_fraction, useful_units, latents=self._latents)
        for adapter in self._served(loggers):
            adapter.attempt("metrics", partial(adapter.log, metrics, report.step, is_global_zero), rank_zero_warn)

    def media(
        self, run: RunReport, loggers: Iterable[Logger], is_global_zero: bool = True, final: bool = False
    ) -> None:
        """Send pictures, tables and firing rates, if this window is one that draws; call it after each.

        Args:
            run: What to send, with this window.
            loggers: Where to; those that take no pictures are passed over.
            is_global_zero: Whether this is rank 0; elsewhere nothing happens.
            final: Whether training ends: then it draws, unless this verdict was drawn before.
        """
        takers = [adapter for adapter in self._served(loggers) if adapter.takes_media]
        due = bool(self._every) and (final or is_due(run.history.windows, self._every, run.history.stride))
        if not (takers and due and is_global_zero and run.report.sites) or run.report.step == self._drawn:
            return
        self._drawn = run.report.step
        with guarded(self._draw_no_more):
            media = media_of(run, self._latents)
            for adapter in takers:
                adapter.attempt("media", partial(adapter.show, media), rank_zero_warn)

    def _draw_no_more(self, error: Exception) -> None:
        self._every = 0
        rank_zero_warn(f"{self._name}: pictures could not be made, and are left out: {error!r}")

    def alert(
        self, sites: Sequence[str], report: LivenessReport, loggers: Iterable[Logger], is_global_zero: bool = True
    ) -> None:
        """Alert that sites have crossed the threshold, if alerts were asked for, and not too often.

        Args:
            sites: Their names.
            report: The verdict.
            loggers: Of these, W&B's are alerted.
            is_global_zero: Whether this is rank 0; elsewhere nothing happens.
        """
        self._waiting += sites if self._alerts and is_global_zero else ()
        takers = [adapter for adapter in self._served(loggers) if adapter.takes_alerts]
        if not self._waiting or not takers or time.monotonic() - self._alerted < self._wait:
            return
        title, text = alert_of(self._waiting, report)
        self._waiting, self._alerted = [], time.monotonic()
        for adapter in takers:
            adapter.attempt("alert", partial(adapter.alert, title, text), rank_zero_warn)


def alert_of(sites: Sequence[str], report: LivenessReport) -> tuple[str, str]:
    """Word an alert: the title, and the text.

    Example:
        >>> alert_of(["net.1"], LivenessReport((), step=7))
        ('Dead ReLU units in net.1', 'At step 7: No rectifier was watched.')
    """
    title = f"Dead ReLU units in {sites[0] if len(sites) == 1 else f'{len(sites)} layers'}"[:_LONGEST_TITLE]
    lines = [f"At step {report.step:,}: {headline(report)}"]
    crossed = [site for site in report.sites if site.name in sites]
    lines += [f"{site.name}: {int(site.dead.sum()):,} of {site.units:,}" for site in crossed[:20]]
    return title, "\n".join(lines + [f"... and {len(crossed) - 20} more"] * (len(crossed) > 20))
