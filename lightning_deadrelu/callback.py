"""The callback: its arguments, and when what is done."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_deadrelu.monitor.monitor import Monitor
from lightning_deadrelu.monitor.owner import MonitorOwner
from lightning_deadrelu.monitor.settings import Settings
from lightning_deadrelu.monitor.state import exchange_as_in
from lightning_deadrelu.remedies import Remedy
from lightning_deadrelu.statistics import LivenessReport
from lightning_deadrelu.trainer_host import TrainerHost, logging_step, stand_first, trains
from lightning_deadrelu.warn import warn


class DeadReLUMonitor(MonitorOwner, Callback):
    """Watch every rectifier of a model during ``fit``, and say which of its units are dead.

    On one training batch in ``every_n_steps`` it counts, on the device, which units fire. After
    ``window`` such observations all ranks merge their counts, judge once, and log one dictionary of
    metrics to every logger. Watching changes no weight, no random number and no loss.

    Logged: ``dead_relu/dead_fraction``, ``/newly_dead_units``, ``/revived_units`` and ``/at_risk_fraction``, more of
    the whole model under ``dead_relu_details/``, and ``dead_relu_sites/<site>`` for each site.
    ``dead_relu/dead_fraction`` is in ``trainer.callback_metrics``, for ``EarlyStopping`` and
    ``ModelCheckpoint``.

    Args:
        every_n_steps: Observe one training batch in this many; accumulated batches count as one.
        window: Observations between verdicts.
        min_samples: A unit is dead once this many samples have passed since it last fired; after 299, its firing rate
            is below 1 % at 95 % confidence.
        threshold: A site is reported on the terminal, and repaired, while more than this share of its units is dead; 0
            means any dead unit.
        remedy: What to do about dead units: ``"auto"`` (what can be done at each site), another flag (``"reset"``,
            ``"bias_warming"``, ``"wake_up"``, ``"leaky"``, ``"thermal_kick"``, ``"leaky_relu"``, ``"rrelu"``,
            ``"elu"``, ``"selu"``, ``"gelu"``, ``"silu"``), a remedy such as :class:`Reset`, your own subclass of
            :class:`Remedy`, or a list of these, of which the next is tried where the one before failed. None only
            watches.
        include: Shell patterns over site names, or kinds such as ``"relu6"``; empty for all rectifiers.
            Smooth activations (``"gelu"``, ``"silu"``, ``"elu"``, ``"leaky_relu"``, ``"softplus"``, ...) are
            watched, for dormancy, when their kind is named here.
        exclude: Patterns or kinds to leave out.
        tau: A unit is dormant if its mean output is at most this share of its layer's mean.
        mask: Called with each observed batch; returns a boolean tensor of shape ``(batch, time)``, True for
            data and False for padding. It applies to activations of shape ``(batch, time, units)`` and
            ``(batch * time, units)``.
        gradient_evidence: Also look at the gradients of the biases (or of the weights, where there is no bias) at every
            optimizer step. A unit with a gradient fired somewhere in that batch, so its age falls to zero. See
            "Gradient evidence" in the documentation.
        unit_dims: The dimension that holds the units, by pattern over site names, where the layers before a rectifier
            do not tell.
        checkup: Look, on the first observed batch, for what is going to kill units, as :func:`checkup` does; what is
            found is reported once, and kept in ``findings``.
        alerts: Send a W&B alert when a site crosses the threshold; at most one in ten minutes.
        report_dir: A folder for ``report.html`` and ``report.json``, written when training ends, even if by an error.
        preset: ``"sae"`` also logs what is usual for sparse autoencoders, ``<name>_sae/<site>/...``: ``l0``,
            ``dead_features``, ``mean_log10_feature_sparsity``, ``below_1e-5``, ``below_1e-6``,
            ``mean_passes_since_fired``, and a histogram of log densities.
        name: Prefix of the keys; two monitors on one Trainer need two names.

    Raises:
        MisconfigurationException: If an argument makes no sense.

    Example:
        >>> monitor = DeadReLUMonitor(every_n_steps=5)
        >>> monitor.report is None
        True
    """

    all_rates: bool = False
    """Count on each observation, not only a window's first and last, how often units fire; to be set before ``fit``.

    Also count on how many samples a whole layer is silent, and which units are multiples of others.
    """

    def __init__(
        self,
        *,
        every_n_steps: int = 10,
        window: int = 10,
        min_samples: int = 299,
        threshold: float = 0.1,
        remedy: Remedy | str | Sequence[Remedy | str] | None = None,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        tau: float = 0.025,
        mask: Callable[[Any], Tensor] | None = None,
        gradient_evidence: bool = False,
        unit_dims: Mapping[str, int] | None = None,
        checkup: bool = False,
        alerts: bool = False,
        report_dir: str | None = None,
        preset: str | None = None,
        name: str = "dead_relu",
    ) -> None:
        super().__init__()
        self.every_n_steps = every_n_steps
        self.window = window
        self.min_samples = min_samples
        self.threshold = threshold
        self.remedy = remedy
        self.include = include
        self.exclude = exclude
        self.tau = tau
        self.mask = mask
        self.gradient_evidence = gradient_evidence
        self.unit_dims = unit_dims
        self.checkup = checkup
        self.alerts = alerts
        self.report_dir = report_dir
        self.preset = preset
        self.name = name
        self._settings = self._checked_settings()
        self._clear(self.name)

    def _checked_settings(self) -> Settings:
        try:
            return Settings(**{field.name: getattr(self, field.name) for field in fields(Settings)})
        except ValueError as error:
            raise MisconfigurationException(str(error)) from None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._settings.changed})"

    # -- what a user may override ------------------------------------------------------------------------

    def on_verdict(self, trainer: Trainer, pl_module: LightningModule, report: LivenessReport) -> None:
        """Called after each verdict, on every rank: stop the run, page somebody. Does nothing by default.

        Args:
            trainer: The Trainer.
            pl_module: Its module.
            report: The verdict.
        """

    # -- when --------------------------------------------------------------------------------------------

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(name=self.name)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._pending = None  # checkpoints are loaded after this and before or after on_fit_start
        if stage == "fit":
            self._stop()
            self._clear(self.name)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._settings = self._checked_settings()
        _check_trainer(trainer, self)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # only here has every strategy restored its checkpoint
        stand_first(trainer, self)
        self._start(TrainerHost(trainer, self._settings))

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._monitor:
            first = batch_idx % trainer.accumulate_grad_batches == 0
            self._monitor.begin_batch(first=first, trains=trains(trainer))
            if self._settings.mask:
                self._monitor.note_batch(batch)

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if self._monitor:
            self._monitor.before_backward()

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if self._monitor:
            self._monitor.before_step(optimizer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._monitor:
            last = (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch
            loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
            report = self._monitor.end_batch(loss, batch, logging_step(trainer), last=last)
            self._tell(trainer, pl_module, report)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._monitor and self._monitor.running:
            self._monitor.pause()
            self._judge_first(self._monitor, trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._monitor:
            self._monitor.skip_rest()
            self._judge_first(self._monitor, trainer, pl_module)

    def _judge_first(self, monitor: Monitor, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge before EarlyStopping and ModelCheckpoint come for the first time."""
        if not monitor.progress.judged:
            self._tell(trainer, pl_module, monitor.provisional_verdict())

    def _tell(self, trainer: Trainer, pl_module: LightningModule, report: LivenessReport | None) -> None:
        if report is not None:
            self._show(report)
            self.on_verdict(trainer, pl_module, report)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._monitor:
            self._monitor.pause()
            self._tell(trainer, pl_module, self._monitor.last_verdict())
            self._monitor.conclude()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._abort()

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._tell_outcome(pl_module)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stop()

    @override
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the activations in place that go with the weights which a checkpoint brought outside of a fit."""
        if self._pending and trainer.state.fn != "fit":  # a sanity check comes before resuming
            exchange_as_in(self._pending, pl_module)
            self._pending = None

    on_test_epoch_start = on_predict_epoch_start = on_validation_epoch_start

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        if not (self._monitor and self._monitor.running):  # a search for the learning rate puts back what it found
            super().load_state_dict(state_dict)


def _check_trainer(trainer: Trainer, monitor: DeadReLUMonitor) -> None:
    """Refuse what cannot work beside this monitor or at the end, and say what is missing."""
    _check_others([one for one in trainer.callbacks if isinstance(one, DeadReLUMonitor)])
    if monitor.report_dir is not None and trainer.is_global_zero and (reason := _unwritable(Path(monitor.report_dir))):
        raise MisconfigurationException(
            f"`DeadReLUMonitor(report_dir={monitor.report_dir!r})`: the report is written when training ends, and"
            f' {reason}. Try `report_dir="reports"`.'
        )
    if not trainer.loggers and not trainer.barebones and trainer.is_global_zero:
        warn(
            f"{monitor.name}: the Trainer has no logger, so nothing is logged. The verdicts are in `monitor.report`;"
            " for curves, pass `Trainer(logger=...)`."
        )


def _check_others(monitors: Sequence[DeadReLUMonitor]) -> None:
    """Refuse monitors that log under the same keys, or edit the same units."""
    names = [one.name for one in monitors]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise MisconfigurationException(
            f"`DeadReLUMonitor(name={twice!r})` is there {names.count(twice)} times, and all would log under the same"
            f' keys. Give each a name of its own, such as `name="{twice}_2"`.'
        )
    names = [one.name for one in monitors if one.remedy is not None]
    if len(names) > 1:
        raise MisconfigurationException(
            f"The monitors {names} all have a remedy, and would edit the same units. Give one of them all,"
            " as a list, and the others `remedy=None`."
        )


def _unwritable(folder: Path) -> str:
    """Say why nothing can be written into a folder, which need not exist yet; empty if it can."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        return f"`{there}` is a file"
    return "" if os.access(there, os.W_OK | os.X_OK) else f"`{there}` may not be written into"
