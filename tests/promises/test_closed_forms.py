"""Closed forms from the literature that the verdicts have to meet.

Firing counts on one-hot inputs, Gaussian firing rates and the born-dead probability of deep narrow nets
(Lu et al. 2020, arXiv 1903.06733). Monte Carlo results have to lie within four standard errors.
"""

import math

import pytest
import torch
from torch import nn

from lightning_deadrelu import find_dead_units


def phi(t: torch.Tensor) -> torch.Tensor:
    return torch.special.ndtr(t.double())


@pytest.mark.parametrize("n", [9, 99])
def test_one_hot_inputs_fire_uniformly_many_times(n):
    """Weights and bias are exchangeable, so the bias ranks anywhere among the negated weights."""
    torch.manual_seed(n)
    units = 40_000
    site = find_dead_units(nn.Sequential(nn.Linear(n, units), nn.ReLU()), [torch.eye(n)], min_samples=n).sites[0]
    share, error = 1 / (n + 1), math.sqrt(n) / (n + 1) / math.sqrt(units)
    assert site.dead_fraction == pytest.approx(share, abs=4 * error)
    assert site.always_on.double().mean().item() == pytest.approx(share, abs=4 * error)
    observed = torch.bincount((site.firing_rate * n).round().long(), minlength=n + 1).double()
    expected = units / (n + 1)
    chi_squared = ((observed - expected) ** 2 / expected).sum().item()
    assert chi_squared < n + 4 * math.sqrt(2 * n)  # mean n, variance 2n


def test_gaussian_inputs_fire_at_the_normal_rate_and_score_as_computed():
    torch.manual_seed(0)
    layer = nn.Linear(16, 200)
    nn.init.normal_(layer.bias, std=0.5)
    samples = 20_000
    batches = [torch.randn(2000, 16) for _ in range(samples // 2000)]
    site = find_dead_units(nn.Sequential(layer, nn.ReLU()), batches).sites[0]
    sigma, bias = layer.weight.detach().norm(dim=1).double(), layer.bias.detach().double()
    rate = phi(bias / sigma)
    error = (rate * (1 - rate) / samples).sqrt()
    assert ((site.firing_rate - rate).abs() <= 4.5 * error).all()  # 200 units: 4 sigma is met by one in 80 runs
    density = torch.exp(-((bias / sigma) ** 2) / 2) / math.sqrt(2 * math.pi)
    mean = sigma * density + bias * rate
    assert torch.allclose(site.dormancy, mean / mean.mean(), atol=0.05)


@pytest.mark.parametrize(("width", "depth"), [(2, 10), (3, 10), (5, 10), (10, 10)])
def test_born_dead_layers_of_narrow_nets_at_one_input(width, depth):
    """Some hidden layer is silent at a given input with probability 1 - prod(1 - 2^-N)."""
    torch.manual_seed(width)
    nets = 4000
    expected = 1 - (1 - 2.0**-width) ** (depth - 1)
    dead = (
        _silent_layers(_stack(nets, width, depth, bias=True), torch.randn(1, nets, 7, 1)).any(0).double().mean().item()
    )
    assert dead == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / nets))


@pytest.mark.parametrize(
    ("width", "depth", "born_dead"), [(1, 5, 0.8750), (2, 10, 0.8798), (3, 10, 0.5785), (5, 10, 0.1285)]
)
def test_born_dead_nets_of_one_input_without_bias(width, depth, born_dead):
    """By homogeneity the inputs 1 and -1 stand for all; the probability lies between Lu et al.'s bounds."""
    torch.manual_seed(width)
    nets = 4000
    x = torch.tensor([1.0, -1.0]).view(2, 1, 1, 1).expand(2, nets, 1, 1)
    dead = _silent_layers(_stack(nets, width, depth, bias=False, inputs=1), x)[-1].double().mean().item()
    a1, a2 = 1 - 2.0**-width, 1 - 2.0 ** (1 - width) - (width - 1) * 4.0**-width
    c = (1 - 2.0 ** (1 - width)) * (1 - 2.0**-width) / (1 + (width - 1) * 2.0**-width)
    lower = 1 - a1 ** (depth - 2) + c * (a2 ** (depth - 2) - a1 ** (depth - 2))
    upper = 1 - a1 ** (depth - 1)
    error = 4 * math.sqrt(born_dead * (1 - born_dead) / nets)
    assert lower - error <= dead <= upper + error
    assert dead == pytest.approx(born_dead, abs=error)


class _Stack(nn.Module):
    """Many narrow nets side by side: layer weights of shape ``(nets, out, in)``."""

    def __init__(self, weights: list[torch.Tensor], biases: list[torch.Tensor] | None) -> None:
        super().__init__()
        self.weights = nn.ParameterList(weights)
        self.biases = nn.ParameterList(biases or [])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number, weight in enumerate(self.weights):
            x = weight @ x
            x = torch.relu(x + self.biases[number] if len(self.biases) else x)
        return x


def _stack(nets: int, width: int, depth: int, bias: bool, inputs: int = 7) -> _Stack:
    sizes = [inputs] + [width] * (depth - 1)
    bounds = [1 / math.sqrt(n) for n in sizes[:-1]]
    weights = [torch.empty(nets, width, n).uniform_(-b, b) for n, b in zip(sizes[:-1], bounds, strict=True)]
    biases = [torch.empty(nets, width, 1).uniform_(-b, b) for b in bounds]
    return _Stack(weights, biases if bias else None)


def _silent_layers(stack: _Stack, x: torch.Tensor) -> torch.Tensor:
    """Tell for each hidden layer and net whether all its units are dead, shape ``(layers, nets)``."""
    report = find_dead_units(stack, [x], min_samples=1)
    assert len(report.sites) == len(stack.weights)
    return torch.stack([site.dead.view(x.shape[1], -1).all(1) for site in report.sites])
