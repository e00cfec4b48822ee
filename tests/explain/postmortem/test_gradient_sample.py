"""The estimate of the gradients' norm: exact where all is read, and whatever gradients come and go."""

import pytest
import torch
from torch import nn

from lightning_deadrelu.explain.postmortem.gradient_sample import GradientSample


def norm(parameters):
    squares = [float(p.grad.double().square().sum()) for p in parameters if p.grad is not None]
    return sum(squares) ** 0.5


def estimate(sample, optimizer):
    entries = sample.read(optimizer)
    return None if entries is None else float((entries.float().square() @ sample.weights).sqrt())


def layers(count=3):
    return nn.ModuleList(nn.Linear(5, 4) for _ in range(count))


def backward(*used):
    for layer in used:
        layer.zero_grad()
        layer(torch.randn(3, 5)).square().sum().backward()


def test_heads_that_take_turns_are_each_read():
    net, sample = layers(), GradientSample()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(130):
        optimizer.zero_grad()
        backward(net[0], net[1 + step % 2])
        found, exact = estimate(sample, optimizer), norm(net.parameters())
        assert found == pytest.approx(exact) or step == 2  # looked again at steps 1, 2, 4, 8, ...
    optimizer.zero_grad()
    assert estimate(sample, optimizer) is None


def test_layers_that_are_unfrozen_added_or_exchanged_are_met():
    net, sample = layers(), GradientSample()
    optimizer = torch.optim.SGD(net[:2].parameters(), lr=0.1)
    for _ in range(4):
        backward(net[0])
        estimate(sample, optimizer)
    for _ in range(64):
        backward(net[0], net[1])
        found = estimate(sample, optimizer)
    assert found == pytest.approx(norm(net[:2].parameters()))
    optimizer.add_param_group({"params": list(net[2].parameters())})
    backward(*net)
    assert estimate(sample, optimizer) == pytest.approx(norm(net.parameters()))
    net[0] = nn.Linear(5, 9)
    optimizer.param_groups[0]["params"] = list(net[:2].parameters())
    backward(*net)
    assert estimate(sample, optimizer) == pytest.approx(norm(net.parameters()))


def test_a_parameter_that_grows_in_place_is_met_at_the_next_look():
    net, sample = layers(1), GradientSample()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(70):
        if step == 5:
            net[0].weight.data, net[0].bias.data = torch.randn(40, 5), torch.randn(40)
        backward(net[0])
        found = estimate(sample, optimizer)
        assert found == pytest.approx(norm(net.parameters())) or 5 <= step < 7
    assert found > 0


def test_of_very_many_parameters_four_stand_for_all():
    net, sample = layers(100), GradientSample()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    backward(*net)
    assert len(sample.read(optimizer)) == 4 * 20
    assert float(sample.weights.sum()) == pytest.approx(100 * 24)
    assert 0.5 < estimate(sample, optimizer) / norm(net.parameters()) < 2


def test_of_large_parameters_each_stands_for_what_lies_around_it():
    net, sample = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 100), nn.Linear(100, 10)), GradientSample()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for scale, weight in zip((1.0, 3.0, 100.0), net, strict=True):
        weight.weight.grad = torch.full_like(weight.weight, scale)
        weight.bias.grad = torch.zeros_like(weight.bias)
    assert len(sample.read(optimizer)) == 1_024  # of the two large ones, as many as they stand for
    whole = sum(p.numel() for p in net.parameters())
    assert estimate(sample, optimizer) == pytest.approx((whole * (0.75 + 0.25 * 9)) ** 0.5)


def test_in_evaluation_of_other_layouts():
    weight = nn.Parameter(torch.randn(6, 5).T)
    weight.grad = torch.randn(6, 5).T
    sparse = nn.Embedding(9, 3, sparse=True)
    sparse(torch.tensor([1, 2])).sum().backward()
    optimizer = torch.optim.SGD([weight, sparse.weight], lr=0.1)
    assert estimate(GradientSample(), optimizer) == pytest.approx(float(weight.grad.norm()))
