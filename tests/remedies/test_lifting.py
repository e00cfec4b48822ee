"""A lift raises what is low, by exactly the height asked for on the layer's mean input."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from views import DEAD, layer, mask, report_of, rows, view_of

from lightning_deadrelu.attribution.result import Attribution
from lightning_deadrelu.remedies import LEVELS, NotApplicable, SiteView
from lightning_deadrelu.remedies.lifting import raised

UNITS, WIDTH = 6, 4


def linear_view(weight, bias, inputs, dead=DEAD):
    """A site that a linear layer alone feeds."""
    values = {"fc.weight": weight} | ({} if bias is None else {"fc.bias": bias})
    incoming = [rows("fc.weight", "weight", UNITS), *([] if bias is None else [rows("fc.bias", "bias", UNITS)])]
    unknown = torch.full((len(LEVELS), UNITS), torch.nan, dtype=torch.float64)
    return SiteView(report_of(dead), dead, Attribution(tuple(incoming)), values, {}, unknown, inputs=inputs)


def pre_activations(values, inputs):
    """Compute each unit's input on each row by a loop."""
    bias = values.get("fc.bias", torch.zeros(UNITS))
    return [[float(row @ w) + float(b) for w, b in zip(values["fc.weight"], bias, strict=True)] for row in inputs]


def with_rises(values, writes):
    copies = {name: value.clone() for name, value in values.items()}
    for write in writes:
        old = write.slice.read(copies[write.slice.name])
        write.slice.write_(copies[write.slice.name], old + write.values)
    return copies


@pytest.mark.parametrize("has_bias", [True, False])
@given(seed=st.integers(0, 100))
def test_inputs_rise_by_the_height_on_average_and_only_those_of_treated_units(has_bias, seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = (UNITS, WIDTH), (UNITS,), (9, WIDTH)
    weight, bias, inputs = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes)
    height = torch.where(DEAD, torch.rand(UNITS, generator=generator, dtype=torch.float64) * 50, 0.0)
    view = linear_view(weight, bias if has_bias else None, inputs)
    new = with_rises(view.values, raised(view, height))
    old, now = pre_activations(view.values, inputs), pre_activations(new, inputs)
    for unit in range(UNITS):
        mean_rise = sum(after[unit] - before[unit] for before, after in zip(old, now, strict=True)) / len(inputs)
        assert mean_rise == pytest.approx(float(height[unit]), abs=1e-6)
        if not DEAD[unit]:
            assert torch.equal(new["fc.weight"][unit], weight[unit])


def test_what_is_low_is_raised():
    """One unit lost its bias, the other its weights along the mean input: each gets back what it lost."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.rand(50, WIDTH, generator=generator)
    mean = inputs.mean(0)
    weight, bias = torch.zeros(UNITS, WIDTH), torch.zeros(UNITS)
    bias[1] -= 30
    weight[3] -= 20 * mean / mean.square().sum()
    view = linear_view(weight, bias, inputs)
    new = with_rises(view.values, raised(view, torch.tensor([0.0, 30, 0, 20, 0, 0])))
    assert torch.allclose(new["fc.bias"], torch.zeros(UNITS), atol=1e-5)
    assert torch.allclose(new["fc.weight"], torch.zeros(UNITS, WIDTH), atol=1e-5)


def test_without_any_live_unit_zero_is_typical():
    weight, bias = torch.zeros(UNITS, WIDTH), torch.full((UNITS,), -3.0)
    view = linear_view(weight, bias, torch.rand(5, WIDTH), dead=mask(1, 1, 1, 1, 1, 1))
    (write,) = raised(view, torch.full((UNITS,), 3.0))
    assert write.slice.role == "bias"
    assert torch.equal(write.values, torch.full((UNITS,), 3.0, dtype=torch.float64))


def test_inputs_that_are_zero_on_average_leave_all_to_the_bias():
    view = linear_view(torch.zeros(UNITS, WIDTH), torch.zeros(UNITS), torch.zeros(5, WIDTH))
    (write,) = raised(view, torch.where(DEAD, 1.0, 0.0))
    assert write.slice.role == "bias"


def test_behind_a_norm_its_shift_is_raised():
    values, laws, attribution = layer(norm=True)
    (write,) = raised(view_of(attribution, DEAD, values, laws), torch.where(DEAD, 2.0, 0.0))
    assert write.slice.role == "shift"
    assert write.values.tolist() == [2.0, 2.0]


def test_what_cannot_be_raised():
    """A norm without a shift takes off again what is added before it; weights need the layer's input."""
    values, laws, attribution = layer(norm=True)
    no_shift = [one for one in attribution.incoming if one.role not in ("scale", "shift")]
    height = torch.where(DEAD, 2.0, 0.0)
    weight = [one for one in attribution.incoming if one.role == "weight"]
    for incoming in (no_shift, weight):
        with pytest.raises(NotApplicable, match="neither a bias nor a norm's shift"):
            raised(view_of(Attribution(tuple(incoming)), DEAD, values, laws), height)
