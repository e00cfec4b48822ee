"""A run as a table, for a terminal or a notebook."""

from __future__ import annotations

from typing_extensions import Self

from lightning_deadrelu.explain.postmortem import described
from lightning_deadrelu.render.names import shortened_names
from lightning_deadrelu.render.table import coded, html_table, prose, terminal_width, text_table
from lightning_deadrelu.report.run_report import RunReport
from lightning_deadrelu.report.site_summary import COLUMNS, rows_of, shortened

_NARROW = 100  # characters; in fewer, what kind of rectifier a layer has is left out
_PREFIX = 12  # characters that a monitor's name takes before the first line


class Summary(str):
    """A text that a notebook shows as a headline over a table.

    Args:
        text: What is printed.
        html: What a notebook shows instead.
    """

    _html: str

    def __new__(cls, text: str, html: str = "") -> Self:
        """Keep both."""
        new = super().__new__(cls, text)
        new._html = html
        return new

    def _repr_html_(self) -> str:
        return self._html


def summary(run: RunReport, width: int | None = None) -> Summary:
    """Tell what became of each site over a run, in the order of execution, under a sentence that says it all.

    Of more than a dozen sites the healthy ones are gathered, and of many others all but the worst 20.

    Args:
        run: What to show.
        width: Characters per line; by default those of the terminal, from 80 to 140.
    """
    width = width or terminal_width()
    names = [summary.site.name for summary in run.sites]
    short = dict(zip(names, shortened_names(names), strict=True))
    rows = [row | {"site": short.get(str(row["site"]), row["site"])} for row in rows_of(shortened(run.sites))]
    columns = [column for column in COLUMNS if width >= _NARROW or column.key != "kind"]
    unwatched = [f"not watched: {name}: {reason}" for name, reason in run.report.unwatched.items()]
    below = "\n".join(filter(None, [*unwatched, described(run.deaths)]))
    table = text_table(columns, rows, width) if rows else ""
    text = "\n".join(filter(None, [prose(run.conclusion, width - _PREFIX), table, prose(below, width)]))
    notes = f'<p style="white-space: pre-wrap">{coded(below)}</p>' if below else ""
    return Summary(text, f"<p>{coded(run.conclusion)}</p>{html_table(COLUMNS, rows) if rows else ''}{notes}")
