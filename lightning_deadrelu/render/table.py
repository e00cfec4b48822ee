"""Rows as tables: for a terminal, for a notebook, and in Markdown."""

from __future__ import annotations

import html
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from typing import NamedTuple

Cell = str | int | float | None
Row = Mapping[str, Cell]


class Column(NamedTuple):
    """How one entry of each row is shown.

    Args:
        key: Its key in the rows.
        title: Above the column.
        percent: Digits behind the point of a share that is shown in percent; None for what is no share.
        text: Whether it holds words, which stand at the left and wrap; numbers stand at the right.
        optional: Whether the column is left out where no row has anything to say in it.
    """

    key: str
    title: str
    percent: int | None = None
    text: bool = False
    optional: bool = False

    def show(self, row: Row) -> str:
        """Write an entry: ``-`` where there is None, nothing where there is no such entry.

        Example:
            >>> Column("dead", "dead").show({"dead": 1234}), Column("dead", "", percent=1).show({"dead": 0.25})
            ('1,234', '25.0%')
        """
        value = row.get(self.key, "")
        if value is None:
            return "-"
        if isinstance(value, str):
            return value
        if self.percent is not None:
            return f"{value:.{self.percent}%}"
        return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def shown_columns(columns: Sequence[Column], rows: Sequence[Row]) -> list[Column]:
    """Leave out the optional columns in which no row has anything but zero or nothing.

    Example:
        >>> [column.key for column in shown_columns([Column("a", "A"), Column("b", "B", optional=True)], [{"b": 0}])]
        ['a']
    """
    return [column for column in columns if not column.optional or any(row.get(column.key) for row in rows)]


def text_table(columns: Sequence[Column], rows: Sequence[Row], width: int | None = None) -> str:
    """Lay rows out in lines; where they are too wide, the widest columns of text wrap.

    Example:
        >>> print(text_table([Column("a", "layer", text=True), Column("b", "units")], [{"a": "net.1", "b": 1234}]))
        layer  units
        net.1  1,234
    """
    columns = shown_columns(columns, rows)
    cells = [[column.show(row) for column in columns] for row in rows]
    titles = [[column.title] if column.text else column.title.split() for column in columns]
    sizes = [max(map(len, [*title, *(row[at] for row in cells)]), default=0) for at, title in enumerate(titles)]
    gap, width = 2, width or terminal_width()
    if sum(sizes) + gap * (len(sizes) - 1) > width:
        gap = 1
    words = [at for at, column in enumerate(columns) if column.text]
    while words and sum(sizes) + gap * (len(sizes) - 1) > width and max(sizes[at] for at in words) > 1:
        sizes[max(words, key=lambda at: sizes[at])] -= 1
    head = _lines([column.title for column in columns], columns, sizes, gap)
    top = max((len(part) for part in map(_wrapped, (column.title for column in columns), sizes)), default=0)
    return "\n".join([*head[:top], *(line for row in cells for line in _lines(row, columns, sizes, gap))])


def coded(text: str) -> str:
    """Escape for HTML, and set what stands between backticks as code.

    Example:
        >>> coded("<b> in `net.1`")
        '&lt;b&gt; in <code>net.1</code>'
    """
    parts = html.escape(text).split("`")
    if len(parts) % 2 == 0:  # a name has one
        return html.escape(text)
    return "".join(f"<code>{part}</code>" if at % 2 else part for at, part in enumerate(parts))


def terminal_width() -> int:
    """Return the characters in a line of the terminal, but at least 80 and at most 140."""
    return min(max(shutil.get_terminal_size((120, 24)).columns, 80), 140)


def prose(text: str, width: int) -> str:
    """Break lines of prose that are too long; what goes on is indented by two more characters.

    Example:
        >>> print(prose("12 units died at step 40", 16))
        12 units died at
          step 40
    """
    lines = []
    for line in text.splitlines():
        indent = " " * (len(line) - len(line.lstrip()) + 2)
        lines += textwrap.wrap(
            line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
        ) or [""]
    return "\n".join(lines)


def _lines(cells: Sequence[str], columns: Sequence[Column], sizes: Sequence[int], gap: int) -> list[str]:
    """Write one row, in as many lines as its longest cell takes."""
    parts = [_wrapped(cell, size) for cell, size in zip(cells, sizes, strict=True)]
    height = max(map(len, parts), default=0)
    lines = []
    for line in range(height):
        texts = [part[line] if line < len(part) else "" for part in parts]
        padded = (
            text.ljust(size) if column.text else text.rjust(size)
            for text, column, size in zip(texts, columns, sizes, strict=True)
        )
        lines.append((" " * gap).join(padded).rstrip())
    return lines


def _wrapped(cell: str, size: int) -> list[str]:
    return textwrap.wrap(cell, max(size, 1), break_on_hyphens=False) or [""]


def html_table(columns: Sequence[Column], rows: Sequence[Row]) -> str:
    """Lay rows out as HTML that scrolls, for a notebook.

    Example:
        >>> html_table([Column("a", "layer")], [{"a": "<b>"}]).count("&lt;b&gt;")
        1
    """
    columns = shown_columns(columns, rows)
    cells = [[("th", column.title) for column in columns], *([("td", c.show(row)) for c in columns] for row in rows)]
    lines = ("".join(f"<{tag}>{html.escape(text)}</{tag}>" for tag, text in line) for line in cells)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div style="max-height:30em;overflow:auto"><table>{body}</table></div>'


def markdown_table(columns: Sequence[Column], rows: Sequence[Row]) -> str:
    """Lay rows out in Markdown.

    Example:
        >>> markdown_table([Column("a", "layer")], [{"a": "net.1"}]).splitlines()
        ['| layer |', '| --- |', '| net.1 |']
    """
    lines = [[column.title for column in columns], ["---"] * len(columns)]
    lines += [[column.show(row).replace("|", "\\|") for column in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
