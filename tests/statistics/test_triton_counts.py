"""The kernel counts what the eager reductions count; run in Triton's interpreter where there is no GPU."""

import math
import subprocess
import sys
import warnings
from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from lightning_deadrelu.model.rectifiers import Rectifier
from lightning_deadrelu.statistics import UnitLiveness, count, counts, triton_counts
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


def only(places):
    """Be -0.0 all over, but for some."""
    x = torch.full((40, 3), -0.0)
    for place, value in places.items():
        x.view(-1)[place] = value
    return x


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


@settings(max_examples=25)
@given(st.data())
def test_odd_values_anywhere(data):
    rows, units = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 150))
    x = torch.randn(rows, units, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 999))))
    for _ in range(data.draw(st.integers(0, 5))):
        place = data.draw(st.integers(0, rows * units - 1))
        x.view(-1)[place] = data.draw(st.sampled_from([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-40]))
    agrees(x, -1)


@pytest.mark.parametrize("values", [{}, {0: -1.0}, {3: math.nan, 6: -2.0}, {7: -math.inf}, {9: math.nan, 100: 5.0}])
def test_zeros_with_a_sign_are_zeros(values):
    agrees(only(values), -1)
    agrees(only(values).T.contiguous()[None], -2)


@pytest.mark.parametrize("inner", [2, 49, 1025, 3136])
def test_channels_of_every_length(inner):
    agrees(torch.randn(3, 4, inner), -2)


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
    ("shape", "dtype", "dims", "every"),
    [
        ((8, 20), torch.float32, (-1,), 2),  # gaps
        ((8, 20), torch.float64, (-1,), 1),  # would be rounded
        ((2, 3, 4), torch.float32, (-3, -1), 1),  # units apart from each other
    ],
)
def test_what_it_cannot_read_in_one_go_is_left_to_others(shape, dtype, dims, every):
    x = torch.randn(shape, dtype=dtype, device=DEVICE)[..., ::every]
    assert reduce_once(x, dims) is None


@pytest.fixture
def kernels(monkeypatch):
    """Count with kernels wherever tensors are."""
    monkeypatch.setattr(counts, "runs_kernels", lambda x: True)
    monkeypatch.setattr(counts, "_read_once", counts._ReadOnce())


@pytest.mark.parametrize(("rates", "redundancy"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize(("shape", "dims"), [((6, 9), (-1,)), ((2, 4, 3, 3), (-3,)), ((7,), (-1,)), ((4, 6, 9), (-1,))])
def test_what_is_counted_with_the_kernel_is_what_is_counted_without(
    kernels, monkeypatch, shape, dims, rates, redundancy
):
    x = torch.randn(shape)
    x.view(-1)[1] = math.nan
    valid = torch.rand(shape[:-1]) > 0.3 if len(shape) == 3 else None
    there = None if valid is None else valid.to(DEVICE)
    found = count(x.to(DEVICE), x.relu().to(DEVICE), dims, valid=there, rates=rates, redundancy=redundancy)
    monkeypatch.setattr(counts, "runs_kernels", lambda x: False)
    eager = count(x, x.relu(), dims, valid=valid, redundancy=redundancy)
    assert [value is None for value in found] == [value is None for value in eager]
    for name, one, other in zip(eager._fields, found, eager, strict=True):
        if one is None:
            continue
        one, other = (torch.as_tensor(value).double().cpu() for value in (one, other))
        torch.testing.assert_close(one, other, equal_nan=True, rtol=1e-5, atol=1e-5, msg=name)


def batches(calls):
    """Make the inputs of two layers: those of each call, in each of some batches."""
    torch.manual_seed(0)
    x = [[(site, torch.randn(8, 5 + site) - 1.5) for site in calls] for _ in range(4)]
    x[1][0][1][2, 3] = math.nan
    return x


def counted(batches, drops=()):
    """Count batch for batch, as a watch does, but for those that are broken off."""
    liveness = UnitLiveness({"one": 5, "two": 6}, window=4).to(DEVICE)
    for number, batch in enumerate(batches):
        liveness.observation = number
        liveness.begin_batch()
        for site, x in batch:
            x = x.to(DEVICE)
            room = liveness.accumulators.lend(liveness.layout, site, number, x)
            liveness.add(site, count(x, x.relu(), rates=liveness.wants_rates(site), room=room))
        if number in drops:
            liveness.drop_batch()
        else:
            liveness.end_batch()
    return liveness.totals()


@pytest.mark.parametrize("drops", [(), (0,), (1, 2)])
@pytest.mark.parametrize("calls", [(0, 1), (0, 1, 0), (1,), (0, 0, 0, 1)])
def test_batches_are_added_up_in_the_same_room_one_after_another(kernels, monkeypatch, calls, drops):
    told = counted(batches(calls), drops)
    monkeypatch.setattr(counts, "runs_kernels", lambda x: False)
    eager = counted(batches(calls), drops)
    for name in (field.name for field in fields(eager)):
        one, other = getattr(told, name).cpu(), getattr(eager, name).cpu()
        torch.testing.assert_close(one, other, equal_nan=True, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    "rectifier", [Rectifier("threshold", hinge=0.5), Rectifier("hardswish", hinge=-3.0), Rectifier("gelu", smooth=True)]
)
def test_other_rectifiers_are_counted_eagerly(kernels, monkeypatch, rectifier):
    monkeypatch.setattr(counts, "_read_once", None)
    x = torch.randn(5, 3)
    assert count(x, x, rectifier=rectifier).fired.tolist() == (x > rectifier.hinge).sum(0).tolist()


def test_a_kernel_that_fails_is_told_of_once_and_left_alone(kernels, monkeypatch):
    def fail(*args):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(triton_counts, "reduce_once", fail)
    x = torch.randn(5, 3)
    with pytest.warns(UserWarning, match="no compiler"):
        first = count(x, x.relu())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = count(x, x.relu())
    assert first.fired.tolist() == again.fired.tolist() == (x > 0).sum(0).tolist()


def test_triton_is_not_loaded_to_count_on_a_cpu():
    code = "import sys, torch; from lightning_deadrelu.statistics import count; x = torch.ones(2, 3); count(x, x)"
    command = [sys.executable, "-c", f"{code}; sys.exit('lightning_deadrelu.statistics.triton_counts' in sys.modules)"]
    assert subprocess.run(command, check=False).returncode == 0
