"""Whose silence is beyond doubt: against counts of all orders, and against units that live."""

from dataclasses import replace
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from views import site

from lightning_deadrelu.remedies import Reset
from lightning_deadrelu.repair.candidates import candidates, improbable


@pytest.mark.parametrize(("rate", "age"), [(0.5, 5), (0.1, 29), (0.01, 299), (0.001, 2995)])
def test_improbable_silence_matches_the_published_ages(rate, age):
    one = site(dead=range(10), age=age, usual_rate=rate)
    assert improbable(one, 0.05).all()
    assert not improbable(replace(one, age=one.age - 1), 0.05).any()


@given(st.integers(1, 9), st.integers(0, 6), st.data())
def test_improbable_silence_is_counted_over_all_orders(seen, age, data):
    fired = data.draw(st.integers(1, seen))
    orders = list(combinations(range(seen + age), fired))
    share = Fraction(sum(order[-1] < seen for order in orders), len(orders))
    one = site(dead=[0], units=1, age=age, usual_rate=fired / seen, seen=seen)
    for significance in (share * Fraction(999, 1000), share * Fraction(1001, 1000)):
        assert bool(improbable(one, float(significance))) == (share <= significance)


@pytest.mark.parametrize("firings", [1, 2, 3, 10])
@pytest.mark.parametrize("rate", [0.3, 0.01, 0.0003])
def test_no_living_unit_is_called_improbable_more_often_than_it_says(rate, firings):
    units, generator = 20_000, np.random.default_rng(firings)
    seen = torch.from_numpy(generator.geometric(rate, (firings, units)).sum(0))
    age = torch.from_numpy(generator.geometric(rate, units)) - 1  # the longest silence before it fires again
    one = replace(site(range(units), units), age=age, seen=seen, fired_ever=torch.full_like(seen, firings))
    wrongly = improbable(one, 0.05).double().mean()
    assert wrongly < 0.055
    assert rate > 0.001 or wrongly > 0.045  # nor is it blunt


def test_rare_units_are_protected_by_their_own_history_and_busy_ones_treated_early():
    remedy = Reset(significance=0.05)
    assert not candidates(site(dead=[0], age=2000, usual_rate=0.001), remedy, 2990).any()
    assert candidates(site(dead=[0], age=30, usual_rate=0.5), remedy, 2990).any()
    assert not candidates(site(dead=[0], age=2000, usual_rate=0.0), remedy, 2990).any()  # has never fired
