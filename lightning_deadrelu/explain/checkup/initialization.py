"""What may be wrong with a model before its first step: initialisation, biases, shape, inputs. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from torch import nn

from lightning_deadrelu.explain.centring import INDICATORS
from lightning_deadrelu.explain.checkup.context import CheckContext, ParameterStats, code
from lightning_deadrelu.explain.finding import Confidence, Finding
from lightning_deadrelu.render.names import listed
from lightning_deadrelu.statistics import SiteReport
from lightning_deadrelu.statistics.born_dead import born_dead_bounds

MARGIN = 4.0
"""Standard errors by which a figure has to differ."""
_LARGE, _SMALL = 2.0, 0.2  # times He's standard deviation
_PYTORCH = 1 / math.sqrt(6)
_NARROW, _DEEP = 10, 3  # units; layers of at most so many
_XAVIER_FROM = 100  # entries that tell Xavier's value from others
_STANDARDISE = "x = (x - mean) / std, with the mean and the standard deviation of the training set"
_TRANSPOSED = nn.modules.conv._ConvTransposeNd


def bad_init(context: CheckContext) -> Iterator[Finding]:
    """Find weights drawn too large for a rectifier, and chains of them drawn too small or by Xavier's rule."""
    if not context.fresh:
        return
    plain = [site for site in context.sites if not context.normed(site) and len(context.weights(site)) == 1]
    large = [site for site in plain if _of_he(context, site)[0] > _LARGE]
    if large:
        yield _badly_drawn(context, large, "the signal grows from layer to layer", "likely")
        return
    small = _longest(context, lambda site: _of_he(context, site)[1] < _SMALL)
    if len(small) > 1:
        yield _badly_drawn(context, small, "the signal all but ends", "likely")
        return
    xavier = _longest(context, lambda site: _is_xavier(context, site))
    if len(xavier) > 1 and all(_rules_out(context, xavier, other) for other in (1.0, _PYTORCH)):
        words = (
            f"it is Xavier's, which keeps {_of_he(context, xavier[0])[2] ** 2:.0%} of the signal's variance per layer"
        )
        yield _badly_drawn(context, xavier, words, "likely" if len(xavier) > 4 else "possible")


def _badly_drawn(context: CheckContext, sites: Sequence[SiteReport], words: str, confidence: Confidence) -> Finding:
    names = [context.weights(site)[0] for site in sites]
    he = math.sqrt(2 / _fan_in(context, names[0]))
    more = f"; the same with {listed(names[1:])}" if len(names) > 1 else ""
    return Finding(
        cause="bad_init",
        where=names[0],
        measured=f"before a ReLU, weights have a standard deviation of {context.stats[names[0]].rms:.3g}, where He's"
        f" is {he:.3g}: {words}{more}",
        confidence=confidence,
        edit="init_for_relu_(model, batch)",
        source="He et al. 2015, arXiv 1502.01852",
    )


def _of_he(context: CheckContext, site: SiteReport) -> tuple[float, float, float]:
    """Divide the measured standard deviation by He's: at least, at most, and as measured."""
    name = context.weights(site)[0]
    known = context.stats.get(name)
    if known is None or isinstance(context.layer(name), (_TRANSPOSED, nn.Embedding)):
        return 0.0, math.inf, math.nan
    ratio, error = known.rms / math.sqrt(2 / _fan_in(context, name)), _error(known)
    return ratio * (1 - error), ratio * (1 + error), ratio


def _error(known: ParameterStats) -> float:
    return MARGIN / math.sqrt(2 * known.entries)  # of a normal law's standard deviation, relative to it


def _fan_in(context: CheckContext, name: str) -> int:
    return math.prod(context.shapes[name][1:]) or 1


def _is_xavier(context: CheckContext, site: SiteReport) -> bool:
    """Whether a standard deviation agrees with Xavier's."""
    name, ratio = context.weights(site)[0], _of_he(context, site)[2]
    if not ratio > 0 or context.stats[name].entries < _XAVIER_FROM:
        return False
    out, into = context.shapes[name][:2]
    return abs(ratio / math.sqrt(into / (into + out)) - 1) < _error(context.stats[name])


def _rules_out(context: CheckContext, sites: Sequence[SiteReport], other: float) -> bool:
    """Whether not all of some sites can have been drawn with another standard deviation, in units of He's."""
    errors = [_error(context.stats[context.weights(site)[0]]) for site in sites]
    return any(abs(_of_he(context, s)[2] / other - 1) > 2 * error for s, error in zip(sites, errors, strict=True))


def _longest(context: CheckContext, fits: object) -> list[SiteReport]:
    """Find the longest run of sites in a chain that all fit."""
    assert callable(fits)
    best: list[SiteReport] = []
    for chain in context.chains:
        run: list[SiteReport] = []
        for site in chain:
            run = [*run, site] if len(context.weights(site)) == 1 and fits(site) else []
            best = max(best, run, key=len)
    return best


def negative_bias(context: CheckContext) -> Iterator[Finding]:
    """Find layers that are born with negative biases, and units that are silent."""
    if not context.fresh:
        return
    sites = [site for site in context.sites if site.dead_fraction >= 0.1 and _is_negative(context, site)]
    if not sites:
        return
    worst = max(sites, key=lambda site: site.dead_fraction)
    name, negative = context.bias(worst), context.stats[context.bias(worst)]
    yield Finding(
        cause="negative_bias",
        where=name,
        measured=f"{negative.negative:.0%} of the {negative.entries} biases are negative (root mean square"
        f" {negative.rms:.3g}), and {int(worst.dead.sum())} of {worst.units} units of `{worst.name}` fire on none"
        f" of {worst.samples} samples",
        confidence="certain" if worst.dead_fraction >= 0.5 else "likely",
        edit=f"nn.init.constant_({code(name)}, 0.01)",
        source="He et al. 2015, arXiv 1502.01852: zero biases",
    )


def _is_negative(context: CheckContext, site: SiteReport) -> bool:
    """Whether so many biases are negative that a symmetric law would not bring it about in 10,000 draws."""
    known = context.stats.get(context.bias(site))
    return known is not None and known.negative >= 0.9 and known.entries >= 18


def narrow_and_deep(context: CheckContext) -> Iterator[Finding]:
    """Find chains of narrow linear layers that are born dead too often."""
    if not context.fresh:
        return
    for chain in context.chains:
        widths = [site.units for site in chain if len(context.shapes[context.weights(site)[0]]) == 2]
        if len(widths) < len(chain) or sum(width <= _NARROW for width in widths) < _DEEP:
            continue
        first = context.shapes[context.weights(chain[0])[0]][1]
        lower, upper = born_dead_bounds(widths, inputs=first, bias=any(map(context.bias, chain)))
        dead = [site for site in chain if bool(site.dead.all())]
        if upper >= 0.05:
            yield _narrow(chain, widths, lower, upper, dead)


def _narrow(
    chain: Sequence[SiteReport], widths: Sequence[int], lower: float, upper: float, dead: Sequence[SiteReport]
) -> Finding:
    seen = f"; all units of `{dead[0].name}` are dead" if dead else ""
    bound = f"{lower:.0%} to {upper:.0%}" if lower else f"{upper:.0%}"
    what = "the net is born dead" if lower else "some layer is silent at a given input"
    sure: Confidence = "certain" if dead else "likely" if upper >= 0.5 else "possible"
    return Finding(
        cause="narrow_and_deep",
        where=chain[0].name,
        measured=f"{len(widths)} layers of {min(widths)} to {max(widths)} units: {what} with a probability of"
        f" {bound}{seen}",
        confidence=sure,
        edit=f"widen to {math.ceil(math.log2(100 * len(widths)))} units, or randomized_asymmetric_init_(model)",
        source="1 - prod(1 - 2^-N), Lu et al. 2020, arXiv 1903.06733",
    )


def uncentred_inputs(context: CheckContext) -> Iterator[Finding]:
    """Find inputs far from centred, where more of the first layer's units are dead or always on than chance makes."""
    given = context.first_input
    fed = [s for s in context.sites if given and f"{given.path}.weight".lstrip(".") in context.weights(s)]
    if not given or len(fed) != 1 or given.off_centre < 0.5:
        return
    dead, on = fed[0].dead_fraction, float(fed[0].always_on.double().mean())
    by_chance = 2 / (given.distinct + 1)  # of units that rank n distinct one-hot rows and a bias at random
    if min(dead, on) < 0.05 or dead + on < max(0.3, 2 * by_chance):
        return
    indicate = given.indicators >= INDICATORS
    sure: Confidence = "certain" if dead + on >= 0.5 and given.off_centre >= 0.9 else "likely"
    yield Finding(
        cause="uncentred_inputs",
        where=given.path,
        measured=f"its inputs have |mean|^2 / E|x|^2 = {given.off_centre:.2f} over {given.rows} rows, and of the"
        f" {fed[0].units} units of `{fed[0].name}` {dead:.0%} are dead and {on:.0%} are always on",
        confidence="possible" if indicate else sure,
        edit="x = x - mean, with the mean of the training set" if indicate else _STANDARDISE,
        source="LeCun et al. 1998, Efficient BackProp; P(silent on n centred inputs) = 2^-n",
    )
