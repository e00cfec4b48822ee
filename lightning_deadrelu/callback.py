"""The callback: its arguments, and when what is done."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_deadrelu.monitor import Monitoring, exchange_as_in
from lightning_deadrelu.observe import ranks
from lightning_deadrelu.remedies import Remedy
from lightning_deadrelu.repair.activation_swap import rectifiers
from lightning_deadrelu.settings import Settings
from lightning_deadrelu.statistics import LivenessReport


class DeadReLUMonitor(Monitoring):
    """Watch every rectifier of a model during ``fit``, and say which of its units are dead.

    On one training batch in ``every_n_steps`` it counts, on the device, which units fire. After
    ``window`` such observations all ranks merge their counts, judge once, and log one dictionary of
    metrics to every logger. Watching changes no weight, no random number and no loss.

    Logged: ``dead_relu/dead_fraction``, ``/dead_units``, ``/judged_fraction``, ``/newly_dead_units``,
    ``/revived_units``, ``/redied_units``, ``/rare_fraction``, ``/always_on_fraction``,
    ``/frozen_fraction``, ``/dormant_fraction``, ``/remedied_units``, and ``dead_relu_sites/<site>`` for each
    site.
    ``dead_relu/dead_fraction`` is in ``trainer.callback_metrics``, for ``EarlyStopping`` and
    ``ModelCheckpoint``.

    Args:
        every_n_steps: Observe one training batch in so many; batches that are accumulated count as one.
        window: Observations between verdicts.
        min_samples: A unit that stays silent is dead once so many samples have passed since it last fired;
            299 bound its firing rate below 1 % at 95 % confidence.
        threshold: A site is reported on the terminal, and treated, while more than this share of its units is dead; 0
            means any dead unit.
        remedy: What to do about dead units: a flag (``"reset"``, ``"thermal_kick"``, ``"bias_warming"``, ``"leaky"``,
            ``"leaky_relu"``, ``"rrelu"``, ``"elu"``, ``"selu"``, ``"gelu"``, ``"silu"``), a remedy such as
            :class:`Reset`, your own subclass of :class:`Remedy`, or a list of these: the next is tried where the one
            before did not revive a site. None only watches.
        include: Shell patterns over site names, or kinds such as ``"relu6"``; empty for all rectifiers.
            Smooth activations (``"gelu"``, ``"silu"``, ``"elu"``, ``"leaky_relu"``, ``"softplus"``, ...) are
            watched, for dormancy, when their kind is named here.
        exclude: Patterns or kinds to leave out.
        tau: A unit is dormant if its mean output is at most this share of its layer's mean.
        mask: Called with each observed batch; returns a boolean tensor of shape ``(batch, time)``, True for
            data and False for padding. It applies to activations of shape ``(batch, time, units)`` and
            ``(batch * time, units)``.
        gradient_evidence: At every optimizer step, also look at the gradients of the biases (of the weights where there
            is no bias): a unit that has one fired somewhere in that batch, and its age falls to zero. Every training
            sample counts then, not the observed ones alone. See "Gradient evidence" in the README.
        unit_dims: The dimension that holds the units, by pattern over site names, where the layers before a
            rectifier tell it wrongly or not at all.
        checkup: Look, on the first observed batch, for what is going to kill units, as :func:`checkup` does; the
            findings are told once, and are in ``findings``.
        alerts: Send a W&B alert when a site crosses the threshold; at most one in ten minutes.
        report_dir: A folder for ``report.html`` and ``report.json``, written when training ends, also by an error.
        name: Prefix of the keys; two monitors on one Trainer need two names.

    Raises:
        MisconfigurationException: If an argument makes no sense.

    Example:
        >>> monitor = DeadReLUMonitor(every_n_steps=5)
        >>> monitor.report is None
        True
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
        self.name = name
        self._settings = self._checked_settings()
        self.report = None
        self._pending = None
        self._clear()

    def _checked_settings(self) -> Settings:
        given = {field.name: getattr(self, field.name) for field in fields(Settings)}
        try:
            return Settings(**given)
        except ValueError as error:
            raise MisconfigurationException(str(error)) from None

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
        # checkpoints are loaded after this and before or after on_fit_start
        self._pending = None
        if stage == "fit":
            self._disarm()
            self._clear()

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._trainer = trainer
        self._check_alone(trainer)
        with self._careful():
            self._watch = self._new_watch(pl_module)
            self._watch.substitutes = rectifiers(pl_module)
            self._repair.losses = self._repair.losses.to(self._watch.liveness.magnitude)
        self._reporter.prepare(trainer.loggers, trainer.is_global_zero)
        if not trainer.loggers and not trainer.barebones:
            rank_zero_warn(
                f"{self.name}: the Trainer has no logger, so nothing is logged. The verdicts are in"
                " `monitor.report`; for curves, pass `Trainer(logger=...)`."
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # only here has every strategy restored its checkpoint
        self._running = True
        self._joint = ranks.is_joint(trainer.world_size)
        self._device = pl_module.device
        with self._careful():
            self._repair.start(pl_module)
        if self._pending is not None:
            with self._careful():
                self._restore(self._pending, trainer, pl_module)
        self._pending = None
        self._repair.refusal = self._refusal(trainer)
        self._show(trainer)  # who waits for the key must not crash

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._disarm()
        first = batch_idx % trainer.accumulate_grad_batches == 0
        if first:
            self._observing = self._is_due(self._batches) and _trains(trainer)
        if self._watch and not self._failure:
            with self._careful():
                self._repair.begin(self._patient(trainer), self._observing)
                if self._evidence:
                    self._evidence.begin(self._watch, pl_module, self._observing, first)
                if self._observing:
                    self._watch.valid = self._valid(batch)
                    self._watch.liveness.observation = self._observation
                    if self._examination:
                        self._examination.begin(self._watch)
                    self._watch.probe.arm()

    def _is_due(self, batch: int) -> bool:
        """Whether a batch is to be observed: the first of each ``every_n_steps``, or with a remedy any one of them.

        Tasks, optimizers and heads that take turns would else be met always in the same phase, and what rests in that
        phase be taken for dead.
        """
        block, place = divmod(batch, self.every_n_steps)
        return place == (_scattered(block) % self.every_n_steps if self._repair.ladder.rungs else 0)

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if pl_module.automatic_optimization and self._watch:  # later closures see the batch at other weights
            self._watch.probe.pause()
        if self._evidence and not self._failure:
            with self._careful():
                self._evidence.note_start()

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self._gradients.note(optimizer)
        if self._observing and self._examination:
            self._examination.before_step(pl_module, optimizer)
        if self._watch and not self._failure:
            with self._careful():
                self._recorder.before_step(optimizer, pl_module, self._watch.sites)
                if self._evidence:
                    begun = self._observation + self._observing
                    self._evidence.step(optimizer, begun, pl_module.automatic_optimization)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._disarm()
        self._step = _logging_step(trainer)
        last = (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if self._watch:
            with self._careful():
                self._repair.end(self._patient(trainer), last)
                if self._observing:
                    self._repair.note_loss(loss)
                if not self._failure:
                    self._recorder.after_batch(loss, batch, self._step if last else None)
        if last:
            self._batches += 1
            if self._observing:
                self._observed(trainer, pl_module)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._disarm()
        if self._running and not self._judged:
            self._verdict(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._disarm()
        self._observing = False  # a batch that was skipped does not end
        if not self._judged:  # EarlyStopping and ModelCheckpoint come after this, wherever they are listed
            self._verdict(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._disarm()
        if self._unjudged:
            self._verdict(trainer, pl_module)
        self._stop()
        with self._careful():
            self._conclude(trainer)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._disarm()  # terms in flight are out of the model, but go into a checkpoint that is saved now
        self._running = self._joint = False
        with self._careful():
            if trainer.is_global_zero:
                self._write_report()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stop()

    def _stop(self) -> None:
        self._disarm()
        with self._careful():
            self._repair.stop(self._step)
        self._running = self._joint = False

    def _disarm(self) -> None:
        self._repair.terms.end()
        if self._watch:
            self._watch.probe.disarm()
            self._watch.valid = None

    @override
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore_activations(trainer, pl_module)

    @override
    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore_activations(trainer, pl_module)

    @override
    def on_predict_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore_activations(trainer, pl_module)

    def _restore_activations(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the activations in place that go with the weights which a checkpoint brought outside of a fit."""
        if self._pending and not self._running and trainer.state.fn != "fit":  # a sanity check comes before resuming
            exchange_as_in(self._pending, pl_module)
            self._pending = None


def _logging_step(trainer: Trainer) -> int:
    """Count steps as Lightning's own monitors do, so that the curves share an x-axis."""
    return int(getattr(trainer.fit_loop.epoch_loop, "_batches_that_stepped", trainer.global_step))


def _scattered(number: int) -> int:
    """Hash a number (Knuth's multiplicative hash), 0 to 0."""
    return (number * 2_654_435_761 % 2**32) >> 16


def _trains(trainer: Trainer) -> bool:
    """Whether batches train: StochasticWeightAveraging ends with an epoch that only measures BatchNorm statistics."""
    return not getattr(trainer.fit_loop, "_skip_backward", False)
