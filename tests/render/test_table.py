"""Tables of any rows in any width."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_deadrelu.render.table import Column, html_table, markdown_table, shown_columns, text_table

COLUMNS = (
    Column("name", "layer", text=True),
    Column("dead", "dead now"),
    Column("share", "", percent=1),
    Column("late", "died at", optional=True),
    Column("why", "refused because", text=True),
)
WORDS = st.text("abcdefgh._[]<&|", min_size=1, max_size=120)
ROWS = st.fixed_dictionaries(
    {"name": WORDS, "dead": st.integers(0, 99_999), "share": st.floats(0, 1), "late": st.none(), "why": WORDS}
)


@given(st.lists(ROWS, min_size=1, max_size=5), st.integers(60, 200))
def test_a_table_fits_and_loses_nothing(rows, width):
    lines = text_table(COLUMNS, rows, width).splitlines()
    assert max(map(len, lines)) <= width
    written = "".join(lines).replace(" ", "")
    for row in rows:
        assert f"{row['dead']:,}" in written
        assert f"{row['share']:.1%}" in written
        for letter in "[]<&|":
            assert written.count(letter) == sum((row["name"] + row["why"]).count(letter) for row in rows)


def test_where_there_is_room_each_row_is_one_line():
    rows = [{"name": "net.1", "dead": 1234, "share": 0.5, "why": "-"}, {"name": "... 3 layers"}]
    assert text_table(COLUMNS, rows, 80).splitlines() == [
        "layer          dead         refused because",
        "                now",
        "net.1         1,234  50.0%  -",
        "... 3 layers",
    ]


def test_optional_columns_are_left_out_where_they_say_nothing():
    for late, shown in ((None, False), (0, False), (9, True)):
        keys = [column.key for column in shown_columns(COLUMNS, [{"name": "a", "late": late}])]
        assert ("late" in keys) == shown


@pytest.mark.parametrize("name", ["<b>&", "a|b"])
def test_names_do_not_become_markup(name):
    row = {"name": name, "dead": None}
    assert "<td>&lt;b&gt;&amp;</td>" in html_table(COLUMNS, [row]) or name != "<b>&"
    assert markdown_table(COLUMNS[:2], [row]).splitlines()[-1].replace("\\|", "").count("|") == 3
