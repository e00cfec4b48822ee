"""Reports as tables and pictures; the only module that draws."""

from __future__ import annotations

import io
import itertools
import math
import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_deadrelu.slices import Attribution
from lightning_deadrelu.statistics import LivenessReport, SiteReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
_LONGEST_NAME = 44
_POINTS_PER_NAME = 11
_POINTS_PER_KEY = 80
_POINTS_PER_LETTER = 5.5


def headline(report: LivenessReport) -> str:
    """Say in one line how a model fares.

    Example:
        >>> headline(LivenessReport(()))
        'No rectifier was watched.'
    """
    if not report.sites:
        return "No rectifier was watched."
    if not report.units:
        return "No rectifier in training was watched."
    line = f"{report.dead_units:,} of {report.units:,} units are dead ({report.dead_fraction:.1%})"
    broken = sum(_states(site)["not finite"] for site in report.headline)
    unjudged = sum(_states(site)["not judged"] for site in report.headline)
    line += f", {broken:,} are not finite" if broken else ""
    return line + (f", {unjudged:,} are not judged yet" if unjudged else "") + "."


def _states(site: SiteReport) -> dict[str, int]:
    """Count the units of each state; a unit is in the first that fits."""
    counts, left = {}, site.dead | ~site.dead
    for state, mask in _masks(site).items():
        counts[state] = int((left & mask).sum())
        left = left & ~mask
    return counts


def _masks(site: SiteReport) -> dict[str, Tensor]:
    everything, smooth = site.dead | ~site.dead, site.smooth
    return {
        "dead": site.dead,
        "not finite": site.nonfinite,
        "not judged": ~site.judged & (not smooth),
        "frozen": site.frozen & (not smooth),
        "rare": site.rare & (not smooth),
        "always on": site.always_on & (not smooth),
        "dormant": site.dormant & smooth,
        "alive": everything,
    }


# -- tables ----------------------------------------------------------------------------------------------


def table(report: LivenessReport, width: int = 140) -> str:
    """Lay a report out as a table, one row per site in the order of execution.

    Args:
        report: What to show.
        width: Characters per line.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rows = [_row(site) for site in report.sites]
    shown = [name for name in (rows[0] if rows else ()) if not _is_idle(name, rows)]
    grid = Table(box=None, pad_edge=False)
    for name in shown:
        left = name in ("site", "kind")
        grid.add_column(name, justify="left" if left else "right", overflow="fold", no_wrap=name != "site", min_width=4)
    for row in rows:
        grid.add_row(*(Text(row[name]) for name in shown))
    paper = io.StringIO()
    console = Console(file=paper, width=width, no_color=True, highlight=False, markup=False, emoji=False)
    console.print(headline(report))
    if rows:
        console.print(grid)
    for name, reason in report.unwatched.items():
        console.print(f"not watched: {name}: {reason}")
    return "\n".join(line.rstrip() for line in paper.getvalue().rstrip().splitlines())


def _row(site: SiteReport) -> dict[str, str]:
    cells = {"site": site.name if site.trainable else f"{site.name} (not trained)", "kind": site.kind}
    cells |= {"units": f"{site.units:,}", "dead": f"{int(site.dead.sum()):,}", "": f"{site.dead_fraction:.1%}"}
    cells |= {"not finite": _tally(site.nonfinite), "not judged": _tally(~site.judged & ~site.nonfinite)}
    cells |= {"rare": _tally(site.rare), "always on": _tally(site.always_on), "frozen": _tally(site.frozen)}
    if site.smooth:
        cells |= dict.fromkeys(("dead", "", "not judged", "rare", "always on", "frozen"), "-")
    bound = site.rate_bound[site.dead]
    cells |= {"dormant": _tally(site.dormant), "samples": f"{site.samples:,}"}
    return cells | {"rate below": f"{float(bound.max()):.2%}" if len(bound) else "-"}


def _tally(mask: Tensor) -> str:
    return f"{int(mask.sum()):,}"


def _is_idle(column: str, rows: list[dict[str, str]]) -> bool:
    return column in ("not finite", "not judged") and all(row[column] in ("0", "-") for row in rows)


def attribution_table(known: Mapping[str, Attribution], width: int = 140) -> str:
    """Lay out which parameters feed each site's units and which read them, one row per site.

    Args:
        known: Attributions by the sites' names.
        width: Characters per line.

    Example:
        >>> print(attribution_table({"act": Attribution(no_incoming="no", no_outgoing="no", no_outlet="no")}))
        site  fed by  bias that counts  read by  refused because
        act   -       -                 -        fed: no; read: no; outlet: no
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=None, pad_edge=False)
    for name in ("site", "fed by", "bias that counts", "read by", "refused because"):
        grid.add_column(name, overflow="fold")
    for site, attribution in known.items():
        grid.add_row(*map(Text, (site, *_attribution_cells(attribution))))
    paper = io.StringIO()
    Console(file=paper, width=width, no_color=True, highlight=False, markup=False, emoji=False).print(grid)
    return "\n".join(line.rstrip() for line in paper.getvalue().rstrip().splitlines())


def _attribution_cells(attribution: Attribution) -> tuple[str, str, str, str]:
    bias = attribution.bias.name if attribution.bias else ""
    refused = {"fed": attribution.no_incoming, "read": attribution.no_outgoing, "outlet": attribution.no_outlet}
    fed, read = ([part.name for part in parts] for parts in (attribution.incoming, attribution.outgoing))
    reasons = "; ".join(f"{what}: {why}" for what, why in refused.items() if why)
    return ", ".join(fed) or "-", bias or "-", ", ".join(dict.fromkeys(read)) or "-", reasons or "-"


# -- pictures --------------------------------------------------------------------------------------------


def plot(report: LivenessReport, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """Draw, for each site, which shares of its units are dead, rare, always on, alive and so on.

    Args:
        report: What to draw.
        ax: Where to draw; a new figure by default.

    Raises:
        ModuleNotFoundError: Without matplotlib.
    """
    ax = ax or _new_axes(len(report.sites))
    states = [_states(site) for site in report.sites]
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


def _new_axes(sites: int) -> Axes:
    try:
        from matplotlib import pyplot
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("Plots need matplotlib. Try `pip install lightning-deadrelu[plot]`.") from error
    _, ax = pyplot.subplots(figsize=(8, min(1.4 + 0.28 * max(sites, 2), _TALLEST)), layout="constrained")
    return ax


def _label(ax: Axes, report: LivenessReport) -> None:
    """Put title and key above, where they keep clear of the bars whatever the size, and names as far as they fit."""
    names = _shortened([site.name for site in report.sites])
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


def _shortened(names: list[str]) -> list[str]:
    """Leave out of long names what all have in common, then the middle.

    Example:
        >>> _shortened([f"model.encoder_of_images.layers.{i}.feed_forward.activation.relu" for i in range(2)])
        ['…0…', '…1…']
    """
    if max(map(len, names), default=0) <= _LONGEST_NAME:
        return names
    paths = [name.split(".") for name in names]
    shortest = min(map(len, paths)) - 1
    head = min(_in_common(paths), shortest)
    tail = min(_in_common([path[::-1] for path in paths]), shortest - head)
    short = ["…" * (head > 0) + ".".join(path[head : len(path) - tail]) + "…" * (tail > 0) for path in paths]
    return [name if len(name) <= _LONGEST_NAME else f"{name[:16]}…{name[16 - _LONGEST_NAME :]}" for name in short]


def _in_common(paths: list[list[str]]) -> int:
    """Count the leading parts that all paths share."""
    return sum(1 for _ in itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False)))
