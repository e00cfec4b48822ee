"""Collect what a check-up needs while one batch runs, without changing anything."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_deadrelu.explain.checkup.context import CheckContext, Entry, Measured, groups_of
from lightning_deadrelu.explain.checkup.initialization import bad_init, narrow_and_deep, negative_bias, uncentred_inputs
from lightning_deadrelu.explain.checkup.optimization import bias_decay, high_learning_rate, no_clipping, no_schedule
from lightning_deadrelu.explain.checkup.structure import attention_relu, batchnorm_order, generator_relu, relu_output
from lightning_deadrelu.explain.finding import Finding, ranked
from lightning_deadrelu.model.sites import clean
from lightning_deadrelu.model.trainable import trainable_sites
from lightning_deadrelu.observe.watch import Watch
from lightning_deadrelu.statistics import LivenessReport, Rules, UnitHistory, judge

RULES: tuple[Callable[[CheckContext], list[Finding]], ...] = (
    uncentred_inputs,
    negative_bias,
    bad_init,
    narrow_and_deep,
    relu_output,
    attention_relu,
    generator_relu,
    high_learning_rate,
    no_clipping,
    bias_decay,
    batchnorm_order,
    no_schedule,
)
"""What is looked for; of equally sure findings the first comes first."""

MIN_SAMPLES = 29
"""A unit that is silent on so many samples of the batch fires, at 95 %, on less than 10 % of them."""

_LINEAR: tuple[type[nn.Module], ...] = (nn.Linear, nn.modules.conv._ConvNd)
_ENTRIES: tuple[type[nn.Module], ...] = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.GroupNorm)
_ENTRIES += (*_LINEAR, nn.RNNBase, nn.modules.batchnorm._NormBase)


class CheckRun:
    """One check-up: look while a batch runs, measure before its first step, conclude at its end.

    A failure costs the check-up alone, and is kept in :attr:`error`.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 1))
        >>> watch, one = Watch(model), CheckRun()
        >>> one.begin(watch)
        >>> with watch.probe:
        ...     _ = model(torch.randn(64, 4))
        >>> one.measure(model, model.parameters())
        >>> one.conclude(watch, model, [])
        ()
    """

    def __init__(self) -> None:
        self._measured: dict[str, Measured] = {}
        self._entry: tuple[str, Tensor] | None = None
        self._fresh = True
        self._handles: list[RemovableHandle] = []
        self.error: Exception | None = None
        """Why there are no findings."""

    @contextmanager
    def _kept(self) -> Iterator[None]:
        try:
            with torch._C.DisableTorchFunction(), torch.no_grad():  # a probe must not see what is done here
                yield
        except Exception as error:
            self.error = self.error or error

    def begin(self, watch: Watch) -> None:
        """Follow the next batch, and look at what its first layer is given."""
        watch.trace()
        layers = {clean(n): m for n, m in watch.probe.model.named_modules() if isinstance(m, _ENTRIES)}
        self._handles = [watch.probe.subscribe_input(name, partial(self._enter, name, m)) for name, m in layers.items()]

    def _enter(self, path: str, layer: nn.Module, x: Tensor) -> None:
        if self._entry is None:
            with self._kept():
                self._entry = path, _moments(layer, x)

    def measure(
        self, model: nn.Module, parameters: Iterable[Tensor], gradients: Mapping[int, Tensor | None] | None = None
    ) -> None:
        """Measure parameters and gradients, before they are changed; the first time counts.

        Args:
            model: Names them.
            parameters: Which.
            gradients: By ``id`` of the parameter; by default what ``.grad`` holds.
        """
        asked = {id(parameter) for parameter in parameters}
        with self._kept():
            for name, parameter in model.named_parameters(remove_duplicate=False):
                if id(parameter) in asked and clean(name) not in self._measured and _is_plain(parameter):
                    gradient = parameter.grad if gradients is None else gradients.get(id(parameter))
                    self._measured[clean(name)] = _measured(parameter, gradient)

    def before_step(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Measure what an optimizer is about to change."""
        self._fresh = self._fresh and not optimizer.state
        self.measure(model, (parameter for group in optimizer.param_groups for parameter in group["params"]))

    def conclude(
        self,
        watch: Watch,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        *,
        clipped: bool = False,
        scheduled: bool = False,
        fresh: bool = True,
    ) -> tuple[Finding, ...]:
        """Say what was found, the surest first.

        Args:
            watch: Has seen the batch.
            model: Its model.
            optimizers: What trains it.
            clipped: Whether gradients are clipped.
            scheduled: Whether there is a learning-rate schedule.
            fresh: Whether no step was made before.
        """
        for handle in self._handles:
            handle.remove()
        held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
        self.measure(model, (parameter for parameter in model.parameters() if id(parameter) not in held))
        found: list[Finding] = []
        with self._kept():
            report = _verdict(watch, model, optimizers)
            attributions, tracer = watch.attributions, watch.tracer
            shapes = {clean(name): tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
            scene = CheckContext(
                report=report,
                attributions=attributions,
                modules={clean(name): module for name, module in model.named_modules()},
                shapes=shapes,
                groups=groups_of(model, optimizers),
                measured=self._measured,
                order=tracer.order,
                readers={name: tracer.other_readers(name) for name in tracer.order if name in shapes},
                entry=self._entered(),
                fresh=fresh and self._fresh,
                clipped=clipped,
                scheduled=scheduled,
            )
            for rule in RULES:
                found += rule(scene)
        return ranked(found)

    def _entered(self) -> Entry | None:
        if self._entry is None or not self._entry[1].numel():
            return None
        rows, mean, square = self._entry[1].tolist()
        return Entry(self._entry[0], int(rows), mean / square if square else 0.0)


def _verdict(watch: Watch, model: nn.Module, optimizers: Sequence[Optimizer]) -> LivenessReport:
    trainable = trainable_sites(watch.sites, model, optimizers)
    totals = watch.liveness.totals().to_host()
    return judge(totals, UnitHistory.empty(), watch.layout, Rules(MIN_SAMPLES), trainable=trainable)[0]


def _moments(layer: nn.Module, x: Tensor) -> Tensor:
    """Return rows, ``|mean|^2`` and ``E|x|^2`` of what a layer is given; nothing where it is not plain numbers."""
    convolves = isinstance(layer, nn.modules.conv._ConvNd)
    if not isinstance(layer, _LINEAR) or not x.is_floating_point() or (convolves and x.ndim != layer.weight.ndim):
        return torch.empty(0)
    rows = x.movedim(1, -1).flatten(0, -2) if convolves else x.reshape(-1, x.shape[-1])
    if len(rows) < MIN_SAMPLES:
        return torch.empty(0)
    rows = rows.float()
    return torch.stack([rows.new_tensor(len(rows)), rows.mean(0).square().sum(), rows.square().mean(0).sum()])


def _is_plain(parameter: Tensor) -> bool:
    if nn.parameter.is_lazy(parameter) or hasattr(parameter, "device_mesh"):
        return False
    return parameter.is_floating_point() and parameter.numel() > 0 and parameter.device.type != "meta"


def _norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32)))


def _measured(parameter: Tensor, gradient: Tensor | None) -> Measured:
    norm = _norm(parameter)
    known = gradient is not None and gradient.layout is torch.strided and not hasattr(gradient, "device_mesh")
    slope = _norm(gradient) if known and gradient is not None else math.nan
    negative = float((parameter < 0).float().mean()) if parameter.ndim < 2 else 0.0
    return Measured(parameter.numel(), norm / math.sqrt(parameter.numel()), negative, slope)
