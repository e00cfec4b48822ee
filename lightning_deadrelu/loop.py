"""The monitor in a loop of one's own: plain, Fabric, Accelerate, or what Hugging Face's Trainer runs."""
# ruff: noqa: D102 - what the members of LoopHost mean is told by Host

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import Self, override

from lightning_deadrelu.guarded import guarded
from lightning_deadrelu.monitor.host import Misuse
from lightning_deadrelu.monitor.monitor import Monitor
from lightning_deadrelu.monitor.owner import MonitorOwner
from lightning_deadrelu.monitor.settings import Settings
from lightning_deadrelu.observe import ranks
from lightning_deadrelu.progress import beside_bars
from lightning_deadrelu.remedies import Remedy
from lightning_deadrelu.report.metrics import metrics_of
from lightning_deadrelu.report.run_report import RunReport
from lightning_deadrelu.statistics import LivenessReport
from lightning_deadrelu.validation import Argument
from lightning_deadrelu.warn import warn

Log = Callable[[dict[str, float], int], Any]
"""Takes metrics by name, and the step."""

_logger = logging.getLogger("lightning_deadrelu")
_COPYING = frozenset({"FullyShardedDataParallel", "DeepSpeedEngine"})
_WRAPPERS = _COPYING | {"DistributedDataParallel", "DataParallel", "_FabricModule", "OptimizedModule"}


class LoopSettings(Settings):
    """What :func:`watch` was given."""

    call: ClassVar[str] = "watch"


class LoopHost:
    """A loop, with the properties that :class:`~lightning_deadrelu.monitor.host.Host` describes.

    Args:
        model: What the loop calls: the model, or a wrapper around it.
        optimizers: What trains it.
        name: Prefix of the metrics.
        log: Takes the metrics of each verdict, on rank 0.
        latents: Whether those of sparse autoencoders are among them.
    """

    in_step = True  # for all that is known
    steps_once = False  # a loop may go forward again after a step, as GANs do
    clips = True  # for all that is known
    averages = ""
    run_name = ""

    def __init__(
        self, model: nn.Module, optimizers: Sequence[Optimizer], name: str, log: Log | None, latents: bool = False
    ) -> None:
        self.called, self.model, self.optimizers = model, _unwrapped(model), optimizers
        self._name, self._log, self._latents = name, log, latents

    @property
    def device(self) -> torch.device:
        return next((parameter.device for parameter in self.model.parameters()), torch.device("cpu"))

    @property
    def is_joint(self) -> bool:
        return ranks.is_joint(ranks.place_in_group()[1])

    @property
    def is_first_rank(self) -> bool:
        return ranks.place_in_group()[0] == 0

    @property
    def schedules(self) -> bool:
        return any("initial_lr" in group for one in self.optimizers for group in one.param_groups)

    @property
    def unrepairable(self) -> str:
        copying = next((name for one in self.called.modules() if (name := type(one).__name__) in _COPYING), "")
        return copying and f"`{copying}` shards parameters or keeps other copies of them, which no remedy edits"

    def refusal(self, text: str) -> Misuse:
        return Misuse(text)

    def warn(self, text: str) -> None:
        if self.is_first_rank:
            warn(f"{self._name}: {text}")

    def info(self, text: str) -> None:
        if self.is_first_rank:
            with beside_bars():
                _logger.info("%s: %s", self._name, text)

    def show_score(self, dead_fraction: float) -> None:
        """Do nothing: a loop has no place for it but the log."""

    def publish(self, run: RunReport, *, edited: int, at_risk: float, crossed: Sequence[str], closed: bool) -> None:
        if self._log and self.is_first_rank and run.report.sites:
            with guarded(self._drop_log):
                useful = run.useful_units if closed else 0
                metrics = metrics_of(run.report, self._name, edited, at_risk, useful, self._latents)
                self._log(metrics, run.report.step)

    def _drop_log(self, error: Exception) -> None:
        self._log = None
        self.warn(f"`log` took no metrics and is left out: {error!r}")

    def conclude(self, run: RunReport) -> None:
        """Do nothing: the log has it all."""

    def say_at_end(self, text: str) -> None:
        if self.is_first_rank:
            print(f"{self._name}: {text}")


class LoopMonitor(MonitorOwner):
    """What :func:`watch` returns: watches within a ``with`` block, and is read there and afterwards."""

    def __init__(self, host: LoopHost, settings: Settings) -> None:
        self._host, self._settings = host, settings
        self._inside = self._stepped = False
        self._handles: list[RemovableHandle] = []
        self._listening: RemovableHandle | None = None  # to what the model is called with, for the mask
        self._clear(self._settings.name)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.report!r})"

    def __enter__(self) -> Self:
        self._clear(self._settings.name)
        self._inside = True
        try:
            self._begin()
        except BaseException:
            self._leave()
            raise
        optimizers = self._host.optimizers
        self._handles = [one.register_step_pre_hook(self._before_step) for one in optimizers]
        self._handles += [one.register_step_post_hook(self._after_step) for one in optimizers]
        return self

    def _begin(self) -> None:
        self._start(self._host)
        if self._monitor:
            probe = self._monitor.watch.probe
            probe.needs_gradients = True
            probe.on_backward = self._monitor.before_backward if self._monitor.evidence else None
        self._begin_batch(first=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._abort() if error else self._conclude()
        finally:
            self._leave()

    def _conclude(self) -> None:
        if self._monitor is None:
            return
        self._monitor.pause()
        self._keep(self._monitor.last_verdict())
        self._monitor.conclude()
        self._tell_outcome(self._host.model)
        if not (self._monitor.progress.batches or self.failure):
            self._host.warn(
                "no step of an optimizer came before a `monitor.step(loss)`, so there is no verdict. Pass to `watch`"
                " the optimizers that step, and call `monitor.step(loss)` after `optimizer.step()`."
            )

    def _leave(self) -> None:
        for handle in (*self._handles, *filter(None, [self._listening])):
            handle.remove()
        self._handles, self._listening, self._inside = [], None, False
        self._stop()

    # -- a training batch --------------------------------------------------------------------------------

    def step(self, loss: Tensor | float | None = None, batch: Any = None) -> LivenessReport | None:
        """End a batch; to be called once after each, on all ranks, behind the optimizer's step.

        Where no optimizer has stepped since the call before, the batch adds to the gradients of the next, and the two
        are one observation.

        Args:
            loss: The loss, for the post-mortem, and for the judgement of remedies.
            batch: The batch, for the post-mortem.

        Returns:
            The verdict, if a window has ended with this batch.

        Raises:
            RuntimeError: Outside of the ``with`` block.
        """
        if not self._inside:
            raise RuntimeError(
                "`monitor.step()` outside of its `with` block: nothing is watched there. Move the loop into"
                " `with watch(model, optimizer) as monitor:`."
            )
        if self._monitor is None:
            return None
        loss = loss.detach() if isinstance(loss, Tensor) else loss
        last = self._stepped
        report = self._monitor.end_batch(loss, batch, self._monitor.progress.batches, last=last)
        self._keep(report)
        self._begin_batch(first=last)
        return report

    def _keep(self, report: LivenessReport | None) -> None:
        self.report = self.report if report is None else report

    def _begin_batch(self, first: bool) -> None:
        if self._listening:
            self._listening.remove()
        self._stepped, self._listening = False, None
        if self._monitor:
            self._monitor.begin_batch(first=first)
            self._monitor.before_backward()  # also where a backward is not seen: it comes later than this
            if self._settings.mask and self._monitor.progress.observing:
                self._listening = self._host.model.register_forward_pre_hook(self._note_inputs, with_kwargs=True)

    def _note_inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._monitor:
            self._monitor.note_batch(kwargs or (args[0] if args else None))

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Look at the gradients before a step; those that a closure makes, as soon as it has made them."""
        self._stepped = True
        if self._monitor is None:
            return None
        closure = next((value for value in (*args, *kwargs.values()) if callable(value)), None)
        self._monitor.watch.probe.rest()
        if closure:
            return _exchanged(closure, self._looking(self._monitor, optimizer, closure), args, kwargs)
        self._monitor.before_step(optimizer)
        return None

    def _looking(self, monitor: Monitor, optimizer: Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
        """Have a closure observed, by its first call: later ones see the batch at other weights."""
        calls = iter([monitor.watch.probe.resume])

        def looking() -> Any:
            next(calls, lambda: None)()
            loss = closure()
            monitor.before_step(optimizer)
            monitor.watch.probe.rest()
            return loss

        return looking

    def _after_step(self, *call: Any) -> None:
        if self._monitor:
            self._monitor.watch.probe.resume()

    # -- to be continued ---------------------------------------------------------------------------------

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned; within the block at once, else when it begins."""
        super().load_state_dict(state_dict)
        if self._inside:
            self._stop()
            self._begin()


def watch(
    model: nn.Module,
    optimizers: Optimizer | Sequence[Optimizer],
    *,
    log: Log | None = None,
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
    report_dir: str | None = None,
    preset: str | None = None,
    name: str = "dead_relu",
) -> LoopMonitor:
    """Watch every rectifier of a model in a loop of your own, as :class:`DeadReLUMonitor` does in Lightning's Trainer.

    Observed are forwards with gradients between one ``monitor.step(loss)`` and the next; what runs under ``no_grad`` or
    ``inference_mode`` is not. Several processes of one group reach one verdict. When the block ends, even if by an
    error, nothing is left in the model.

    Args:
        model: What is trained; wrappers of DDP, Fabric and ``torch.compile`` are seen through.
        optimizers: What trains it, one or several.
        log: Called on rank 0 with the metrics of each verdict by name, and the step, such as ``wandb.log``. A function
            that fails is left out from then on.
        every_n_steps: Observe one training batch in this many.
        window: Observations between verdicts.
        min_samples: See :class:`DeadReLUMonitor`, as for all that follow.
        threshold: Warn, and repair, when more than this share of a site is dead.
        remedy: What to do about dead units.
        include: Patterns over site names, or kinds, to watch.
        exclude: Patterns or kinds to leave out.
        tau: The share of the layer's mean output up to which a unit is dormant.
        mask: Called with the keyword arguments that the model is called with, or without any with the first positional
            one; returns True for data and False for padding, shape ``(batch, time)``.
        gradient_evidence: Also use the gradients of every training batch.
        unit_dims: The dimension that holds the units, by pattern over site names.
        checkup: Look on the first observed batch for what is going to kill units.
        report_dir: A folder for ``report.html`` and ``report.json``, written when the block ends.
        preset: ``"sae"`` also logs what is usual for sparse autoencoders.
        name: Prefix of the metrics.

    Raises:
        ValueError: If an argument makes no sense.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> _ = nn.init.ones_(model[0].weight)
        >>> optimizer = torch.optim.SGD(model.parameters(), 0.01)
        >>> with watch(model, optimizer, every_n_steps=1, window=4) as monitor:  # doctest: +ELLIPSIS
        ...     for batch in torch.rand(8, 100, 4):
        ...         loss = model(batch).square().mean()
        ...         optimizer.zero_grad()
        ...         loss.backward()
        ...         optimizer.step()
        ...         report = monitor.step(loss)
        dead_relu: None of 8 units is dead.
        layer...
        >>> report.dead_units, report.units
        (0, 8)
    """
    settings = LoopSettings(
        every_n_steps=every_n_steps,
        window=window,
        min_samples=min_samples,
        threshold=threshold,
        remedy=remedy,
        include=include,
        exclude=exclude,
        tau=tau,
        mask=mask,
        gradient_evidence=gradient_evidence,
        unit_dims=unit_dims,
        checkup=checkup,
        report_dir=report_dir,
        preset=preset,
        name=name,
    )
    takes = "it is called with metrics and a step"
    Argument("watch", "log", log).check(log is None or callable(log), takes, "log=wandb.log")
    return LoopMonitor(LoopHost(model, _optimizers(optimizers), name, log, preset is not None), settings)


def _optimizers(given: Any) -> list[Optimizer]:
    """List the optimizers that step, without the wrappers of Fabric and Accelerate."""
    found = list(given) if isinstance(given, (list, tuple)) else [given]
    fits = bool(found) and all(isinstance(one, Optimizer) for one in found)
    why = "it has to be an optimizer of torch, or a list of some"
    Argument("watch", "optimizers", given).check(fits, why, "optimizers=torch.optim.AdamW(model.parameters())")
    return [_without_wrapper(one) for one in found]


def _without_wrapper(optimizer: Optimizer) -> Optimizer:
    inner = getattr(optimizer, "optimizer", None)
    return _without_wrapper(inner) if isinstance(inner, Optimizer) else optimizer


def _exchanged(old: Any, new: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Put one value in another's place among the arguments of a call."""
    swapped = {key: new if value is old else value for key, value in kwargs.items()}
    return tuple(new if value is old else value for value in args), swapped


def _unwrapped(model: nn.Module) -> nn.Module:
    """Take off what DDP, Fabric and the compiler put around a model."""
    name = "_orig_mod" if hasattr(model, "_orig_mod") else "module"
    return _unwrapped(model.get_submodule(name)) if type(model).__name__ in _WRAPPERS else model
