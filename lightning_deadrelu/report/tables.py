"""Reports as tables for a terminal or a notebook, with rich."""

from __future__ import annotations

import html
import io
import math
import shutil
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_deadrelu.attribution.result import Attribution
from lightning_deadrelu.explain.postmortem import described
from lightning_deadrelu.report.run_report import RunReport
from lightning_deadrelu.report.site_summary import Gap, SiteSummary, shortened, shortened_names
from lightning_deadrelu.statistics import LivenessReport, SiteReport

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text


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
    broken = sum(states_of(site)["not finite"] for site in report.headline)
    unjudged = sum(states_of(site)["not judged"] for site in report.headline)
    line += f", {broken:,} are not finite" if broken else ""
    return line + (f", {unjudged:,} are not judged yet" if unjudged else "") + "."


def states_of(site: SiteReport) -> dict[str, int]:
    """Count the units of each state; a unit is in the first that fits.

    Args:
        site: The verdict.
    """
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


# -- at the end of a run ---------------------------------------------------------------------------------


def summary(run: RunReport, width: int | None = None) -> str:
    """Tell what became of each site over a run, in the order of execution, under a sentence that says it all.

    Of more than a dozen sites the healthy ones are gathered, and of many sick ones all but the worst 20.

    Args:
        run: What to show.
        width: Characters per line; by default those of the terminal, from 80 to 140.

    Example:
        >>> print(summary(RunReport(LivenessReport(()))))
        No rectifier was watched.
    """
    names = [summary.site.name for summary in run.sites]
    short = dict(zip(names, shortened_names(names), strict=True))
    rows = [_told(row, short) for row in shortened(run.sites)]
    width = width or min(max(shutil.get_terminal_size((120, 24)).columns, 80), 140)
    lines = [run.conclusion, *([_laid_out(rows, width)] if rows else [])]
    lines += [f"not watched: {name}: {reason}" for name, reason in run.report.unwatched.items()]
    return "\n".join([*lines, *filter(None, [described(run.deaths)])])


def _laid_out(rows: list[dict[str, str]], width: int) -> str:
    """Lay rows out without the columns that tell nothing; in little room, tighter and without the kinds."""
    from rich.table import Table

    tight = width < 100
    told = [name for name in _STORY if name in _ALWAYS or any(row.get(name, "-") not in "-0" for row in rows)]
    shown = [name for name in told if not (tight and name == "kind")]
    grid = Table(box=None, pad_edge=False, padding=(0, 1 if tight else 2, 0, 0))
    for name in shown:
        if name == "layer":
            grid.add_column(name, overflow="fold", min_width=16)
        else:
            grid.add_column(name, justify="left" if name in ("kind", "verdict") else "right", no_wrap=True)
    for row in rows:
        grid.add_row(*(_plain(row.get(name, "")) for name in shown))
    return _printed(grid, width)


_STORY = ("layer", "kind", "units", "dead\nnow", "", "worst", "died\nat step", "remedied", "fire\nagain", "verdict")
_ALWAYS = ("layer", "kind", "units", "dead\nnow", "", "verdict")


def _told(row: SiteSummary | Gap, names: Mapping[str, str]) -> dict[str, str]:
    if isinstance(row, Gap):
        return {"layer": str(row), "units": f"{sum(story.site.units for story in row.stories):,}"}
    site = row.site
    cells = {"layer": names[site.name], "kind": site.kind, "units": f"{site.units:,}", "verdict": row.verdict}
    dead, share = (f"{int(site.dead.sum()):,}", f"{site.dead_fraction:.1%}") if not site.smooth else ("-", "-")
    cells |= {"dead\nnow": dead, "": share, "worst": "-" if math.isnan(row.worst) else f"{row.worst:.1%}"}
    cells |= {"died\nat step": "-" if row.died is None else f"{row.died:,}", "remedied": f"{row.remedied:,}"}
    return cells | {"fire\nagain": "-" if site.smooth else f"{row.revived:,}"}


def _printed(grid: Table, width: int) -> str:
    from rich.console import Console

    paper = io.StringIO()
    Console(file=paper, width=width, no_color=True, highlight=False, markup=False, emoji=False).print(grid)
    return "\n".join(line.rstrip() for line in paper.getvalue().rstrip().splitlines())


def _plain(text: str) -> Text:
    from rich.text import Text

    return Text(text)


def html_table(report: LivenessReport) -> str:
    """Lay a report out as HTML, for a notebook: the headline, and a table that scrolls.

    Args:
        report: What to show.

    Example:
        >>> html_table(LivenessReport(()))
        '<p>No rectifier was watched.</p>'
    """
    rows = [_row(site) for site in report.sites]
    line = f"<p>{html.escape(headline(report))}</p>"
    if not rows:
        return line
    shown = [name for name in rows[0] if not _is_idle(name, rows)]
    head = "".join(f"<th>{html.escape(name)}</th>" for name in shown)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(row[name])}</td>' for name in shown)}</tr>" for row in rows)
    grid = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'{line}<div style="max-height:30em;overflow:auto">{grid}</div>'
