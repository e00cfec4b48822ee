"""How far inputs are from centred and whether they are indicators, against loops over plain numbers."""

import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_deadrelu.explain.centring import indicator_share, mean_over_deviation

ROWS = st.lists(st.lists(st.sampled_from([0.0, 1.0, 0.5, -2.0]), min_size=3, max_size=3), min_size=2, max_size=6)


@given(ROWS)
def test_indicators_are_counted_among_what_varies(rows):
    columns = list(zip(*rows, strict=True))
    varying = [column for column in columns if len(set(column)) > 1]
    indicators = [column for column in varying if set(column) <= {0.0, 1.0}]
    assert float(indicator_share(torch.tensor(rows))) == pytest.approx(len(indicators) / max(len(varying), 1))


@given(ROWS)
def test_the_mean_is_measured_in_deviations(rows):
    columns = list(zip(*rows, strict=True))
    size = sum(statistics.fmean(column) ** 2 for column in columns) ** 0.5
    deviation = sum(statistics.pvariance(column) for column in columns) ** 0.5
    found = float(mean_over_deviation(torch.tensor(rows)))
    if deviation:
        assert found == pytest.approx(size / deviation, rel=1e-4)
