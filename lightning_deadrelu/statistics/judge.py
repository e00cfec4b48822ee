"""From the counts of a window to verdicts. Pure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_deadrelu.model.layout import Layout
from lightning_deadrelu.statistics.report import LivenessReport, SiteReport
from lightning_deadrelu.statistics.totals import FINITE, NAN, Totals, UnitHistory

Array = np.ndarray[Any, np.dtype[Any]]

_RARE = 0.01


@dataclass(frozen=True)
class Rules:
    """What a verdict asks for.

    Args:
        min_samples: A silent unit is dead from this age on.
        tau: A unit is dormant if its mean output is at most this share of its layer's mean.
        all_rates: Whether counts and sums are read on every observation, at five to ten times the cost; by default on
            the first and last of a window.
        redundancy: Whether silent samples of whole layers, and units that are multiples of others, are counted where
            rates are, at twice their cost.
    """

    min_samples: int = 299
    tau: float = 0.025
    all_rates: bool = False
    redundancy: bool = False


def judge(
    totals: Totals,
    history: UnitHistory,
    layout: Layout,
    rules: Rules = Rules(),
    *,
    trainable: Sequence[bool] | None = None,
    step: int = 0,
    steps: Sequence[int] = (),
    unwatched: Mapping[str, str] | None = None,
) -> tuple[LivenessReport, UnitHistory]:
    """Turn the counts of a window into verdicts.

    Args:
        totals: The window's counts on the CPU, merged over ranks; the report shares no memory with them.
        history: What is known from the windows before.
        layout: Of the flat tensors.
        rules: What a verdict asks for.
        trainable: For each site, whether an optimizer trains what feeds it; by default all do.
        step: The step the report bears.
        steps: The step of each observation of the window that is done; what is not listed bears ``step``.
        unwatched: What could not be watched, and why.

    Returns:
        The report, and the history for the next window.
    """
    before = history.extended(layout.units, len(layout))
    steps = [*steps, *[step] * (totals.samples.shape[1] - len(steps))]  # an observation may be under way
    found, history = _units(totals, before, layout, rules, steps)
    parts = zip(*(values.split([site.units for site in layout]) for values in found.values()), strict=True)
    blind = totals.blind_share if rules.redundancy else [None] * len(layout)
    sizes = zip(totals.samples.sum(1).tolist(), totals.elements.sum(1).tolist(), blind, strict=True)
    learns = [True] * len(layout) if trainable is None else trainable
    reports = [
        SiteReport(name, site.kind, site.units, *size, trains, site.smooth, **dict(zip(found, part, strict=True)))
        for site, name, size, trains, part in zip(layout, layout.names, sizes, learns, parts, strict=True)
        if site.units  # without, the site was left out and only keeps its place
    ]
    return LivenessReport(tuple(reports), step, dict(unwatched or {})), history


def _units(
    totals: Totals, before: UnitHistory, layout: Layout, rules: Rules, steps: Sequence[int]
) -> tuple[dict[str, Tensor], UnitHistory]:
    """Judge the units of all sites end to end: fields of :class:`SiteReport` by name, and the next history.

    In NumPy, whose comparisons take a third of the time that torch's take on a CPU.
    """
    was_dead, ever, returned = before.dead.numpy(), before.ever.numpy(), before.revived.numpy()
    nonfinite = totals.nonfinite.numpy()
    fires, sane, proven = totals.last_fired.numpy() >= 0, nonfinite < NAN, totals.proved.numpy() >= 0
    found = _by_site(totals, before, layout, steps, fires, proven)
    smooth = torch.tensor([site.smooth for site in layout], dtype=torch.bool)  # of no site too
    rated, ran = totals.elements.any(1), totals.samples.any(1)
    silent = _per_unit(ran & ~smooth, layout) & ~fires & sane
    kept = _per_unit(unseen(totals, before), layout)  # a fraction must not fall because sites got lost
    dead = (silent & (found["age"] >= rules.min_samples)) | (kept & was_dead)
    lives = fires | (proven & ~dead)
    newly_dead, revived = dead & ~was_dead, lives & was_dead
    found |= {
        "dead": dead,
        "silent": silent,
        "judged": lives | dead | (kept & ever),
        "newly_dead": newly_dead,
        "revived": revived,
    }
    found |= {"born_dead": dead & ~(ever | proven), "redied": newly_dead & returned, "nonfinite": nonfinite > FINITE}
    found |= {"rare": lives & found["rare"], "frozen": fires & sane & totals.constant(layout).numpy()}
    found["dormant"] = (found["dormancy"] <= rules.tau) & _per_unit(rated, layout) & sane
    found["dormant"] &= totals.peak.numpy() < math.inf
    units = {key: torch.from_numpy(values) for key, values in found.items()}
    units["fired_ever"] = before.fired + totals.fired
    units["peak"], projection = totals.peak.clone(), totals.projection
    units["projection"] = projection.clone() if len(projection) else projection.new_zeros(1).expand(layout.units)
    return units, UnitHistory(
        age=units["age"],
        ever=torch.from_numpy(ever | fires | proven),
        dead=torch.from_numpy(dead | (was_dead & ~lives)),
        revived=torch.from_numpy(returned | revived),
        fired=units["fired_ever"],
        seen=units["seen"],
        last_fired=units["last_fired"],
        elements=before.elements + totals.elements.sum(1),
        ran=before.ran | totals.samples.any(1),
    )


def unseen(totals: Totals, before: UnitHistory) -> list[bool]:
    """Tell for each site whether it ran before, and not in this window, so that its last verdict stands."""
    now, known = totals.samples.any(1).tolist(), before.ran.tolist()
    return [not runs and place < len(known) and known[place] for place, runs in enumerate(now)]


def _per_unit(of_sites: Sequence[bool] | Tensor, layout: Layout) -> Array:
    """Repeat what is said of each site for its units."""
    return np.repeat(np.asarray(of_sites, dtype=bool), [site.units for site in layout])


def _by_site(
    totals: Totals, before: UnitHistory, layout: Layout, steps: Sequence[int], fires: Array, proven: Array
) -> dict[str, Array]:
    """Work out what takes numbers of the site, one site at a time, so that a part stays in the cache."""
    fired, magnitude, number = totals.fired.numpy(), totals.magnitude.numpy(), torch.tensor([-1, *steps]).int()
    elements, samples = totals.elements.sum(1).tolist(), totals.samples.sum(1).tolist()
    counts = np.int32 if max(elements, default=0) < 2**31 else np.int64  # half the bytes to compare
    dtypes = {"fired": counts, "always_on": bool, "rare": bool, "dormancy": magnitude.dtype}
    dtypes |= {"age": np.int64, "seen": np.int64}
    flat = {key: np.empty(layout.units, dtype) for key, dtype in dtypes.items()}
    behind = totals.last_fired.int().add_(1)  # observations until then
    signs = behind.maximum(totals.proved.int()) if proven.any() else behind
    last_fired, since = number.index_select(0, behind).numpy(), _since(totals.samples)
    flat["last_fired"] = np.maximum(last_fired, before.last_fired.numpy(), out=last_fired)
    age, seen = before.age.numpy(), before.seen.numpy()
    age = age * ~proven if proven.any() else age  # who had a gradient before the window's first observation, too
    for index, place in enumerate(layout.places):
        so_far = int(before.elements[index]) + elements[index]
        part = {key: values[place] for key, values in flat.items()}
        part["fired"][:] = fired[place]
        _compare(part, elements[index])
        _dormancy(part["dormancy"], magnitude[place])
        np.maximum(seen[place], fires[place] * so_far, out=part["seen"])
        np.add(age[place], samples[index], out=part["age"])
        np.minimum(part["age"], since[index].index_select(0, signs[place]).numpy(), out=part["age"])
    return flat


def _since(samples: Tensor) -> Tensor:
    """Add up, by site, the samples since so many observations were done; before any, since nobody knows when."""
    later = samples.flip(1).cumsum(1).flip(1)[:, 1:]
    unknown = torch.full_like(samples[:, :1], torch.iinfo(samples.dtype).max)
    return torch.cat([unknown, later, torch.zeros_like(unknown)], 1)


def _compare(part: dict[str, Array], elements: int) -> None:
    """Compare how often units fired with the site's elements."""
    np.equal(part["fired"], elements or -1, out=part["always_on"])
    np.less(part["fired"], _least_usual(elements), out=part["rare"])


def _least_usual(elements: int) -> int:
    """Say how often a unit has to fire not to be rare; once where that is no less than all rates that are.

    Example:
        >>> _least_usual(10), _least_usual(700)
        (0, 7)
    """
    if not elements or 1 / elements >= _RARE:
        return 0
    first = max(int(_RARE * elements) - 1, 0)
    return next(number for number in itertools.count(first) if number / elements >= _RARE)


def _dormancy(out: Array, magnitude: Array) -> None:
    """Divide each unit's absolute output by the layer's mean: the ReDo score, in place.

    A layer that puts out nothing at all scores 0 throughout; what is not a finite number counts as no output in the
    layer's mean. Source: Sokar et al. 2023, arXiv 2302.12902, whose scores average 1.

    Args:
        out: Where to put it, shape ``(units,)``.
        magnitude: Sum of the absolute output, shape ``(units,)``.
    """
    layer = float(torch.from_numpy(magnitude).mean())
    if not math.isfinite(layer):
        magnitude = np.nan_to_num(magnitude, nan=0.0, posinf=0.0)
        layer = float(torch.from_numpy(magnitude).mean())
    np.divide(magnitude, layer, out=out) if layer > 0 else out.fill(0.0)
