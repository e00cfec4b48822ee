"""What happens at each batch, step and window's end, in any loop: observe, judge, explain, repair, tell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer

from lightning_deadrelu.attribution import Attributions
from lightning_deadrelu.checkpoint import encode
from lightning_deadrelu.explain.checkup import CheckRun
from lightning_deadrelu.explain.postmortem import still_true
from lightning_deadrelu.guarded import Guard, unless_failed, why_it_ends
from lightning_deadrelu.model.sharding import split_layer
from lightning_deadrelu.model.trainable import Gradients
from lightning_deadrelu.monitor import window_end
from lightning_deadrelu.monitor.announcer import Announcer
from lightning_deadrelu.monitor.host import Host, Misuse
from lightning_deadrelu.monitor.merge import merged
from lightning_deadrelu.monitor.resume import restore, run_state
from lightning_deadrelu.monitor.settings import Settings
from lightning_deadrelu.monitor.state import MonitorState, Progress, Window
from lightning_deadrelu.monitor.verdicts import Verdicts
from lightning_deadrelu.observe.gradient_evidence import GradientEvidence
from lightning_deadrelu.observe.padding_mask import mask_of
from lightning_deadrelu.observe.ranks import Ranks
from lightning_deadrelu.observe.watch import Watch
from lightning_deadrelu.repair.activation_swap import records, rectifiers
from lightning_deadrelu.repair.repair import Repair
from lightning_deadrelu.repair.training_context import TrainingContext
from lightning_deadrelu.report.run_report import RunReport
from lightning_deadrelu.statistics import LivenessReport
from lightning_deadrelu.warn import warn


class Monitor:
    """Watch the rectifiers of a model while a loop trains it.

    The loop calls :meth:`start`; for each batch :meth:`begin_batch`, :meth:`note_batch`, :meth:`before_backward`,
    :meth:`before_step` and :meth:`end_batch`; then :meth:`last_verdict` and :meth:`conclude`, or after an error
    :meth:`abort`; and :meth:`stop` whatever happened. All ranks have to do so at the same batches.
    """

    def __init__(self, settings: Settings, host: Host) -> None:
        self.settings, self.host = settings, host
        self.guard = Guard(self._take_out, self._say_failure, lambda: self.repair.reunite(), but=(Misuse,))
        """Keeps the first failure, after which nothing is watched."""
        self.announcer = Announcer(settings, host)
        self.repair = _repair_of(settings, self.announcer)
        """Carries remedies out."""
        self.watch = _watch_of(settings, host)
        """Counts what the rectifiers do."""
        self.ranks = Ranks(host.device, lambda: self.running and host.is_joint, lambda: bool(self.guard.failure))
        """The processes that train the model together."""
        self.evidence = GradientEvidence(host.warn) if settings.gradient_evidence else None
        """Asks gradients who lives; None unless that is wanted."""
        self.gradients = Gradients()
        self.verdicts = Verdicts(settings, host, self.watch, self.evidence, self.gradients, self.ranks)
        """Judges, explains, and keeps the history."""
        self.checkup = CheckRun() if settings.checkup else None  # until the first observed batch is done
        self.progress = Progress()
        """How far the run has come."""
        self.report: LivenessReport | None = None
        """The latest verdict; None before the first."""
        self.running = False
        """Whether training has begun, and not ended."""
        self._acts = False  # in the present batch: most are neither observed nor have edits under way

    def _say_failure(self, error: Exception) -> None:
        warn(f"{self.settings.name}: {why_it_ends(error)}")

    # -- from start to end -------------------------------------------------------------------------------

    def start(self, saved: Mapping[str, Any] | None = None) -> None:
        """Begin to train, or go on.

        Args:
            saved: The :meth:`state` in the checkpoint that the weights are from, if they are.
        """
        self.running = True
        self._start()
        if saved is not None:
            with self.guard():
                restore(self, saved)
        if self.settings.remedies:
            self.repair.refusal = self.host.unrepairable or _why_split(self.host)
        if self.repair.refusal:
            self.host.warn(
                f"{self.repair.refusal}; watching goes on. Set `remedy=None`, or train with `strategy='ddp'`."
            )
        self.host.show_score(self.progress.score)  # who waits for the key must not crash

    @unless_failed
    def _start(self) -> None:
        host = self.host
        self.repair.attach(
            TrainingContext(self.watch, host.model, host.optimizers, host.called, self.gradients, self.ranks)
        )

    def pause(self) -> None:
        """Take out of the model what observes it or is there for one batch; harmless when there is nothing."""
        with self.guard():
            self._take_out()

    def _take_out(self) -> None:
        self.watch.valid = None
        self.watch.probe.disarm()
        self.repair.pause()  # last: a model may refuse to have its own modules back

    def skip_rest(self) -> None:
        """Give up the batch that is under way: one that is skipped does not end."""
        self.pause()
        self.watch.liveness.drop_batch()
        self.progress.observing = False

    def stop(self) -> None:
        """Take everything out of the model for good; harmless when it has been done."""
        self.pause()
        self.watch.close()
        with self.guard():
            self.repair.stop(self.progress.step)
        self.running = False

    def abort(self) -> None:
        """End because of an error; what belongs into a checkpoint that is saved now stays. Harmless when it is over."""
        if not self.running:
            return
        self.pause()
        self.watch.liveness.drop_batch()  # a resumed run has it anew
        self.watch.close()
        self.running = False
        with self.guard():
            self._write_report()

    def conclude(self) -> None:
        """End, and log what became of all units."""
        self.stop()
        if self.host.is_first_rank and self.report is not None and self.report.sites:
            with self.guard():
                self.host.conclude(self.run_report)
                self._write_report()

    def _write_report(self) -> None:
        if self.host.is_first_rank and self.settings.report_dir and self.report:
            from lightning_deadrelu.report.html_page import write

            write(self.run_report, self.settings.report_dir)

    @property
    def attribution(self) -> Attributions | None:
        """Which parameters feed and read each site; None where that is not traced, or nothing has run yet."""
        return self.watch.attributions if self.watch.sites and self.repair.traces else None

    @property
    def run_report(self) -> RunReport:
        """All that is known of the run so far, in one object."""
        return _run_report_of(self)

    # -- a training batch --------------------------------------------------------------------------------

    def begin_batch(self, *, first: bool = True, trains: bool = True) -> None:
        """Observe a batch if it is its turn; to be called before its forward.

        Args:
            first: Whether it starts anew; False where it adds to the gradients of the batch before.
            trains: Whether weights are going to change by it.
        """
        if self._acts:  # in a batch that was skipped
            self.pause()
        if first:
            self.progress.observing = trains and self.settings.is_due(self.progress.batches)
        self._acts = bool(self.progress.observing or self.evidence or self.repair.is_busy)
        if self._acts:
            self._begin_batch(first)

    @unless_failed
    def _begin_batch(self, first: bool) -> None:
        self.repair.begin(self.progress.observing)
        if self.evidence:
            self.evidence.begin(self.watch, self.host.model, self.progress.observing, first)
        if self.progress.observing:
            self.watch.liveness.observation = self.progress.window.observations
            self.watch.liveness.begin_batch()
            if self.checkup:
                self.checkup.begin(self.watch)
            self.watch.probe.arm()

    @unless_failed
    def note_batch(self, batch: Any) -> None:
        """Ask the mask of a batch; one that fails is refused at the first, and later costs the watch alone."""
        if not (self.progress.observing and self.settings.mask):
            return
        try:
            self.watch.valid = mask_of(batch, self.settings.mask, first=not self.progress.batches)
        except Exception as error:
            if self.progress.batches:
                raise
            said = error if isinstance(error, TypeError) else repr(error)
            raise self.host.refusal(f"`{self.settings.call}(mask=...)`: {said}") from error

    def before_backward(self) -> None:
        """Note that the forward is done; to be called before each backward."""
        if self._acts:
            self._before_backward()

    @unless_failed
    def _before_backward(self) -> None:
        if self.host.steps_once:  # later closures see the batch at other weights
            self.watch.probe.pause()
            self.repair.before_backward()
        if self.evidence:
            self.evidence.note_start()

    @unless_failed
    def before_step(self, optimizer: Optimizer) -> None:
        """Look at the gradients; to be called before each step of an optimizer."""
        observing = self.progress.observing
        self.gradients.note(optimizer)
        if observing and self.checkup:
            self.checkup.before_step(self.host.model, optimizer)
        self.verdicts.recorder.before_step(optimizer)
        if self.evidence:
            begun = self.progress.window.observations + observing
            self.evidence.step(optimizer, begun, self.host.steps_once)

    def end_batch(self, loss: Any, batch: Any, step: int, *, last: bool = True) -> LivenessReport | None:
        """End a batch, and with the last observation of a window the window.

        Args:
            loss: The loss that the training step returned.
            batch: The batch.
            step: Its number, as loggers count.
            last: Whether it is the last of those whose gradients add up.

        Returns:
            The verdict, where a window has ended.
        """
        progress = self.progress
        progress.batches += last
        progress.step = step
        if self._acts:
            self._acts = False
            window_end.check_mask(self)
            self.pause()
            self.watch.liveness.end_batch()
            with self.guard():
                self.repair.end(last)  # also after a failure: terms in flight go on
        self._note_done(loss, batch, last)
        if not last or not progress.observing:
            return None
        window_end.close_observation(self)
        return window_end.close(self) if progress.window.observations == self.settings.window else None

    @unless_failed
    def _note_done(self, loss: Any, batch: Any, last: bool) -> None:
        if self.progress.observing:
            self.repair.note_loss(loss)
        self.verdicts.recorder.after_batch(loss, batch, self.progress.step if last else None)

    # -- a verdict ---------------------------------------------------------------------------------------

    def provisional_verdict(self) -> LivenessReport | None:
        """Judge a window that goes on; the next verdict tells what has changed since."""
        return window_end.judge_open(self, again=True)

    def last_verdict(self) -> LivenessReport | None:
        """Judge what was observed since the last verdict, at the end of training; a run that goes on judges it anew."""
        return window_end.judge_open(self, again=False) if self.progress.window.unjudged else None

    def open_window(self) -> None:
        """Start a window."""
        self.progress.window = Window()
        self.watch.liveness.reset()

    # -- to be continued ---------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return plain values and tensors; while they train, all ranks have to ask for them together."""
        # also after a failure: without the activations the weights mean nothing
        saved = encode(MonitorState(records(self.host.model)))
        with self.guard():
            counted = merged(self)
            saved["run"] = None if counted is None else encode(run_state(self, counted))
        return dict(saved)


def _repair_of(settings: Settings, announcer: Announcer) -> Repair:
    remedies, traces = settings.remedies, settings.gradient_evidence
    return Repair(remedies, settings.threshold, settings.min_samples, announcer.tell_event, trace=traces)


def _watch_of(settings: Settings, host: Host) -> Watch:
    watch = Watch(
        host.model,
        include=settings.include,
        exclude=settings.exclude,
        rules=settings.rules,
        window=settings.window,
        unit_dims=settings.unit_dims,
        keep_fused=True,
        device=host.device,
        blind=_why_split(host),
    )
    watch.substitutes = rectifiers(host.model)
    watch.masked = settings.mask is not None
    watch.probe.router.observes = lambda: host.in_step
    return watch


def _why_split(host: Host) -> str:
    """Say why the units of the model cannot be told from one rank to the other; empty if they can."""
    name = split_layer(host.model)
    return f"tensor parallelism splits `{name}`, so that each rank has other units" if name else ""


def _run_report_of(monitor: Monitor) -> RunReport:
    recorder, settings = monitor.verdicts.recorder, monitor.settings
    return RunReport(
        report=monitor.report or LivenessReport(()),
        history=monitor.verdicts.raster,
        events=tuple(monitor.repair.events),
        attribution=monitor.attribution or {},
        deaths=still_true(recorder.deaths, monitor.report, settings.repairs),
        findings=monitor.progress.findings,
        name=settings.name,
        about=_about(monitor.host, settings),
    )


def _about(host: Host, settings: Settings) -> dict[str, str]:
    """Gather what tells one run from another."""
    model, changed = type(host.model).__name__, settings.changed or "defaults"
    return {"run": host.run_name, "model": model, "settings": changed}
