"""Why units died: from what was noted before to a sentence and a cause. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lightning_deadrelu.findings import Confidence, Finding
from lightning_deadrelu.vitals import Rows

Kind = Literal["born dead", "shock", "drift", "upstream"]

LAG = 20  # steps; twice the memory of a momentum of 0.9, which pushes on after a spike
_BEFORE = 200  # steps that tell what is usual
_LEAST = 10  # of them
_SPIKE = 8.0  # gradients of healthy runs reach 3 to 5 times their median
_INPUT_SPIKE = 5.0  # normalised inputs hardly leave twice their usual range
_RATE_SPIKE = 3.0  # above all rates before, so that neither warm-up nor a warm restart counts
_IDLE = 0.1  # a model that hardly learns any more has gradients near 0: they count by what was usual before
_ANEW = 0.5  # of the largest before: what is less than that follows from it
_DEVIATIONS = 6.0  # of the logarithm, by the median absolute deviation
_SHARE, _UNITS = 0.05, 3  # of a site: what dies beside is told without a cause
_DRIFT_WINDOWS = 4
_BIG_STEP = {"adaptive": 0.3, "plain": 0.1}  # of the size of the weights, at one step; 0.001 to 0.01 is usual
_OFF_CENTRE = 1.2  # raw images in 0 to 1 have 1.5 to 2, normalised ones 0
_SHIFT = 3.0
_EARLY = 100  # steps
_LEAN, _ERRORS = 0.3, 5.0  # of the weights' size; and in standard errors
_SMALL, _LARGE = 0.1, 3.0  # times He's size; PyTorch's own draws have 0.4
_NARROW, _DEEP = 16, 5


class Feed(NamedTuple):
    """What feeds units at one time; tensors of shape ``(units,)``, NaN where it is not known.

    Args:
        bias: The bias, or BatchNorm's beta.
        square: Mean square of the incoming weights, of a sample from the whole site.
        mean: Mean of the incoming weights, of a sample from the whole site.
    """

    bias: Tensor
    square: Tensor
    mean: Tensor

    @classmethod
    def unknown(cls, units: int) -> Feed:
        """Know nothing."""
        return cls(*torch.full((3, units), math.nan))

    def of(self, units: Tensor) -> Feed:
        """Choose units."""
        return Feed(*(values[units] for values in self))


class Victims(NamedTuple):
    """The newly dead of one site, and what is known of them; tensors of shape ``(victims,)``.

    Args:
        site: Its name.
        size: Units of the site.
        first: Whether no other rectifier comes before it.
        born: Never fired.
        last_fired: Step of the last observation in which each fired; -1 if none.
        silent_from: Step of the first observation after.
        constant: Whether the input did not vary in the window.
        upstream: The nearest site before that is dead altogether; empty if none.
        peaks: Largest input by window, the latest last, shape ``(windows, victims)``.
        alive: What fed them at the start of the window in which they fired last.
        now: What feeds them now.
        start: What fed all units of the site at the start, shape ``(size,)`` each.
        units: Which units they are.
        fan_in: Weights per unit; 0 where it is not known.
        decay: Weight decay of the bias.
        left: What decay alone would have left of a bias since the start, 0 to 1.
        adaptive: Whether the optimizer divides by the size of past gradients, as Adam does.
        momentum: Of an optimizer that does not.
    """

    site: str
    size: int
    first: bool
    units: Tensor
    born: Tensor
    last_fired: Tensor
    silent_from: Tensor
    constant: Tensor
    upstream: str
    peaks: Tensor
    alive: Feed
    now: Feed
    start: Feed
    fan_in: int = 0
    decay: float = 0.0
    left: float = 1.0
    adaptive: bool = False
    momentum: float = 0.0

    def of(self, chosen: Tensor) -> Victims:
        """Choose victims.

        Args:
            chosen: Boolean, shape ``(victims,)``.
        """
        names = ("units", "born", "last_fired", "silent_from", "constant")
        cut: dict[str, Any] = {name: getattr(self, name)[chosen] for name in names}
        return self._replace(**cut, peaks=self.peaks[:, chosen], alive=self.alive.of(chosen), now=self.now.of(chosen))

    @property
    def moved(self) -> float:
        """Median change of the biases since the victims were alive; NaN where it is not known."""
        return _median(self.now.bias - self.alive.bias)


@dataclass(frozen=True)
class Wave:
    """Units that died together, and why.

    Args:
        kind: ``"born dead"``, ``"shock"`` (within the resolution), ``"drift"`` (over many windows) or ``"upstream"``.
        cause: One word, as in :class:`~lightning_deadrelu.findings.Finding`; ``"unknown"`` where none is certain.
        sites: Where.
        units: How many at each.
        first_step: The last observation at which one of them fired; for those born dead, the first of all.
        last_step: The first observation from which on all were silent.
        evidence: What was measured.
        moved: Median change of the biases; None where it is not known.
        finding: The cause with its remedy; None where it is unknown.

    Example:
        >>> print(Wave("shock", "gradient_spike", ("fc2",), (142,), 120, 130, "as gradients rose 80-fold", -4.1))
        142 units of `fc2` died between steps 120 and 130, as gradients rose 80-fold; bias moved by -4.1
    """

    kind: Kind
    cause: str
    sites: tuple[str, ...]
    units: tuple[int, ...]
    first_step: int
    last_step: int
    evidence: str
    moved: float | None = None
    finding: Finding | None = None

    def __str__(self) -> str:
        total = sum(self.units)
        who = f"{total:,} unit{'s' * (total > 1)} of {self._where}"
        moved = "" if self.moved is None else f"; bias moved by {self.moved:+.2g}"
        when = f"between steps {self.first_step:,} and {self.last_step:,}"
        if self.kind == "born dead":
            return f"{who} {'were' if total > 1 else 'was'} born dead: {self.evidence}"
        done = "sank into silence" if self.kind == "drift" else "died"
        return f"{who} {done} {when}, {self.evidence}{moved}"

    @property
    def is_large(self) -> bool:
        """Whether it is worth a line of its own."""
        return sum(self.units) >= (_UNITS if self.finding else 2 * _UNITS)

    @property
    def _where(self) -> str:
        if len(self.sites) == 1:
            return f"`{self.sites[0]}`"
        most = self.units.index(max(self.units))
        return f"{len(self.sites)} layers (most in `{self.sites[most]}`, {self.units[most]:,})"

    def to_dict(self) -> dict[str, Any]:
        """Turn into plain values that ``json.dumps`` takes."""
        plain = {"kind": self.kind, "cause": self.cause, "sites": list(self.sites), "units": list(self.units)}
        steps = {"first_step": self.first_step, "last_step": self.last_step, "evidence": self.evidence}
        finding = self.finding.to_dict() if self.finding else None
        return plain | steps | {"moved": self.moved, "finding": finding, "sentence": str(self)}

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Wave:
        """Turn back what :meth:`to_dict` returned."""
        values = {key: value for key, value in plain.items() if key != "sentence"}
        finding = Finding(**values["finding"]) if values["finding"] else None
        return cls(**values | {"sites": tuple(values["sites"]), "units": tuple(values["units"]), "finding": finding})


def explain(
    victims: Sequence[Victims], rows: Rows, *, off_centre: float = math.nan, sites: int = 1
) -> tuple[Wave, ...]:
    """Gather the newly dead into waves, and say of each what came just before.

    Args:
        victims: The newly dead, by site, in the order of execution.
        rows: What was noted at each step.
        off_centre: Size of the inputs' mean over that of their deviation.
        sites: How many sites there are.

    Returns:
        The waves; of the same kind, cause and time they are one, over all sites.
    """
    waves: list[Wave] = []
    for one in victims:
        upstream = one.constant & bool(one.upstream)
        born = one.born & ~upstream
        decayed = _decayed(one) & ~born & ~upstream
        drifted = _drifted(one.peaks) & ~born & ~upstream & ~decayed
        waves += [_upstream(one.of(part)) for part in (upstream & one.born, upstream & ~one.born) if part.any()]
        waves += [_born(one.of(born), off_centre, sites)] if born.any() else []
        waves += [_decay(one.of(decayed))] if decayed.any() else []
        waves += [_drift(one.of(drifted), rows)] if drifted.any() else []
        rest = one.of(~(upstream | born | drifted | decayed))
        waves += [_shock(part, rows, off_centre) for part in _together(rest)]
    return tuple(joined(waves))


_UNNAMED = ("unknown", "born_dead")


def joined(waves: Sequence[Wave]) -> list[Wave]:
    """Join what is alike in kind and cause, and goes on in time.

    Args:
        waves: In any order.

    Returns:
        Waves in the order of their first step; of the same step, those that others follow from come first.
    """
    groups: list[list[Wave]] = []
    for wave in sorted((_adopted(wave, waves) for wave in waves), key=lambda wave: wave.first_step):
        alike = (group for group in groups if (group[0].kind, group[0].cause) == (wave.kind, wave.cause))
        group = next((group for group in alike if _go_on(group, wave)), None)
        if group is None:
            groups.append([wave])
        else:
            group.append(wave)
    return sorted(map(_one, groups), key=lambda wave: (wave.first_step, wave.cause == "upstream_death"))


def _adopted(wave: Wave, others: Sequence[Wave]) -> Wave:
    """Give the few of one site the cause that many at another, at the same time, died of."""
    if wave.cause not in _UNNAMED or wave.kind not in ("born dead", "shock"):
        return wave
    named = (one for one in others if one.kind == wave.kind and one.cause not in (*_UNNAMED, "upstream_death"))
    cause = next((one for one in named if _overlap(one, wave)), wave)
    return replace(wave, cause=cause.cause, evidence=cause.evidence, finding=cause.finding)


def _overlap(one: Wave, other: Wave) -> bool:
    same = one.first_step < other.last_step and other.first_step < one.last_step
    return same or one.kind == "born dead"


def _go_on(group: Sequence[Wave], wave: Wave) -> bool:
    lasting = wave.kind == "born dead" or wave.cause == "bias_decay"
    return lasting or wave.first_step <= max(one.last_step for one in group)


def _one(group: Sequence[Wave]) -> Wave:
    counts: dict[str, int] = {}
    for wave in group:
        for site, number in zip(wave.sites, wave.units, strict=True):
            counts[site] = counts.get(site, 0) + number
    largest = max(group, key=lambda wave: sum(wave.units))
    first, last = min(wave.first_step for wave in group), max(wave.last_step for wave in group)
    where, units = tuple(counts), tuple(counts.values())
    return Wave(
        largest.kind, largest.cause, where, units, first, last, largest.evidence, largest.moved, largest.finding
    )


def told(waves: Sequence[Wave], most: int = 5) -> str:
    """Tell of the largest waves, with what mends their causes, in the order of time; empty if there were none.

    Args:
        waves: All of them.
        most: How many to tell of.

    Example:
        >>> told(())
        ''
    """
    large = sorted((wave for wave in waves if wave.is_large), key=lambda wave: (wave.finding is None, -sum(wave.units)))
    shown = sorted(large[:most], key=lambda wave: wave.first_step)
    lines: list[str] = []
    for wave in shown:
        lines += [f"{wave}.", *(advice for advice in _advice(wave) if advice not in lines)]
    left = sum(sum(wave.units) for wave in waves if wave not in shown)
    if left:
        lines.append(f"{left:,} more unit{'s' * (left > 1)} died; see `monitor.deaths`.")
    return "\n".join(lines)


def _advice(wave: Wave) -> list[str]:
    found = wave.finding
    return [f"  {found.cause} ({found.confidence}): try `{found.edit}` [{found.source}]"] if found else []


# -- what kind of death ----------------------------------------------------------------------------------


def _drifted(peaks: Tensor) -> Tensor:
    """Tell whose peak had sunk over windows before it met zero: by half, and by more than it fell at the end."""
    windows, units = peaks.shape
    if windows <= _DRIFT_WINDOWS:
        return torch.zeros(units, dtype=torch.bool)
    before, now = peaks[:-1], peaks[-1]
    fired = before > 0
    order = torch.arange(1, windows)[:, None]
    last = (fired * order).amax(0)  # 1 is the first window
    end = torch.where(last > 0, before.gather(0, (last - 1).clamp(min=0)[None])[0], -math.inf)
    top = before.amax(0)
    sunk = (end <= top / 2) & (end - now <= top - end)
    return sunk & (fired.sum(0) >= _DRIFT_WINDOWS) & peaks.isfinite().all(0)


def _together(victims: Victims) -> list[Victims]:
    """Part victims where one interval of death ends before the next begins."""
    parts: list[Victims] = []
    left = victims
    while len(left.units):
        end = int(left.silent_from[left.last_fired.argmin()])
        while True:  # chained: those who died a little later
            part = left.last_fired < end
            further = int(left.silent_from[part].max())
            if further == end:
                break
            end = further
        parts.append(left.of(part))
        left = left.of(~part)
    return parts


# -- waves -----------------------------------------------------------------------------------------------


class _Cause(NamedTuple):
    """A cause, before it is known where it struck, in the terms of a finding."""

    name: str
    evidence: str
    confidence: Confidence
    edit: str
    source: str


_UNKNOWN = _Cause("unknown", "for no cause that was seen", "possible", "", "")


def _wave(kind: Kind, victims: Victims, cause: _Cause, moved: bool = True, where: str = "") -> Wave:
    known = moved and math.isfinite(victims.moved) and victims.moved != 0
    finding = None
    if cause.name != "unknown":
        finding = Finding(
            cause=cause.name,
            where=where or victims.site,
            evidence=cause.evidence,
            confidence=cause.confidence,
            edit=cause.edit,
            source=cause.source,
        )
    first, last = int(victims.last_fired.min()), int(victims.silent_from.max())
    change = float(f"{victims.moved:.4g}") if known else None
    units = (len(victims.units),)
    return Wave(kind, cause.name, (victims.site,), units, first, last, cause.evidence, change, finding)


def _are_many(victims: Victims) -> bool:
    """Whether so many of a site died that chance alone is no explanation."""
    return len(victims.units) >= max(_UNITS, _SHARE * victims.size)


def _upstream(victims: Victims) -> Wave:
    born = bool(victims.born.all())
    evidence = f"{'never fired, ' if born else ''}their input being constant since `{victims.upstream}` is dead"
    source = "a layer without a live unit puts out its next layer's bias, whatever the input"
    cause = _Cause("upstream_death", evidence, "certain", 'DeadReLUMonitor(remedy="reset")', source)
    return _wave("born dead" if born else "upstream", victims, cause, moved=False, where=victims.upstream)


def _drift(victims: Victims, rows: Rows) -> Wave:
    sunk = (
        f"their largest input having sunk from {_median(victims.peaks.amax(0)):.2g} over {len(victims.peaks)} windows"
    )
    cause = _UNKNOWN._replace(evidence=sunk)
    if _are_many(victims):
        cause = _large_steps(victims, rows, sunk) or cause
    return _wave("drift", victims, cause)


def _decayed(victims: Victims) -> Tensor:
    """Tell who would fire with its first bias, of which decay has taken a good part."""
    lost = victims.start.bias[victims.units] - victims.now.bias
    sunk = victims.peaks.amax(0) - victims.peaks[-1]
    shrunk = (victims.now.bias < 0.7 * victims.start.bias[victims.units]) & (victims.now.bias > -0.1 * lost)
    return shrunk & (victims.peaks[-1] + lost > 0) & (lost >= sunk / 2) & (victims.left <= 0.8)


def _decay(victims: Victims) -> Wave:
    start, now = _median(victims.start.bias[victims.units]), _median(victims.now.bias)
    evidence = f"while a weight decay of {victims.decay:g} took their biases from {start:.2g} to {now:.2g}"
    edit = f"AdamW(decay_groups(model, {victims.decay:g}))"
    source = "He et al. 2019, arXiv 1812.01187: no decay of biases"
    return _wave("drift", victims, _Cause("bias_decay", evidence, "likely", edit, source), moved=False)


# -- shocks ----------------------------------------------------------------------------------------------


class _Spike(NamedTuple):
    step: int
    ratio: float
    usual: float
    value: float


def _shock(victims: Victims, rows: Rows, off_centre: float) -> Wave:
    cause = _UNKNOWN
    if _are_many(victims):
        early = int(victims.last_fired.min()) < _EARLY
        cause = (
            _spiked(victims, rows)
            or (_bad_init(victims) if early else None)
            or _shifted(victims, rows)
            or _large_steps(victims, rows)
            or (_uncentred(victims, off_centre) if early else None)
            or cause
        )
    return _wave("shock", victims, cause)


def _shifted(victims: Victims, rows: Rows) -> _Cause | None:
    """Find a step at which the loss jumped to about that of the untrained model, and stayed: the work is another."""
    first, ended = int(victims.last_fired.min()), int(victims.silent_from.median())
    loss, steps = rows.column("loss"), torch.tensor(rows.steps, dtype=torch.int64)
    for place in ((steps >= first - LAG) & (steps < ended)).nonzero().flatten().tolist():
        before, after = loss[max(0, place - _LEAST) : place], loss[place : place + _LEAST]
        if len(before) < _LEAST or not loss[place] >= _SHIFT * before.max():
            continue
        if after.median() >= loss[place] / 3 and loss[place] <= 3 * loss[:_LEAST].max():
            rose = f"{_median(before):.2g} to {float(loss[place]):.2g} at step {int(steps[place]):,}"
            evidence = f"when the loss rose from {rose}, and stayed high"
            edit = 'DeadReLUMonitor(remedy="reset")'
            return _Cause("distribution_shift", evidence, "possible", edit, "Dohare et al. 2024, Nature 632:768")
    return None


def _spiked(victims: Victims, rows: Rows) -> _Cause | None:
    """Find what rose out of proportion before most of the victims fell silent: the earliest link of the chain."""
    first = int(victims.last_fired.min())
    ended = int(victims.silent_from.median())  # by then half of them were dead
    rate, gradient = (_spike(rows, name, first, ended) for name in ("rate", "gradient"))
    inputs = [_spike(rows, f"input_{number}", first, ended) for number in range(3)]
    largest = max((spike for spike in inputs if spike), key=lambda spike: spike.ratio, default=None)
    if rate and not (gradient and gradient.step < rate.step):
        evidence = f"{_told('the learning rate', rate, first)}, from {rate.usual:.4g} to {rate.value:.4g}"
        edit = f"lr={rate.usual:.4g}"
        return _Cause("learning_rate_spike", evidence, "likely", edit, "Goyal et al. 2017, arXiv 1706.02677")
    if largest and not (gradient and gradient.step < largest.step):
        evidence = f"{_told('the largest input', largest, first)}, to {largest.value:.2g}"
        edit = f"x.clamp(-{2 * largest.usual:.2g}, {2 * largest.usual:.2g})"
        source = "a step moves weights by lr * delta * x, in proportion to the input"
        return _Cause("outlier_batch", evidence, "likely", edit, source)
    if gradient:
        evidence = _told("the gradient norm", gradient, first)
        edit = f"Trainer(gradient_clip_val={2 * gradient.usual:.1g})"
        return _Cause("gradient_spike", evidence, "likely", edit, "Pascanu et al. 2013, arXiv 1211.5063")
    return None


def _told(what: str, spike: _Spike, first: int) -> str:
    ago = first - spike.step
    if ago > 0:
        return f"{ago} step{'s' * (ago != 1)} after {what} rose {_fold(spike)}"
    return f"when {what} rose {_fold(spike)} at step {spike.step:,}"


def _fold(spike: _Spike) -> str:
    return f"{spike.ratio:,.0f}-fold" if spike.ratio < 1e6 else "more than a million-fold"


def _spike(rows: Rows, name: str, first: int, end: int) -> _Spike | None:
    """Find the largest value among the steps that may have killed, if it is out of proportion to those before."""
    column, steps = rows.column(name), torch.tensor(rows.steps, dtype=torch.int64)
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


def _large_steps(victims: Victims, rows: Rows, sunk: str = "") -> _Cause | None:
    """Blame the learning rate where single steps were as large as the weights themselves."""
    ratio, rate = _step_size(victims, rows)
    if not ratio >= _BIG_STEP["adaptive" if victims.adaptive else "plain"]:
        return None
    evidence = f"with steps of {ratio:.0%} of the size of the weights, at a learning rate of {rate:.2g}"
    evidence = f"{sunk}, {evidence}" if sunk else evidence
    source = "an update should be about 1e-3 of the weights (CS231n, section on update ratios)"
    return _Cause("high_learning_rate", evidence, "likely", f"lr={rate / 10:.1g}", source)


def _step_size(victims: Victims, rows: Rows) -> tuple[float, float]:
    """Estimate a step over the weights it changed: lr for what Adam steps, lr times the gradient for others."""
    steps = torch.tensor(rows.steps, dtype=torch.int64)
    first, last = int(victims.last_fired.min()), int(victims.silent_from.max())
    near = (steps >= first - LAG) & (steps < last)
    rate = _median(rows.column("rate")[near])
    weights = math.sqrt(_median(victims.alive.square))
    if victims.adaptive:
        return rate / weights if weights else math.nan, rate
    norm = weights * (victims.fan_in * victims.size) ** 0.5
    gradient = _median(rows.column("gradient")[near])
    return rate * gradient / (1 - min(victims.momentum, 0.99)) / norm if norm else math.nan, rate


# -- born dead -------------------------------------------------------------------------------------------


def _born(victims: Victims, off_centre: float, sites: int) -> Wave:
    few = _UNKNOWN._replace(evidence="they have fired on no sample since the first step")
    if len(victims.units) < max(_UNITS, 2 * _SHARE * victims.size):
        return _wave("born dead", victims, few, moved=False)
    options = (
        _negative_bias(victims),
        _uncentred(victims, off_centre),
        _bad_init(victims),
        _narrow(victims, sites),
    )
    plain = _Cause(
        "born_dead", few.evidence, "possible", 'DeadReLUMonitor(remedy="reset")', "Lu et al. 2019, arXiv 1903.06733"
    )
    return _wave("born dead", victims, next(filter(None, options), plain), moved=False)


def _negative_bias(victims: Victims) -> _Cause | None:
    """Blame biases without which most would fire, where nearly all of the site are negative."""
    bias, now = victims.start.bias, victims.now.bias
    fires_without = victims.peaks[-1] - now > 0
    usual = victims.fan_in**-0.5 if victims.fan_in else 0.0  # PyTorch draws biases within +- this
    if not (_median(bias) < -usual and (bias < 0).float().mean() >= 0.8 and fires_without.float().mean() >= 0.5):
        return None
    evidence = f"their biases, {_median(now):.2g} in the median, exceed the largest of their weighted inputs"
    return _Cause(
        "negative_bias",
        evidence,
        "certain",
        "init_for_relu_(model)",
        "the input of a unit is w.x + b: it never exceeds 0",
    )


def _bad_init(victims: Victims) -> _Cause | None:
    """Blame weights whose mean is negative, or whose size is far from He's."""
    start, read = victims.start, victims.size * min(victims.fan_in, _LEAST)
    size = float(start.square.mean()) ** 0.5
    if not size or not victims.fan_in:
        return None
    lean, times = -float(start.mean.mean()) / size, size * (victims.fan_in / 2) ** 0.5
    source = "He et al. 2015, arXiv 1502.01852: standard deviation (2 / fan_in) ** 0.5, mean 0"
    if lean >= max(_LEAN, _ERRORS * read**-0.5):
        evidence = f"their weights leaning to the negative, by {lean:.1f} of their size"
    elif not _SMALL <= times <= _LARGE:
        evidence = f"their weights being {times:.2g} times He's size"
    else:
        return None
    return _Cause("bad_init", evidence, "likely", "init_for_relu_(model)", source)


def _uncentred(victims: Victims, off_centre: float) -> _Cause | None:
    if not victims.first or not off_centre >= _OFF_CENTRE:
        return None
    evidence = f"the inputs' mean is {off_centre:.1f} times their deviation from it, so that its sign decides"
    edit = "x = (x - x.mean(0)) / x.std(0)"
    return _Cause("uncentred_inputs", evidence, "likely", edit, "LeCun et al. 1998, Efficient BackProp, section 4.3")


def _narrow(victims: Victims, sites: int) -> _Cause | None:
    if victims.size > _NARROW or sites < _DEEP:
        return None
    evidence = (
        f"{sites} layers with no more than {victims.size} units: all of one are dead with chance 2^-{victims.size}"
    )
    source = "Lu et al. 2019, arXiv 1903.06733, theorem 3.2"
    return _Cause("narrow_and_deep", evidence, "likely", "randomized_asymmetric_init_(model)", source)


def _median(values: Tensor) -> float:
    known = values[values.isfinite()]
    return float(known.median()) if len(known) else math.nan
