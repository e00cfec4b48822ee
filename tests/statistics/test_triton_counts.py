"""The kernel counts what the eager reductions count; run in Triton's interpreter where there is no GPU."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from lightning_deadrelu.statistics.triton_counts import reduce_once

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [((7, 33), -1), ((2, 5, 300), -1), ((3, 4, 5, 6), -3), ((300, 5), -1), ((2, 130, 40), -2), ((5,), -1)]


def brute_force(x, dim, cap):
    """Go through the inputs of each unit one by one."""
    rows = x.cpu().float().movedim(dim, -1).reshape(-1, x.shape[dim])
    told = []
    for column in rows.T:
        values = column.tolist()
        missing = any(math.isnan(value) for value in values)
        told.append(
            (
                sum(value > 0 for value in values),
                math.nan if missing else math.fsum(min(max(value, 0.0), cap) for value in values),
                math.nan if missing else max(values),
                math.nan if missing else min(values),
            )
        )
    return [torch.tensor(one) for one in zip(*told, strict=True)]


def agrees(x, dim, cap=math.inf, valid=None):
    told = reduce_once(x.to(DEVICE), (dim,), cap, None if valid is None else valid.to(DEVICE))
    fired, magnitude, peak, trough = brute_force(x if valid is None else x[valid], dim, cap)
    assert told.fired.tolist() == fired.tolist()
    torch.testing.assert_close(told.magnitude.cpu(), magnitude, equal_nan=True, rtol=1e-4, atol=1e-4)
    assert torch.equal(told.peak.cpu().nan_to_num(77.0), peak.nan_to_num(77.0))
    assert torch.equal(told.trough.cpu().nan_to_num(77.0), trough.nan_to_num(77.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "dim"), SHAPES)
def test_all_shapes_and_types(shape, dim, dtype):
    x = torch.randn(shape).to(dtype)
    agrees(x, dim)
    x.view(-1)[1], x.view(-1)[3] = math.inf, math.nan
    agrees(x, dim, cap=6.0)


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_odd_values_anywhere(data):
    rows, units = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 150))
    x = torch.randn(rows, units, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 999))))
    for _ in range(data.draw(st.integers(0, 5))):
        place = data.draw(st.integers(0, rows * units - 1))
        x.view(-1)[place] = data.draw(st.sampled_from([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-40]))
    agrees(x, -1)


def test_channels_last():
    agrees(torch.randn(3, 4, 5, 6).to(memory_format=torch.channels_last), -3)


def test_padding_does_not_count():
    x = torch.randn(4, 6, 9)
    agrees(x, -1, valid=torch.rand(4, 6) > 0.5)


def test_several_dimensions_of_units():
    x = torch.randn(5, 3, 4)
    told = reduce_once(x.to(DEVICE), (-2, -1))
    assert told.fired.tolist() == (x > 0).sum(0).flatten().tolist()


@pytest.mark.parametrize(
    ("x", "dims"),
    [
        (torch.randn(8, 20)[:, ::2], (-1,)),  # gaps
        (torch.randn(8, 20, dtype=torch.float64), (-1,)),  # would be rounded
        (torch.randn(2, 3, 4), (-3, -1)),  # units apart from each other
    ],
)
def test_what_it_cannot_read_in_one_go_is_left_to_others(x, dims):
    assert reduce_once(x.to(DEVICE), dims) is None
