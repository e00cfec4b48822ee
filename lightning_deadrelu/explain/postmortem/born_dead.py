"""Name why units were born dead: biases, weights, inputs, narrow layers. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_deadrelu.explain.postmortem.causes import Cause
from lightning_deadrelu.explain.postmortem.dying_units import DyingUnits, median
from lightning_deadrelu.statistics.born_dead import born_dead_bounds

_OFF_CENTRE = 1.2  # raw images in 0 to 1 have 1.5 to 2, normalised ones 0
_LEAN, _ERRORS = 0.3, 5.0  # of the weights' size; and in standard errors
_SMALL, _LARGE = 0.1, 3.0  # times He's size; PyTorch's own draws have 0.4
_DEEP, _CHANCE = 5, 0.05  # layers; that one of them is born dead
_ROWS = 10  # of a unit's weights, taken for independent


def negative_bias(dying: DyingUnits) -> Cause | None:
    """Blame biases without which most would fire, where nearly all of the site are negative."""
    bias, now = dying.first_bias, dying.bias
    fires_without = dying.peaks[-1] - now > 0
    usual = dying.fan_in**-0.5 if dying.fan_in else 0.0  # PyTorch draws biases within +- this
    if not (median(bias) < -usual and (bias < 0).float().mean() >= 0.8 and fires_without.float().mean() >= 0.5):
        return None
    measured = f"because their negative biases ({median(now):.2g} in the median) outweigh their largest inputs"
    return Cause(
        "negative_bias",
        measured,
        "certain",
        "init_for_relu_(model)",
        "the input of a unit is w.x + b: it never exceeds 0",
    )


def bad_init(dying: DyingUnits) -> Cause | None:
    """Blame weights whose mean is negative, or whose size is far from He's."""
    read, size = dying.size * min(dying.fan_in, _ROWS), dying.first_square**0.5
    if not size or not dying.fan_in:
        return None
    lean, times = -dying.first_mean / size, size * (dying.fan_in / 2) ** 0.5
    source = "He et al. 2015, arXiv 1502.01852: standard deviation (2 / fan_in) ** 0.5, mean 0"
    if lean >= max(_LEAN, _ERRORS * read**-0.5):
        measured = f"because their weights are negative in the mean, by {lean:.1f} of their size"
    elif not _SMALL <= times <= _LARGE:
        measured = f"because their weights are {times:.2g} times He's size"
    else:
        return None
    return Cause("bad_init", measured, "likely", "init_for_relu_(model)", source)


def uncentred(dying: DyingUnits, off_centre: float) -> Cause | None:
    """Blame inputs whose mean exceeds what sets them apart, in the first layer."""
    if not dying.first or not off_centre >= _OFF_CENTRE:
        return None
    measured = f"because the mean of the inputs is {off_centre:.1f} times their spread, so that its sign decides"
    edit = "x = (x - x.mean(0)) / x.std(0)"
    return Cause("uncentred_inputs", measured, "likely", edit, "LeCun et al. 1998, Efficient BackProp, section 4.3")


def narrow(dying: DyingUnits, widths: Sequence[int]) -> Cause | None:
    """Blame few units in many layers, where the chance that some layer is silent at a given input is no small one."""
    alike = [width for width in widths if width <= dying.size]
    chance = born_dead_bounds(alike)[1] if len(alike) >= _DEEP else 0.0
    if chance < _CHANCE:
        return None
    chain = f"{len(alike)} layers of at most {dying.size} units"
    measured = f"because one of {chain} is silent on an input with a probability of {chance:.0%}"
    source = "1 - prod(1 - 2^-N), Lu et al. 2020, arXiv 1903.06733"
    return Cause("narrow_and_deep", measured, "likely", "randomized_asymmetric_init_(model)", source)
