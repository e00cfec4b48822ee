"""What is known of a site that was asked about."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_deadrelu.attribution.result import Attribution, Outlet
from lightning_deadrelu.model.slices import Slice
from lightning_deadrelu.repair.proposals import fed_by_linear, fires_now


def rows_of(name, role, units=3):
    return Slice(name, role, torch.arange(units), torch.arange(units)[:, None], (0,))


def attributed(*incoming, **reasons):
    return Attribution(tuple(incoming), (), Outlet("fc", torch.arange(3), -1), **reasons)


LINEAR = rows_of("fc.weight", "weight"), rows_of("fc.bias", "bias")
TENSORS = {"fc.weight": torch.zeros(3, 2), "fc.bias": torch.zeros(3), "bn.weight": torch.zeros(3)}


def test_a_linear_layer_alone_is_told_from_all_else():
    assert fed_by_linear(attributed(*LINEAR), TENSORS) == "fc"
    assert fed_by_linear(attributed(LINEAR[0]), TENSORS) == "fc"
    assert fed_by_linear(attributed(*LINEAR, rows_of("bn.weight", "scale")), TENSORS) == ""
    assert fed_by_linear(attributed(*LINEAR, no_incoming="shared"), TENSORS) == ""
    assert fed_by_linear(attributed(*LINEAR), {**TENSORS, "fc.weight": torch.zeros(3, 2, 1, 1)}) == ""
    assert fed_by_linear(Attribution(LINEAR), TENSORS) == ""


@pytest.mark.parametrize("bias", [True, False])
@given(seed=st.integers(0, 200), hinge=st.sampled_from([0.0, 1.5]))
def test_who_fires_now_equals_a_slow_loop(bias, seed, hinge):
    generator = torch.Generator().manual_seed(seed)
    weight, shift, inputs = (torch.randn(*shape, generator=generator) for shape in ((3, 2), (3,), (4, 2)))
    tensors = {"fc.weight": weight, "fc.bias": shift}
    fires = fires_now(inputs, attributed(*LINEAR[: 1 + bias]), tensors, hinge).tolist()
    for unit in range(3):
        z = [float(row @ weight[unit]) + (float(shift[unit]) if bias else 0.0) for row in inputs]
        assert fires[unit] == any(one > hinge for one in z)
