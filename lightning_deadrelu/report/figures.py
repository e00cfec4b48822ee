"""A run as a figure, with matplotlib."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lightning_deadrelu.render.figures import DPI, draw_pixels, label_steps, pyplot
from lightning_deadrelu.render.names import shortened_names
from lightning_deadrelu.render.scale import shades_of
from lightning_deadrelu.report.raster import Raster, SiteRaster, image_of
from lightning_deadrelu.report.run_report import RunReport
from lightning_deadrelu.report.site_summary import column_of, worst_first
from lightning_deadrelu.statistics import SiteReport
from lightning_deadrelu.statistics.unit_state import State

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lightning_deadrelu.repair.event import Event

CURVES = {"dead_fraction": State.DEAD, "rare_fraction": State.RARE}
CURVES |= {"always_on_fraction": State.ALWAYS_ON, "frozen_fraction": State.FROZEN}
"""The shares of all units that are drawn over a run."""

_STYLES = {State.DEAD: "-", State.RARE: "--", State.ALWAYS_ON: "-.", State.FROZEN: ":"}
_MOST_RASTERS = 4


def plot_run(run: RunReport) -> tuple[Figure, tuple[Axes, ...]]:
    """Draw a run: how many units were dead over time, and below what became of the units of the worst sites.

    Of more than four sites, a picture of the dead share of all of them, by depth and time, stands in between.

    Returns:
        The figure and its axes: the curves, then the picture of all sites if there is one, then the worst sites.

    Raises:
        ModuleNotFoundError: Without matplotlib.
    """
    history = run.history
    sites = [history.sites[one.site.name] for one in worst_first(run.sites)[:_MOST_RASTERS]]
    every = [one.site.name for one in run.sites]
    names = dict(zip(every, shortened_names(every, 60), strict=True))
    deep = len(run.sites) > _MOST_RASTERS
    heights = [2.6, *[1.6] * deep, *[1.0] * len(sites)]
    figure, grid = pyplot().subplots(
        len(heights), 1, figsize=(8, sum(heights) + 1.3), height_ratios=heights, layout="constrained", squeeze=False,
        dpi=DPI,
    )  # fmt: skip
    axes: tuple[Axes, ...] = tuple(grid[:, 0])
    _draw_curves(axes[0], history, run.events)
    if deep:
        _draw_depth(axes[1], history)
    for ax, site in zip(axes[1 + deep :], sites, strict=True):
        _draw_raster(ax, names[site.name], site, run.report[site.name])
    for ax in axes:
        label_steps(ax, history.steps, last=ax is axes[-1])
    figure.suptitle(textwrap.fill(run.conclusion.replace("`", ""), 96), x=0.01, ha="left", fontsize="medium")
    _add_key(figure, sites)
    return figure, axes


def _draw_curves(ax: Axes, history: Raster, events: Iterable[Event]) -> None:
    columns, top = range(len(history.steps)), 0.0
    for name, state in CURVES.items():
        values = history.curves.get(name, ())
        if state is State.DEAD or max(values, default=0) > 0:
            dot = "o" * (len(values) == 1)
            ax.plot(columns, values, _STYLES[state], color=state.colour, label=state.label, linewidth=2, marker=dot)
            top = max(top, *values, 0.0)
    ax.set(ylim=(0, min(max(1.15 * top, 0.05), 1.02)), ylabel="share of units")
    repairs = sorted({column_of(event.step, history.steps) for event in events if event.action == "edited"})
    if repairs:
        ax.plot(repairs, [0.02] * len(repairs), "^", transform=ax.get_xaxis_transform(), label="repair", clip_on=False)
        ax.lines[-1].set(color=pyplot().rcParams["text.color"], markersize=6)
    ax.yaxis.set_major_formatter("{x:.0%}")
    ax.grid(axis="y", alpha=0.25)
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=5, fontsize="small", frameon=False)


def _draw_depth(ax: Axes, history: Raster) -> None:
    curves = history.site_curves
    draw_pixels(ax, shades_of(np.array(list(curves.values()))), f"dead share of all {len(curves):,} layers")
    ax.set_yticks([0, len(curves) - 1], ["first", "last"], fontsize="small")


def _draw_raster(ax: Axes, name: str, site: SiteRaster, verdict: SiteReport) -> None:
    share = f"{verdict.dead_fraction:.0%} dead" if not verdict.smooth else site.kind
    draw_pixels(ax, image_of(site), f"{name}: {site.units:,} units, {share}")


def _add_key(figure: Figure, sites: Sequence[SiteRaster]) -> None:
    from matplotlib.patches import Patch

    seen = {int(value) for site in sites for value in site.states.unique()}
    keys = [Patch(facecolor=s.colour, edgecolor="#888888", linewidth=0.5, label=s.label) for s in State if s in seen]
    if keys:
        title = "a row for each unit, the first to die at the bottom"
        figure.legend(handles=keys, loc="outside lower left", ncols=5, fontsize="small", frameon=False, title=title,
                      title_fontsize="small", alignment="left")  # fmt: skip
