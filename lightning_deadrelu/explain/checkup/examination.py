"""Run a check-up: collect what its rules need while one batch runs, without changing anything."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_deadrelu.explain.centring import indicator_share
from lightning_deadrelu.explain.checkup.context import CheckContext, FirstLayerInput, ParameterStats, groups_of
from lightning_deadrelu.explain.checkup.initialization import bad_init, narrow_and_deep, negative_bias, uncentred_inputs
from lightning_deadrelu.explain.checkup.optimization import bias_decay, high_learning_rate, no_clipping, no_schedule
from lightning_deadrelu.explain.checkup.structure import attention_relu, batchnorm_order, generator_relu, relu_output
from lightning_deadrelu.explain.finding import Finding, ranked
from lightning_deadrelu.guarded import guarded
from lightning_deadrelu.model.optimizer_groups import parameters_of
from lightning_deadrelu.model.sites import clean
from lightning_deadrelu.model.trainable import trainable_sites
from lightning_deadrelu.observe.torch_modes import unseen_by_modes
from lightning_deadrelu.observe.watch import Watch
from lightning_deadrelu.statistics import LivenessReport, Rules, UnitHistory, judge

RULES: tuple[Callable[[CheckContext], Iterable[Finding]], ...] = (
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

_DISTINCT = 1024  # rows of which it is counted how many differ

MIN_SAMPLES = 29
"""A unit that is silent on so many samples of the batch fires, at 95 %, on less than 10 % of them."""

_LINEAR: tuple[type[nn.Module], ...] = (nn.Linear, nn.modules.conv._ConvNd)
_FIRST_LAYERS: tuple[type[nn.Module], ...] = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.GroupNorm)
_FIRST_LAYERS += (*_LINEAR, nn.RNNBase, nn.modules.batchnorm._NormBase)


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
        self._stats: dict[str, ParameterStats] = {}
        self._first_input: tuple[str, Tensor] | None = None
        self._fresh = True
        self._handles: list[RemovableHandle] = []
        self.error: Exception | None = None
        """Why there are no findings."""

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        with guarded(self._fail), unseen_by_modes(), torch.no_grad():  # no probe must see what is done
            yield

    def _fail(self, error: Exception) -> None:
        self.error = self.error or error

    def begin(self, watch: Watch) -> None:
        """Follow the next batch, and look at what its first layer is given."""
        watch.trace()
        layers = {clean(n): m for n, m in watch.probe.model.named_modules() if isinstance(m, _FIRST_LAYERS)}
        self._handles = [
            watch.probe.router.subscribe_input(name, partial(self._enter, name, m)) for name, m in layers.items()
        ]

    def _enter(self, path: str, layer: nn.Module, x: Tensor) -> None:
        if self._first_input is None:
            with self._guarded():
                self._first_input = path, _moments(layer, x)

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
        with self._guarded():
            for name, parameter in model.named_parameters(remove_duplicate=False):
                if id(parameter) in asked and clean(name) not in self._stats and _is_plain(parameter):
                    gradient = parameter.grad if gradients is None else gradients.get(id(parameter))
                    self._stats[clean(name)] = _stats_of(parameter, gradient)

    def before_step(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Measure what an optimizer is about to change."""
        self._fresh = self._fresh and not optimizer.state
        self.measure(model, parameters_of(optimizer))

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
        """Say what was found, the surest first."""
        for handle in self._handles:
            handle.remove()
        held = set(map(id, parameters_of(*optimizers)))
        self.measure(model, (parameter for parameter in model.parameters() if id(parameter) not in held))
        found: list[Finding] = []
        with self._guarded():
            report = _verdict(watch, model, optimizers)
            attributions, tracer = watch.attributions, watch.tracer
            shapes = {clean(name): tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
            context = CheckContext(
                report=report,
                attributions=attributions,
                modules={clean(name): module for name, module in model.named_modules()},
                shapes=shapes,
                groups=groups_of(model, optimizers),
                stats=self._stats,
                order=tracer.known.order,
                readers={name: tracer.known.other_readers(name) for name in tracer.known.order if name in shapes},
                first_input=self._read_first_input(),
                fresh=fresh and self._fresh,
                clipped=clipped,
                scheduled=scheduled,
            )
            for rule in RULES:
                found += rule(context)
        return ranked(found)

    def _read_first_input(self) -> FirstLayerInput | None:
        if self._first_input is None or not self._first_input[1].numel():
            return None
        rows, mean, square, distinct, indicators = self._first_input[1].tolist()
        off_centre = mean / square if square else 0.0
        return FirstLayerInput(self._first_input[0], int(rows), off_centre, int(distinct), indicators)


def _verdict(watch: Watch, model: nn.Module, optimizers: Sequence[Optimizer]) -> LivenessReport:
    trainable = trainable_sites(watch.sites, model, optimizers)
    totals = watch.liveness.totals().to_host()
    return judge(totals, UnitHistory.empty(), watch.layout, Rules(MIN_SAMPLES), trainable=trainable)[0]


def _moments(layer: nn.Module, x: Tensor) -> Tensor:
    """Measure what a layer is given; nothing where it is not plain numbers.

    Returns:
        The number of rows, ``|mean|^2``, ``E|x|^2``, how many rows differ, and the share of indicators.
    """
    convolves = isinstance(layer, nn.modules.conv._ConvNd)
    if not isinstance(layer, _LINEAR) or not x.is_floating_point() or (convolves and x.ndim != layer.weight.ndim):
        return torch.empty(0)
    rows = x.movedim(1, -1).flatten(0, -2) if convolves else x.reshape(-1, x.shape[-1])
    if len(rows) < MIN_SAMPLES:
        return torch.empty(0)
    rows = rows.float()
    distinct = len(torch.unique(rows[:_DISTINCT], dim=0))  # more than that is many
    counts = rows.new_tensor([len(rows), distinct])
    moments = torch.stack([rows.mean(0).square().sum(), rows.square().mean(0).sum()])
    return torch.cat([counts[:1], moments, counts[1:], indicator_share(rows).reshape(1)])


def _is_plain(parameter: Tensor) -> bool:
    if nn.parameter.is_lazy(parameter) or hasattr(parameter, "device_mesh"):
        return False
    return parameter.is_floating_point() and parameter.numel() > 0 and parameter.device.type != "meta"


def _norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32)))


def _stats_of(parameter: Tensor, gradient: Tensor | None) -> ParameterStats:
    norm = _norm(parameter)
    known = gradient is not None and gradient.layout is torch.strided and not hasattr(gradient, "device_mesh")
    slope = _norm(gradient) if known and gradient is not None else math.nan
    negative = float((parameter < 0).float().mean()) if parameter.ndim < 2 else 0.0
    return ParameterStats(parameter.numel(), norm / math.sqrt(parameter.numel()), negative, slope)
