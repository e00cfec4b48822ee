"""New units fire, and where their layer is silent."""

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_deadrelu.remedies import InitDistribution
from lightning_deadrelu.remedies.redraw import choose

HE = InitDistribution(0.0, 1.0, False)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def layer(units=6, features=3, rows=100, seed=0):
    g = generator(seed)
    inputs = torch.randn(rows, features, generator=g)
    return inputs, torch.randn(units, features, generator=g), torch.randn(units, generator=g)


@given(st.integers(0, 50), st.integers(1, 8))
def test_each_new_unit_fires_on_a_middle_share_of_the_inputs(seed, tries):
    inputs, weight, bias = layer(seed=seed)
    units = torch.tensor([True, False, True, False, False, False])
    new, shift = choose(inputs, weight, bias, units, HE, tries, generator(seed))
    shares = ((inputs @ new.T + shift) > 0).double().mean(0)
    assert new.shape == (2, 3)
    assert ((shares >= 0.08) & (shares <= 0.92)).all()


def test_weights_follow_the_law():
    inputs, weight, bias = layer(units=2000, features=8)
    everyone = torch.ones(2000, dtype=torch.bool)
    new, _ = choose(inputs, weight, bias, everyone, InitDistribution(0.0, 0.3, True), 1, generator())
    assert InitDistribution.of(new).std == pytest.approx(0.3, rel=0.02)
    assert InitDistribution.of(new).uniform


def test_it_covers_inputs_on_which_the_layer_is_silent():
    """A layer of two that fires on one side: the new unit has to fire on the other."""
    inputs = torch.linspace(-1, 1, 101)[:, None]
    right = torch.tensor([[1.0], [1.0]])
    units = torch.tensor([False, True])
    gap = inputs[:, 0] <= 0

    def covered(tries, seed):
        new, shift = choose(inputs, right, torch.zeros(2), units, HE, tries, generator(seed))
        return ((inputs @ new.T + shift) > 0)[gap].double().mean()

    chosen = torch.tensor([covered(8, seed) for seed in range(200)]).mean()
    plain = torch.tensor([covered(1, seed) for seed in range(200)]).mean()
    assert chosen > 0.75
    assert plain < 0.6


def test_the_best_of_the_draws_is_taken():
    """Against a slow loop over the same draws."""
    inputs, weight, bias = layer(units=2, features=2)
    bias = torch.tensor([-2.0, 0.0])
    units, tries = torch.tensor([False, True]), 5
    g = generator(3)
    drawn = torch.randn(tries, 2, generator=g).double()
    shares = 0.1 + 0.8 * torch.rand(tries, generator=g).double()
    silent = [row for row in inputs.double() if not row @ weight[0].double() + bias[0] > 0]
    best, most = None, -1.0
    for w, share in zip(drawn, shares, strict=True):
        z = sorted(float(row @ w) for row in inputs.double())
        mean = sum(z) / len(z)
        spread = (sum((one - mean) ** 2 for one in z) / len(z)) ** 0.5
        b = 1e-3 * spread - z[int((1 - share) * (len(z) - 1))]
        covered = sum(float(row @ w) + b > 0 for row in silent) / len(silent)
        if covered > most:
            best, most = (w, b), covered
    new, shift = choose(inputs, weight, bias, units, HE, tries, generator(3))
    assert torch.equal(new[0].double(), best[0])
    assert float(shift[0]) == pytest.approx(best[1], rel=1e-5)


def test_a_layer_without_bias_gets_weights_that_fire():
    inputs, weight, _ = layer(units=3)
    new, shift = choose(inputs, weight, None, torch.tensor([True, True, True]), HE, 8, generator())
    assert (shift == 0).all()
    assert ((inputs @ new.T) > 0).any(0).all()


def test_on_a_constant_input_a_new_unit_is_just_on():
    inputs = torch.ones(20, 2)
    new, shift = choose(inputs, torch.zeros(1, 2), torch.zeros(1), torch.tensor([True]), HE, 4, generator())
    assert float(inputs[0] @ new[0] + shift[0]) == pytest.approx(1e-3, rel=1e-2)


def test_it_is_deterministic_and_leaves_its_inputs_alone():
    inputs, weight, bias = layer()
    before = [tensor.clone() for tensor in (inputs, weight, bias)]
    units = torch.tensor([True] * 6)
    first, second = (choose(inputs, weight, bias, units, HE, 8, generator(1)) for _ in range(2))
    assert all(map(torch.equal, first, second))
    assert all(map(torch.equal, (inputs, weight, bias), before))


@pytest.mark.parametrize("hinge", [-3.0, 0.5, 20.0])
@pytest.mark.parametrize("tries", [1, 8])
def test_firing_is_measured_from_the_hinge(hinge, tries):
    inputs, weight, bias = layer(units=40)
    everyone = torch.ones(40, dtype=torch.bool)
    new, shift = choose(inputs, weight, bias, everyone, HE, tries, generator(), hinge)
    shares = ((inputs @ new.T + shift) > hinge).double().mean(0)
    assert ((shares >= 0.08) & (shares <= 0.92)).all()
    assert ((inputs @ new.T + shift) > hinge).any(1).double().mean() > 0.97


def test_the_layer_s_silence_is_measured_from_the_hinge():
    """One unit fires on the right of 2, so that up to there is the gap."""
    inputs = torch.linspace(-1, 3, 101)[:, None]
    one, units = torch.tensor([[1.0], [1.0]]), torch.tensor([False, True])
    new, shift = choose(inputs, one, torch.zeros(2), units, HE, 64, generator(), 2.0)
    fires = (inputs @ new.T + shift)[:, 0] > 2
    assert fires[inputs[:, 0] < 0.9 * 2].double().mean() > 0.85
    assert not fires[inputs[:, 0] > 2.8].any()


@pytest.mark.parametrize("most", [1, 700, 2**22])
def test_blocks_cover_the_inputs_whatever_their_size(most, monkeypatch):
    monkeypatch.setattr("lightning_deadrelu.remedies.redraw._MOST_NUMBERS", most)
    inputs, weight, bias = layer(units=50)
    units = torch.arange(50) % 5 == 0
    new, shift = choose(inputs, weight, bias - 99, units, HE, 8, generator())
    fires = (inputs @ new.T + shift) > 0
    assert new.shape == (10, 3)
    assert fires.any(1).double().mean() > 0.97
    assert ((fires.double().mean(0) >= 0.08) & (fires.double().mean(0) <= 0.92)).all()


def test_without_bias_and_gap_units_fire_on_a_share_too():
    inputs, weight, _ = layer(units=60, features=1)
    inputs = inputs.abs()  # half of the draws fire nowhere, and half everywhere
    inputs[::3] *= -1
    units = torch.arange(60) >= 30
    new, _ = choose(inputs, weight, None, units, HE, 8, generator())
    shares = ((inputs @ new.T) > 0).double().mean(0)
    assert ((shares >= 0.1) & (shares <= 0.9)).all()


def test_no_units_are_no_work():
    inputs, weight, bias = layer()
    new, shift = choose(inputs, weight, bias, torch.zeros(6, dtype=torch.bool), HE, 8, generator())
    assert (new.shape, shift.shape) == ((0, 3), (0,))


@pytest.mark.timing
@pytest.mark.parametrize("offset", [0.0, -1e3])
def test_a_wide_layer_takes_seconds(offset):
    """A tenth of a transformer's 16384 units, beside live ones, and beside none that fire: once 28 s."""
    inputs, weight = torch.randn(256, 4096), torch.empty(16384, 4096).normal_(std=0.02)
    units = torch.arange(16384) % 10 == 0
    law, bias = InitDistribution(0.0, 0.02, False), torch.full((16384,), offset)
    started = time.process_time()
    choose(inputs, weight, bias, units, law, 8, generator())
    assert time.process_time() - started < 10  # of all threads
