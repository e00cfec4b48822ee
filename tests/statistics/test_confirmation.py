"""What is seen of units in the one batch before they are edited."""

import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_deadrelu.model.rectifiers import Rectifier
from lightning_deadrelu.remedies import LEVELS
from lightning_deadrelu.statistics.confirmation import MOST_ROWS, Confirmation, SilenceSample

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


def test_padding_may_lie_in_memory_in_any_order():
    confirmation = Confirmation({0: torch.tensor([True])}, CPU)
    valid = torch.tensor([[True, True], [False, True], [True, True]]).T  # two of three tokens
    x = torch.tensor([-1.0, 5.0, -1.0, -1.0, -2.0, -1.0])[:, None]
    confirmation(0, RELU, x, (-1,), valid)
    confirmation.listen(0, x, valid)
    assert confirmation.evidence.fired.tolist() == [0]
    assert confirmation.evidence.quantiles[0].item() == -2
    assert len(confirmation.rows(0)) == 5


def test_sites_lie_end_to_end_and_are_cut_out_again():
    confirmation = Confirmation({2: torch.tensor([True, False]), 1: torch.tensor([True, True])}, CPU)
    confirmation(1, RELU, torch.tensor([[1.0, -1.0]]), (-1,))
    assert confirmation.of(1, confirmation.evidence).fired.tolist() == [1, 0]
    assert confirmation.of(2, confirmation.evidence).calls.tolist() == [0]
    assert confirmation.of(2, confirmation.evidence).quantiles.isnan().all()


def test_nothing_is_seen_without_a_call():
    nothing = SilenceSample.nothing(3, CPU)
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


def test_what_is_kept_is_a_copy_of_no_more_than_the_bound():
    """Whatever the micro-batches: no activation is kept alive, or changes what was kept."""
    confirmation = Confirmation({0: torch.tensor([True])}, CPU)
    seen = []
    for call in range(64):
        x = torch.full((100, 8), float(call))
        x[:, 1] = torch.arange(100)
        seen.append(x.clone())
        confirmation.listen(0, x)
        x.fill_(-1)
        assert len(pickle.dumps(confirmation)) < MOST_ROWS * 8 * 4 + 5000
    rows, whole = confirmation.rows(0), torch.cat(seen).double()
    assert MOST_ROWS / 2 <= len(rows) <= MOST_ROWS
    assert torch.equal(rows, whole[:: len(whole) // len(rows)][: len(rows)])  # evenly, over all calls


@pytest.mark.parametrize("flat", [False, True])
def test_rows_of_padding_are_not_kept(flat):
    confirmation = Confirmation({0: torch.tensor([True])}, CPU)
    valid = torch.tensor([[True, True, False], [True, False, False]])
    x = torch.arange(12.0).view(2, 3, 2)
    confirmation.listen(0, x.flatten(0, 1) if flat else x, valid)
    assert confirmation.rows(0)[:, 0].tolist() == [0.0, 2.0, 6.0]
    confirmation.listen(0, torch.zeros(3, 2), valid)  # of something else
    assert len(confirmation.rows(0)) == 6
    confirmation.listen(0, x, torch.zeros(2, 3, dtype=torch.bool))
    assert len(confirmation.rows(0)) == 6


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_what_is_no_number_does_not_fire_and_hides_nothing(bad):
    confirmation = Confirmation({0: torch.tensor([True, True, True])}, CPU)
    confirmation(0, RELU, torch.tensor([[bad, bad, 1.0], [-1.0, 2.0, bad]]), (-1,))
    assert confirmation.evidence.fired.tolist() == [0, 1, 1]


@pytest.mark.parametrize("hinge", [0.1, -3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_input_on_the_hinge_does_not_fire(hinge, dtype):
    confirmation = Confirmation({0: torch.tensor([True])}, CPU)
    confirmation(0, RELU._replace(hinge=hinge), torch.tensor([[hinge]], dtype=dtype), (-1,))
    assert confirmation.evidence.fired.tolist() == [0]


class Largest(TorchDispatchMode):
    """Note the most bytes of a new tensor."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        views = {one.untyped_storage().data_ptr() for one in args if isinstance(one, torch.Tensor)}
        for one in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(one, torch.Tensor) and one.untyped_storage().data_ptr() not in views:
                self.most = max(self.most, one.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("asked", [1, 64])
@pytest.mark.parametrize(
    ("shape", "dims"),
    [((20_000, 64), (-1,)), ((50, 400, 64), (-1,)), ((20, 64, 20, 50), (-3,)), ((2000, 64, 10), (-2,))],
)
def test_no_copy_of_the_activation_is_made(shape, dims, asked, monkeypatch):
    monkeypatch.setattr("lightning_deadrelu.statistics.confirmation._MOST_NUMBERS", 2**14)
    x = torch.randn(shape).transpose(0, 1).contiguous().transpose(0, 1)  # in memory the other way round
    confirmation = Confirmation({0: torch.arange(64) < asked}, CPU)
    with Largest() as largest:
        confirmation(0, RELU, x, dims)
        confirmation.listen(0, x)
    assert largest.most <= x.numel()  # one byte each
    assert confirmation.evidence.fired.tolist() == [1] * asked


def test_rows_of_a_layer_that_is_averaged_before_the_site_are_of_no_use():
    confirmation = Confirmation({0: torch.tensor([True])}, CPU)
    confirmation.listen(0, torch.ones(6, 3))
    confirmation(0, RELU, torch.ones(2, 1), (-1,))
    assert confirmation.rows(0) is None


class Unwaited(TorchDispatchMode):
    """Refuses what makes the host wait for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("padded", [False, True])
def test_looking_never_waits_for_the_device(padded):
    confirmation = Confirmation({0: torch.tensor([True, False])}, CPU)
    valid = torch.tensor([[True, True, False], [True, False, False]]) if padded else None
    with Unwaited():
        confirmation(0, RELU, torch.randn(2, 3, 2), (-1,), valid)
        confirmation.listen(0, torch.randn(2, 3, 4), valid)
    assert len(confirmation.rows(0)) == (3 if padded else 6)
