"""Name what came just before units died: spikes, another task, steps as large as the weights."""

from __future__ import annotations

import math
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_deadrelu.explain.finding import Confidence
from lightning_deadrelu.explain.postmortem.dying_units import DyingUnits, median
from lightning_deadrelu.explain.postmortem.step_log import Rows

LAG = 20  # steps; twice the memory of a momentum of 0.9, which pushes on after a spike
_BEFORE = 200  # steps that tell what is usual
_LEAST = 10  # of them
_SPIKE = 8.0  # gradients of healthy runs reach 3 to 5 times their median
_INPUT_SPIKE = 5.0  # normalised inputs hardly leave twice their usual range
_RATE_SPIKE = 3.0  # above all rates before, so that neither warm-up nor a warm restart counts
_IDLE = 0.1  # a model that hardly learns any more has gradients near 0: they count by what was usual before
_ANEW = 0.5  # of the largest before: what is less than that follows from it
_DEVIATIONS = 6.0  # of the logarithm, by the median absolute deviation
_BIG_STEP = {"adaptive": 0.3, "plain": 0.1}  # of the size of the weights, at one step; 0.001 to 0.01 is usual
_NEAR_ZERO = 0.1  # of the first losses
_GROWN = 1.5  # times the calm loss, two steps before the largest
_SHIFT = 3.0  # times the largest loss of the steps before
_UNTRAINED = 3.0  # times the first losses, and as many times less
_SETTLED = 100  # steps in which a model learns a new task, on digits


class Cause(NamedTuple):
    """A cause, before it is known where it struck, in the terms of a finding."""

    cause: str
    measured: str
    confidence: Confidence
    edit: str
    source: str


UNKNOWN = Cause("unknown", "without a known cause", "possible", "", "")


class _Spike(NamedTuple):
    step: int
    ratio: float
    usual: float
    value: float


class Log:
    """What was logged of the last steps, by column. Layers that died together ask the same, which is found once."""

    def __init__(self, rows: Rows) -> None:
        self.steps = rows.numbers
        self.column = cache(rows.column)
        self.median = cache(partial(_median_of, self))
        self.spike = cache(partial(_spike, self))
        self.shift = cache(partial(_shift, self))
        self.burst = cache(partial(_burst, self))


def _median_of(log: Log, name: str, first: int, end: int) -> float:
    return median(log.column(name)[(log.steps >= first) & (log.steps < end)])


def shifted(dying: DyingUnits, log: Log) -> Cause | None:
    """Find the last step at which the loss jumped to about that of the untrained model, and stayed high."""
    return log.shift(*dying.interval)


def _shift(log: Log, first: int, ended: int) -> Cause | None:
    loss, steps = log.column("loss"), log.steps
    near = ((steps >= first - _SETTLED) & (steps < ended)).nonzero().flatten().tolist()
    place = next((place for place in reversed(near) if _jumps(loss, place)), None)
    if place is None:
        return None
    rose = f"{median(loss[place - _LEAST : place]):.2g} to {float(loss[place]):.2g} at step {int(steps[place]):,}"
    measured = f"after the loss rose from {rose}, and stayed high"
    edit = 'DeadReLUMonitor(remedy="reset")'
    return Cause("distribution_shift", measured, "likely", edit, "Dohare et al. 2024, Nature 632:768")


def _jumps(loss: Tensor, place: int) -> bool:
    """Whether a loss is far above all just before, those after it are above them as well, and it is as at the start."""
    before, after = loss[max(0, place - _LEAST) : place], loss[place : place + _LEAST]
    untrained = loss[:_LEAST].max()
    if len(before) < _LEAST or not untrained / _UNTRAINED <= loss[place] <= untrained * _UNTRAINED:
        return False
    return bool(loss[place] >= _SHIFT * before.max() and after.median() > before.max())


def spiked(dying: DyingUnits, log: Log) -> Cause | None:
    """Find what rose out of proportion before most of the dying units fell silent: the earliest link of the chain."""
    first, ended = dying.interval
    rate, gradient = (log.spike(name, first, ended) for name in ("rate", "gradient"))
    inputs = [log.spike(f"input_{number}", first, ended) for number in range(3)]
    largest = max((spike for spike in inputs if spike), key=lambda spike: spike.ratio, default=None)
    if rate and not (gradient and gradient.step < rate.step):
        measured = f"{_spike_text('the learning rate', rate, first)}, from {rate.usual:.4g} to {rate.value:.4g}"
        edit = f"lr={rate.usual:.4g}"
        return Cause("learning_rate_spike", measured, "likely", edit, "Goyal et al. 2017, arXiv 1706.02677")
    if largest and not (gradient and gradient.step < largest.step):
        measured = f"{_spike_text('the largest input', largest, first)}, to {largest.value:.2g}"
        edit = f"x.clamp(-{2 * largest.usual:.2g}, {2 * largest.usual:.2g})"
        source = "a step moves weights by lr * delta * x, in proportion to the input"
        return Cause("outlier_batch", measured, "likely", edit, source)
    if unstable := adam_spike(dying, log):
        return unstable
    if gradient:
        if too_fast := large_steps(dying, log, before=gradient.step):  # of which the spike is a consequence
            return too_fast._replace(measured=f"{too_fast.measured}, when the gradient norm rose {_times(gradient)}")
        measured = _spike_text("the gradient norm", gradient, first)
        edit = f"Trainer(gradient_clip_val={2 * gradient.usual:.1g})"
        return Cause("gradient_spike", measured, "likely", edit, "Pascanu et al. 2013, arXiv 1211.5063")
    return None


def adam_spike(dying: DyingUnits, log: Log) -> Cause | None:
    """Find a loss that burst from near zero, where Adam's second moment had followed the gradients down.

    Steps stay as large as before, whatever is left of the gradients. Either they overshoot, and errors grow from step
    to step; or what rounding leaves of the gradients bursts at once.
    """
    return log.burst(*dying.interval) if dying.adaptive else None


def _burst(log: Log, first: int, ended: int) -> Cause | None:
    loss, steps = log.column("loss"), log.steps
    near = ((steps >= first - LAG) & (steps < ended)).nonzero().flatten()
    near = near[near >= 2 * LAG]
    if not len(near):
        return None
    place = int(near[int(loss[near].nan_to_num(0.0).argmax())])
    low = median(loss[place - 2 * LAG : place - LAG // 2])
    if not (loss[place] >= _SPIKE * low and low <= _NEAR_ZERO * median(loss[:_LEAST])):
        return None
    rose = f"from {low:.2g} to {float(loss[place]):.2g} at step {int(steps[place]):,}"
    if _is_rounded(loss[: place + 1]):
        edit, source = "cross_entropy(logits.float(), labels)", "arXiv 2605.06152: absorption in the softmax"
        return Cause("low_precision", f"when the loss, in 16 bits, rose {rose}", "likely", edit, source)
    if not _GROWN * low <= loss[place - 2] < loss[place - 1]:
        return None  # what one batch does comes in one step
    measured = f"when the loss grew {rose}, over some steps, while rate and inputs were as usual"
    source = "arXiv 2506.04805: Adam's second moment decouples from the gradients"
    return Cause("adam_spike", measured, "likely", "Adam(..., eps=1e-3)", source)


def _is_rounded(loss: Tensor) -> bool:
    """Whether all losses are numbers of 16 bits, as none of 32 bits are by chance."""
    loss = loss[loss.isfinite()]
    return len(loss) > 1 and any(bool((loss == loss.to(kind).float()).all()) for kind in (torch.bfloat16, torch.half))


def _spike_text(what: str, spike: _Spike, first: int) -> str:
    ago = first - spike.step
    if ago > 0:
        return f"{ago} step{'s' * (ago != 1)} after {what} rose {_times(spike)}"
    return f"when {what} rose {_times(spike)} at step {spike.step:,}"


def _times(spike: _Spike) -> str:
    return f"{spike.ratio:,.0f}-fold" if spike.ratio < 1e6 else "more than a million-fold"


def _spike(log: Log, name: str, first: int, end: int) -> _Spike | None:
    """Find the largest value among the steps that may have killed, if it is out of proportion to those before."""
    column, steps = log.column(name), log.steps
    known = column.isfinite() & (column > 0)
    column, steps = column[known], steps[known]
    may = ((steps >= first - LAG) & (steps < end)).nonzero().flatten()
    may = may[may >= _LEAST]
    if not len(may):
        return None
    place = int(may[int(column[may].argmax())])
    value, before = float(column[place]), column[max(0, place - _BEFORE) : place]
    usual = max(float(before.median()), _IDLE * float(column[:place].median()))
    spike = _Spike(int(steps[place]), value / usual, usual, value)
    if name == "rate":
        return spike if value >= _RATE_SPIKE * float(column[:place].max()) else None
    least = _INPUT_SPIKE if name.startswith("input") else _SPIKE
    logs = before.log()
    deviation = 1.4826 * float((logs - logs.median()).abs().median())
    least = max(least, math.exp(_DEVIATIONS * deviation), _ANEW * float(before.max()) / usual)
    return spike if spike.ratio >= least else None


def large_steps(dying: DyingUnits, log: Log, sunk: str = "", before: int | None = None) -> Cause | None:
    """Blame the learning rate where single steps were as large as the weights themselves.

    Args:
        dying: The units.
        log: What was logged at each step.
        sunk: What the steps did.
        before: Look at the ten steps before this one; by default at those around the deaths.
    """
    first, last = int(dying.last_fired.min()) - LAG, int(dying.silent_from.max())
    ratio, rate = _step_size(dying, log, *((first, last) if before is None else (before - _LEAST, before)))
    if not ratio >= _BIG_STEP["adaptive" if dying.adaptive else "plain"]:
        return None
    measured = f"after steps of {ratio:.0%} of the weights' size at a learning rate of {rate:.2g}"
    measured = f"{sunk}, {measured}" if sunk else measured
    source = "an update should be about 1e-3 of the weights (CS231n, section on update ratios)"
    return Cause("high_learning_rate", measured, "likely", f"lr={rate / 10:.1g}", source)


def _step_size(dying: DyingUnits, log: Log, first: int, last: int) -> tuple[float, float]:
    """Estimate a step over the weights it changed: lr for what Adam steps, lr times the gradient for others."""
    rate = log.median("rate", first, last)
    weights = math.sqrt(median(dying.live_square))
    if dying.adaptive:
        return rate / weights if weights else math.nan, rate
    norm = weights * (dying.fan_in * dying.size) ** 0.5
    gradient = log.median("gradient", first, last)
    return rate * gradient / (1 - min(dying.momentum, 0.99)) / norm if norm else math.nan, rate
