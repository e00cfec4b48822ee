"""Norms that a model writes out by hand keep each unit apart: what feeds the rectifier behind them is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

GRAPH = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])  # of each of eight nodes
GRAPHS = 3
EPS = 1e-5


def mean_of_graphs(x: Tensor) -> Tensor:
    """Average over the nodes of each graph, as message passing libraries do."""
    index = GRAPH[:, None].expand_as(x)
    count = x.new_zeros(GRAPHS).scatter_add_(0, GRAPH, x.new_ones(len(x))).clamp(min=1)
    return x.new_zeros(GRAPHS, x.shape[1]).scatter_add_(0, index, x) / count[:, None]


class Normed(nn.Module):
    """A layer, a norm written by hand, a rectifier and its reader."""

    def __init__(self, norm: Callable[[Any, Tensor], Tensor], conv: bool = False) -> None:
        super().__init__()
        self.norm, self.rectifier = norm, nn.ReLU()
        self.a = nn.Conv2d(4, 6, 1) if conv else nn.Linear(4, 6)
        self.b = nn.Conv2d(6, 5, 1) if conv else nn.Linear(6, 5)
        self.scale = nn.Parameter(torch.rand(6) + 0.5)
        self.shift, self.mean_scale = nn.Parameter(torch.randn(6) / 5), nn.Parameter(torch.rand(6))
        self.register_buffer("running_mean", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.rectifier(self.norm(self, self.a(x))))


def graph_norm(m: Any, x: Tensor) -> Tensor:
    out = x - mean_of_graphs(x).index_select(0, GRAPH) * m.mean_scale
    std = (mean_of_graphs(out.pow(2)) + EPS).sqrt().index_select(0, GRAPH)
    return m.scale * out / std + m.shift


def instance_norm(m: Any, x: Tensor) -> Tensor:
    out = x - mean_of_graphs(x)[GRAPH]
    return out / (mean_of_graphs(out * out) + EPS).sqrt()[GRAPH] * m.scale.view(1, -1) + m.shift.view(1, -1)


def batch_norm(m: Any, x: Tensor) -> Tensor:
    var, mean = torch.var_mean(x, 0, unbiased=False)
    return (x - mean) * torch.rsqrt(var + EPS) * m.scale + m.shift


def spread(m: Any, x: Tensor) -> Tensor:
    return m.scale[None] * (x - x.mean(0, keepdim=True)) / x.std(0, keepdim=True) + m.shift[None]


def of_images(m: Any, x: Tensor) -> Tensor:
    centred = x - x.mean((2, 3), keepdim=True)
    out = centred / centred.square().mean((2, 3), keepdim=True).add(EPS).sqrt()
    return out * m.scale[:, None, None] + m.shift[:, None, None]


def squashed(m: Any, x: Tensor) -> Tensor:
    """A dynamic tanh, which takes the place of a norm in newer transformers."""
    return m.scale * torch.tanh(0.5 * x) + m.shift


def swish(m: Any, x: Tensor) -> Tensor:
    return x * x.sigmoid() - x.exp().reciprocal() + m.shift


def by_degree(m: Any, x: Tensor) -> Tensor:
    """Scale by what comes of no layer, whatever was done to it."""
    degree = torch.ones(len(x)).cumsum(0).pow(-0.5) * -1 / torch.arange(1.0, 1 + len(x)).std()
    return x * (-degree)[:, None].exp()


LAYER = ["a.weight", "a.bias"]
FOLLOWED: dict[str, tuple[Callable[[Any, Tensor], Tensor], list[str]]] = {
    "over graphs, its mean scaled": (graph_norm, ["scale", *LAYER, "mean_scale", "shift"]),
    "over graphs, centred first": (instance_norm, [*LAYER, "scale", "shift"]),
    "over the batch": (batch_norm, [*LAYER, "scale", "shift"]),
    "over the batch, by spread": (spread, ["scale", *LAYER, "shift"]),
    "over positions": (of_images, [*LAYER, "scale", "shift"]),
    "squashed": (squashed, ["scale", *LAYER, "shift"]),
    "a gate of its own": (swish, [*LAYER, "shift"]),
    "by numbers of no layer": (by_degree, LAYER),
    "a shift behind a negation": (lambda m, x: m.shift - x, ["shift", *LAYER]),
}


def inputs(model: nn.Module) -> Tensor:
    return torch.randn(8, 4, 3, 3) if isinstance(model.a, nn.Conv2d) else torch.randn(8, 4)


@pytest.mark.parametrize("name", FOLLOWED)
def test_the_layer_before_a_norm_written_by_hand_is_known(name: str) -> None:
    torch.manual_seed(0)
    norm, names = FOLLOWED[name]
    model = Normed(norm, conv=name == "over positions")
    x = inputs(model)
    (known,) = oracle.check(model, lambda: model(x.clone())).values()
    assert sorted(one.name for one in known.incoming) == sorted(names), known.no_incoming
    assert known.bias is not None
    assert known.bias.name == names[-1 if "shift" not in names else names.index("shift")]
    assert [one.name for one in known.outgoing] == ["b.weight"]


def kept(m: Any, x: Tensor) -> Tensor:
    m.running_mean.lerp_(x.detach().mean(0), 0.1)
    return x - x.mean(0) + m.shift


def permuted(m: Any, x: Tensor) -> Tensor:
    """What looks like another view of a parameter is another order of its entries."""
    return x.tanh() + m.shift[torch.tensor([1, 0, 2, 3, 5, 4])]


REFUSED: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "over units": (
        lambda m, x: (x - x.mean(1, keepdim=True)) * m.scale + m.shift,
        "passes through `mean` (it joins units)",
    ),
    "over pairs": (
        lambda m, x: x / x.pow(2).sum(-1, keepdim=True).sqrt() + m.shift,
        "passes through `sum` (it joins units)",
    ),
    "over everything": (lambda m, x: x / x.std() + m.shift, "passes through `std` (it joins units)"),
    "of another order": (lambda m, x: x.tanh() + x.flip(1) + m.shift, "a slice of `a.weight` feeds several units"),
    "without a shift": (lambda m, x: x - x.mean(0), "its input is negated on the way"),
    "with a shift taken off": (lambda m, x: x - m.shift, "its input is negated on the way"),
    "with a shift before the spread": (lambda m, x: (x + m.shift).tanh(), "what feeds it passes through `tanh`"),
    "with running statistics": (kept, "the tensor `running_mean`"),
    "with shifts in another order": (permuted, "what feeds it passes through `tanh`"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_unit_by_unit_or_has_no_shift_of_its_own_is_refused(name: str) -> None:
    torch.manual_seed(0)
    norm, reason = REFUSED[name]
    model = Normed(norm)
    x = inputs(model)
    (known,) = oracle.check(model, lambda: model(x.clone())).values()
    assert reason in known.no_incoming


class Reading(nn.Module):
    """A layer and its reader; the loss reads something more."""

    def __init__(self, more: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.more, self.a, self.b = more, nn.Linear(4, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        z = self.a(x)
        h = F.relu(z)
        return self.b(h).square().mean() + self.more(z, h)


ALONE: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "its output": (lambda z, h: h[:, 2].mean(), "no_outgoing"),
    "its input": (lambda z, h: z[:, 2].square().mean(0), "no_incoming"),
    "its output for one sample": (lambda z, h: h[1, 2], "no_outgoing"),
}


@pytest.mark.parametrize("name", ALONE)
def test_what_a_loss_reads_of_one_unit_is_read(name: str) -> None:
    more, where = ALONE[name]
    torch.manual_seed(0)
    model, x = Reading(more), torch.randn(8, 4)
    (known,) = oracle.check(model, lambda: model(x), units=6).values()
    assert getattr(known, where)
