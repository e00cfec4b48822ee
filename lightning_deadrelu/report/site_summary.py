"""What became of each site over a run, and of all together in one sentence; what tables and pages tell."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from lightning_deadrelu.report.raster import Raster
from lightning_deadrelu.statistics import LivenessReport, SiteReport

if TYPE_CHECKING:
    from lightning_deadrelu.repair.policy import Event

_MANY = 0.1  # the monitor's own threshold, by default
_MOST_SHOWN = 20
_FEW = 12
_DONE = {
    "Reset": "reset",
    "ThermalKick": "kicked",
    "BiasWarming": "warmed",
    "LeakySlope": "given a slope",
    "SwapActivation": "given another activation",
}
WELL = ("healthy", "not trained")
"""Verdicts on sites that need no attention."""


class SiteSummary(NamedTuple):
    """What became of a site.

    Args:
        site: The latest verdict.
        worst: Largest dead fraction over the run; not a number for smooth sites, or without a history.
        since: Step from which on at least half of today's dead have been dead; None if none is.
        died: Step of the window in which most units died; None if none did, or no history was kept.
        remedied: Units that were edited.
        revived: Of these, the units that fire now.
        verdict: In a word.
    """

    site: SiteReport
    worst: float
    since: int | None
    died: int | None
    remedied: int
    revived: int
    verdict: str


class Gap(NamedTuple):
    """Sites that are left out of a table.

    Args:
        stories: Of these sites, in the order of execution.
    """

    stories: tuple[SiteSummary, ...]

    def __str__(self) -> str:
        well = all(story.verdict in WELL for story in self.stories)
        worst = max(story.site.dead_fraction for story in self.stories)
        dead = "healthy" if well and not worst else f"at most {worst:.1%} dead"
        return f"... {len(self.stories):,} sites, {dead}"


def summarize(report: LivenessReport, history: Raster, events: Iterable[Event]) -> list[SiteSummary]:
    """Gather what became of each site, in the order of execution.

    Args:
        report: The latest verdict.
        history: The states of all units over the run.
        events: What was done.
    """
    edited: dict[str, set[int]] = {}
    for event in events:
        if event.action == "edited":
            edited.setdefault(event.site, set()).update(event.units)
    curves = history.site_curves
    return [
        _story(site, curves.get(site.name, ()), history.steps, sorted(edited.get(site.name, ())))
        for site in report.sites
    ]


def _story(site: SiteReport, curve: Sequence[float], steps: Sequence[int], edited: Sequence[int]) -> SiteSummary:
    known = [0.0 if math.isnan(value) else value for value in curve]
    worst = max([*known, site.dead_fraction]) if known and not site.smooth else math.nan
    units = torch.tensor([unit for unit in edited if unit < site.units], dtype=torch.long)
    revived = 0 if site.smooth else int((~site.silent[units] & (site.samples > 0)).sum())
    since, died = (None, None) if site.smooth else (_since(known, steps, site.dead_fraction), _died(known, steps))
    return SiteSummary(site, worst, since, died, len(units), revived, _verdict(site, worst, len(units)))


def _since(curve: Sequence[float], steps: Sequence[int], now: float) -> int | None:
    """Go back to where half as much was dead as is now.

    Example:
        >>> _since([0.5, 0.0, 0.2, 0.4], [9, 19, 29, 39], now=0.4)
        29
    """
    long = sum(1 for _ in itertools.takewhile(lambda dead: dead >= now / 2, reversed(curve)))
    return steps[-long] if now and long else None


def _died(curve: Sequence[float], steps: Sequence[int]) -> int | None:
    """Find the step of the steepest rise.

    Example:
        >>> _died([0.0, 0.1, 0.5, 0.5], [9, 19, 29, 39]), _died([0.0, 0.0], [9, 19])
        (29, None)
    """
    rises = [after - before for before, after in zip([0.0, *curve], curve, strict=False)]
    return steps[rises.index(max(rises))] if max(rises, default=0) > 0 else None


def _verdict(site: SiteReport, worst: float, remedied: int) -> str:
    dead, units = site.dead_fraction, site.units
    judged, linear, rare = (int(mask.sum()) / units for mask in (site.judged, site.always_on, site.rare))
    options = {
        "not run": not site.samples,
        "not finite": bool(site.nonfinite.any()),
        "exchanged": site.smooth and remedied > 0,
        "dormant": site.smooth and int(site.dormant.sum()) > units / 2,
        "healthy": site.smooth,
        "dead": dead == 1,
        "ailing": dead > _MANY,
        "a few dead": dead > 0,
        "not judged": judged < 0.5,
        "frozen": bool(site.frozen.all()),
        "linear": linear == 1,
        "rare": rare > 0.5,
        "repaired": remedied > 0,
        "recovered": worst > _MANY,
        "not trained": not site.trainable,
    }
    return next((word for word, fits in options.items() if fits), "healthy")


def shortened(told: Sequence[SiteSummary]) -> list[SiteSummary | Gap]:
    """Leave out of many stories the healthy ones, and of very many all but the worst 20.

    Args:
        told: All stories, in the order of execution.
    """
    ill = [story for story in told if story.verdict not in WELL]
    shown = {story.site.name for story in sorted(ill, key=_gravity, reverse=True)[:_MOST_SHOWN]}
    rows: list[SiteSummary | Gap] = []
    for story in told:
        last = rows[-1] if rows else None
        if len(told) <= _FEW or story.site.name in shown:
            rows.append(story)
        elif isinstance(last, Gap):
            rows[-1] = Gap((*last.stories, story))
        else:
            rows.append(Gap((story,)))
    return [row.stories[0] if isinstance(row, Gap) and len(row.stories) == 1 else row for row in rows]


def column_of(step: int, steps: Sequence[int]) -> int:
    """Find the window in which a step lies; of steps after the last, the last.

    Example:
        >>> column_of(9, [9, 19]), column_of(10, [9, 19]), column_of(99, [9, 19])
        (0, 1, 1)
    """
    return min(bisect.bisect_left(steps, step), max(len(steps) - 1, 0))


def worst_first(told: Iterable[SiteSummary]) -> list[SiteSummary]:
    """Order stories by how much there is to see: the dead, then what was, then what else is not well."""
    return sorted(told, key=_gravity, reverse=True)


def _gravity(story: SiteSummary) -> tuple[float, float, bool]:
    return story.site.dead_fraction, 0.0 if math.isnan(story.worst) else story.worst, story.verdict not in WELL


def shortened_names(names: list[str], longest: int = 44) -> list[str]:
    """Leave out of long names what all have in common, then the middle.

    Args:
        names: All of them.
        longest: Characters that a name may have.

    Example:
        >>> shortened_names([f"model.encoder_of_images.layers.{i}.feed_forward.activation.relu" for i in range(2)])
        ['…0…', '…1…']
    """
    if max(map(len, names), default=0) <= longest:
        return names
    paths = [name.split(".") for name in names]
    shortest = min(map(len, paths)) - 1
    head = min(_in_common(paths), shortest)
    tail = min(_in_common([path[::-1] for path in paths]), shortest - head)
    short = ["…" * (head > 0) + ".".join(path[head : len(path) - tail]) + "…" * (tail > 0) for path in paths]
    return [
        name if len(name) <= longest else f"{name[: longest // 3]}…{name[longest // 3 - longest :]}" for name in short
    ]


def _in_common(paths: list[list[str]]) -> int:
    """Count the leading parts that all paths share."""
    return sum(1 for _ in itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False)))


# -- in one sentence -------------------------------------------------------------------------------------


def conclude(report: LivenessReport, history: Raster, events: Iterable[Event], summaries: Sequence[SiteSummary]) -> str:
    """Say in one sentence how a model fares, since when, and what was done.

    Args:
        report: The latest verdict.
        history: The states of all units over the run.
        events: What was done.
        summaries: What became of each site.
    """
    if not report.sites:
        return "No rectifier was watched."
    if not report.units:
        return "No rectifier in training was watched."
    told = [summary for summary in summaries if summary.site.in_headline]
    line = _deaths(report, told) + _past(report, history) + _others(report)
    return f"{line}{_deeds(summaries, events)}."


def _deaths(report: LivenessReport, told: Sequence[SiteSummary]) -> str:
    if not report.dead_units:
        return f"None of {report.units:,} units is dead"
    verb = "is" if report.dead_units == 1 else "are"
    line = f"{report.dead_units:,} of {report.units:,} units {verb} dead ({report.dead_fraction:.1%})"
    ill = sorted((s for s in told if s.site.dead.any()), key=lambda story: int(story.site.dead.sum()))
    most = ill[-1]
    since = f", since step {most.since:,}" if most.since is not None else ""
    if len(ill) == 1:
        return f"{line}, {'' if report.dead_units == 1 else 'all '}in `{most.site.name}`{since}"
    line = f"{line}, in {len(ill)} of {len(told)} layers"
    number = int(most.site.dead.sum())
    if number == int(ill[-2].site.dead.sum()):
        return line
    return f"{line}, most in `{most.site.name}` ({number:,}{since})"


def _past(report: LivenessReport, history: Raster) -> str:
    """Say how bad it was, if it was worse."""
    curve = history.curves.get("dead_fraction", ())
    worst = max(curve, default=0.0)
    if worst <= report.dead_fraction + 0.01:
        return ""
    return f", after {worst:.1%} at step {history.steps[curve.index(worst)]:,}"


def _others(report: LivenessReport) -> str:
    broken = report.total("nonfinite")
    unjudged = sum(int((~site.judged & ~site.nonfinite).sum()) for site in report.headline)
    line = f", {broken:,} {'is' if broken == 1 else 'are'} not finite" if broken else ""
    return line + (f", {unjudged:,} {'is' if unjudged == 1 else 'are'} not judged yet" if unjudged else "")


def _deeds(told: Sequence[SiteSummary], events: Iterable[Event]) -> str:
    number = sum(story.remedied for story in told)
    if not number:
        return ""
    kinds = {event.remedy for event in events if event.action == "edited"}
    done = _DONE.get(kinds.pop(), "treated") if len(kinds) == 1 else "treated"
    if all(story.site.smooth for story in told if story.remedied):
        return f"; {number:,} {'was' if number == 1 else 'were'} {done}"
    fire = sum(story.revived for story in told)
    if number == 1:
        return f"; 1 was {done}, and {'fires' if fire else 'is silent'}"
    return f"; {number:,} were {done}, {fire:,} of them fire"
