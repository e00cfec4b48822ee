"""What became of each site over a run: the rows of tables and pages, and the facts of the sentence above them."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from lightning_deadrelu.render.table import Cell, Column
from lightning_deadrelu.report.raster import Raster
from lightning_deadrelu.statistics import LivenessReport, SiteReport
from lightning_deadrelu.statistics.report_table import headline, row_of, were

if TYPE_CHECKING:
    from lightning_deadrelu.repair.event import Event

_MANY = 0.1  # the monitor's own threshold, by default
_MOST_SHOWN = 20
_FEW = 12
_WELL = ("healthy", "not trained")

COLUMNS = (
    Column("site", "layer", text=True),
    Column("kind", "kind", text=True),
    Column("units", "units"),
    Column("dead", "dead now"),
    Column("dead_fraction", "", percent=1),
    Column("worst", "worst", percent=1, optional=True),
    Column("died_at", "died at", optional=True),
    Column("repaired", "repaired", optional=True),
    Column("fire_again", "fire again", optional=True),
    Column("verdict", "verdict", text=True),
)


class SiteSummary(NamedTuple):
    """What became of a site.

    Args:
        site: The latest verdict.
        worst: Largest dead fraction over the run; None for smooth sites, or without a history.
        since: Step from which on at least half of today's dead have been dead; None if none is.
        died_at: Step of the window in which most units died; None if none did, or no history was kept.
        repaired: Units that were edited.
        fire_again: Of these, the units that fire now.
        verdict: In a word or two.
    """

    site: SiteReport
    worst: float | None
    since: int | None
    died_at: int | None
    repaired: int
    fire_again: int
    verdict: str

    @property
    def is_well(self) -> bool:
        """Whether the site needs no attention."""
        return self.verdict in _WELL

    def row(self) -> dict[str, Cell]:
        """Return a row of a table: what the verdict says of the site, and what became of it."""
        firing = self.fire_again if self.repaired and not self.site.smooth else None
        facts = {"worst": self.worst, "died_at": self.died_at, "repaired": self.repaired or None, "fire_again": firing}
        return row_of(self.site) | facts | {"verdict": self.verdict}


def summarize(report: LivenessReport, history: Raster, events: Iterable[Event]) -> list[SiteSummary]:
    """Gather what became of each site, in the order of execution."""
    edited: dict[str, set[int]] = {}
    for event in events:
        if event.action == "edited":
            edited.setdefault(event.site, set()).update(event.units)
    curves, steps = history.site_curves, history.steps
    return [
        _summary(site, curves.get(site.name, ()), steps, sorted(edited.get(site.name, ()))) for site in report.sites
    ]


def _summary(site: SiteReport, curve: Sequence[float], steps: Sequence[int], edited: Sequence[int]) -> SiteSummary:
    known = [0.0 if math.isnan(value) else value for value in curve]
    units = torch.tensor([unit for unit in edited if unit < site.units], dtype=torch.long)
    if site.smooth:
        return SiteSummary(site, None, None, None, len(units), 0, _verdict(site, 0.0, len(units)))
    worst = max([*known, site.dead_fraction]) if known else None
    fire = int((~site.silent[units] & (site.samples > 0)).sum())
    since, died = _since(known, steps, site.dead_fraction), _died_at(known, steps)
    return SiteSummary(site, worst, since, died, len(units), fire, _verdict(site, worst or 0.0, len(units)))


def _since(curve: Sequence[float], steps: Sequence[int], now: float) -> int | None:
    """Go back to where half as much was dead as is now.

    Example:
        >>> _since([0.5, 0.0, 0.2, 0.4], [9, 19, 29, 39], now=0.4)
        29
    """
    long = sum(1 for _ in itertools.takewhile(lambda dead: dead >= now / 2, reversed(curve)))
    return steps[-long] if now and long else None


def _died_at(curve: Sequence[float], steps: Sequence[int]) -> int | None:
    """Find the step of the steepest rise.

    Example:
        >>> _died_at([0.0, 0.1, 0.5, 0.5], [9, 19, 29, 39]), _died_at([0.0, 0.0], [9, 19])
        (29, None)
    """
    rises = [after - before for before, after in zip([0.0, *curve], curve, strict=False)]
    return steps[rises.index(max(rises))] if max(rises, default=0) > 0 else None


def _verdict(site: SiteReport, worst: float, repaired: int) -> str:
    dead, units = site.dead_fraction, site.units
    judged, linear, rare = (int(mask.sum()) / units for mask in (site.judged, site.always_on, site.rare))
    options = {
        "not run": not site.samples,
        "not finite": bool(site.nonfinite.any()),
        "repaired": repaired > 0 and (site.smooth or (not dead and judged >= 0.5)),
        "dormant": site.smooth and int(site.dormant.sum()) > units / 2,
        "healthy": site.smooth,
        "dead": dead == 1,
        "many dead": dead > _MANY,
        "a few dead": dead > 0,
        "not judged": judged < 0.5,
        "frozen": bool(site.frozen.all()),
        "linear": linear == 1,
        "rare": rare > 0.5,
        "recovered": worst > _MANY,
        "not trained": not site.trainable,
    }
    return next((word for word, fits in options.items() if fits), "healthy")


def shortened(summaries: Sequence[SiteSummary]) -> list[tuple[SiteSummary, ...]]:
    """Gather neighbours that need no row of their own: of many sites the healthy, of very many all but the worst 20.

    Returns:
        The same sites in the same order; those that share a row together.
    """
    sick = [summary for summary in summaries if not summary.is_well]
    shown = {summary.site.name for summary in worst_first(sick)[:_MOST_SHOWN]}
    alone = [len(summaries) <= _FEW or summary.site.name in shown for summary in summaries]
    groups = itertools.groupby(enumerate(summaries), key=lambda pair: (alone[pair[0]], pair[0] * alone[pair[0]]))
    return [tuple(summary for _, summary in group) for _, group in groups]


def rows_of(groups: Iterable[Sequence[SiteSummary]]) -> list[dict[str, Cell]]:
    """Write a row for each group of sites, which says how many it stands for if that is more than one."""
    return [group[0].row() if len(group) == 1 else _gathered(group) for group in groups]


def _gathered(group: Sequence[SiteSummary]) -> dict[str, Cell]:
    worst = max(summary.site.dead_fraction for summary in group)
    well = all(summary.is_well for summary in group) and not worst
    what = "healthy" if well else f"at most {worst:.1%} dead"
    return {"site": f"... {len(group):,} layers, {what}", "units": sum(summary.site.units for summary in group)}


def worst_first(summaries: Iterable[SiteSummary]) -> list[SiteSummary]:
    """Order sites by how much there is to see: the dead, then what was, then what else is not well."""
    return sorted(summaries, key=lambda one: (one.site.dead_fraction, one.worst or 0.0, not one.is_well), reverse=True)


def column_of(step: int, steps: Sequence[int]) -> int:
    """Find the window in which a step lies; of steps after the last, the last.

    Example:
        >>> column_of(9, [9, 19]), column_of(10, [9, 19]), column_of(99, [9, 19])
        (0, 1, 1)
    """
    return min(bisect.bisect_left(steps, step), max(len(steps) - 1, 0))


# -- in one sentence -------------------------------------------------------------------------------------


def conclude(report: LivenessReport, history: Raster, summaries: Iterable[SiteSummary]) -> str:
    """Say in one sentence how a model fares, since when, and what was done."""
    summaries = list(summaries)
    since = {one.site.name: one.since for one in summaries if one.since is not None}
    return headline(report, since=since, past=_past(report, history), repaired=_repaired(summaries))


def _past(report: LivenessReport, history: Raster) -> str:
    """Say how bad it was, if it was worse."""
    curve = history.curves.get("dead_fraction", ())
    worst = max(curve, default=0.0)
    if worst <= report.dead_fraction + 0.01:
        return ""
    return f", down from {worst:.1%} at step {history.steps[curve.index(worst)]:,}"


def _repaired(summaries: Sequence[SiteSummary]) -> str:
    number, fire = (sum(getattr(one, key) for one in summaries) for key in ("repaired", "fire_again"))
    if not number:
        return ""
    if all(one.site.smooth for one in summaries if one.repaired):
        return f"; {were(number)} repaired"
    if number == 1:
        return f"; 1 was repaired, and {'fires again' if fire else 'is silent'}"
    how_many = {0: "none", number: "all"}.get(fire, f"{fire:,}")
    return f"; {were(number)} repaired, and {how_many} fire again"
