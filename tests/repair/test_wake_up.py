"""A push adds an upward gradient to sleeping units and changes nothing else: no forward, no other unit."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_deadrelu.observe.probe import Probe
from lightning_deadrelu.remedies import Push
from lightning_deadrelu.repair.edit_schedule import EditSchedule
from lightning_deadrelu.repair.wake_up import ScheduledPush, push_

RECTIFIERS = {
    "relu": F.relu,
    "in place": lambda x: F.relu_(x),
    "module": nn.ReLU(),
    "relu6": nn.ReLU6(),
    "clamp": lambda x: x.clamp(min=0),
    "maximum": lambda x: torch.maximum(x, torch.zeros_like(x)),
    "threshold": nn.Threshold(0.0, 0.0),
}


def expected(push, x, above, dims):
    """Compute by loops what is added to the gradient of each input."""
    flat = x.movedim(dims, tuple(range(-len(dims), 0))).flatten(-len(dims)).flatten(0, -2)
    sizes = above.movedim(dims, tuple(range(-len(dims), 0))).flatten(-len(dims)).flatten(0, -2)
    totals = sorted(sum(abs(float(one)) for one in column) for column in sizes.T)
    typical = totals[(len(totals) - 1) // 2]
    added = []
    for unit, column in enumerate(flat.T):
        rate = sum(float(one) > 0 for one in column) / len(column)
        pushed = bool(push.units[unit]) and rate < push.firing_rate
        added.append(-push.strength * typical / len(column) if pushed else 0.0)
    return added


@pytest.mark.parametrize("rectifier", RECTIFIERS.values(), ids=RECTIFIERS)
@pytest.mark.parametrize(("shape", "dims"), [((9, 4), (-1,)), ((3, 4, 2, 5), (-3,)), ((2, 3, 4), (-1,))])
def test_what_is_added_equals_a_slow_loop(rectifier, shape, dims):
    torch.manual_seed(0)
    push = Push(torch.tensor([True, True, True, False]), firing_rate=0.3, strength=0.7)
    start = torch.randn(shape, dtype=torch.float64)
    start.select(dims[0], 0).abs_().neg_()  # two units are asleep, one of them is not to be pushed
    start.select(dims[0], 3).abs_().neg_()
    above = torch.randn(shape, dtype=torch.float64)
    gradients = []
    for pushed in (False, True):
        leaf = start.clone().requires_grad_()
        x = leaf * 1.0
        out = rectifier(x)
        if pushed:
            push_(push, x, out, dims)
        assert torch.equal(out, F.relu(start))
        gradients.append(torch.autograd.grad(out, leaf, above)[0])
    difference = (gradients[1] - gradients[0]).movedim(dims[0], -1).flatten(0, -2)
    wanted = torch.tensor(expected(push, start, above, dims), dtype=torch.float64)
    assert (wanted[:2] < 0).tolist() == [True, False]
    assert torch.allclose(difference, wanted.expand_as(difference))


def test_where_units_are_selected_the_push_goes_to_what_they_are_selected_from():
    torch.manual_seed(0)
    push = Push(torch.tensor([True, True, True, False]), firing_rate=0.3, strength=0.7)
    start, above = torch.randn(9, 4, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    start[:, [0, 3]] -= 10
    gradients = []
    for pushed in (False, True):
        leaf = start.clone().requires_grad_()
        x = leaf * 1.0
        values, indices = x.topk(2)
        out = torch.zeros_like(x).scatter(-1, indices, values.relu())
        if pushed:
            push_(push, x, out, (-1,), None)
        gradients.append(torch.autograd.grad(out, leaf, above)[0])
    sizes = [sum(abs(float(one)) for one in column) for column in gradients[0].T]
    assert [size > 0 for size in sizes] == [False, True, True, False]
    wanted = torch.tensor([-0.7 * (sizes[1] + sizes[2]) / 2 / 9, 0.0, 0.0, 0.0], dtype=torch.float64)
    assert torch.allclose(gradients[1] - gradients[0], wanted.expand(9, 4))


class Shared(nn.Module):
    """One function serves two layers; the weight of one is computed in the forward."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(3, 3)

    def forward(self, x):
        x = F.relu(F.linear(x, self.a.weight.tanh(), self.a.bias))
        return F.relu(self.b(x))


class Recomputed(nn.Module):
    """Runs the forward again in the backward."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)


def sites_of(model, x):
    sites = []
    with Probe(model, lambda site, *call: sites.append(site)):
        model(x)
    return sites


def pushing(model, units, *sites, steps=1000):
    schedule, push = EditSchedule(model), Push(torch.tensor(units))
    for number, site in enumerate(sites):
        schedule.add(ScheduledPush(site=f"act{number}", steps=steps, push=push, place=site))
    return schedule


def gradients_of(model, x, schedule=None):
    model.zero_grad()
    if schedule:
        schedule.begin()
    out = model(x)
    if schedule:
        schedule.before_backward()
    out.sum().backward()
    if schedule:
        schedule.end()
    return out, [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("recomputed", [False, True])
def test_only_the_named_site_is_pushed_and_the_forward_is_the_same_to_the_last_bit(recomputed):
    torch.manual_seed(0)
    model, x = Shared(), torch.randn(8, 4)
    with torch.no_grad():
        model.b.bias[0] = -9.0
    if recomputed:
        model = Recomputed(model)
    _, second = sites_of(model, x)
    plain, before = gradients_of(model, x)
    out, after = gradients_of(model, x, pushing(model, [True, False, False], second))
    assert torch.equal(plain, out)
    names = [name.removeprefix("inner.") for name, _ in model.named_parameters()]
    changes = {name: one - two for name, one, two in zip(names, after, before, strict=True)}
    assert changes["b.bias"][0] < 0
    assert changes["b.bias"][1:].eq(0).all()
    assert changes["b.weight"][1:].eq(0).all()


def test_nothing_is_left_when_it_ends():
    torch.manual_seed(0)
    model, x = Shared(), torch.randn(8, 4)
    schedule = pushing(model, [True] * 3, *sites_of(model, x), steps=2)
    _, before = gradients_of(model, x)
    for step in range(2):
        gradients_of(model, x, schedule)
        assert schedule.advance() == ["act0", "act1"] * (step == 1)
    _, after = gradients_of(model, x, schedule)
    assert all(map(torch.equal, before, after))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_sites_whose_units_all_fire_are_let_go():
    model = Shared()
    schedule = pushing(model, [True, True, False], *sites_of(model, torch.randn(8, 4)))
    rates = {"act0": torch.tensor([0.5, 0.12, 0.0]), "act1": torch.tensor([0.5, 0.09, 0.0])}
    assert schedule.end_pushes(rates) == ["act0"]
    assert schedule.sites == ["act1"]


def test_a_forward_without_a_graph_is_left_alone():
    x = torch.randn(3, 2)
    push_(Push(torch.ones(2, dtype=torch.bool)), x, F.relu(x), (-1,))
