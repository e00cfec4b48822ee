"""What is read of a batch: against all of it, where it is small; and of any form."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_deadrelu.explain.postmortem.batch_sample import INPUTS, off_centre, reduced, sample_batch

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@given(st.lists(SHAPES, max_size=4), st.booleans(), st.integers(0, 3))
def test_small_batches_are_read_exactly(shapes, has_loss, seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(shape, generator=generator).transpose(0, -1) for shape in shapes]
    loss = torch.randn((), generator=generator) if has_loss else None
    sample = sample_batch(loss, inputs)
    if sample is None:
        assert not shapes
        assert not has_loss
        return
    (values,) = reduced([sample])
    largest = [max(abs(value) for value in x.flatten().tolist()) for x in inputs[:INPUTS]]
    missing = [float("nan")] * (INPUTS - len(largest))
    expected = [float("nan") if loss is None else float(loss), *largest, *missing]
    assert values.tolist() == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize(
    "form",
    [
        lambda x: x,
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: x.double(),
        lambda x: x.bfloat16(),
    ],
)
def test_one_large_image_of_a_large_batch_is_seen(form):
    x = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    x[17] *= 1000
    (values,) = reduced([sample_batch(None, [form(x), torch.zeros(64)])])
    assert values[1] > 1000
    assert values[2] == 0


def test_it_is_one_copy_that_later_changes_do_not_reach():
    loss, x = torch.tensor(2.0, requires_grad=True), torch.ones(4, 3)
    sample = sample_batch(loss * 1, x)
    x.fill_(7.0)
    assert not sample.values.requires_grad
    assert reduced([sample])[0].tolist()[:2] == [2.0, 1.0]


def test_off_centre_sees_each_feature():
    x = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0))
    assert off_centre(x) < 0.1
    assert off_centre(x + torch.tensor([5.0, -5.0, 0.0])) == pytest.approx((50 / 3) ** 0.5, rel=0.05)
    assert off_centre([torch.arange(3)]) is None


def test_one_hot_features_are_not_taken_for_uncentred():
    kinds = torch.multinomial(torch.tensor([0.9, 0.05, 0.05]), 400, replacement=True)
    one_hot = torch.nn.functional.one_hot(kinds).float()
    both = torch.cat([one_hot, one_hot, torch.rand(400, 1) + 5], 1)  # beside a number
    assert off_centre(one_hot).isnan()
    assert off_centre(both).isnan()
    assert off_centre(torch.rand(400, 3) + 5) > 5
