"""What trackers show besides curves: pictures, a table and firing rates, made once for all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from lightning_deadrelu.render.scale import shades_of
from lightning_deadrelu.render.table import Cell
from lightning_deadrelu.report.latents import latents_of
from lightning_deadrelu.report.raster import Picture, enlarged, image_of
from lightning_deadrelu.report.run_report import RunReport
from lightning_deadrelu.report.site_summary import worst_first
from lightning_deadrelu.statistics.report_table import row_of

MOST_SITES = 32
LEGEND = (
    "Rasters: a row for each unit, the first to die at the bottom; a column for each window. Orange is dead, black"
    " repaired, pale blue alive, amber rare, dark blue always on, pink frozen, green dormant, yellow not finite, grey"
    " not judged. Overview: a row for each layer, the first on top; the darker, the larger its dead share."
)

_COLUMNS = ["site", "kind", "units", "dead", "dead_fraction", "rare", "always_on", "dormant", "born_dead", "died"]
_COLUMNS += ["revived", "peak_10", "peak_50", "peak_90", "samples", "rate_bound"]
_EVERY = 50  # windows
_LEAST = (192, 512)  # pixels, so that a tracker need not smooth what it enlarges


@dataclass(frozen=True, eq=False)
class Media:
    """One instalment.

    Args:
        step: Of the verdict.
        rows: The table, a row for each site in the order of execution.
        rates: Firing rates of the sites shown, by name.
        rasters: The history of the sites shown, by name, without any text; shape ``(height, width, 3)``.
        overview: The dead share of all sites; None without a history.
        summary: The run in a few numbers.
        left_out: Sites that are not shown, because others have more dead units.
        log_densities: Of the latents of sparse autoencoders, by name of the site; powers of ten.
    """

    step: int
    rows: Sequence[Mapping[str, Cell]]
    rates: Mapping[str, Tensor]
    rasters: Mapping[str, Picture] = field(default_factory=dict)
    overview: Picture | None = None
    summary: Mapping[str, Cell] = field(default_factory=dict)
    left_out: int = 0
    log_densities: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def columns(self) -> list[str]:
        """The head of the table."""
        return list(self.rows[0]) if self.rows else []


def is_due(windows: int, stride: int = 1) -> bool:
    """Tell whether a window draws: 1, 2, 4, 8, ..., then each fiftieth, rarer as the raster's columns widen.

    So a long run draws some dozen times, whatever its length.

    Example:
        >>> [n for n in range(1, 201) if is_due(n)]
        [1, 2, 4, 8, 16, 32, 50, 100, 150, 200]
    """
    return windows % (_EVERY * stride) == 0 or (windows < _EVERY and windows & (windows - 1) == 0)


def media_of(run: RunReport, latents: bool = False) -> Media:
    """Make what trackers show."""
    chosen = {summary.site.name for summary in worst_first(run.sites)[:MOST_SITES]}
    shown = [summary.site for summary in run.sites if summary.site.name in chosen]
    histories, curves = run.history.sites, run.history.site_curves
    table = [row_of(summary.site) for summary in run.sites]
    return Media(
        run.report.step,
        [{key: row[key] for key in _COLUMNS} for row in table],
        {site.name: site.firing_rate for site in shown},
        {site.name: image_of(histories[site.name], _LEAST) for site in shown if site.name in histories},
        enlarged(shades_of(np.array(list(curves.values()))), _LEAST) if curves else None,
        summary_of(run),
        len(run.sites) - len(shown),
        {site.name: site.log_density for site in latents_of(run.report) if site.elements} if latents else {},
    )


def summary_of(run: RunReport) -> dict[str, Cell]:
    """Sum a run up: how it stands, how bad it was, and what came of it."""
    report, curves = run.report, run.history.curves
    worst = max(report.headline, key=lambda site: site.dead_fraction, default=None)
    summary: dict[str, Cell] = {"dead_fraction": report.dead_fraction, "dead_units": report.dead_units}
    summary["highest_dead_fraction"] = max([report.dead_fraction, *curves.get("dead_fraction", ())])
    summary |= {"worst_site": worst.name if worst else None}
    summary["worst_site_dead_fraction"] = worst.dead_fraction if worst else 0.0
    return summary | {key: sum(curves.get(key, ())) for key in ("revived_units", "remedied_units")}
