"""A lift adds in parts what was asked for: to the last bit, in every precision, and also when it is interrupted."""

import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_deadrelu.checkpoint import decode, encode
from lightning_deadrelu.model.slices import Slice
from lightning_deadrelu.remedies import Write
from lightning_deadrelu.repair.edit_schedule import EditSchedule
from lightning_deadrelu.repair.lift import ScheduledLift


def row(unit, name="bias"):
    return Slice(name, "bias", torch.tensor([unit]), torch.tensor([[unit]]), (0,))


def lift(total, steps, unit=1, site="act"):
    return ScheduledLift(site=site, steps=steps, rises=(Write(row(unit), torch.tensor([total])),))


def lifted(tensor, one, steps):
    for _ in range(steps):
        one.advance({"bias": tensor})
    return tensor


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@given(start=st.floats(-300, 300), total=st.floats(0.5, 300), steps=st.integers(1, 400))
def test_all_is_added_whatever_the_precision(dtype, start, total, steps):
    bias, one = torch.tensor([1.0, start, 1.0], dtype=dtype), lift(total, steps)
    begun = float(bias[1])
    lifted(bias, one, steps)
    assert one.is_over
    assert float(bias[1]) == pytest.approx(begun + total, rel=2 * torch.finfo(dtype).eps, abs=1e-2)
    assert bias[0] == bias[2] == 1


def test_parts_are_equal_and_what_others_write_meanwhile_stays():
    bias, one, seen = torch.zeros(2), lift(4.0, 4), []
    for _ in range(4):
        one.advance({"bias": bias})
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
    assert lifted(bias, lift(3.0, 200), 200)[1] == -27


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(cut=st.integers(0, 37))
def test_a_lift_resumed_in_the_middle_ends_in_the_same_bits(dtype, cut):
    whole, halves = (torch.tensor([0.1, -7.3], dtype=dtype) for _ in range(2))
    first, file = lift(7.77, 37), io.BytesIO()
    lifted(whole, lift(7.77, 37), 37)
    lifted(halves, first, cut)
    torch.save(encode(first), file)
    second = decode(ScheduledLift, torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    lifted(halves, second, 37 - cut)
    assert torch.equal(whole, halves)
    assert second.is_over


def test_sites_end_by_themselves_and_are_named():
    model = torch.nn.Linear(1, 3)
    torch.nn.init.zeros_(model.bias)
    schedule = EditSchedule(model)
    schedule.add(lift(1.0, 1, unit=0, site="short"))
    schedule.add(lift(2.0, 3, unit=2, site="long"))
    assert schedule.advance() == ["short"]
    assert schedule.sites == ["long"]
    assert [edit.site for edit in schedule.drop(schedule.sites)] == ["long"]
    assert schedule.advance() == []
    assert torch.equal(model.bias, torch.tensor([1.0, 0.0, 2 / 3]))
