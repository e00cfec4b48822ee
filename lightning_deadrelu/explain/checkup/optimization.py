"""What may be wrong with how a model is trained: decay, learning rate, clipping, schedule. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator

from lightning_deadrelu.explain.checkup.context import CheckContext
from lightning_deadrelu.explain.finding import Finding
from lightning_deadrelu.model.optimizer_groups import ParameterGroup
from lightning_deadrelu.render.names import listed

_HALF_LIFE = 1000  # steps; SGD at 0.1 with momentum 0.9 and decay 5e-4 has 1,386
_L2_OF_ADAM = 0.01
_USUAL = {"adam": 1e-3, "sgd": 0.1}
_FROM = {"adam": 1e-2, "sgd": 0.1 + 1e-9}  # learning rates that may be too high, if the weights agree:
_STEP = {"adam": 0.1, "sgd": 0.025}  # of the weights' size; on digits, layers begin to die there
_GRADIENT_STEP = 0.1  # the same at an ordinary learning rate, with
_LARGE_GRADIENT = 10.0  # times what it is usually clipped to


def bias_decay(context: CheckContext) -> Iterator[Finding]:
    """Find biases and norms before a rectifier that decay fast."""
    names = [
        name for site in context.sites for name in (context.bias(site), *context.scales(site)) if name in context.groups
    ]
    strong = [name for name in dict.fromkeys(names) if _decays(context.groups[name])]
    if not strong:
        return
    group = context.groups[strong[0]]
    half = _half_life(group)
    rate = f"half of each is gone in {half:.0f} steps" if half < math.inf else "as a part of Adam's gradient"
    yield Finding(
        cause="bias_decay",
        where=strong[0],
        measured=f"weight_decay={group.weight_decay:g} of {group.optimizer} at a learning rate of {group.peak:g}"
        f" holds for {len(strong)} biases and norms before a ReLU ({listed(strong)}): {rate}",
        confidence="likely" if half < _HALF_LIFE / 5 or group.weight_decay >= 10 * _L2_OF_ADAM else "possible",
        edit=f"{group.optimizer}(decay_groups(model, {group.weight_decay:g}), lr={group.peak:g})",
        source="He et al. 2019, arXiv 1812.01187; w <- (1 - lr * decay) w",
    )


def _decays(group: ParameterGroup) -> bool:
    if group.kind == "adam" and not group.decoupled:
        return group.weight_decay >= _L2_OF_ADAM
    return _half_life(group) < _HALF_LIFE


def _half_life(group: ParameterGroup) -> float:
    """Count the steps in which a parameter without other gradients halves; unknown for Adam's L2."""
    rate = group.peak * group.shrinking
    unknown = rate == 0 or not (group.decoupled or group.kind == "sgd")
    return math.inf if unknown else math.log(2) / rate


def high_learning_rate(context: CheckContext) -> Iterator[Finding]:
    """Find a first step that is large beside the weights that feed rectifiers."""
    name, step = _largest(context)
    if not _is_high(context, name, step):
        return
    group = context.groups[name]
    yield Finding(
        cause="high_learning_rate",
        where=name,
        measured=f"{_said(group)}, without a warm-up, moves these weights by {step:.1%} of their size"
        f" {_after(group)}; above {_STEP[group.kind]:.1%} units begin to die",
        confidence="likely" if step > 2 * _STEP[group.kind] else "possible",
        edit=f"{group.optimizer}(..., lr={_USUAL[group.kind]:g}), or a warm-up",
        source="Goyal et al. 2017, arXiv 1706.02677; CS231n: ratio of updates to weights",
    )


def no_clipping(context: CheckContext) -> Iterator[Finding]:
    """Find gradients so large that an ordinary learning rate moves the weights far."""
    name, step = _largest(context)
    if context.clipped or step <= _GRADIENT_STEP or context.groups[name].kind != "sgd" or _is_high(context, name, step):
        return
    group, gradient = context.groups[name], context.stats[name].gradient
    if gradient < _LARGE_GRADIENT:
        return
    yield Finding(
        cause="no_clipping",
        where=name,
        measured=f"the first gradient has a norm of {gradient:.3g} there, unclipped: {_said(group)} moves these"
        f" weights by {step:.0%} of their size {_after(group)}",
        confidence="likely" if step > 3 * _GRADIENT_STEP else "possible",
        edit="Trainer(gradient_clip_val=1.0)",
        source="Pascanu et al. 2013, arXiv 1211.5063",
    )


def no_schedule(context: CheckContext) -> Iterator[Finding]:
    """Find a large learning rate of Adam that never falls."""
    name, step = _largest(context)
    if context.scheduled or not _is_high(context, name, step) or context.groups[name].kind != "adam":
        return
    yield Finding(
        cause="no_schedule",
        where=name,
        measured=f"{_said(context.groups[name])} stays so to the end: no schedule lowers it",
        confidence="possible",
        edit="torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=max_epochs)",
        source="Loshchilov and Hutter 2017, arXiv 1608.03983",
    )


def _largest(context: CheckContext) -> tuple[str, float]:
    """Find the weights before a rectifier, without a norm, that the first steps move most, beside their size."""
    sites = [site for site in context.sites if not context.normed(site) and not context.multiplies(site)]
    steps = {name: context.step(name) for site in sites for name in context.weights(site)}
    known = {name: step for name, step in steps.items() if not math.isnan(step)}
    return max(known.items(), key=lambda item: item[1], default=("", 0.0))


def _is_high(context: CheckContext, name: str, step: float) -> bool:
    if name not in context.groups:
        return False
    group = context.groups[name]
    return group.lr >= _FROM[group.kind] and step > _STEP[group.kind]


def _said(group: ParameterGroup) -> str:
    momentum = f" and momentum={group.momentum:g}" if group.momentum else ""
    return f"{group.optimizer} with lr={group.lr:g}{momentum}"


def _after(group: ParameterGroup) -> str:
    return f"after {group.memory:.0f} such steps" if group.momentum else "after one step"
