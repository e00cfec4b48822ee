"""The callback: when to look, when to judge, and how ranks agree."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_deadrelu import ranks
from lightning_deadrelu.activations import records, rectifiers, reinstate_, restore
from lightning_deadrelu.arguments import check
from lightning_deadrelu.attribution import Attributions
from lightning_deadrelu.ladder import Event
from lightning_deadrelu.remedies import Remedy, ladder_of
from lightning_deadrelu.repair import Patient, Repair
from lightning_deadrelu.reporting import Reporter
from lightning_deadrelu.sites import Site
from lightning_deadrelu.statistics import History, LivenessReport, Rules, Totals, judge
from lightning_deadrelu.trainable import Gradients, trainable_sites
from lightning_deadrelu.watch import Watch

_SHARDED = frozenset({"FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy", "XLAFSDPStrategy"})
_AVERAGING = frozenset({"WeightAveraging", "EMAWeightAveraging", "StochasticWeightAveraging"})
_FORMAT = 2  # of the saved state
_SAVED = ("batches", "observing", "observation", "step", "judged", "unjudged", "score")


class DeadReLUMonitor(Callback):
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
        gradient_evidence: Whether gradients are asked too; this version does not, so False is all it takes.
        unit_dims: The dimension that holds the units, by pattern over site names, where the layers before a
            rectifier tell it wrongly or not at all.
        prog_bar: Show the dead fraction in the progress bar.
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
        prog_bar: bool = False,
        name: str = "dead_relu",
    ) -> None:
        super().__init__()
        try:
            check({name: value for name, value in locals().items() if name not in ("self", "__class__")})
        except ValueError as error:
            raise MisconfigurationException(str(error)) from None
        self.every_n_steps = every_n_steps
        self.window = window
        self.threshold = threshold
        self.remedy = remedy
        self.include = tuple(include)
        self.exclude = tuple(exclude)
        self.rules = Rules(min_samples, tau)
        self.mask = mask
        self.unit_dims = dict(unit_dims or {})
        self.prog_bar = prog_bar
        self.name = name
        self.report: LivenessReport | None = None
        """The latest verdict; None before the first."""
        self._pending: dict[str, Any] | None = None  # what a checkpoint held, until training starts
        self._clear()

    def _clear(self) -> None:
        self.report = None
        self._watch: Watch | None = None
        self._history = History.empty()
        self._repair = self._new_repair()
        self._gradients = Gradients()
        self._reporter = Reporter(self.name)
        self._failure: Exception | None = None
        self._batches = 0  # training batches done, accumulated ones as one
        self._observing = False  # whether the present training batch is being observed
        self._observation = 0  # observations done in the open window
        self._step = 0  # the last training batch, as loggers count
        self._judged = False  # whether there was a verdict in this fit
        self._unjudged = False  # whether there was an observation since the last verdict
        self._score = 0.0  # the dead fraction; units not yet judged count as not dead
        self._running = False  # whether training has begun, and not ended
        self._joint = False  # whether other ranks come to the same hooks
        self._device = torch.device("cpu")  # where ranks communicate
        self._off = False  # whether some rank has failed, and all know
        self._checked = False  # whether the patterns were held against the sites
        self._told: set[str] = set()  # sites already warned about
        self._trainer: Trainer | None = None

    # -- what a user may override ------------------------------------------------------------------------

    def on_verdict(self, trainer: Trainer, pl_module: LightningModule, report: LivenessReport) -> None:
        """Called after each verdict, on every rank: stop the run, page somebody. Does nothing by default.

        Args:
            trainer: The Trainer.
            pl_module: Its module.
            report: The verdict.
        """

    @property
    def events(self) -> tuple[Event, ...]:
        """What was done to which units, when and why; the last 1,000."""
        return tuple(self._repair.events)

    @property
    def attribution(self) -> Attributions | None:
        """Which parameters feed and read each site, where there is a remedy; prints as a table.

        None before the first observed batch. For a look alone, take ``remedy=Reset(dry_run=True)``.
        """
        known = self._watch and self._watch.sites and self._repair.ladder.rungs
        return self._watch.attributions if self._watch and known else None

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
        with self._careful():
            self._watch = self._new_watch(pl_module)
            self._watch.judged_as = rectifiers(pl_module)
            self._repair.losses = self._repair.losses.to(self._watch.liveness.maxima)
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
        if self._pending:
            with self._careful():
                self._restore(self._pending, trainer, pl_module)
        self._pending = None
        self._repair.refusal = self._refusal(trainer)
        self._show(trainer)  # who waits for the key must not crash

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._disarm()
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._observing = self._batches % self.every_n_steps == 0 and _trains(trainer)
        if self._watch and not self._failure:
            with self._careful():
                self._repair.begin(self._patient(trainer), self._observing)
                if self._observing:
                    self._watch.valid = self._valid(batch)
                    self._watch.liveness.observation = self._observation
                    self._watch.probe.arm()

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if pl_module.automatic_optimization and self._watch:  # later closures see the batch at other weights
            self._watch.probe.pause()

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self._gradients.note(optimizer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._disarm()
        self._step = _logging_step(trainer)
        last = (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch
        if self._watch:
            self._repair.end(self._patient(trainer), last)
        if self._observing:
            self._repair.note_loss(outputs.get("loss") if isinstance(outputs, Mapping) else outputs)
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

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stop()

    def _stop(self) -> None:
        self._disarm()
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
        if self._pending and not self._running:
            _exchange_as_in(self._pending, pl_module)
            self._pending = None

    # -- how ---------------------------------------------------------------------------------------------

    def _patient(self, trainer: Trainer) -> Patient:
        assert self._watch is not None
        joint = self._joint and trainer.state.status != "interrupted"
        model = trainer.lightning_module
        return Patient(self._watch, model, trainer.optimizers, trainer.strategy.model or model, joint)

    def _new_repair(self) -> Repair:
        return Repair(ladder_of(self.remedy), self.threshold, self.rules.min_samples, self._tell)

    def _refusal(self, trainer: Trainer) -> str:
        """Say why nothing can be repaired under this strategy; empty if it can."""
        if not self._repair.ladder.rungs:
            return ""
        sharded = [kind.__name__ for kind in type(trainer.strategy).__mro__ if kind.__name__ in _SHARDED]
        if not sharded:
            return ""
        reason = f"`{sharded[0]}` shards parameters or keeps other copies of them, which no remedy edits yet"
        rank_zero_warn(f"{self.name}: {reason}; watching goes on. Set `remedy=None`, or train with `strategy='ddp'`.")
        return reason

    def _tell(self, event: Event) -> None:
        if event.action == "refused":
            rank_zero_warn(f"{self.name}: {event}. `monitor.attribution` shows what is known of all sites.")
        else:
            rank_zero_info(f"{self.name}: {event}")
        copies = [type(one) for one in getattr(self._trainer, "callbacks", []) if _has_name(one, _AVERAGING)]
        if event.action == "edited" and copies and "copies" not in self._told:
            self._told.add("copies")
            rank_zero_warn(f"{self.name}: averaged copies of the weights ({copies[0].__name__}) are left alone.")

    @property
    def _headline(self) -> str:
        return f"{self.name}/dead_fraction"

    @property
    def _selection(self) -> list[Any]:
        dims = [[pattern, dim] for pattern, dim in self.unit_dims.items()]
        return [list(self.include), list(self.exclude), dims]

    def _new_watch(self, pl_module: LightningModule) -> Watch:
        return Watch(
            pl_module,
            include=self.include,
            exclude=self.exclude,
            rules=self.rules,
            window=self.window,
            unit_dims=self.unit_dims,
            keep_fused=True,
            device=pl_module.device,
        )

    def _valid(self, batch: Any) -> Tensor | None:
        """Tell data from padding; a mask that fails is refused at the first batch, and later costs the watch alone."""
        try:
            return self._masked(batch)
        except Exception as error:
            if self._batches:
                raise
            raise MisconfigurationException(f"`DeadReLUMonitor(mask=...)`: {error!r}") from error

    def _masked(self, batch: Any) -> Tensor | None:
        valid = self.mask(batch) if self.mask else None
        if valid is not None and (not isinstance(valid, Tensor) or valid.ndim != 2):
            got = f"shape {tuple(valid.shape)}" if isinstance(valid, Tensor) else type(valid).__name__
            raise TypeError(f"`mask` returned {got}; it has to return a boolean tensor of shape (batch, time), or None")
        return None if valid is None else valid.bool()

    def _observed(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close an observation, and with the last of a window the window; also after a failure, as other ranks do."""
        self._observing = False
        self._unjudged = True
        self._observation += 1
        if self._watch and self._watch.probe.failure:
            self._fail(self._watch.probe.failure)
        if self._watch and not self._failure:
            with self._careful():
                self._watch.liveness.observation = self._observation
        if not self._joint and self._watch and self._watch.sites:
            with self._careful():
                self._check_sites()
        if self._watch and not self._off:
            with self._careful():
                self._repair.confirm(self._patient(trainer), self._step, self._failure is not None)
        if self._observation == self.window:
            self._verdict(trainer, pl_module, close=True)

    def _settled(self) -> bool:
        """Make sure that all ranks want the same edits: they do unless one has failed since the counts were merged."""
        if self._joint and not self._off and ranks.any_failed(self._failure is not None, self._device):
            self._give_up()
        return self._failure is None

    def _give_up(self) -> None:
        """Stop on all ranks together, because one has failed."""
        self._off = True
        self._failure = self._failure or RuntimeError("the monitor failed on another rank")

    def _verdict(self, trainer: Trainer, pl_module: LightningModule, close: bool = False) -> None:
        """Judge the window so far, on all ranks together, and tell everybody."""
        self._judged, self._unjudged = True, False  # also if it fails: all ranks have to keep step
        report = None
        with self._careful():
            if (joined := self._joined()) is not None:
                totals, losses = joined
                self._check_sites()
                report = self._judge(totals, trainer, pl_module, close)
                if close:
                    self._repair.decide(self._patient(trainer), report, losses)
                self._publish(report, trainer)
        if close and self._watch and self._repair.ladder.rungs and not self._settled():
            self._repair.forget(self._patient(trainer))
        if close:
            self._observation = 0
            if self._watch:
                self._watch.liveness.reset()
        if report is not None:
            self.on_verdict(trainer, pl_module, report)

    def _judge(self, totals: Totals, trainer: Trainer, pl_module: LightningModule, close: bool) -> LivenessReport:
        assert self._watch is not None
        sites = self._watch.sites
        report, history = judge(
            totals,
            self._history,
            sites,
            self.rules,
            trainable=trainable_sites(sites, pl_module, trainer.optimizers, self._gradients.never),
            step=self._step,
            unwatched=self._watch.unwatched(),
        )
        if close:
            self._history = history
        return report

    def _publish(self, report: LivenessReport, trainer: Trainer) -> None:
        self.report = report
        self._score = report.dead_fraction
        self._show(trainer)
        if report.sites:
            self._reporter(report, trainer.loggers, trainer.is_global_zero, self._repair.edited_units)
        self._repair.edited_units = 0
        self._warn(report)

    def _warn(self, report: LivenessReport) -> None:
        """Say on the terminal which sites have crossed the threshold, each once in a fit."""
        crossed = [s for s in report.headline if s.dead_fraction > self.threshold and s.name not in self._told]
        self._told.update(site.name for site in crossed)
        if crossed:
            sites = ", ".join(f"`{site.name}` ({int(site.dead.sum())} of {site.units} units)" for site in crossed)
            rank_zero_warn(
                f"{self.name}: more than {self.threshold:.0%} dead at step {report.step}: {sites}. They fired on no"
                f" sample for {self.rules.min_samples} samples or more, and get no gradient."
            )

    def _show(self, trainer: Trainer) -> None:
        trainer.callback_metrics[self._headline] = torch.tensor(self._score)
        if self.prog_bar:
            trainer.progress_bar_metrics[self.name] = self._score  # the whole key would not fit

    def _check_sites(self) -> None:
        """Refuse patterns that match nothing, and warn about a model with nothing to watch; once."""
        assert self._watch is not None
        if self._failure or self._checked:
            return
        self._checked = True
        try:
            self._watch.check_patterns()
        except ValueError as error:
            raise MisconfigurationException(f"DeadReLUMonitor: {error}") from error
        if not any(site.units for site in self._watch.sites):
            unseen = "".join(f" `{name}`: {why}." for name, why in self._watch.unwatched().items())
            rank_zero_warn(
                f"{self.name}: no rectifier ran in the observed batches, so there is nothing to watch.{unseen}"
            )

    def _joined(self) -> tuple[Totals, Tensor] | None:
        """Merge the window's counts over all ranks and bring them to the host; None once any rank has failed.

        Every rank comes here at the same batches, unless it was interrupted. It takes three collectives
        whatever the number of sites; the layouts are exchanged only after one has changed.
        """
        if self._off:
            return None
        losses = self._repair.losses
        if not self._joint or (self._trainer and self._trainer.state.status == "interrupted"):
            return None if self._failure or not self._watch else (self._watch.liveness.totals().to_host(), losses)
        if not ranks.agree(self._watch, self._failure is not None, self._device):
            self._give_up()
            return None
        assert self._watch is not None
        totals, merged = ranks.merge(self._watch, losses.to(self._device))
        self._repair.losses = merged if ranks.rank() == 0 else torch.zeros_like(merged)
        return totals.to_host(), merged

    @contextmanager
    def _careful(self) -> Iterator[None]:
        """Keep a failure of the monitor from ending the run or losing a checkpoint."""
        try:
            yield
        except MisconfigurationException:
            raise
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._disarm()
        if self._failure is None:
            self._failure = error
            where = "".join(traceback.format_tb(error.__traceback__)[-2:])
            warnings.warn(
                f"{self.name}: the monitor failed and watches no longer; training goes on.\n{where}{error!r}",
                stacklevel=2,
            )

    # -- to be continued ---------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._pending is not None:  # loaded, and not yet taken up
            return self._pending
        state: dict[str, Any] = {}
        with self._careful():
            joined = self._joined()
            if self._watch and self._trainer and joined:
                state = {key: getattr(self, f"_{key}") for key in _SAVED}
                state["format"] = _FORMAT
                state["selection"] = self._selection
                state["told"] = sorted(self._told)
                state["sites"] = [list(site) for site in self._watch.sites]
                state["totals"] = {key: tensor.clone() for key, tensor in vars(joined[0]).items()}
                state["history"] = dict(vars(self._history))
                state["never_trained"] = self._gradients.save(self._trainer.lightning_module)
                state["repair"] = self._repair.state_dict()
                state["activations"] = records(self._trainer.lightning_module)
        return state

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not self._running:  # a search for the learning rate puts back what it found, while we go on
            self._pending = state_dict

    def _restore(self, state: Mapping[str, Any], trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._watch is not None
        if state.get("format") != _FORMAT:
            rank_zero_warn(f"{self.name}: the checkpoint is of another version of the monitor; all ages start at zero.")
            return
        for key in _SAVED:
            setattr(self, f"_{key}", state[key])
        self._told = set(state["told"])
        self._gradients.load(state["never_trained"], pl_module, trainer.optimizers)
        _exchange_as_in(state, pl_module)
        self._watch.judged_as = rectifiers(pl_module)
        self._repair.load_state_dict(state["repair"], self._patient(trainer))
        if state["selection"] != self._selection:  # the sites are others, and so are their numbers
            self._observation = 0
            self._repair.forget(self._patient(trainer))
            rank_zero_warn(f"{self.name}: other sites are selected than in the checkpoint, so all ages start at zero.")
            return
        self._watch.adopt(
            Site._make(tuple(item) if isinstance(item, list) else item for item in site) for site in state["sites"]
        )
        self._history = History(**state["history"])
        totals = Totals(**state["totals"])
        if totals.samples.shape[-1] != self.window:  # the open window has another length: start anew
            self._observation = 0
        elif trainer.global_rank == 0:  # it holds the counts of all ranks
            self._watch.liveness.load(totals)

    def __getstate__(self) -> dict[str, Any]:
        # Lightning binds `log` to the model; a copy of the callback must not copy that, nor watch
        state = {key: value for key, value in vars(self).items() if key not in ("log", "log_dict")}
        fresh: dict[str, Any] = {
            "_watch": None,
            "_trainer": None,
            "_gradients": Gradients(),
            "_reporter": Reporter(self.name),
        }
        fresh["_repair"] = self._new_repair()
        return state | fresh | {"_running": False, "_joint": False}


def _exchange_as_in(state: Mapping[str, Any], pl_module: LightningModule) -> None:
    """Have the activations that go with the weights of a checkpoint, and no others."""
    saved = state.get("activations", [])
    restore(pl_module, saved)
    reinstate_(pl_module, keep={record["path"] for record in saved})


def _has_name(value: object, names: AbstractSet[str]) -> bool:
    return any(kind.__name__ in names for kind in type(value).__mro__)


def _logging_step(trainer: Trainer) -> int:
    """Count steps as Lightning's own monitors do, so that the curves share an x-axis."""
    return int(getattr(trainer.fit_loop.epoch_loop, "_batches_that_stepped", trainer.global_step))


def _trains(trainer: Trainer) -> bool:
    """Whether batches train: StochasticWeightAveraging ends with an epoch that only measures BatchNorm statistics."""
    return not getattr(trainer.fit_loop, "_skip_backward", False)
