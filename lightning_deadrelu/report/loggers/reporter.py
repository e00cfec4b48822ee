"""When which logger gets what, and what happens if it fails."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_warn

from lightning_deadrelu.report.loggers.adapters import TRACKERS, kind_of, lay_out, names_of
from lightning_deadrelu.report.loggers.images import can_draw
from lightning_deadrelu.report.loggers.media import is_due, media_of
from lightning_deadrelu.report.metrics import metrics_of
from lightning_deadrelu.report.run_report import RunReport
from lightning_deadrelu.statistics import LivenessReport

_LONGEST_TITLE = 63  # W&B takes less than 64 characters
_SECTIONS = ("", "_sites", "_dormant", "_rates")


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
    """

    def __init__(
        self, name: str, media_every_n_windows: int = 50, alerts: bool = False, alert_wait: float = 600.0
    ) -> None:
        self._name = name
        self._every = media_every_n_windows
        self._alerts = alerts
        self._wait = alert_wait
        self._alerted = -alert_wait
        self._waiting: list[str] = []
        self._broken: set[int] = set()
        self._no_media: set[int] = set()
        self._laid_out: set[int] = set()
        self._mapped: dict[str, str] = {}
        self._drawn = -1
        self._warned = False

    def prepare(self, loggers: Iterable[Logger], is_global_zero: bool = True) -> None:
        """Make ``trainer/global_step`` the x-axis in W&B, also of runs that the logger did not start.

        Args:
            loggers: The Trainer's loggers.
            is_global_zero: Whether this is rank 0; elsewhere a run is a dummy.
        """
        for logger in loggers:
            if kind_of(logger) == "WandbLogger" and is_global_zero:
                with self._spared(logger):
                    self._define(logger)

    def __call__(
        self,
        report: LivenessReport,
        loggers: Iterable[Logger],
        is_global_zero: bool = True,
        remedied_units: int = 0,
        at_risk_fraction: float = 0.0,
    ) -> None:
        """Log a report.

        Args:
            report: The verdict; its ``step`` is the x-axis.
            loggers: Where to.
            is_global_zero: Whether this is rank 0.
            remedied_units: Units edited since the last report.
            at_risk_fraction: Share of the units that sink towards silence.
        """
        metrics = metrics_of(report, self._name, remedied_units, at_risk_fraction)
        for logger in loggers:
            if id(logger) not in self._broken:
                with self._spared(logger):
                    self._log(logger, metrics, report.step, is_global_zero)

    def media(
        self,
        run: RunReport,
        loggers: Iterable[Logger],
        is_global_zero: bool = True,
        final: bool = False,
    ) -> None:
        """Send pictures, tables and firing rates, if this window is one that draws; call it after each.

        Args:
            run: What to send, with this window.
            loggers: Where to; those that take no pictures are passed over.
            is_global_zero: Whether this is rank 0; elsewhere nothing happens.
            final: Whether training ends: then it draws, unless this verdict was drawn before.
        """
        barred = self._broken | self._no_media
        takers = [logger for logger in loggers if kind_of(logger) and id(logger) not in barred]
        due = bool(self._every) and (final or is_due(run.history.windows, self._every, run.history.stride))
        if not (takers and due and is_global_zero and run.report.sites) or run.report.step == self._drawn:
            return
        self._drawn = run.report.step
        self._warn_if_blind()
        try:
            media = media_of(run)
        except Exception as error:
            self._no_media |= set(map(id, takers))
            rank_zero_warn(f"{self._name}: pictures could not be made, and are left out: {error!r}")
            return
        for logger in takers:
            with self._spared(logger, "media"):
                TRACKERS[kind_of(logger)](logger, media, self._name)

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
        runs = [one for one in loggers if kind_of(one) == "WandbLogger" and id(one) not in self._broken]
        if not self._waiting or not runs or time.monotonic() - self._alerted < self._wait:
            return
        title, text = alert_of(self._waiting, report)
        self._waiting, self._alerted = [], time.monotonic()
        for logger in runs:
            with self._spared(logger, "alert"):
                logger.experiment.alert(title=title, text=text, level="WARN")

    def _warn_if_blind(self) -> None:
        if not can_draw() and not self._warned:
            self._warned = True
            rank_zero_warn(f"{self._name}: there are no rasters, because Pillow is missing. Try `pip install pillow`.")

    @contextmanager
    def _spared(self, logger: Logger, what: str = "metrics") -> Iterator[None]:
        try:
            yield
        except Exception as error:
            (self._broken if what == "metrics" else self._no_media).add(id(logger))
            rank_zero_warn(f"{self._name}: {type(logger).__name__} took no {what} and is left out: {error!r}")

    def _define(self, logger: Any) -> None:
        for section in _SECTIONS:
            logger.experiment.define_metric(f"{self._name}{section}/*", step_metric="trainer/global_step")

    def _log(self, logger: Logger, metrics: Mapping[str, float], step: int, is_global_zero: bool) -> None:
        names, kind = names_of(logger, metrics), kind_of(logger)
        if kind == "WandbLogger" and is_global_zero:
            self._map_names(logger, names)
        logger.log_metrics(metrics={name: metrics[key] for name, key in names.items()}, step=step)
        if kind == "TensorBoardLogger" and is_global_zero and id(logger) not in self._laid_out | self._no_media:
            self._laid_out.add(id(logger))
            with self._spared(logger, "media"):
                lay_out(logger, self._name)

    def _map_names(self, logger: Any, names: Mapping[str, str]) -> None:
        sites = {name: key.split("/", 1)[1] for name, key in names.items() if not key.startswith(f"{self._name}/")}
        if sites != self._mapped:
            logger.experiment.config.update({f"{self._name}_sites": sites}, allow_val_change=True)
            self._mapped = sites


def alert_of(sites: Sequence[str], report: LivenessReport) -> tuple[str, str]:
    """Word an alert: the title, and the text.

    Args:
        sites: Names of the sites that crossed the threshold.
        report: The verdict.

    Example:
        >>> alert_of(["net.1"], LivenessReport((), step=7))
        ('Dead ReLU units in net.1', 'At step 7, 0 of 0 units are dead (0.0%).')
    """
    title = f"Dead ReLU units in {sites[0] if len(sites) == 1 else f'{len(sites)} sites'}"[:_LONGEST_TITLE]
    lines = [f"At step {report.step:,}, {report.dead_units:,} of {report.units:,} units are dead"]
    lines[0] += f" ({report.dead_fraction:.1%})."
    crossed = [site for site in report.sites if site.name in sites]
    lines += [f"{site.name}: {int(site.dead.sum()):,} of {site.units:,}" for site in crossed[:20]]
    return title, "\n".join(lines + [f"... and {len(crossed) - 20} more"] * (len(crossed) > 20))
