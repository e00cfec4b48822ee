"""What trackers show besides curves: pictures, a table and firing rates, made once for all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_deadrelu.report.loggers.images import Picture, can_draw, card_of, overview_of
from lightning_deadrelu.report.raster import Raster
from lightning_deadrelu.report.run_report import RunReport
from lightning_deadrelu.statistics import LivenessReport, SiteReport

MOST_SITES = 32
_QUANTILES = {"peak_10": 0.1, "peak_50": 0.5, "peak_90": 0.9}
Cell = str | int | float | None


@dataclass(frozen=True, eq=False)
class Media:
    """One instalment.

    Args:
        step: Of the verdict.
        rows: The table, a row for each site in the order of execution.
        rates: Firing rates of the sites shown, by name.
        overview: All sites in one picture; None without Pillow.
        cards: The history of the sites shown, by name; none without Pillow.
        summary: The run in a few numbers.
        left_out: Sites that are not shown, because others have more dead units.
    """

    step: int
    rows: Sequence[Mapping[str, Cell]]
    rates: Mapping[str, Tensor]
    overview: Picture | None = None
    cards: Mapping[str, Picture] = field(default_factory=dict)
    summary: Mapping[str, Cell] = field(default_factory=dict)
    left_out: int = 0

    @property
    def columns(self) -> list[str]:
        """The head of the table."""
        return list(self.rows[0]) if self.rows else []


def is_due(windows: int, every: int, stride: int = 1) -> bool:
    """Tell whether a window draws: 1, 2, 4, 8, ..., then each ``every``-th, rarer as the raster's columns widen.

    So a long run draws some dozen times, whatever its length.

    Args:
        windows: Windows so far.
        every: The rhythm; 0 for never.
        stride: Windows in each column of the raster.

    Example:
        >>> [n for n in range(201) if is_due(n, every=50)]
        [1, 2, 4, 8, 16, 32, 50, 100, 150, 200]
    """
    if not every or not windows:
        return False
    return windows % (every * stride) == 0 or (windows < every and windows & (windows - 1) == 0)


def media_of(run: RunReport) -> Media:
    """Make what trackers show.

    Args:
        run: What to show.

    Example:
        >>> media_of(RunReport(LivenessReport((), step=3))).step
        3
    """
    report, raster, name = run.report, run.history, run.name
    shown = _worst(report.sites)
    media = Media(report.step, [row_of(site) for site in report.sites], {site.name: site.firing_rate for site in shown})
    overview, cards, histories = None, {}, raster.sites
    if can_draw() and histories:
        title = f"{name}: {report.dead_units:,} of {report.units:,} units are dead ({report.dead_fraction:.1%})"
        overview = overview_of(raster.site_curves, raster.steps, title)
        cards = {site.name: card_of(histories[site.name], site) for site in shown if site.name in histories}
    left_out = len(report.sites) - len(shown)
    return Media(media.step, media.rows, media.rates, overview, cards, summary_of(report, raster), left_out)


def _worst(sites: Sequence[SiteReport]) -> list[SiteReport]:
    """Choose the sites with most dead units, and put them back into the order of execution."""
    worst = sorted(range(len(sites)), key=lambda i: -int(sites[i].dead.sum()))[:MOST_SITES]
    return [sites[i] for i in sorted(worst)]


def row_of(site: SiteReport) -> dict[str, Cell]:
    """Put a site into a row of the table: counts of units, quantiles of their peaks, and the evidence.

    Dead units are either born dead or have died since the start; ``revived`` counts this window. ``rate_bound``
    is the highest of the dead units.

    Args:
        site: The verdict.
    """
    dead, born = int(site.dead.sum()), int(site.born_dead.sum())
    row: dict[str, Cell] = {"site": site.name, "kind": site.kind, "units": site.units, "dead": dead}
    row |= {"dead_fraction": site.dead_fraction, "rare": int(site.rare.sum()), "always_on": int(site.always_on.sum())}
    row |= {"dormant": int(site.dormant.sum()), "born_dead": born, "died": dead - born}
    row |= {"revived": int(site.revived.sum()), **_peaks(site), "samples": site.samples}
    bound = site.rate_bound[site.dead]
    return row | {"rate_bound": float(bound.max()) if len(bound) else None}


def _peaks(site: SiteReport) -> dict[str, Cell]:
    finite = site.peak[site.peak.isfinite()].double()
    if not len(finite):
        return dict.fromkeys(_QUANTILES)
    return {key: float(torch.quantile(finite, share)) for key, share in _QUANTILES.items()}


def summary_of(report: LivenessReport, raster: Raster) -> dict[str, Cell]:
    """Sum a run up: how it stands, how bad it was, and what came of it.

    Args:
        report: The latest verdict.
        raster: The history.
    """
    curves: dict[str, Any] = dict(raster.curves)
    worst = max(report.headline, key=lambda site: site.dead_fraction, default=None)
    summary: dict[str, Cell] = {"dead_fraction": report.dead_fraction, "dead_units": report.dead_units}
    summary["highest_dead_fraction"] = max([report.dead_fraction, *curves.get("dead_fraction", ())])
    summary |= {"worst_site": worst.name if worst else None}
    summary["worst_site_dead_fraction"] = worst.dead_fraction if worst else 0.0
    return summary | {key: sum(curves.get(key, ())) for key in ("revived_units", "remedied_units")}
