"""A report in one sentence, as rows for every table, and as bars."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_deadrelu.render import figures
from lightning_deadrelu.render.names import shortened_names
from lightning_deadrelu.render.table import Cell, Column, html_table, text_table
from lightning_deadrelu.statistics.unit_state import State, state_shares

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lightning_deadrelu.statistics.report import LivenessReport, SiteReport

COLUMNS = (
    Column("layer", "layer", text=True),
    Column("kind", "kind", text=True),
    Column("units", "units"),
    Column("dead", "dead"),
    Column("dead_fraction", "", percent=1),
    Column("not_finite", "not finite", optional=True),
    Column("not_judged", "not judged", optional=True),
    Column("rare", "rare"),
    Column("always_on", "always on"),
    Column("frozen", "frozen"),
    Column("dormant", "dormant"),
    Column("duplicate", "duplicate", optional=True),
    Column("blind_fraction", "blind", percent=1, optional=True),
    Column("samples", "samples"),
    Column("rate_bound", "rate below", percent=2),
)
_QUANTILES = {"peak_10": 0.1, "peak_50": 0.5, "peak_90": 0.9}
_HARD_ONLY = (
    *("dead", "dead_fraction", "not_judged", "rare", "always_on", "frozen", "born_dead", "died", "revived"),
    "blind_fraction",
)


def row_of(site: SiteReport) -> dict[str, Cell]:
    """Tell of a site what tables show: counts of units, quantiles of their peaks, and the evidence.

    Dead units are either born dead or have died since the start; ``revived`` counts this window. ``rate_bound`` is the
    highest of the dead units. What does not apply, as death to a smooth activation, is None.

    Args:
        site: The verdict.
    """
    names = ("dead", "rare", "always_on", "frozen", "dormant", "duplicate", "born_dead")
    masks = {key: getattr(site, key) for key in names}
    masks |= {"revived": site.revived, "not_finite": site.nonfinite, "not_judged": ~site.judged & ~site.nonfinite}
    counts = {key: int(mask.sum()) for key, mask in masks.items()}
    bound = site.rate_bound[site.dead]
    row: dict[str, Cell] = {"site": site.name, "kind": site.kind, "units": site.units, **counts, **_peaks(site.peak)}
    row |= {"died": counts["dead"] - counts["born_dead"], "dead_fraction": site.dead_fraction, "samples": site.samples}
    row |= {"blind_fraction": site.blind_fraction}
    row |= {"rate_bound": float(bound.max()) if len(bound) else None}
    row |= {"layer": site.name if site.trainable else f"{site.name} (not trained)"}
    return row | dict.fromkeys(_HARD_ONLY) if site.smooth else row


def _peaks(peak: Tensor) -> dict[str, Cell]:
    finite = peak[peak.isfinite()].double()
    if not len(finite):
        return dict.fromkeys(_QUANTILES)
    return {key: float(torch.quantile(finite, share)) for key, share in _QUANTILES.items()}


def report_text(report: LivenessReport, width: int | None = None) -> str:
    """Lay a report out as a table, one row per site in the order of execution.

    Args:
        report: What to show.
        width: Characters per line; by default those of the terminal, from 80 to 140.
    """
    lines = [headline(report)]
    if report.sites:
        lines.append(text_table(COLUMNS, [row_of(site) for site in report.sites], width))
    return "\n".join([*lines, *(f"not watched: {name}: {reason}" for name, reason in report.unwatched.items())])


def report_html(report: LivenessReport) -> str:
    """Lay a report out as HTML, for a notebook: the headline, and a table that scrolls.

    Args:
        report: What to show.

    Example:
        >>> from lightning_deadrelu.statistics import LivenessReport
        >>> report_html(LivenessReport(()))
        '<p>No rectifier was watched.</p>'
    """
    rows = [row_of(site) for site in report.sites]
    return f"<p>{html.escape(headline(report))}</p>{html_table(COLUMNS, rows) if rows else ''}"


def plot_report(report: LivenessReport, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """Draw, for each site, which shares of its units are dead, rare, always on, alive and so on.

    Args:
        report: What to draw.
        ax: Where to draw; a new figure by default.

    Raises:
        ModuleNotFoundError: Without matplotlib.
    """
    shares = [state_shares(site) for site in report.sites]
    bars = {(state.label, state.colour): [each[state] for each in shares] for state in reversed(State)}
    return figures.share_bars(shortened_names([site.name for site in report.sites]), bars, headline(report), ax)


# -- in one sentence -------------------------------------------------------------------------------------


def headline(
    report: LivenessReport, *, since: Mapping[str, int] | None = None, past: str = "", repaired: str = ""
) -> str:
    """Say in one sentence how a model fares.

    Args:
        report: The verdict.
        since: The step from which on most of a site's dead units have been dead, by the site's name.
        past: How it was before.
        repaired: What was done.

    Example:
        >>> from lightning_deadrelu.statistics import LivenessReport
        >>> headline(LivenessReport(()))
        'No rectifier was watched.'
    """
    if not report.sites:
        return "No rectifier was watched."
    if not report.units:
        return "No rectifier in training was watched."
    return f"{_dead(report, since or {})}{past}{_others(report)}{repaired}."


def were(number: int) -> str:
    """Begin a clause on so many units.

    Example:
        >>> were(1), were(1200)
        ('1 was', '1,200 were')
    """
    return f"{number:,} {'was' if number == 1 else 'were'}"


def _are(number: int) -> str:
    return f"{number:,} {'is' if number == 1 else 'are'}"


def _dead(report: LivenessReport, since: Mapping[str, int]) -> str:
    number = report.dead_units
    if not number:
        return f"None of {report.units:,} units is dead"
    line = f"{number:,} of {report.units:,} units {'is' if number == 1 else 'are'} dead ({report.dead_fraction:.1%})"
    sick = sorted((site for site in report.headline if site.dead.any()), key=lambda site: int(site.dead.sum()))
    most, counts = sick[-1].name, [int(site.dead.sum()) for site in sick]
    start = f", since step {since[most]:,}" if most in since else ""
    if len(sick) == 1:
        return f"{line}, {'' if number == 1 else 'all '}in `{most}`{start}"
    line = f"{line}, in {len(sick)} of {len(report.headline)} layers"
    return line if counts[-1] == counts[-2] else f"{line}, most in `{most}` ({counts[-1]:,}{start})"


def _others(report: LivenessReport) -> str:
    broken = report.total("nonfinite")
    unjudged = sum(int((~site.judged & ~site.nonfinite).sum()) for site in report.headline)
    line = f"; {_are(broken)} not finite" if broken else ""
    return line + (f"; {_are(unjudged)} not judged yet" if unjudged else "")
