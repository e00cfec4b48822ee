"""Where the units of each site lie."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_deadrelu.model.layout import Layout
from lightning_deadrelu.model.sites import Site


@given(st.lists(st.integers(0, 5), max_size=8))
def test_units_lie_end_to_end_in_the_order_of_their_sites(units: list[int]) -> None:
    layout = Layout(Site("act", False, "relu", (str(number),), count) for number, count in enumerate(units))
    owners = [number for number, count in enumerate(units) for _ in range(count)]
    assert layout.units == len(owners)
    assert [number for number in range(len(layout)) for _ in owners[layout.place(number)]] == owners
    assert all(set(owners[layout.place(number)]) <= {number} for number in range(len(layout)))
    assert layout.places == tuple(layout.place(number) for number in range(len(units)))


@given(st.lists(st.sampled_from("abc"), max_size=8))
def test_names_lead_back_to_their_sites(owners: list[str]) -> None:
    layout = Layout(Site(owner, False, "relu", (str(number),), 1) for number, owner in enumerate(owners))
    assert [layout.number(name) for name in layout.names] == list(range(len(owners)))
    assert [layout.site(name) for name in layout.names] == list(layout)
    assert all(name in layout for name in layout.names)
    assert "d" not in layout
    with pytest.raises(KeyError):
        layout.number("d")


def test_layouts_of_equal_sites_are_equal() -> None:
    site = Site("act", False, "relu", ("w",), 3)
    assert Layout([site]) == Layout((site,))
    assert hash(Layout([site])) == hash(Layout((site,)))
    assert Layout([site]) != Layout([site, site])
    assert Layout() != ()
