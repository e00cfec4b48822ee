"""What may be wrong with where rectifiers stand in a model. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from lightning_deadrelu.explain.checkup.context import CheckContext
from lightning_deadrelu.explain.finding import Confidence, Finding
from lightning_deadrelu.statistics import SiteReport

_SEEN_DEAD = 0.1
_FAST = 0.1  # of the weights' size
_SOFTMAX = ("`softmax`", "`log_softmax`")


def batchnorm_order(context: CheckContext) -> Iterator[Finding]:
    """Find rectifiers between a layer and its BatchNorm."""
    sites = [s for s in context.sites if _is_before_norm(context, s)]
    if not sites:
        return
    worst = max(sites, key=lambda site: site.dead_fraction)
    yield Finding(
        cause="batchnorm_order",
        where=worst.name,
        measured=f"{len(sites)} rectifiers are followed by a BatchNorm and not preceded by one: it makes a constant"
        f" of a silent unit, and keeps none from falling silent; {_dead(worst)}",
        confidence=_sure(worst),
        edit="put the BatchNorm before the ReLU: conv, norm, act",
        source="Ioffe and Szegedy 2015, arXiv 1502.03167",
    )


def _is_before_norm(context: CheckContext, site: SiteReport) -> bool:
    behind = context.attributions[site.name].no_outgoing
    return "`batch_norm`" in behind and bool(context.weights(site)) and not context.normed(site)


def relu_output(context: CheckContext) -> Iterator[Finding]:
    """Find a rectifier behind the last layer of the model."""
    last = next((name for name in reversed(context.order) if len(context.shapes.get(name, ())) > 1), "")
    sites = [s for s in context.sites if last in context.weights(s) and len(context.shapes[last]) == 2]
    sites = [s for s in sites if not context.attributions[s.name].outgoing]
    if not sites:
        return
    reader = context.attributions[sites[0].name].no_outgoing
    yield Finding(
        cause="relu_output",
        where=sites[0].name,
        measured=f"it rectifies the last layer, `{last}`: an output that is negative gets no gradient"
        f" ({reader}); {_dead(sites[0])}",
        confidence=_sure(sites[0]),
        edit=f"drop `{sites[0].name}`, or take nn.Softplus() for positive targets",
        source="d relu(z) / dz = 0 for z <= 0",
    )


def attention_relu(context: CheckContext) -> Iterator[Finding]:
    """Find rectifiers in a net that scores for an attention: for a softmax, or for a sum of values that runs away."""
    sites = [s for s in context.sites if _scores(context, s)]
    if not sites:
        yield from _runaway(context)
        return
    worst = max(sites, key=lambda site: site.dead_fraction)
    yield Finding(
        cause="attention_relu",
        where=worst.name,
        measured=f"what it puts out is scored for a softmax: where its units are silent, all scores are alike and"
        f" the attention is uniform; {_dead(worst)}",
        confidence=_sure(worst),
        edit=f"take nn.Tanh() for `{worst.name}`",
        source="Bahdanau et al. 2015, arXiv 1409.0473",
    )


def _runaway(context: CheckContext) -> Iterator[Finding]:
    """Find scores without a softmax that move far at the first step: their gradient is a sum over all values."""
    steps = [
        (context.step(name), site, name)
        for site in context.sites
        if context.multiplies(site)
        for name in context.weights(site)
    ]
    fast = [one for one in steps if one[0] > _FAST]
    if not fast:
        return
    step, site, name = max(fast, key=lambda one: one[0])
    yield Finding(
        cause="attention_relu",
        where=site.name,
        measured=f"what it puts out multiplies other activations, without a softmax, and the first steps move"
        f" `{name}` by {step:.1%} of its size; {_dead(site)}",
        confidence="likely",
        edit=f"divide what `{site.name}` puts out by the number of values that are summed",
        source="Wortsman et al. 2023, arXiv 2309.08586",
    )


def _scores(context: CheckContext, site: SiteReport) -> bool:
    known = context.attributions[site.name]
    if not context.weights(site):
        return False
    if any(known.no_outgoing.startswith(name) for name in _SOFTMAX):
        return context.weights(site)[-1] != context.order[-1] and not any(relu_output(context))
    one = [read.name for read in known.outgoing if context.shapes.get(read.name, (0,))[0] == 1]
    return any(reader in _SOFTMAX for name in one for reader in context.readers.get(name, ()))


def generator_relu(context: CheckContext) -> Iterator[Finding]:
    """Find rectifiers in the net whose output another net, with an optimizer of its own, has to judge."""
    generator = _generator(context)
    sites = [s for s in context.sites if generator is not None and _optimizer(context, s) == generator]
    sites = [s for s in sites if s.dead_fraction >= _SEEN_DEAD or not context.normed(s)]
    if not sites:
        return
    worst = max(sites, key=lambda site: site.dead_fraction)
    norm = "with a norm before it" if context.normed(worst) else "without a norm before it"
    yield Finding(
        cause="generator_relu",
        where=worst.name,
        measured=f"a ReLU {norm}, in a net that learns through another one with an optimizer of its own;"
        f" {_dead(worst)}",
        confidence=_sure(worst),
        edit=f"take nn.LeakyReLU(0.2) for `{worst.name}`, or put a BatchNorm before it",
        source="Radford et al. 2016 (DCGAN), arXiv 1511.06434",
    )


def _optimizer(context: CheckContext, site: SiteReport) -> int | None:
    places = {context.groups[name].number for name in context.weights(site) if name in context.groups}
    return places.pop() if len(places) == 1 else None


def _generator(context: CheckContext) -> int | None:
    """Number the optimizer whose net puts out what the other's takes in, where that one ends in a single score."""
    nets: dict[int, list[str]] = {}
    for name in context.order:
        if name in context.groups and len(context.shapes.get(name, ())) > 1:
            nets.setdefault(context.groups[name].number, []).append(name)
    if len(nets) != 2:
        return None
    (first, a), (second, b) = nets.items()
    fits = [one for one, own, other in ((first, a, b), (second, b, a)) if _feeds(context, own, other)]
    return fits[0] if len(fits) == 1 else None


def _feeds(context: CheckContext, own: list[str], other: list[str]) -> bool:
    out = _width(context, own[-1], 0)
    return out > 1 and out == _width(context, other[0], 1) and _width(context, other[-1], 0) == 1


def _width(context: CheckContext, name: str, dim: int) -> int:
    flipped = isinstance(context.layer(name), nn.modules.conv._ConvTransposeNd)
    return context.shapes[name][1 - dim if flipped else dim]


def _dead(site: SiteReport) -> str:
    return f"{int(site.dead.sum())} of the {site.units} units of `{site.name}` fire on none of {site.samples} samples"


def _sure(site: SiteReport) -> Confidence:
    return "likely" if site.dead_fraction >= _SEEN_DEAD else "possible"
