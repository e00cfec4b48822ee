"""Reports as metrics, and metrics to loggers; the only module that knows loggers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_warn

from lightning_deadrelu.statistics import LivenessReport

_COUNTED = {"newly_dead": "newly_dead_units", "revived": "revived_units", "redied": "redied_units"}
_SHARED = {name: f"{name}_fraction" for name in ("rare", "always_on", "frozen", "dormant")}


def metrics_of(report: LivenessReport, name: str = "dead_relu", remedied_units: int = 0) -> dict[str, float]:
    """Turn a report into the scalars that are logged.

    Args:
        report: The verdict.
        name: Prefix of the keys.
        remedied_units: Units edited since the last report.

    Returns:
        ``<name>/...`` for the whole model and ``<name>_sites/<site>`` for the dead fraction of each site;
        for smooth activations, of which none is ever dead, ``<name>_dormant/<site>``.

    Example:
        >>> metrics_of(LivenessReport(()))["dead_relu/dead_fraction"]
        0.0
    """
    totals: dict[str, float] = {"dead_fraction": report.dead_fraction, "dead_units": report.dead_units}
    totals["judged_fraction"] = report.fraction("judged")
    totals |= {key: report.total(mask) for mask, key in _COUNTED.items()}
    totals |= {key: report.fraction(mask) for mask, key in _SHARED.items()}
    totals["remedied_units"] = remedied_units
    metrics: dict[str, float] = {f"{name}/{key}": float(value) for key, value in totals.items()}
    for site in report.sites:
        if site.smooth:
            metrics[f"{name}_dormant/{site.name}"] = int(site.dormant.sum()) / site.units
        else:
            metrics[f"{name}_sites/{site.name}"] = site.dead_fraction
    return metrics


class Reporter:
    """Send reports to a Trainer's loggers, one ``log_metrics`` call for each report and logger.

    A logger that fails is left out from then on, with a warning: a broken chart must not end a run.

    Args:
        name: Prefix of the keys.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._broken: set[int] = set()
        self._mapped: dict[str, str] = {}

    def prepare(self, loggers: Iterable[Logger], is_global_zero: bool = True) -> None:
        """Make ``trainer/global_step`` the x-axis in W&B, also of runs that the logger did not start.

        Args:
            loggers: The Trainer's loggers.
            is_global_zero: Whether this is rank 0; elsewhere a run is a dummy.
        """
        for logger in loggers:
            if _is_wandb(logger) and is_global_zero:
                with self._spared(logger):
                    self._define(logger)

    def __call__(
        self, report: LivenessReport, loggers: Iterable[Logger], is_global_zero: bool = True, remedied_units: int = 0
    ) -> None:
        """Log a report.

        Args:
            report: The verdict; its ``step`` is the x-axis.
            loggers: Where to.
            is_global_zero: Whether this is rank 0.
            remedied_units: Units edited since the last report.
        """
        metrics = metrics_of(report, self._name, remedied_units)
        for logger in loggers:
            if id(logger) not in self._broken:
                with self._spared(logger):
                    self._log(logger, metrics, report.step, is_global_zero)

    @contextmanager
    def _spared(self, logger: Logger) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._broken.add(id(logger))
            rank_zero_warn(f"{self._name}: {type(logger).__name__} took no metrics and is left out: {error!r}")

    def _define(self, logger: Any) -> None:
        for section in (self._name, f"{self._name}_sites", f"{self._name}_dormant"):
            logger.experiment.define_metric(f"{section}/*", step_metric="trainer/global_step")

    def _log(self, logger: Logger, metrics: Mapping[str, float], step: int, is_global_zero: bool) -> None:
        if _is_wandb(logger):
            names = _wandb_names(metrics)
            if is_global_zero:
                self._map_names(logger, names)
            metrics = {name: metrics[key] for name, key in names.items()}
        logger.log_metrics(metrics=dict(metrics), step=step)

    def _map_names(self, logger: Any, names: Mapping[str, str]) -> None:
        sites = {name: key.split("/", 1)[1] for name, key in names.items() if not key.startswith(f"{self._name}/")}
        if sites != self._mapped:
            logger.experiment.config.update({f"{self._name}_sites": sites}, allow_val_change=True)
            self._mapped = sites


def _is_wandb(logger: object) -> bool:
    return any(kind.__name__ == "WandbLogger" for kind in type(logger).__mro__)


def _wandb_names(keys: Iterable[str]) -> dict[str, str]:
    """Name keys without dots, which W&B reads as nesting, and no two alike."""
    names: dict[str, str] = {}
    for key in keys:
        name = key.replace(".", "_")
        while name in names:
            name += "_"
        names[name] = key
    return names
