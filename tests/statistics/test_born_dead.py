"""Bounds of the probability that a net is born dead: against many nets drawn at once, and as published."""

import math

import pytest
import torch
from torch import nn

from lightning_deadrelu import born_dead_bounds, find_dead_units


def born_dead(nets, widths, bias, inputs, seed):
    """Draw many nets at once, and count those with a silent layer at one input, and those silent on all of +-x."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(nets, inputs, 1, generator=generator, dtype=torch.float64)
    values, silent = torch.cat([x, -x], 2), torch.zeros(nets, dtype=torch.bool)
    for into, out in zip([inputs, *widths], widths, strict=False):
        weights = torch.randn(nets, out, into, generator=generator, dtype=torch.float64)
        shift = torch.randn(nets, out, 1, generator=generator, dtype=torch.float64) if bias else 0
        values = (weights @ values + shift).relu()
        silent |= (values[..., 0] == 0).all(1)
    return silent.double().mean().item(), (values == 0).all(2).all(1).double().mean().item()


@pytest.mark.parametrize("widths", [[2] * 9, [3] * 9, [5] * 9, [4, 2, 6], [1] * 4])
@pytest.mark.parametrize("bias", [True, False])
def test_the_upper_bound_is_exact_at_one_input(widths, bias):
    nets = 10_000
    _, upper = born_dead_bounds(widths, inputs=7, bias=bias)
    at_one_input, _ = born_dead(nets, widths, bias, 7, len(widths))
    assert at_one_input == pytest.approx(upper, abs=4 * math.sqrt(upper * (1 - upper) / nets))


@pytest.mark.parametrize("width", [1, 2, 3, 5])
def test_nets_of_one_input_are_born_dead_as_often_as_the_bounds_say(width):
    nets = 10_000
    lower, upper = born_dead_bounds([width] * 9, inputs=1, bias=False)
    _, dead = born_dead(nets, [width] * 9, False, 1, width)
    error = 4 * math.sqrt(dead * (1 - dead) / nets)
    assert lower - error <= dead <= upper + error
    assert width > 1 or dead == pytest.approx(lower, abs=error)  # one unit: the lower bound is exact


def test_bounds_as_published_and_none_where_nothing_is_proved():
    published = {1: (4, 0.8750, 0.9375), 2: (9, 0.8703, 0.9249), 3: (9, 0.5134, 0.6993), 10: (9, 0.0001, 0.0088)}
    for width, (layers, low, high) in published.items():
        assert born_dead_bounds([width] * layers, inputs=1, bias=False) == pytest.approx((low, high), abs=5e-5)
    assert born_dead_bounds([2] * 9)[0] == born_dead_bounds([2, 3], inputs=1, bias=False)[0] == 0
    with pytest.raises(ValueError, match="at least 1 unit"):
        born_dead_bounds([4, 0])


def test_a_net_that_is_born_dead_by_the_closed_form_is_found_dead():
    """One hidden unit in each of 20 layers is silent almost surely."""
    torch.manual_seed(0)
    model = nn.Sequential(*(part for _ in range(20) for part in (nn.Linear(1, 1, bias=False), nn.ReLU())))
    assert born_dead_bounds([1] * 20, inputs=1, bias=False)[0] > 0.999
    assert find_dead_units(model, [torch.randn(400, 1)]).sites[-1].dead_fraction == 1
