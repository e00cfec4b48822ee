"""The callback: when to look, when to judge, and how ranks agree."""

from __future__ import annotations

import hashlib
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_deadrelu.reporting import Reporter, prepare
from lightning_deadrelu.sites import Site, clean
from lightning_deadrelu.statistics import History, LivenessReport, Rules, Totals, judge
from lightning_deadrelu.watch import Watch


class DeadReLUMonitor(Callback):
    """Watch every rectifier of a model during ``fit``, and say which of its units are dead.

    On one training batch in ``every_n_steps`` it counts, on the device, which units fire. After
    ``window`` such observations all ranks merge their counts, judge once, and log one dictionary of
    metrics to every logger. Watching changes no weight, no random number and no loss.

    Logged: ``dead_relu/dead_fraction``, ``/dead_units``, ``/judged_fraction``, ``/newly_dead_units``,
    ``/revived_units``, ``/redied_units``, ``/rare_fraction``, ``/always_on_fraction``,
    ``/frozen_fraction``, ``/dormant_fraction``, and ``dead_relu_sites/<site>`` for each site.
    ``dead_relu/dead_fraction`` is in ``trainer.callback_metrics``, for ``EarlyStopping`` and
    ``ModelCheckpoint``.

    Args:
        every_n_steps: Observe one training batch in so many; batches that are accumulated count as one.
        window: Observations between verdicts.
        min_samples: A unit that stays silent is dead once so many samples have passed since it last fired;
            299 bound its firing rate below 1 % at 95 % confidence.
        threshold: A site is reported on the terminal when more than this share of its units is dead.
        include: Shell patterns over site names, or kinds such as ``"relu6"``; empty for all rectifiers.
            Smooth activations (``"gelu"``, ``"silu"``, ``"elu"``, ``"leaky_relu"``, ``"softplus"``, ...) are
            watched, for dormancy, when their kind is named here.
        exclude: Patterns or kinds to leave out.
        tau: A unit is dormant if its mean output is at most this share of its layer's mean.
        mask: Called with each observed batch; returns a boolean tensor of shape ``(batch, time)``, True for
            data and False for padding. It applies to activations of shape ``(batch, time, units)`` and
            ``(batch * time, units)``.
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
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        tau: float = 0.025,
        mask: Callable[[Any], Tensor] | None = None,
        unit_dims: Mapping[str, int] | None = None,
        prog_bar: bool = False,
        name: str = "dead_relu",
    ) -> None:
        super().__init__()
        _check_counts(every_n_steps=every_n_steps, window=window, min_samples=min_samples)
        _check_shares(threshold=threshold, tau=tau)
        _check_patterns(include=include, exclude=exclude)
        if not isinstance(name, str) or not name.isidentifier():
            _refuse("name", name, "metric keys start with it", 'name="dead_relu"')
        if mask is not None and not callable(mask):
            _refuse("mask", mask, "it is called with each batch", 'mask=lambda batch: batch["attention_mask"]')
        self.every_n_steps = every_n_steps
        self.window = window
        self.threshold = threshold
        self.include = tuple(include)
        self.exclude = tuple(exclude)
        self.rules = Rules(min_samples, tau)
        self.mask = mask
        self.unit_dims = dict(unit_dims or {})
        self.prog_bar = prog_bar
        self.name = name
        self.report: LivenessReport | None = None
        """The latest verdict; None before the first."""
        self._pending: dict[str, Any] | None = None
        self._clear()

    def _clear(self) -> None:
        self._watch: Watch | None = None
        self._history = History.empty()
        self._reporter = Reporter(self.name)
        self._failure: Exception | None = None
        self._batches = 0  # training batches begun, accumulated ones as one
        self._observing = False  # whether the present training batch is being observed
        self._judged = False  # whether there was a verdict in this fit
        self._together = False  # whether all ranks run the same hooks
        self._off = False  # whether some rank has failed, and all know
        self._told: set[str] = set()  # sites already warned about; "" once the layout has been checked

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
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._disarm()
        self._clear()
        self.report = None
        with self._careful():
            self._watch = self._new_watch(pl_module)
            if trainer.loggers:
                prepare(trainer.loggers, self.name, trainer.is_global_zero)
            elif not trainer.barebones:
                rank_zero_warn(
                    f"{self.name}: the Trainer has no logger, so nothing is logged. The verdicts are in"
                    " `monitor.report` and `trainer.callback_metrics`; for curves, pass `Trainer(logger=...)`."
                )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # only here has every strategy restored its checkpoint
        self._together = True
        if self._pending:
            with self._careful():
                self._restore(self._pending, trainer.global_rank)
        self._pending = None

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._disarm()
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._observing = self._batches % self.every_n_steps == 0
            self._batches += 1
        if self._observing and self._watch and not self._failure:
            with self._careful():
                self._watch.valid = self.mask(batch).bool() if self.mask else None
                self._watch.probe.arm()

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if pl_module.automatic_optimization:  # later closures of the same batch see it at other weights
            self._disarm()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._disarm()
        last = trainer.is_last_batch
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or last
        if self._observing and stepped and self._watch:
            self._observing = False
            self._observed(trainer, pl_module)
        if last and not self._judged:
            self._verdict(trainer, pl_module)
        if self.prog_bar and self.report and not trainer.barebones:
            self.log(self._headline, self.report.dead_fraction, prog_bar=True, logger=False)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._disarm()
        if self._together and not trainer.sanity_checking and not self._judged:
            self._verdict(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._disarm()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._disarm()
        if self._watch and self._watch.liveness.observation:
            self._verdict(trainer, pl_module, close=True)
        self._together = False
        self._pending = None

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
        self._together = False

    def _disarm(self) -> None:
        if self._watch:
            self._watch.probe.disarm()
            self._watch.valid = None

    # -- how ---------------------------------------------------------------------------------------------

    @property
    def _headline(self) -> str:
        return f"{self.name}/dead_fraction"

    def _new_watch(self, pl_module: LightningModule) -> Watch:
        return Watch(
            pl_module,
            include=self.include,
            exclude=self.exclude,
            rules=self.rules,
            window=self.window,
            unit_dims=self.unit_dims,
            device=pl_module.device,
        )

    def _observed(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close an observation, and with the last of a window the window."""
        assert self._watch is not None
        if self._watch.probe.failure and not self._failure:
            self._fail(self._watch.probe.failure)
        self._watch.liveness.observation += 1
        if self._ranks() == 1:
            self._check_sites()
        if self._watch.liveness.observation == self.window:
            self._verdict(trainer, pl_module, close=True)

    def _verdict(self, trainer: Trainer, pl_module: LightningModule, close: bool = False) -> None:
        """Judge the window so far, on all ranks together, and tell everybody."""
        report = None
        with self._careful():
            if (totals := self._joined()) is not None:
                self._check_sites()
                report = self._judge(totals, trainer, pl_module, close)
                self._publish(report, trainer)
        if self._watch and close:
            self._watch.liveness.reset()
        trainer.callback_metrics.setdefault(self._headline, torch.tensor(0.0))  # who waits for it must not crash
        if report is not None:
            self.on_verdict(trainer, pl_module, report)

    def _judge(self, totals: Totals, trainer: Trainer, pl_module: LightningModule, close: bool) -> LivenessReport:
        assert self._watch is not None
        report, history = judge(
            totals,
            self._history,
            self._watch.sites,
            self.rules,
            trainable=trainable_sites(self._watch.sites, pl_module, trainer.optimizers),
            step=_logging_step(trainer),
            unwatched=self._watch.unwatched(),
        )
        if close:
            self._history = history
        return report

    def _publish(self, report: LivenessReport, trainer: Trainer) -> None:
        self.report = report
        self._judged = True
        trainer.callback_metrics[self._headline] = torch.tensor(report.dead_fraction)
        if report.sites:
            self._reporter(report, trainer.loggers, trainer.is_global_zero)
        for site in report.headline:
            if site.dead_fraction > self.threshold and site.name not in self._told:
                self._told.add(site.name)
                rank_zero_warn(
                    f"{self.name}: {int(site.dead.sum())} of the {site.units} units of `{site.name}` are dead at step"
                    f" {report.step}: they fired on none of the last"
                    f" {int(site.age[site.dead].min()):,} samples or more, get no gradient and will not recover by themselves."
                )

    def _check_sites(self) -> None:
        """Refuse patterns that match nothing, and warn about a model with nothing to watch; once."""
        assert self._watch is not None
        if self._failure or "" in self._told:
            return
        self._told.add("")
        try:
            self._watch.check_patterns()
        except ValueError as error:
            raise MisconfigurationException(f"DeadReLUMonitor: {error}") from error
        if not any(site.units for site in self._watch.sites):
            unseen = "".join(f" `{name}`: {why}." for name, why in self._watch.unwatched().items())
            rank_zero_warn(
                f"{self.name}: no rectifier ran in the observed batches, so there is nothing to watch.{unseen}"
            )

    # -- together ----------------------------------------------------------------------------------------

    def _ranks(self) -> int:
        return dist.get_world_size() if self._together and dist.is_available() and dist.is_initialized() else 1

    def _joined(self) -> Totals | None:
        """Merge the window's counts over all ranks and bring them to the host; None once any rank has failed.

        Every rank comes here at the same batches. It takes three collectives whatever the number of sites:
        a fixed-size header, one sum and one maximum; the layouts are exchanged only after one has changed.
        """
        if self._watch is None or (self._failure and self._ranks() == 1) or self._off:
            return None
        if self._ranks() > 1 and not self._agree():
            return None
        totals = self._watch.liveness.totals()
        if self._ranks() > 1:
            sums, maxima = totals.sums(), totals.maxima.clone()
            dist.all_reduce(sums, dist.ReduceOp.SUM)
            dist.all_reduce(maxima, dist.ReduceOp.MAX)
            totals = totals.merged(sums, maxima)
        return totals.to_host()

    def _agree(self) -> bool:
        """Settle on one layout; False if a rank has failed, after which none watches any longer."""
        assert self._watch is not None
        mark = _fingerprint(self._watch.sites)
        header = torch.tensor([mark, -mark, float(self._failure is not None)], dtype=torch.float64)
        header = header.to(self._watch.liveness.device)
        dist.all_reduce(header, dist.ReduceOp.MAX)
        highest, lowest, failed = header.tolist()
        if failed:
            self._off = True
            self._failure = self._failure or RuntimeError("the monitor failed on another rank")
            return False
        if highest != -lowest:
            layouts: list[Any] = [None] * self._ranks()
            dist.all_gather_object(layouts, self._watch.sites)
            self._watch.adopt(dict.fromkeys(site for layout in layouts for site in layout))
        return True

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
        state: dict[str, Any] = {}
        with self._careful():
            totals = self._joined() if self._watch else None
            if self._watch and totals:
                state = {
                    "sites": [list(site) for site in self._watch.sites],
                    "totals": {key: tensor.clone() for key, tensor in vars(totals).items()},
                    "history": vars(self._history),
                    "observation": self._watch.liveness.observation,
                    "observing": self._observing,
                    "batches": self._batches,
                    "judged": self._judged,
                    "told": sorted(self._told),
                }
        return state

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._pending = state_dict

    def _restore(self, state: Mapping[str, Any], rank: int) -> None:
        assert self._watch is not None
        self._watch.adopt(
            Site._make(tuple(item) if isinstance(item, list) else item for item in site) for site in state["sites"]
        )
        self._history = History(**state["history"])
        totals = Totals(**state["totals"])
        if totals.samples.shape[-1] == self.window:  # else the open window has another length: start anew
            self._watch.liveness.observation = state["observation"]
            if rank == 0:  # it holds the counts of all ranks
                self._watch.liveness.load(totals)
        self._observing, self._batches, self._judged = state["observing"], state["batches"], state["judged"]
        self._told = set(state["told"])

    def __getstate__(self) -> dict[str, Any]:
        # Lightning binds `log` to the model; a copy of the callback must not copy that, nor watch
        state = {key: value for key, value in vars(self).items() if key not in ("log", "log_dict")}
        return state | {"_watch": None, "_reporter": Reporter(self.name)}


def trainable_sites(
    sites: Sequence[Site], model: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> list[bool]:
    """Tell for each site whether an optimizer trains what feeds it.

    A site whose producers are unknown goes by the parameters of the nearest module around it.

    Args:
        sites: The sites.
        model: Their model.
        optimizers: What trains it; none means that every parameter with a gradient counts.
    """
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    learns = {
        clean(name): p.requires_grad and (not held or id(p) in held)
        for name, p in model.named_parameters(remove_duplicate=False)
    }
    return [_learns(site, learns) for site in sites]


def _learns(site: Site, learns: Mapping[str, bool]) -> bool:
    if site.traced:
        return any(learns.get(name, False) for name in site.source)
    path = site.owner
    while path:
        path = path.rpartition(".")[0]
        around = [value for name, value in learns.items() if name.startswith(f"{path}." if path else "")]
        if around:
            return any(around)
    return any(learns.values())


def _fingerprint(sites: Sequence[Site]) -> float:
    return float(int.from_bytes(hashlib.sha256(repr(sites).encode()).digest()[:6], "big"))


def _logging_step(trainer: Trainer) -> int:
    """Count steps as Lightning's own monitors do, so that the curves share an x-axis."""
    return int(getattr(trainer.fit_loop.epoch_loop, "_batches_that_stepped", trainer.global_step))


def _refuse(argument: str, value: object, why: str, remedy: str) -> None:
    raise MisconfigurationException(f"`DeadReLUMonitor({argument}={value!r})`: {why}. Try `{remedy}`.")


def _check_counts(**counts: int) -> None:
    for argument, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            example = {"every_n_steps": 10, "window": 10, "min_samples": 299}[argument]
            _refuse(argument, value, "it has to be a whole number of at least 1", f"{argument}={example}")


def _check_shares(**shares: float) -> None:
    for argument, value in shares.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            example = {"threshold": 0.1, "tau": 0.025}[argument]
            _refuse(argument, value, "it is a share, from 0 to 1", f"{argument}={example}")


def _check_patterns(**patterns: Sequence[str]) -> None:
    for argument, value in patterns.items():
        if isinstance(value, str) or not all(isinstance(pattern, str) for pattern in value):
            listed = [value] if isinstance(value, str) else ["encoder.*"]
            _refuse(argument, value, "it takes a list of patterns", f"{argument}={listed}")
