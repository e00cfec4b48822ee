"""The counts of one call, against a loop over single numbers."""

import math
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_deadrelu.model.rectifiers import Rectifier
from lightning_deadrelu.statistics import Rules, UnitLiveness, count

RELU = Rectifier("relu", plain=True)
RECTIFIERS = {
    "relu": (RELU, torch.relu),
    "relu6": (Rectifier("relu6", cap=6.0, plain=True), F.relu6),
    "hardtanh": (Rectifier("hardtanh", cap=1.0, plain=True), lambda x: F.hardtanh(x, 0, 1)),
    "threshold": (Rectifier("threshold", hinge=0.5), lambda x: F.threshold(x, 0.5, -2.0)),
    "hardswish": (Rectifier("hardswish", hinge=-3.0), F.hardswish),
}


def slow_units(x, dims):
    """Yield, for each unit, the list of its inputs in order, by walking every index."""
    sizes = [x.shape[d] for d in dims]
    units = [[] for _ in range(math.prod(sizes))]
    for index in torch.cartesian_prod(*[torch.arange(n) for n in x.shape]).view(-1, x.ndim).tolist():
        number = 0
        for d, size in zip(dims, sizes, strict=True):
            number = number * size + index[d]
        units[number].append(x[tuple(index)].item())
    return units


def side_by_side(x, dims):
    """Lay the units out side by side, as channels-last does."""
    return x.movedim(dims[-1], -1).contiguous().movedim(-1, dims[-1])


@pytest.mark.parametrize("lay_out", [lambda x, dims: x, side_by_side])
@pytest.mark.parametrize("kind", RECTIFIERS)
@pytest.mark.parametrize(
    ("shape", "dims", "samples"),
    [
        ((5, 4), (-1,), 5),
        ((4,), (-1,), 1),
        ((2, 3, 4), (-1,), 6),
        ((2, 4, 3), (-2,), 2),
        ((2, 4, 3, 3), (-3,), 2),
        ((4, 3, 3), (-3,), 1),
        ((2, 4, 2, 2, 2), (-4,), 2),
        ((2, 3, 5, 4), (-3, -1), 10),
        ((1, 4), (-1,), 1),
    ],
)
def test_count_equals_a_loop_over_single_numbers(kind, shape, dims, samples, lay_out):
    rectifier, function = RECTIFIERS[kind]
    x = lay_out(torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 4, dims)
    counts = count(x, function(x), dims, rectifier)
    inputs, outputs = slow_units(x, dims), slow_units(function(x), dims)
    assert counts.samples == samples
    assert counts.elements == len(inputs[0])
    assert counts.fired.tolist() == [sum(z > rectifier.hinge for z in zs) for zs in inputs]
    assert counts.peak.tolist() == pytest.approx([max(zs) - rectifier.hinge for zs in inputs], rel=1e-6)
    assert counts.magnitude.tolist() == pytest.approx([sum(map(abs, hs)) for hs in outputs], rel=1e-5)
    assert counts.trough.tolist() == pytest.approx([min(zs) - rectifier.hinge for zs in inputs], rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_count_is_exact_in_every_precision(dtype):
    x = torch.randn(3000, 3, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert count(x, x.relu()).fired.tolist() == [sum(z > 0 for z in column) for column in x.T.tolist()]


def test_padding_is_left_out():
    x = torch.tensor([[[1.0, -1.0], [-1.0, 5.0]], [[-1.0, -1.0], [9.0, 9.0]]])
    valid = torch.tensor([[True, False], [True, False]])
    counts = count(x, x.relu(), valid=valid, redundancy=True)
    alone = count(x[valid], x[valid].relu(), redundancy=True)
    for one, other in zip(counts, alone, strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))
    metric = UnitLiveness({"relu": 2}, rules=Rules(1))
    metric.update(x, valid=torch.zeros(2, 2, dtype=torch.bool))
    nothing = metric.report()["relu"]
    assert nothing.samples == nothing.elements == 0
    assert not (nothing.nonfinite | nothing.silent | nothing.frozen).any()


def test_padding_is_left_out_of_images():
    x = torch.randn(2, 3, 3, 3)
    valid = torch.zeros(2, 3, 3, dtype=torch.bool)
    valid[0, 0, 1] = valid[0, 2, 2] = True
    counts = count(x, x.relu(), (-3,), valid=valid, redundancy=True)
    shown = torch.stack([x[0, :, 0, 1], x[0, :, 2, 2]])
    assert counts.fired.tolist() == (shown > 0).sum(0).tolist()
    assert (counts.peak.tolist(), counts.trough.tolist()) == (shown.amax(0).tolist(), shown.amin(0).tolist())
    assert (int(counts.samples), int(counts.elements), int(counts.blind)) == (1, 2, int(not (shown > 0).any()))


def test_counts_are_exact_beyond_what_float32_holds():
    x = torch.ones(2**24 + 1, 1)
    for rectifier in (RELU, Rectifier("threshold")):
        counts = count(x, x, rectifier=rectifier)
        assert int(counts.fired) == counts.samples == counts.elements == 2**24 + 1


def test_counts_are_exact_whatever_the_default_precision_is():
    x = torch.ones(1000, 3)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with ThreadPoolExecutor() as fresh:  # each thread has working memory of its own
            assert fresh.submit(count, x, x).result().fired.tolist() == [1000] * 3
    finally:
        torch.set_default_dtype(torch.float32)


numbers = st.sampled_from([-math.inf, -2.0, -0.0, 0.0, 1e-40, 0.5, 3.0, math.inf, math.nan])


@settings(max_examples=150)
@given(
    arrays.arrays("float32", st.tuples(st.integers(1, 6), st.integers(1, 4)), elements=numbers).map(torch.from_numpy)
)
def test_the_peak_alone_tells_who_fired_and_what_is_no_number(x):
    whole, alone = UnitLiveness({"relu": x.shape[1]}), UnitLiveness({"relu": x.shape[1]})
    whole.add(0, count(x, x.relu()))
    alone.add(0, count(x, x.relu(), rates=False))
    one, other = whole.totals(), alone.totals()
    for name in ("peak", "last_fired"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert torch.equal(one.nonfinite == 2, other.nonfinite == 2)
    fires = [any(z > 0 for z in column) for column in x.T.tolist()]
    assert (other.last_fired >= 0).tolist() == fires


@pytest.mark.timing
def test_small_images_are_counted_as_fast_with_channels_last():
    def seconds(x):
        start = time.thread_time()
        count(x, x, (-3,), rates=False)
        return time.thread_time() - start

    x = torch.randn(128, 512, 3, 3)
    last = x.contiguous(memory_format=torch.channels_last)
    assert min(seconds(last) for _ in range(9)) < 4 * min(seconds(x) for _ in range(9))  # it was 14 times as long


def test_the_peak_is_read_once_and_alone():
    x, reads = torch.randn(8, 5), []

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            reads.extend(func.__name__.split(".")[0] for arg in args if arg is x)
            return func(*args, **(kwargs or {}))

    with Reads():
        counts = count(x, x.relu(), rates=False)
    assert reads == ["relu", "amax"]
    assert (counts.fired, counts.magnitude, counts.trough, counts.elements) == (None, None, None, 0)
