"""Lightning's Trainer, as a monitor sees it; all that Lightning keeps to itself is read here."""
# ruff: noqa: D102 - what each member means is told by Host

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from functools import cached_property

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_deadrelu.guarded import guarded
from lightning_deadrelu.monitor.host import Misuse
from lightning_deadrelu.monitor.settings import Settings
from lightning_deadrelu.observe import ranks
from lightning_deadrelu.progress import beside_bars
from lightning_deadrelu.report.loggers import Reporter
from lightning_deadrelu.report.loggers.private_lightning import read_private
from lightning_deadrelu.report.run_report import RunReport
from lightning_deadrelu.warn import warn

_SHARDED = frozenset({"FSDPStrategy", "DeepSpeedStrategy", "XLAFSDPStrategy"})
_LIVE = frozenset({"RichProgressBar"})
_AVERAGING = frozenset({"WeightAveraging", "EMAWeightAveraging", "StochasticWeightAveraging"})


class Misconfiguration(Misuse, MisconfigurationException):
    """What Lightning's users expect of an argument that cannot work."""


class TrainerHost:
    """A Trainer, with the properties that :class:`~lightning_deadrelu.monitor.host.Host` describes."""

    def __init__(self, trainer: Trainer, settings: Settings) -> None:
        self._trainer, self._name = trainer, settings.name
        self.model = trainer.lightning_module
        self._alerts, self._latents = settings.alerts, settings.preset is not None

    @cached_property
    def _reporter(self) -> Reporter:
        """Made at the first report: until then, other callbacks may give the Trainer a logger."""
        loggers, is_first = self._trainer.loggers, self._trainer.is_global_zero
        return Reporter(self._name, loggers, is_first, alerts=self._alerts, latents=self._latents)

    @property
    def called(self) -> nn.Module:
        return self._trainer.strategy.model or self.model

    @property
    def run_name(self) -> str:
        """What the first logger calls the run, as in ``"lightning_logs/version_0"``."""
        parts: list[str] = []
        with guarded(lambda error: None):  # a logger that we do not know may have neither
            for logger in self._trainer.loggers[:1]:
                version = f"version_{logger.version}" if isinstance(logger.version, int) else logger.version
                parts = [str(part) for part in (logger.name, version) if part]
        return "/".join(parts)

    @property
    def optimizers(self) -> Sequence[torch.optim.Optimizer]:
        return self._trainer.optimizers

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def is_joint(self) -> bool:
        return ranks.is_joint(self._trainer.world_size) and self._trainer.state.status != "interrupted"

    @property
    def is_first_rank(self) -> bool:
        return self._trainer.is_global_zero

    @property
    def in_step(self) -> bool:
        return in_training_step(self.model)

    @property
    def steps_once(self) -> bool:
        return self.model.automatic_optimization

    @property
    def clips(self) -> bool:
        return bool(self._trainer.gradient_clip_val) or not self.model.automatic_optimization

    @property
    def schedules(self) -> bool:
        return bool(self._trainer.lr_scheduler_configs)

    @property
    def averages(self) -> str:
        return next((found for one in self._trainer.callbacks if (found := _known(one, _AVERAGING))), "")

    @property
    def unrepairable(self) -> str:
        sharded = _known(self._trainer.strategy, _SHARDED)
        return sharded and f"`{sharded}` shards parameters or keeps other copies of them, which no remedy edits"

    def refusal(self, text: str) -> Misuse:
        return Misconfiguration(text)

    def warn(self, text: str) -> None:
        if self.is_first_rank:
            warn(f"{self._name}: {text}")

    def info(self, text: str) -> None:
        with beside_bars():
            rank_zero_info(f"{self._name}: {text}")

    def show_score(self, dead_fraction: float) -> None:
        self._trainer.callback_metrics[f"{self._name}/dead_fraction"] = torch.tensor(dead_fraction)

    def publish(self, run: RunReport, *, edited: int, at_risk: float, crossed: Sequence[str], closed: bool) -> None:
        if run.report.sites:
            self._reporter.log(run.report, edited, at_risk, run.useful_units if closed else 0)
            if closed:
                self._reporter.media(run)
        self._reporter.alert(crossed, run.report)

    def conclude(self, run: RunReport) -> None:
        self._reporter.media(run, final=True)

    def say_at_end(self, text: str) -> None:
        if self._trainer.fast_dev_run or not self.is_first_rank:
            return
        bar = self._trainer.progress_bar_callback
        if bar is not None and _known(bar, _LIVE):  # it comes after us, and under it a notebook takes no print
            bar.teardown(self._trainer, self.model, "fit")
        print(f"{self._name}: {text}")


def stand_first(trainer: Trainer, callback: Callback) -> None:
    """Have a callback called before all others: one that raises keeps those behind it uncalled, also of the error."""
    trainer.callbacks = [callback, *(one for one in trainer.callbacks if one is not callback)]


def _known(value: object, names: AbstractSet[str]) -> str:
    """Name the class of an object, or the base of it, that is among some; empty if none is."""
    return next((kind.__name__ for kind in type(value).__mro__ if kind.__name__ in names), "")


# -- what Lightning keeps to itself ------------------------------------------------------------------------


def logging_step(trainer: Trainer) -> int:
    """Count steps as Lightning's own monitors do, so that the curves share an x-axis."""
    step: int | None = read_private(trainer.fit_loop.epoch_loop, "_batches_that_stepped", None)
    return trainer.global_step if step is None else step


def trains(trainer: Trainer) -> bool:
    """Whether batches train: StochasticWeightAveraging ends with an epoch that only measures BatchNorm statistics."""
    return not read_private(trainer.fit_loop, "_skip_backward", False)


def in_training_step(model: LightningModule) -> bool:
    """Whether the training step is running: forwards of hooks, also other callbacks', train nothing."""
    return read_private(model, "_current_fx_name", None) in ("training_step", None)
