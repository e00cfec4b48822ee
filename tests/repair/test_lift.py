"""A lift adds in parts what was asked for: to the last bit, in every precision, and also when it is interrupted."""

import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_deadrelu.checkpoint import decode, encode
from lightning_deadrelu.model.slices import Slice
from lightning_deadrelu.remedies import Lift, Write
from lightning_deadrelu.repair.lift import Lifting, Lifts


def row(unit, name="bias"):
    return Slice(name, "bias", torch.tensor([unit]), torch.tensor([[unit]]), (0,))


def lift(total, steps, unit=1):
    return Lift((Write(row(unit), torch.tensor([total])),), steps)


def lifted(tensor, lifts, steps):
    for _ in range(steps):
        lifts.advance({"bias": tensor})
    return tensor


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@settings(deadline=None)
@given(start=st.floats(-300, 300), total=st.floats(0.5, 300), steps=st.integers(1, 400))
def test_all_is_added_whatever_the_precision(dtype, start, total, steps):
    bias, lifts = torch.tensor([1.0, start, 1.0], dtype=dtype), Lifts()
    begun = float(bias[1])
    lifts.add("act", lift(total, steps))
    lifted(bias, lifts, steps)
    assert lifts.sites == []
    assert float(bias[1]) == pytest.approx(begun + total, rel=2 * torch.finfo(dtype).eps, abs=1e-2)
    assert bias[0] == bias[2] == 1


def test_parts_are_equal_and_what_others_write_meanwhile_stays():
    bias, lifts, seen = torch.zeros(2), Lifts(), []
    lifts.add("act", lift(4.0, 4))
    for _ in range(4):
        lifts.advance({"bias": bias})
        seen.append(float(bias[1]))
        bias[1] -= 0.25  # an optimizer's step
    assert seen == [1.0, 1.75, 2.5, 3.25]


def test_half_precision_without_a_memory_would_not_move():
    """What the remainder is there for: each part is below half a unit of the last place."""
    bias = torch.tensor([0.0, -30.0], dtype=torch.bfloat16)
    plain = bias.clone()
    for _ in range(200):
        plain[1] += 3 / 200
    assert plain[1] == -30
    lifts = Lifts()
    lifts.add("act", lift(3.0, 200))
    assert lifted(bias, lifts, 200)[1] == -27


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(deadline=None)
@given(cut=st.integers(0, 37))
def test_a_lift_resumed_in_the_middle_ends_in_the_same_bits(dtype, cut):
    whole, halves = (torch.tensor([0.1, -7.3], dtype=dtype) for _ in range(2))
    one, first, second = Lifts(), Lifts(), Lifts()
    for lifts in (one, first):
        lifts.add("act", lift(7.77, 37))
    lifted(whole, one, 37)
    lifted(halves, first, cut)
    file = io.BytesIO()
    torch.save(encode(first.state), file)
    second.restore(decode(dict[str, Lifting], torch.load(io.BytesIO(file.getvalue()), weights_only=True)))
    lifted(halves, second, 37 - cut)
    assert torch.equal(whole, halves)
    assert second.sites == one.sites == []


def test_sites_end_by_themselves_and_are_named():
    bias, lifts = torch.zeros(3), Lifts()
    lifts.add("short", lift(1.0, 1, unit=0))
    lifts.add("long", lift(2.0, 3, unit=2))
    assert lifts.advance({"bias": bias}) == ["short"]
    assert lifts.sites == ["long"]
    assert lifts.drop(lifts.sites) == ["long"]
    assert lifts.advance({"bias": bias}) == []
    assert torch.equal(bias, torch.tensor([1.0, 0.0, 2 / 3]))


def test_a_new_lift_takes_the_place_of_the_old():
    bias, lifts = torch.zeros(2), Lifts()
    lifts.add("act", lift(100.0, 10))
    lifts.add("act", lift(1.0, 2))
    assert lifted(bias, lifts, 5)[1] == 1
