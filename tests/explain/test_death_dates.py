"""Dates of death from momentum: against gradients that were made, and deaths that were planted in real runs."""

import math
from collections import defaultdict
from statistics import median

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import nn

from lightning_deadrelu import autopsy
from lightning_deadrelu.explain.death_dates import live_units, momentum_of, steps_without_gradient, tolerance

OPTIMIZERS = {
    "Adam": lambda p: torch.optim.Adam(p, 1e-3),
    "AdamW": lambda p: torch.optim.AdamW(p, 1e-3),
    "AMSGrad": lambda p: torch.optim.AdamW(p, 1e-3, amsgrad=True),
    "NAdam": lambda p: torch.optim.NAdam(p, 1e-3),
    "SGD": lambda p: torch.optim.SGD(p, 0.02, momentum=0.9),
    "Nesterov": lambda p: torch.optim.SGD(p, 0.02, momentum=0.95, nesterov=True),
}


def trained(make, ages, steps, size=lambda step: 1.0, entries=4):
    """Step with gradients of one sign, and with none in the last ``ages`` steps of each unit."""
    weight = nn.Parameter(torch.zeros(len(ages), entries))
    optimizer = make([weight])
    left = torch.tensor(ages)[:, None]
    for step in range(steps):
        weight.grad = torch.full_like(weight, size(step)) * (steps - step > left)
        optimizer.step()
    return weight, optimizer


def dated(make, ages, steps, norms=(), **options):
    weight, optimizer = trained(make, ages, steps, **options)
    momentum = momentum_of([optimizer], weight)
    return steps_without_gradient(momentum, torch.tensor(ages) == 0, norms).tolist()


@settings(max_examples=30)
@given(
    st.sampled_from(list(OPTIMIZERS)),
    st.lists(st.integers(0, 200), min_size=1, max_size=6),
    st.floats(1e-3, 1e3),
)
def test_even_gradients_are_dated_to_the_step(name, ages, size):
    found = dated(OPTIMIZERS[name], [0, 0, 0, *ages], 300, size=lambda step: size)
    assert found == pytest.approx([0, 0, 0, *ages], abs=1)


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_gradients_that_grew_are_allowed_for_where_their_norms_are_known(name):
    def size(step):
        return 10.0 if step >= 350 else 1.0

    norms = [size(step) for step in range(400)]
    assert dated(OPTIMIZERS[name], [0, 0, 0, 100], 400, norms, size=size)[3] == pytest.approx(100, abs=1)
    assert dated(OPTIMIZERS[name], [0, 0, 0, 100], 400, size=size)[3] > 105


def test_beyond_the_reach_of_the_first_moment_the_second_tells_coarsely():
    ages = [0, 0, 0, 1500]
    adam, sgd = (dated(OPTIMIZERS[name], ages, 3000)[3] for name in ("AdamW", "SGD"))
    assert adam == pytest.approx(1500, rel=0.3)
    assert 700 < sgd < 1500  # the least it can be


def test_who_never_had_a_gradient_has_the_age_of_the_run():
    assert dated(OPTIMIZERS["AdamW"], [0, 0, 0, 300], 300)[3] == 300


def test_without_a_live_unit_adam_tells_all_the_same_and_sgd_does_not():
    assert dated(OPTIMIZERS["AdamW"], [300, 300], 1000) == pytest.approx([300, 300], abs=20)
    assert all(map(math.isnan, dated(OPTIMIZERS["SGD"], [300, 300], 1000)))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_of_a_unit_whose_momentum_was_cleared_nothing_is_said(name):
    weight, optimizer = trained(OPTIMIZERS[name], [0, 0, 0], 50)
    key = "momentum_buffer" if "momentum_buffer" in optimizer.state[weight] else "exp_avg"
    optimizer.state[weight][key][2] = 0.0
    found = steps_without_gradient(momentum_of([optimizer], weight), torch.tensor([True, True, False]))
    assert found[:2].tolist() == [0, 0]
    assert found[2].isnan()


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.Adam(p, weight_decay=0.01),
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=1e-4),
        lambda p: torch.optim.SGD(p, 0.1),
        lambda p: torch.optim.RMSprop(p),
        lambda p: torch.optim.Adagrad(p),
        lambda p: torch.optim.Adam(p, betas=(0.99, 0.9)),  # the second moment would fade faster than the first
    ],
    ids=["Adam with L2", "SGD with L2", "plain SGD", "RMSprop", "Adagrad", "betas the wrong way round"],
)
def test_where_momentum_does_not_fade_as_known_nothing_is_said(make):
    weight, optimizer = trained(make, [0, 5], 20)
    assert momentum_of([optimizer], weight) is None


def test_before_the_first_step_and_of_others_nothing_is_said():
    weight = nn.Parameter(torch.zeros(2, 2))
    assert momentum_of([torch.optim.AdamW([weight])], weight) is None
    assert momentum_of([torch.optim.AdamW([weight])], nn.Parameter(torch.zeros(2, 2))) is None


def test_units_along_another_dimension():
    weight, optimizer = trained(OPTIMIZERS["AdamW"], [0, 0, 0, 40], 200)
    turned = nn.Parameter(weight.detach().T.contiguous())
    other = torch.optim.AdamW([turned])
    state = {key: value.T.contiguous() if value.ndim == 2 else value for key, value in optimizer.state[weight].items()}
    other.state[turned] = state
    one, two = momentum_of([optimizer], weight), momentum_of([other], turned, dim=1)
    torch.testing.assert_close(one.sizes, two.sizes)


def test_some_units_are_read_as_all_are():
    weight, optimizer = trained(OPTIMIZERS["AdamW"], [0, 0, 0, 40], 200)
    all_units, some = (momentum_of([optimizer], weight, 0, units) for units in (None, torch.tensor([3, 1])))
    for whole, part in zip(all_units[:3], some[:3], strict=True):
        assert torch.equal(part, whole[[3, 1]])


def test_live_units_are_those_with_the_most_momentum_even_if_few():
    weight, optimizer = trained(OPTIMIZERS["AdamW"], [0, 0, *range(100, 120)], 400)
    momentum = momentum_of([optimizer], weight)
    assert live_units(momentum).nonzero().flatten().tolist() == [0, 1]


def test_the_tolerance_grows_where_gradients_change_in_size():
    def fallen(step):
        return 0.01 if step >= 350 else 10.0

    weight, optimizer = trained(OPTIMIZERS["AdamW"], [0, 0, 0], 400, size=fallen)
    assert tolerance(momentum_of([optimizer], weight), torch.ones(3, dtype=torch.bool)) > 30


# -- planted in real runs --------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(64, 64), nn.Linear(64, 10)
        self.norms = nn.ModuleList(nn.LayerNorm(64) for _ in range(2))
        self.ups, self.downs = (nn.ModuleList(nn.Linear(*sizes) for _ in range(2)) for sizes in ((64, 256), (256, 64)))

    def forward(self, x):
        x = self.embed(x)
        for norm, up, down in zip(self.norms, self.ups, self.downs, strict=True):
            x = x + down(up(norm(x)).relu())
        return self.head(x)


def mlp():
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))


def cnn():
    first = [nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 48, 3, 2, 1), nn.ReLU()]
    second = [nn.Conv2d(48, 64, 3, 2, 1), nn.BatchNorm2d(64), nn.ReLU()]
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(256, 10))


# of each net, the layers, and whose biases are set to kill their units
NETS = {
    "mlp": (mlp, lambda net: [(net[0], net[0]), (net[2], net[2])]),
    "cnn": (cnn, lambda net: [(net[1], net[1]), (net[3], net[4])]),
    "residual": (Residual, lambda net: [(up, up) for up in net.ups]),
}
AGES = (5, 10, 20, 50, 100, 200, 400, 700)
STEPS, EACH = 1000, 2


def planted(net, optimizer, layers, seed):
    """Kill units at known steps; return how long each unit of each layer has really had no gradient."""
    pixels, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
    x, generator = (pixels.float() - 5) / 6, torch.Generator().manual_seed(seed)
    victims = [torch.randperm(len(layer.weight), generator=generator) for layer, _ in layers]
    last = [torch.zeros(len(layer.weight), dtype=torch.int64) for layer, _ in layers]
    for step in range(STEPS):
        if STEPS - step in AGES:
            place = EACH * AGES.index(STEPS - step)
            for (_, owner), order in zip(layers, victims, strict=True):
                owner.bias.data[order[place : place + EACH]] = -1e3
        rows = torch.randint(len(x), (64,), generator=generator)
        noisy = x[rows] + torch.randn(64, 64, generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(noisy), labels[rows]).backward()
        for (layer, _), seen in zip(layers, last, strict=True):
            seen[layer.weight.grad.flatten(1).abs().sum(1) > 0] = step + 1
        optimizer.step()
    return [STEPS - seen for seen in last]


@pytest.mark.slow
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize(("name", "within"), [("AdamW", 0.9), ("SGD", 0.75)])
def test_planted_deaths_are_dated_and_no_live_unit_is(net, name, within):
    torch.manual_seed(1)
    build, layers_of = NETS[net]
    model = build()
    layers, optimizer = layers_of(model), OPTIMIZERS[name](model.parameters())
    true = planted(model, optimizer, layers, seed=1)
    errors = defaultdict(list)
    for (layer, _), ages in zip(layers, true, strict=True):
        momentum = momentum_of([optimizer], layer.weight)
        found = steps_without_gradient(momentum, ages < 5)
        for age in AGES:
            errors[age] += (found[ages == age] - age).tolist()
    allowed = {age: max(5, 0.05 * age) for age in AGES}
    assert all(abs(median(errors[age])) <= allowed[age] for age in AGES), dict(errors)
    right = [abs(error) <= allowed[age] for age in AGES for error in errors[age]]
    assert sum(right) >= within * len(right), dict(errors)

    by_name = {layer.name: layer for layer in autopsy(model, optimizer).layers}
    names = {id(module): path for path, module in model.named_modules()}
    for (layer, _), ages in zip(layers, true, strict=True):
        told = by_name[names[id(layer)]]
        assert not told.without_gradient[ages < 20].any()
        assert told.without_gradient[ages >= 100].all()
