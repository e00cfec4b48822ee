"""Reports as figures, with matplotlib."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning_deadrelu.report.raster import SiteRaster, State
from lightning_deadrelu.report.run_report import RunReport
from lightning_deadrelu.report.site_summary import column_of, shortened_names, worst_first
from lightning_deadrelu.report.tables import headline, states_of
from lightning_deadrelu.statistics import LivenessReport, SiteReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lightning_deadrelu.repair.policy import Event
    from lightning_deadrelu.report.raster import Raster

# Okabe and Ito's colours, which colour-blind readers can tell apart
_COLOURS = {
    "dead": "#D55E00",
    "not finite": "#F0E442",
    "not judged": "#8C8C8C",
    "frozen": "#CC79A7",
    "rare": "#E69F00",
    "always on": "#0072B2",
    "dormant": "#009E73",
    "alive": "#BBD6E4",
}
_TALLEST = 12.0  # inches; what has more sites gets thinner bars and fewer names
_MOST_BARS_APART = 60
_POINTS_PER_NAME = 11
_POINTS_PER_KEY = 80
_POINTS_PER_LETTER = 5.5


def plot(report: LivenessReport, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """Draw, for each site, which shares of its units are dead, rare, always on, alive and so on.

    Args:
        report: What to draw.
        ax: Where to draw; a new figure by default.

    Raises:
        ModuleNotFoundError: Without matplotlib.
    """
    ax = ax or _new_axes(len(report.sites))
    states = [states_of(site) for site in report.sites]
    rows, left = range(len(states)), [0.0] * len(states)
    for state, colour in _COLOURS.items():
        shares = [counts[state] / site.units for counts, site in zip(states, report.sites, strict=True)]
        if any(shares):
            height = 0.8 if len(rows) <= _MOST_BARS_APART else 1.0
            ax.barh(rows, shares, left=left, color=colour, label=state, height=height, linewidth=0)
        left = [a + b for a, b in zip(left, shares, strict=True)]
    _label(ax, report)
    figure = ax.get_figure(root=True)
    assert figure is not None
    return figure, ax


def _pyplot() -> Any:
    try:
        from matplotlib import pyplot
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("Plots need matplotlib. Try `pip install lightning-deadrelu[plot]`.") from error
    return pyplot


def _new_axes(sites: int) -> Axes:
    _, ax = _pyplot().subplots(figsize=(8, min(1.4 + 0.28 * max(sites, 2), _TALLEST)), layout="constrained")
    return ax  # type: ignore[no-any-return]


def _label(ax: Axes, report: LivenessReport) -> None:
    """Put title and key above, where they keep clear of the bars whatever the size, and names as far as they fit."""
    names = shortened_names([site.name for site in report.sites])
    width, height = _size_in_points(ax)
    keys, keys_per_row = len(ax.get_legend_handles_labels()[1]), max(int(width / _POINTS_PER_KEY), 1)
    head = 8 + 15 * math.ceil(keys / keys_per_row)
    every = math.ceil(_POINTS_PER_NAME * max(len(names), 1) / max(height - head, _POINTS_PER_NAME))
    ax.set_yticks(range(0, len(names), every), names[::every], fontsize="small")
    ax.set(xlim=(0, 1), ylim=(max(len(names), 1) - 0.5, -0.5), xlabel="share of units")
    ax.xaxis.set_major_formatter("{x:.0%}")
    ax.tick_params(axis="y", length=0 if every == 1 else 3)
    ax.spines[["top", "right", "left"]].set_visible(False)
    if keys:
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=keys_per_row, fontsize="small", frameon=False)
    title = textwrap.fill(headline(report), max(int(width / _POINTS_PER_LETTER), 20))
    ax.set_title(title, loc="left", fontsize="medium", pad=head)


def _size_in_points(ax: Axes) -> tuple[float, float]:
    figure = ax.get_figure(root=True)
    assert figure is not None
    box = ax.get_window_extent()
    return max(box.width / figure.dpi * 72, 1.0), max(box.height / figure.dpi * 72, 1.0)


# -- over a run ------------------------------------------------------------------------------------------

_CURVES = {"dead_fraction": ("dead", "#D55E00", "-"), "rare_fraction": ("rare", "#E69F00", "--")}
_CURVES |= {"always_on_fraction": ("always on", "#0072B2", "-."), "frozen_fraction": ("frozen", "#CC79A7", ":")}
_MOST_RASTERS = 4


def plot_run(run: RunReport) -> tuple[Figure, tuple[Axes, ...]]:
    """Draw a run: how many units were dead over time, and below what became of the units of the worst sites.

    Args:
        run: What to draw; each edit gets a mark.

    Returns:
        The figure and its axes, the curves first.

    Raises:
        ModuleNotFoundError: Without matplotlib.
    """
    pyplot, raster = _pyplot(), run.history
    sites = [raster.sites[one.site.name] for one in worst_first(run.sites)[:_MOST_RASTERS]]
    heights = [2.6, *(1.2 for _ in sites)]
    figure, grid = pyplot.subplots(
        len(heights), 1, figsize=(8, sum(heights) + 1.1), height_ratios=heights, layout="constrained", squeeze=False
    )
    curves, *rasters = grid[:, 0]
    _draw_curves(curves, raster, run.events)
    for ax, site in zip(rasters, sites, strict=True):
        _draw_raster(ax, site, run.report[site.name])
    for ax in grid[:, 0]:
        _label_steps(ax, raster.steps, last=ax is grid[-1, 0])
    title = textwrap.fill(run.conclusion.replace("`", ""), 96)
    figure.suptitle(title, x=0.01, ha="left", fontsize="medium")
    _add_key(figure, sites)
    return figure, tuple(grid[:, 0])


def _draw_curves(ax: Axes, raster: Raster, events: Sequence[Event]) -> None:
    columns, top = range(len(raster.steps)), 0.0
    for name, (label, colour, style) in _CURVES.items():
        values = raster.curves.get(name, ())
        if name == "dead_fraction" or max(values, default=0) > 0:
            ax.plot(columns, values, style, color=colour, label=label, linewidth=2, marker="o" * (len(values) == 1))
            top = max(top, *values, 0.0)
    ax.set(ylim=(0, min(max(1.15 * top, 0.05), 1.02)), ylabel="share of units")
    edited = sorted({column_of(event.step, raster.steps) for event in events if event.action == "edited"})
    if edited:
        ax.plot(edited, [0.02] * len(edited), "^", transform=ax.get_xaxis_transform(), label="remedy", clip_on=False)
        ax.lines[-1].set(color=_pyplot().rcParams["text.color"], markersize=6)
    ax.yaxis.set_major_formatter("{x:.0%}")
    ax.grid(axis="y", alpha=0.25)
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=5, fontsize="small", frameon=False)


def _draw_raster(ax: Axes, site: SiteRaster, verdict: SiteReport) -> None:
    from matplotlib.colors import ListedColormap

    colours = ListedColormap([state.colour for state in State])
    ax.imshow(
        site.states.numpy(), cmap=colours, vmin=-0.5, vmax=len(State) - 0.5, aspect="auto", interpolation="nearest"
    )
    name = site.name if len(site.name) <= 60 else f"{site.name[:20]}…{site.name[-39:]}"
    share = f"{verdict.dead_fraction:.0%} dead" if not verdict.smooth else site.kind
    ax.set_title(f"{name}: {site.units:,} units, {share}", loc="left", fontsize="small")
    ax.set_yticks([0, len(site.rows) - 1], [str(int(site.rows[0])), str(int(site.rows[-1]))], fontsize="small")


def _label_steps(ax: Axes, steps: Sequence[int], last: bool) -> None:
    """Name the steps of the columns: those are of even width, whatever the steps."""
    count = len(steps)
    every = max(math.ceil(count / 8), 1)
    places = list(range(0, count, every))
    ax.set(xlim=(-0.5, max(count, 1) - 0.5))
    ax.set_xticks(places, [f"{steps[place]:,}" for place in places] if last else [""] * len(places), fontsize="small")
    ax.spines[["top", "right"]].set_visible(False)
    if last:
        ax.set_xlabel("training batch at the window's end")


def _add_key(figure: Figure, sites: Sequence[SiteRaster]) -> None:
    from matplotlib.patches import Patch

    seen = {int(value) for site in sites for value in site.states.unique()}
    keys = [Patch(facecolor=s.colour, edgecolor="#888888", linewidth=0.5, label=s.label) for s in State if s in seen]
    if keys:
        figure.legend(handles=keys, loc="outside lower left", ncols=5, fontsize="small", frameon=False)
