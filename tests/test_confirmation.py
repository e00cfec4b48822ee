"""What is seen of units in the one batch before they are edited."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_deadrelu.confirmation import MOST_ROWS, Confirmation, Evidence
from lightning_deadrelu.remedies import LEVELS
from lightning_deadrelu.sites import Rectifier

RELU = Rectifier("relu")
CPU = torch.device("cpu")


def quantile(values, level):
    """The definition, with linear interpolation."""
    values = sorted(values)
    place = level * (len(values) - 1)
    low = math.floor(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (place - low) * (values[high] - values[low])


LAYOUTS = {"rows": ((7, 4), (-1,)), "tokens": ((3, 5, 4), (-1,)), "images": ((3, 4, 2, 2), (-3,)), "one": ((4,), (-1,))}


@pytest.mark.parametrize("layout", LAYOUTS)
@given(seed=st.integers(0, 99), asked=st.sets(st.integers(0, 3), min_size=1))
def test_firing_and_quantiles_equal_a_slow_loop(layout, seed, asked):
    shape, dims = LAYOUTS[layout]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) - 1
    confirmation = Confirmation({5: torch.tensor([unit in asked for unit in range(4)])}, CPU)
    confirmation(5, RELU, x, dims)
    confirmation(6, RELU, x + 100, dims)  # another site
    for column, unit in enumerate(sorted(asked)):
        values = x.double().select(dims[0], unit).flatten().tolist()
        assert bool(confirmation.evidence.fired[column]) == any(value > 0 for value in values)
        expected = [quantile(values, level) for level in LEVELS]
        assert confirmation.evidence.quantiles[:, column].tolist() == pytest.approx(expected)


def test_calls_of_one_batch_are_averaged_and_any_firing_counts():
    confirmation = Confirmation({0: torch.tensor([True])}, CPU)
    confirmation(0, RELU, torch.tensor([[-1.0]]), (-1,))
    confirmation(0, RELU, torch.tensor([[3.0]]), (-1,))
    assert confirmation.evidence.fired.tolist() == [1]
    assert confirmation.evidence.quantiles[:, 0].tolist() == [1.0] * len(LEVELS)


def test_padding_and_the_hinge_are_minded():
    confirmation = Confirmation({0: torch.tensor([True])}, CPU)
    x = torch.tensor([[[0.5], [9.0]], [[0.2], [0.3]]])
    confirmation(0, RELU._replace(hinge=1.0), x, (-1,), torch.tensor([[True, False], [True, True]]))
    assert confirmation.evidence.fired.tolist() == [0]
    assert confirmation.evidence.quantiles[-1].item() == pytest.approx(-0.5)


def test_sites_lie_end_to_end_and_are_cut_out_again():
    confirmation = Confirmation({2: torch.tensor([True, False]), 1: torch.tensor([True, True])}, CPU)
    confirmation(1, RELU, torch.tensor([[1.0, -1.0]]), (-1,))
    assert confirmation.of(1, confirmation.evidence).fired.tolist() == [1, 0]
    assert confirmation.of(2, confirmation.evidence).calls.tolist() == [0]
    assert confirmation.of(2, confirmation.evidence).quantiles.isnan().all()


def test_nothing_is_seen_without_a_call():
    nothing = Evidence.nothing(3, CPU)
    assert nothing.fired.tolist() == nothing.calls.tolist() == [0, 0, 0]
    assert nothing.quantiles.isnan().all()


@pytest.mark.parametrize("count", [1, MOST_ROWS, MOST_ROWS + 1, 10 * MOST_ROWS])
def test_rows_of_the_input_are_kept_up_to_a_bound(count):
    confirmation = Confirmation({0: torch.tensor([True])}, CPU)
    x = torch.arange(3.0 * count).view(count, 3)
    confirmation.listen(0, x)
    rows = confirmation.rows(0)
    assert 0 < len(rows) <= MOST_ROWS
    assert len(rows) == count or count > MOST_ROWS
    assert {tuple(row) for row in rows.tolist()} <= {tuple(row) for row in x.tolist()}
    assert confirmation.rows(1) is None


def test_rows_of_several_calls_and_of_tokens_come_together():
    confirmation = Confirmation({0: torch.tensor([True])}, CPU)
    confirmation.listen(0, torch.ones(2, 5, 3))
    confirmation.listen(0, torch.zeros(0, 3))
    confirmation.listen(0, torch.zeros(3))
    assert confirmation.rows(0).sum(1).tolist() == [3.0] * 10 + [0.0]
