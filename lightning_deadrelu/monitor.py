"""How the callback watches, judges, repairs, tells and goes on from a checkpoint; the callback itself says when."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_deadrelu.attribution import Attributions
from lightning_deadrelu.checkpoint import decode, encode
from lightning_deadrelu.explain.checkup import CheckRun
from lightning_deadrelu.explain.finding import Finding
from lightning_deadrelu.explain.postmortem import DeathEvent
from lightning_deadrelu.explain.postmortem.recorder import FlightRecorder, Readings, RecorderState
from lightning_deadrelu.model.sharding import split_layer
from lightning_deadrelu.model.sites import Site
from lightning_deadrelu.model.trainable import Gradients, trainable_sites
from lightning_deadrelu.observe import ranks
from lightning_deadrelu.observe.gradient_evidence import GradientEvidence
from lightning_deadrelu.observe.watch import Watch
from lightning_deadrelu.remedies import Remedy
from lightning_deadrelu.repair.activation_swap import records, rectifiers, reinstate_, restore
from lightning_deadrelu.repair.policy import Event
from lightning_deadrelu.repair.repair import Diverged, Patient, Repair
from lightning_deadrelu.report.history import RunHistory
from lightning_deadrelu.report.loggers import Reporter
from lightning_deadrelu.report.run_report import RunReport
from lightning_deadrelu.settings import Settings
from lightning_deadrelu.statistics import LivenessReport, Totals, UnitHistory, judge

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SHARDED = frozenset({"FSDPStrategy", "DeepSpeedStrategy", "XLAFSDPStrategy"})
_AVERAGING = frozenset({"WeightAveraging", "EMAWeightAveraging", "StochasticWeightAveraging"})
_FORMAT = 7  # of the saved state
_SAVED = ("batches", "observing", "observation", "steps", "step", "judged", "unjudged", "score")


class Monitoring(Callback):
    """What :class:`~lightning_deadrelu.DeadReLUMonitor` does, hook by hook; its arguments are the attributes."""

    every_n_steps: int
    window: int
    threshold: float
    remedy: Remedy | str | Sequence[Remedy | str] | None
    min_samples: int
    include: Sequence[str]
    exclude: Sequence[str]
    tau: float
    mask: Callable[[Any], Tensor] | None
    gradient_evidence: bool
    unit_dims: Mapping[str, int] | None
    checkup: bool
    alerts: bool
    report_dir: str | None
    name: str
    _settings: Settings
    report: LivenessReport | None
    """The latest verdict; None before the first."""
    _pending: dict[str, Any] | None  # what a checkpoint held, until training starts

    def on_verdict(self, trainer: Trainer, pl_module: LightningModule, report: LivenessReport) -> None:
        """Called after each verdict, on every rank."""

    @property
    def events(self) -> tuple[Event, ...]:
        """What was done to which units, when and why; the last 1,000."""
        return tuple(self._repair.events)

    @property
    def deaths(self) -> tuple[DeathEvent, ...]:
        """When units died, where and why; 100 waves at most, the largest of all and the latest."""
        return self._recorder.deaths

    @property
    def attribution(self) -> Attributions | None:
        """Which parameters feed and read each site, where there is a remedy or gradient evidence; prints as a table.

        None before the first observed batch. For a look alone, take ``remedy=Reset(dry_run=True)``.
        """
        known = self._watch and self._watch.sites and self._repair.traces
        return self._watch.attributions if self._watch and known else None

    def _clear(self) -> None:
        self.report = None
        self._watch: Watch | None = None
        self._history = UnitHistory.empty()
        self._repair = self._new_repair()
        self._gradients = Gradients()
        self._evidence = self._new_evidence()
        self._examination = CheckRun() if self.checkup else None  # until the first observed batch is done
        self.findings: tuple[Finding, ...] = ()
        """What the check-up found, the surest first; empty without one, and before the first observed batch."""
        self._reporter = Reporter(self.name, alerts=self.alerts)
        self._record = RunHistory()
        self._recorder = FlightRecorder(3 * self.every_n_steps * self.window)
        self._raster = self._record.raster  # with the open window, where there was a verdict in it
        self._failure: Exception | None = None
        self._batches = 0  # training batches done, accumulated ones as one
        self._observing = False  # whether the present training batch is being observed
        self._observation = 0  # observations done in the open window
        self._steps: list[int] = []  # of those observations
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

    def _patient(self, trainer: Trainer) -> Patient:
        assert self._watch is not None
        joint = self._joint and trainer.state.status != "interrupted"
        model = trainer.lightning_module
        outer = trainer.strategy.model or model
        return Patient(self._watch, model, trainer.optimizers, outer, joint, self._gradients)

    def _new_repair(self) -> Repair:
        return Repair(self._settings.rungs, self.threshold, self.min_samples, self._tell, self.gradient_evidence)

    def _new_evidence(self) -> GradientEvidence | None:
        return GradientEvidence(self._remark) if self.gradient_evidence else None

    def _remark(self, text: str) -> None:
        rank_zero_warn(f"{self.name}: {text}")

    def _check_alone(self, trainer: Trainer) -> None:
        """Refuse a second monitor with a remedy: both would edit the same units."""
        others = [one.name for one in trainer.callbacks if isinstance(one, Monitoring) and one._repair.ladder.rungs]
        if len(others) > 1 and self._repair.ladder.rungs:
            raise MisconfigurationException(
                f"The monitors {others} all have a remedy, and would edit the same units. Give one of them all,"
                " as a list, and the others `remedy=None`."
            )

    def _refusal(self, trainer: Trainer) -> str:
        """Say why nothing can be repaired under this strategy; empty if it can."""
        if not self._repair.ladder.rungs:
            return ""
        sharded = [kind.__name__ for kind in type(trainer.strategy).__mro__ if kind.__name__ in _SHARDED]
        reason = _why_split(trainer.lightning_module)
        if sharded:
            reason = f"`{sharded[0]}` shards parameters or keeps other copies of them, which no remedy edits"
        if not reason:
            return ""
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

    def _new_watch(self, pl_module: LightningModule) -> Watch:
        return Watch(
            pl_module,
            include=self.include,
            exclude=self.exclude,
            rules=self._settings.rules,
            window=self.window,
            unit_dims=self.unit_dims,
            keep_fused=True,
            device=pl_module.device,
            blind=_why_split(pl_module),
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
        self._steps = [*self._steps, self._step]
        if self._watch and self._watch.probe.failure:
            self._fail(self._watch.probe.failure)
        if self._watch and not self._failure:
            with self._careful():
                self._watch.liveness.observation = self._observation
                self._recorder.observed(self._step)
        if not self._joint and self._watch and self._watch.sites:
            with self._careful():
                self._check_sites()
        if self._examination and self._watch and not self._failure:
            with self._careful():
                self._examine(self._examination, self._watch, trainer)
        if self._watch and not self._off:
            with self._careful():
                self._repair.confirm(self._patient(trainer), self._step, self._failure is not None)
        if self._observation == self.window:
            self._verdict(trainer, pl_module, close=True)

    def _examine(self, examination: CheckRun, watch: Watch, trainer: Trainer) -> None:
        """Conclude the check-up, and tell it once."""
        self._examination = None
        self.findings = examination.conclude(
            watch,
            trainer.lightning_module,
            trainer.optimizers,
            clipped=bool(trainer.gradient_clip_val) or not trainer.lightning_module.automatic_optimization,
            scheduled=bool(trainer.lr_scheduler_configs),
        )
        if examination.error:
            rank_zero_warn(f"{self.name}: the check-up failed; watching goes on. {examination.error!r}")
        elif self.findings:
            rank_zero_warn("\n- ".join([f"{self.name}: the check-up found", *map(str, self.findings)]))
        else:
            rank_zero_info(f"{self.name}: the check-up found nothing that kills units.")

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
                totals, losses, readings = joined
                self._check_sites()
                report = self._judge(totals, trainer, pl_module, close)
                self._explain(report, totals, readings, trainer, close)
                if close:
                    self._repair.decide(self._patient(trainer), report, losses)
                self._publish(report, trainer, close)
        if close and self._watch and self._repair.ladder.rungs and not self._settled():
            self._repair.forget(self._patient(trainer))
        if close:
            self._observation, self._steps = 0, []
            if self._watch:
                self._watch.liveness.reset()
        if report is not None:
            self.on_verdict(trainer, pl_module, report)

    def _judge(self, totals: Totals, trainer: Trainer, pl_module: LightningModule, close: bool) -> LivenessReport:
        assert self._watch is not None
        layout = self._watch.layout
        report, history = judge(
            self._evidence.believed(totals, layout) if self._evidence else totals,
            self._history,
            layout,
            self._settings.rules,
            trainable=trainable_sites(layout.sites, pl_module, trainer.optimizers, self._gradients.never),
            step=self._step,
            steps=self._steps,
            unwatched=self._watch.unwatched(),
        )
        if close:
            self._history = history
        return report

    def _explain(
        self, report: LivenessReport, totals: Totals, readings: Readings, trainer: Trainer, close: bool
    ) -> None:
        """Find out why units died; of a window that has not ended, tell it only in summaries."""
        assert self._watch is not None
        model, layout = trainer.lightning_module, self._watch.layout
        peaks = self._record.peaks.of
        deaths = self._recorder.explain(report, totals, readings, layout, peaks, model, trainer.optimizers)
        if close:
            self._recorder.close_window(totals, readings, layout, model, deaths)
        else:
            self._recorder.keep_open(deaths)
        for death in deaths:
            if death.is_large and close:
                rank_zero_info(f"{self.name}: {death}.")

    def _publish(self, report: LivenessReport, trainer: Trainer, close: bool) -> None:
        self.report = report
        self._score = report.dead_fraction
        self._show(trainer)
        edited, self._repair.edited = self._repair.edited, {}
        if close:
            self._record.close(report, edited)
        self._raster = self._record.raster if close else self._record.with_open(report, edited)
        if report.sites:
            units, at_risk = sum(map(len, edited.values())), self._record.at_risk_fraction
            self._reporter(report, trainer.loggers, trainer.is_global_zero, units, at_risk)
            if close:
                self._reporter.media(self.run_report, trainer.loggers, trainer.is_global_zero)
        crossed = self._warn(report)
        self._reporter.alert(crossed, report, trainer.loggers, trainer.is_global_zero)

    def _conclude(self, trainer: Trainer) -> None:
        """Tell what became of all units, at the end of training, on rank 0."""
        if self.report is None or not self.report.sites or not trainer.is_global_zero:
            return
        self._reporter.media(self.run_report, trainer.loggers, final=True)
        if not trainer.fast_dev_run:
            print(f"\n{self.name}: {self.summary()}")
        self._write_report()

    def _write_report(self) -> None:
        if self.report_dir and self.report:
            from lightning_deadrelu.report.html_page import write

            write(self.run_report, self.report_dir)

    @property
    def run_report(self) -> RunReport:
        """All that is known of the run so far, in one object."""
        report = self.report or LivenessReport(())
        known = dict(self.attribution or {})
        return RunReport(report, self._raster, self.events, known, self.deaths, self.findings, self.name)

    def summary(self) -> str:
        """Tell what became of each site over the run, in the order of execution, under a sentence that says it all."""
        from lightning_deadrelu.report import summary

        return summary(self.run_report)

    def plot(self) -> tuple[Figure, tuple[Axes, ...]]:
        """Draw the run: dead units over time, and what became of the units of the worst sites; needs matplotlib.

        Returns:
            The figure and its axes, the curves first.
        """
        from lightning_deadrelu.report import plot_run

        return plot_run(self.run_report)

    def _warn(self, report: LivenessReport) -> list[str]:
        """Say on the terminal which sites have crossed the threshold, each once in a fit, and name them."""
        crossed = [s for s in report.headline if s.dead_fraction > self.threshold and s.name not in self._told]
        self._told.update(site.name for site in crossed)
        if crossed:
            sites = ", ".join(f"`{site.name}` ({int(site.dead.sum())} of {site.units} units)" for site in crossed)
            rank_zero_warn(
                f"{self.name}: more than {self.threshold:.0%} dead at step {report.step}: {sites}. They fired on no"
                f" sample for {self.min_samples} samples or more, and get no gradient."
            )
        return [site.name for site in crossed]

    def _show(self, trainer: Trainer) -> None:
        trainer.callback_metrics[self._headline] = torch.tensor(self._score)

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

    def _joined(self) -> tuple[Totals, Tensor, Readings] | None:
        """Merge the window's counts over all ranks and bring them to the host; None once any rank has failed.

        Every rank comes here at the same batches, unless it was interrupted. It takes three collectives
        whatever the number of sites; the layouts are exchanged only after one has changed.
        """
        if self._off:
            return None
        if self._evidence and self._watch and not self._failure:
            with self._careful():
                self._evidence.flush(self._watch)
        losses = self._repair.losses
        if not self._joint or (self._trainer and self._trainer.state.status == "interrupted"):
            return None if self._failure or not self._watch else self._on_host(self._watch.liveness.totals(), losses)
        if not ranks.agree(self._watch, self._failure is not None, self._device):
            self._give_up()
            return None
        assert self._watch is not None
        totals, merged = ranks.merge(self._watch, losses.to(self._device))
        self._repair.losses = merged if ranks.rank() == 0 else torch.zeros_like(merged)
        return self._on_host(totals, merged)

    def _on_host(self, totals: Totals, losses: Tensor) -> tuple[Totals, Tensor, Readings]:
        """Bring all that a verdict needs to the host, in one transfer."""
        assert self._watch is not None
        assert self._trainer is not None
        readings = self._recorder.read(self._watch.layout, self._trainer.lightning_module, losses.device)
        totals, (losses, *rest) = totals.to_host_with(losses, *readings)
        return totals, losses, Readings(*rest)

    @contextmanager
    def _careful(self) -> Iterator[None]:
        """Keep a failure of the monitor from ending the run or losing a checkpoint."""
        try:
            yield
        except (MisconfigurationException, Diverged):
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
        if self._trainer:  # also once the watch has failed: weights are nothing without their activations
            state = {"format": _FORMAT, "activations": records(self._trainer.lightning_module)}
        with self._careful():
            joined = self._joined()
            if self._watch and self._trainer and joined:
                state |= {key: getattr(self, f"_{key}") for key in _SAVED}
                state["selection"] = self._settings.selection
                state["told"] = sorted(self._told)
                state["sites"] = [list(site) for site in self._watch.sites]
                state["totals"] = encode(joined[0])
                state["history"] = encode(self._history)
                state["never_trained"] = self._gradients.save(self._trainer.lightning_module)
                state["evidence"] = self._evidence.state_dict(self._watch) if self._evidence else None
                state["repair"] = self._repair.state_dict()
                state["record"] = self._record.state_dict()
                state["recorder"] = encode(self._recorder.state)
        return state

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not self._running:  # a search for the learning rate puts back what it found, while we go on
            self._pending = state_dict

    def _restore(self, state: Mapping[str, Any], trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._watch is not None
        exchange_as_in(state, pl_module)
        self._watch.substitutes = rectifiers(pl_module)
        if state.get("format") != _FORMAT:
            rank_zero_warn(f"{self.name}: the checkpoint is of another version of the monitor; all ages start at zero.")
            return
        if "sites" not in state:
            rank_zero_warn(
                f"{self.name}: the monitor had failed when the checkpoint was saved; all ages start at zero."
            )
            return
        for key in _SAVED:
            setattr(self, f"_{key}", state[key])
        self._told = set(state["told"])
        self._gradients.load(state["never_trained"], pl_module, trainer.optimizers)
        self._repair.load_state_dict(state["repair"], self._patient(trainer))
        self._record.load_state_dict(state["record"])
        if state["selection"] != self._settings.selection:  # the sites are others, and so are their numbers
            self._observation, self._steps = 0, []
            self._repair.forget(self._patient(trainer))
            rank_zero_warn(f"{self.name}: other sites are selected than in the checkpoint, so all ages start at zero.")
            return
        self._watch.adopt(
            Site._make(tuple(item) if isinstance(item, list) else item for item in site) for site in state["sites"]
        )
        if self._evidence and state["evidence"]:
            self._evidence.load_state_dict(state["evidence"], self._watch.sites)
        self._history = decode(UnitHistory, state["history"])
        self._recorder.restore(decode(RecorderState, state["recorder"]))
        totals = decode(Totals, state["totals"])
        if totals.samples.shape[-1] != self.window:  # the open window has another length: start anew
            self._observation, self._steps = 0, []
        elif trainer.global_rank == 0:  # it holds the counts of all ranks
            self._watch.liveness.load(totals)

    def __getstate__(self) -> dict[str, Any]:
        # Lightning binds `log` to the model; a copy of the callback must not copy that, nor watch
        state = {key: value for key, value in vars(self).items() if key not in ("log", "log_dict")}
        fresh: dict[str, Any] = {
            "_watch": None,
            "_trainer": None,
            "_gradients": Gradients(),
            "_examination": None,
            "_reporter": Reporter(self.name, alerts=self.alerts),
        }
        fresh |= {"_repair": self._new_repair(), "_evidence": self._new_evidence()}
        return state | fresh | {"_running": False, "_joint": False}


def exchange_as_in(state: Mapping[str, Any], pl_module: LightningModule) -> None:
    """Have the activations that go with the weights of a checkpoint, and no others."""
    saved = state.get("activations", [])
    restore(pl_module, saved)
    reinstate_(pl_module, keep={record["path"] for record in saved})


def _why_split(model: LightningModule) -> str:
    """Say why the units of a model cannot be told from one rank to the other; empty if they can."""
    name = split_layer(model)
    return f"tensor parallelism splits `{name}`, so that each rank has other units" if name else ""


def _has_name(value: object, names: AbstractSet[str]) -> bool:
    return any(kind.__name__ in names for kind in type(value).__mro__)
