"""Reports as metrics, and metrics to loggers; the only module that knows loggers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_warn

from lightning_deadrelu.metrics import metrics_of
from lightning_deadrelu.statistics import LivenessReport

__all__ = ["Reporter", "metrics_of"]


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
