"""Reports as tables and pictures; the only module that draws."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from lightning_deadrelu.statistics import LivenessReport, SiteReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers can tell apart
_COLOURS = {"dead": "#D55E00", "rare": "#E69F00", "always on": "#0072B2", "alive": "#A9C5D6"}
_MASKS = {"dead": "dead", "rare": "rare", "always on": "always_on"}


def table(report: LivenessReport, width: int = 110) -> str:
    """Lay a report out as a table, one row per site in the order of execution.

    Args:
        report: What to show.
        width: Characters per line.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table(
        box=None, pad_edge=False, header_style="bold", title_justify="left", title=Text(headline(report), "bold")
    )
    grid.add_column("site", overflow="fold")
    grid.add_column("kind")
    for name in ("units", "dead", "", "rare", "always-on", "frozen", "samples", "bound"):
        grid.add_column(name, justify="right")
    for site in report.sites:
        grid.add_row(*_row(site))
    paper = io.StringIO()
    console = Console(file=paper, width=width, no_color=True, highlight=False)
    console.print(grid)
    for name, reason in report.unwatched.items():
        console.print(f"not watched: {name}: {reason}")
    return "\n".join(line.rstrip() for line in paper.getvalue().rstrip().splitlines())


def headline(report: LivenessReport) -> str:
    """Say in one line how a model fares.

    Example:
        >>> headline(LivenessReport(()))
        'No rectifier was watched.'
    """
    if not report.sites:
        return "No rectifier was watched."
    units, dead = report.units, report.dead_units
    unjudged = units - report.total("judged")
    line = f"{dead:,} of {units:,} units are dead ({report.dead_fraction:.1%})"
    return f"{line}; {unjudged:,} are not judged yet." if unjudged else f"{line}."


def _row(site: SiteReport) -> list[str]:
    if site.smooth:
        return [site.name, site.kind, f"{site.units:,}", "-", "-", "-", "-", "-", f"{site.samples:,}", "-"]
    name = site.name if site.trainable else f"{site.name} (frozen weights)"
    silent = site.rate_bound[site.dead]
    masks = [str(int(getattr(site, mask).sum())) for mask in ("rare", "always_on", "frozen")]
    bound = f"{float(silent.max()):.2%}" if len(silent) else "-"
    return [
        name,
        site.kind,
        f"{site.units:,}",
        str(int(site.dead.sum())),
        f"{site.dead_fraction:.1%}",
        *masks,
        f"{site.samples:,}",
        bound,
    ]


def plot(report: LivenessReport, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """Draw, for each site, the shares of its units that are dead, rare, always on, and alive.

    Args:
        report: What to draw.
        ax: Where to draw; a new figure by default.

    Raises:
        ModuleNotFoundError: Without matplotlib.
    """
    try:
        from matplotlib import pyplot
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("Plots need matplotlib. Try `pip install lightning-deadrelu[plot]`.") from error
    sites = [site for site in report.sites if not site.smooth]
    if ax is None:
        _, ax = pyplot.subplots(figsize=(8, 1.2 + 0.28 * max(len(sites), 2)), layout="constrained")
    names = [site.name for site in sites]
    left = [0.0] * len(sites)
    for label, colour in _COLOURS.items():
        shares = [_share(site, label) for site in sites]
        ax.barh(names, shares, left=left, color=colour, label=label, height=0.8)
        left = [a + b for a, b in zip(left, shares, strict=True)]
    ax.invert_yaxis()
    ax.set(xlim=(0, 1), xlabel="share of units", title=headline(report))
    ax.xaxis.set_major_formatter("{x:.0%}")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=4, frameon=False)
    ax.spines[["top", "right", "left"]].set_visible(False)
    figure = ax.get_figure(root=True)
    assert figure is not None
    return figure, ax


def _share(site: SiteReport, label: str) -> float:
    if label == "alive":
        return 1 - sum(_share(site, other) for other in _MASKS)
    return int(getattr(site, _MASKS[label]).sum()) / site.units
