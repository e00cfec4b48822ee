"""A run as a table for a terminal."""

from __future__ import annotations

from lightning_deadrelu.explain.postmortem import described
from lightning_deadrelu.render.names import shortened_names
from lightning_deadrelu.render.table import terminal_width, text_table
from lightning_deadrelu.report.run_report import RunReport
from lightning_deadrelu.report.site_summary import COLUMNS, rows_of, shortened

_NARROW = 100  # characters; in fewer, what kind of rectifier a layer has is left out


def summary(run: RunReport, width: int | None = None) -> str:
    """Tell what became of each site over a run, in the order of execution, under a sentence that says it all.

    Of more than a dozen sites the healthy ones are gathered, and of many others all but the worst 20.

    Args:
        run: What to show.
        width: Characters per line; by default those of the terminal, from 80 to 140.

    Example:
        >>> from lightning_deadrelu.statistics import LivenessReport
        >>> print(summary(RunReport(LivenessReport(()))))
        No rectifier was watched.
    """
    width = width or terminal_width()
    names = [summary.site.name for summary in run.sites]
    short = dict(zip(names, shortened_names(names), strict=True))
    rows = [row | {"site": short.get(str(row["site"]), row["site"])} for row in rows_of(shortened(run.sites))]
    columns = [column for column in COLUMNS if width >= _NARROW or column.key != "kind"]
    lines = [run.conclusion, text_table(columns, rows, width) if rows else ""]
    lines += [f"not watched: {name}: {reason}" for name, reason in run.report.unwatched.items()]
    return "\n".join(filter(None, [*lines, described(run.deaths)]))
