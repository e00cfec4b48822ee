"""Marks of axes, and colours of shares."""

from itertools import pairwise

import numpy as np
from hypothesis import assume, given
from hypothesis import strategies as st

from lightning_deadrelu.render.scale import round_ticks, shades_of


@given(st.integers(0, 10**7), st.integers(0, 10**7), st.integers(4, 10))
def test_ticks_are_round_even_and_inside(low, high, most):
    assume(low < high)
    ticks = round_ticks(low, high, most)
    assert 1 <= len(ticks) <= most
    assert all(low <= tick <= high for tick in ticks)
    gaps = {round(b - a, 9) for a, b in pairwise(ticks)}
    assert len(gaps) <= 1
    assert all(float(f"{gap:.0e}") == gap and f"{gap:e}"[0] in "125" for gap in gaps)


def test_a_larger_share_is_darker_and_any_is_told_from_none():
    shades = shades_of(np.array([0.0, 0.001, 0.05, 0.1, 0.4, 0.5, 0.8, 1.0])).astype(int)
    light = shades @ [299, 587, 114]
    assert (np.diff(light) < 0).all()
    assert (shades[0] != shades[1]).any()
