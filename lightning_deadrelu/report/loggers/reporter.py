"""When which logger gets what."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from functools import partial

from lightning.pytorch.loggers import Logger

from lightning_deadrelu.guarded import guarded
from lightning_deadrelu.report.loggers.adapters import adapter_of
from lightning_deadrelu.report.loggers.media import is_due, media_of
from lightning_deadrelu.report.metrics import metrics_of
from lightning_deadrelu.report.run_report import RunReport
from lightning_deadrelu.statistics import LivenessReport
from lightning_deadrelu.statistics.report_table import headline
from lightning_deadrelu.warn import warn

_LONGEST_TITLE = 63  # W&B takes less than 64 characters
_SECONDS_BETWEEN_ALERTS = 600.0


class Reporter:
    """Send reports to a Trainer's loggers, one ``log_metrics`` call for each report and logger.

    A logger that fails is left out from then on, with a warning: a broken chart must not end a run. One that fails with
    pictures goes on getting scalars. Pictures, tables and firing rates are made once for all loggers, at windows 1, 2,
    4, 8, ... and then at each fiftieth, rarer in long runs.

    Args:
        name: Prefix of the keys.
        loggers: Where to; W&B's gets ``trainer/global_step`` as its x-axis.
        is_first_rank: Whether this is rank 0; elsewhere a run is a dummy, which gets scalars alone.
        alerts: Whether W&B alerts when :meth:`alert` is called.
        latents: Whether what is usual for sparse autoencoders is sent, too.
    """

    def __init__(
        self,
        name: str,
        loggers: Iterable[Logger],
        is_first_rank: bool = True,
        *,
        alerts: bool = False,
        latents: bool = False,
    ) -> None:
        self._name, self._is_first_rank, self._alerts, self._latents = name, is_first_rank, alerts, latents
        self._adapters = [adapter_of(logger, name) for logger in loggers]
        self._waiting: list[str] = []  # sites that no alert has named yet
        self._alerted = -math.inf
        self._draws, self._drawn = is_first_rank, -1  # the last step that was drawn
        for adapter in self._adapters if is_first_rank else ():
            adapter.attempt("metrics", adapter.prepare)

    def log(
        self, report: LivenessReport, remedied_units: int = 0, at_risk_fraction: float = 0.0, useful_units: int = 0
    ) -> None:
        """Log the scalars of a report, whose ``step`` is the x-axis; see :func:`metrics_of`."""
        metrics = metrics_of(report, self._name, remedied_units, at_risk_fraction, useful_units, latents=self._latents)
        for adapter in self._adapters:
            adapter.attempt("metrics", partial(adapter.log, metrics, report.step, self._is_first_rank))

    def media(self, run: RunReport, final: bool = False) -> None:
        """Send pictures, tables and firing rates, if this window is one that draws; to be called after each.

        Args:
            run: What to send, with this window.
            final: Whether training ends: then it draws, unless this verdict was drawn before.
        """
        takers = [adapter for adapter in self._adapters if adapter.takes_media]
        due = self._draws and (final or is_due(run.history.windows, run.history.stride))
        if not (takers and due and run.report.sites) or run.report.step == self._drawn:
            return
        self._drawn = run.report.step
        with guarded(self._draw_no_more):
            media = media_of(run, self._latents)
            for adapter in takers:
                adapter.attempt("media", partial(adapter.show, media))

    def _draw_no_more(self, error: Exception) -> None:
        self._draws = False
        warn(f"{self._name}: pictures could not be made, and are left out: {error!r}")

    def alert(self, sites: Sequence[str], report: LivenessReport) -> None:
        """Alert that some sites have crossed the threshold, if that was asked for; what is too early joins the next."""
        self._waiting += sites if self._alerts and self._is_first_rank else ()
        takers = [adapter for adapter in self._adapters if adapter.takes_alerts]
        if not self._waiting or not takers or time.monotonic() - self._alerted < _SECONDS_BETWEEN_ALERTS:
            return
        title, text = alert_of(self._waiting, report)
        self._waiting, self._alerted = [], time.monotonic()
        for adapter in takers:
            adapter.attempt("alert", partial(adapter.alert, title, text))


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
