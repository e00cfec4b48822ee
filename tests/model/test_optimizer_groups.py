"""How optimizers train, read from their groups: against what their steps do to a parameter without a gradient."""

import pytest
import torch
from torch import nn

from lightning_deadrelu.model.optimizer_groups import ParameterGroup, holder_of, parameters_of

DECAYING = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.01, weight_decay=0.1),
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.5, weight_decay=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "Adam, decoupled": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1, decoupled_weight_decay=True),
    "Muon": lambda p: torch.optim.Muon(p, lr=0.01, momentum=0.95, weight_decay=0.1),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01, weight_decay=0.1),
}


@pytest.mark.parametrize("make", DECAYING.values(), ids=DECAYING)
def test_shrinking_is_what_decay_takes_of_a_parameter_in_a_step(make):
    weight = nn.Parameter(torch.ones(3, 2))
    optimizer = make([weight])
    for _ in range(100):
        weight.grad = torch.zeros(3, 2)
        before = weight.detach().clone()
        optimizer.step()
    taken = float(1 - weight.detach().mean() / before.mean())
    group = ParameterGroup.of(optimizer, optimizer.param_groups[0])
    assert taken == pytest.approx(group.lr * group.shrinking, rel=0.02)


def test_decay_inside_the_gradient_of_adam_is_told_from_decay_apart():
    for name, decoupled in {"Adam": False, "AdamW": True, "NAdam": False, "RAdam": False}.items():
        optimizer = getattr(torch.optim, name)([nn.Parameter(torch.ones(1))], weight_decay=0.1)
        group = ParameterGroup.of(optimizer, optimizer.param_groups[0])
        assert (group.kind, group.decoupled, group.adaptive) == ("adam", decoupled, True)


def test_a_rate_that_is_not_there_yet_counts_as_none():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    optimizer.param_groups[0].update(lr=None, momentum=None)
    assert ParameterGroup.of(optimizer, optimizer.param_groups[0])[2:5] == (0.0, 0.0, 0.0)


def test_who_holds_a_parameter():
    first, second, third = (nn.Parameter(torch.zeros(1)) for _ in range(3))
    one, two = torch.optim.SGD([first], lr=0.1), torch.optim.SGD([{"params": [second], "lr": 0.2}], lr=0.3)
    assert holder_of([one, two], second) == (two, two.param_groups[0])
    assert holder_of([one, two], third) is None
    assert [id(p) for p in parameters_of(one, two)] == [id(first), id(second)]
