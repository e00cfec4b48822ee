"""No attribution of a model that is put together at random is wrong."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

import oracle
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch import Tensor, nn

Layer = Callable[["Drawn", str, Tensor], Tensor]
Move = Callable[[Tensor, Tensor], Tensor]
Made = Callable[["Register", Tensor], Tensor]

LAYERS: list[Layer] = [
    lambda m, name, x: m.layer(name, lambda: nn.Linear(x.shape[-1], 6))(x),
    lambda m, name, x: m.layer(name, lambda: nn.Linear(x.shape[-1], 4, bias=False))(x),
    lambda m, name, x: m.layer(name, lambda: nn.Conv2d(x.shape[1], 6, 2, padding=1))(x),
    lambda m, name, x: m.layer(name, lambda: nn.Conv2d(x.shape[1], 4, 1, groups=2))(x),
    lambda m, name, x: m.layer(name, lambda: nn.ConvTranspose2d(x.shape[1], 4, 2, groups=2))(x),
    lambda m, name, x: m.layer(name, lambda: nn.Conv1d(x.shape[1], 6, 1))(x),
    lambda m, name, x: x @ m.weight(name, x.shape[-1], 6),
    lambda m, name, x: m.weight(name, 3, x.shape[-2]) @ x,
    lambda m, name, x: torch.einsum("...i,oi->...o", x, m.weight(name, 4, x.shape[-1])),
    lambda m, name, x: torch.einsum("bti,iho->bhto", x, m.weight(name, x.shape[-1], 2, 3)),
    lambda m, name, x: torch.einsum("bhtd,hdo->bto", x, m.weight(name, x.shape[1], x.shape[-1], 6)),
    lambda m, name, x: torch.bmm(x, m.weight(name, x.shape[0], x.shape[-1], 4)),
]
MOVES: list[Move] = [
    lambda x, y: x.transpose(1, -1),
    lambda x, y: x.flatten(1),
    lambda x, y: x.flatten(0, 1),
    lambda x, y: x.unflatten(-1, (2, -1)),
    lambda x, y: x.unflatten(1, (-1, 2)),
    lambda x, y: x.reshape(x.shape[0], -1, x.shape[1]),
    lambda x, y: x.chunk(2, -1)[1],
    lambda x, y: x.chunk(2, 1)[0],
    lambda x, y: x[:, 1:],
    lambda x, y: x[..., ::2],
    lambda x, y: x[:, None, -1],
    lambda x, y: x[torch.tensor([1, 0])],
    lambda x, y: x[:, torch.tensor([1, 0, 1])],
    lambda x, y: x.mean(-1),
    lambda x, y: x.amax(1, keepdim=True),
    lambda x, y: x.roll(1, -1),
    lambda x, y: x.flip(1),
    lambda x, y: x.repeat(2, *[1] * (x.ndim - 1)),
    lambda x, y: x.expand(2, *x.shape),
    lambda x, y: F.pad(x, (1, 1)),
    lambda x, y: F.pad(x, (-1, 1)),
    lambda x, y: F.pad(x, (0, 0, 1, 0)),
    lambda x, y: F.max_pool2d(x, 2),
    lambda x, y: F.avg_pool2d(x, 2, padding=1),
    lambda x, y: F.interpolate(x, scale_factor=2),
    lambda x, y: F.pixel_shuffle(x, 2),
    lambda x, y: x * 0.5,
    lambda x, y: x * torch.rand(x.shape[-1:]),
    lambda x, y: x.masked_fill(torch.rand(x.shape) > 0.5, 0.0),
    lambda x, y: torch.where(torch.rand(x.shape) > 0.5, x, 0.0),
]
JOINS: list[Move] = [
    lambda x, y: torch.cat([x, y], -1),
    lambda x, y: torch.cat([x, y], 1),
    lambda x, y: torch.cat([x, torch.zeros_like(x)], 1),
    lambda x, y: torch.stack([x, y], 1),
    lambda x, y: x + y,
    lambda x, y: x * y.sigmoid(),
    lambda x, y: torch.softmax(torch.ones(x.shape[-2], x.shape[-2]), -1) @ x,
    lambda x, y: F.scaled_dot_product_attention(x, x, x),
]


class Block(NamedTuple):
    """A layer, what moves its output, a rectifier, and what moves that one's."""

    layer: Layer
    before: list[Move]
    behind: list[Move]


class Drawn(nn.Module):
    """Blocks in a row; what a tensor's shape does not allow is left out."""

    def __init__(self, blocks: list[Block]) -> None:
        super().__init__()
        self.blocks, self.layers, self.weights = blocks, nn.ModuleDict(), nn.ParameterDict()

    def layer(self, name: str, build: Callable[[], nn.Module]) -> nn.Module:
        if name not in self.layers:
            self.layers[name] = build()
        return self.layers[name]

    def weight(self, name: str, *shape: int) -> nn.Parameter:
        return self.weights.setdefault(name, nn.Parameter(torch.randn(shape)))

    def forward(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            with suppress(RuntimeError, ValueError, IndexError):
                made = moved(block.layer(self, str(number), x), x, block.before)
                x = moved(F.relu(made), x, block.behind)
        return self.layer("head", lambda: nn.Linear(x.shape[-1], 2))(x)


def moved(x: Tensor, y: Tensor, moves: list[Move]) -> Tensor:
    for move in moves:
        with suppress(RuntimeError, ValueError, IndexError):
            new = move(x, y)
            x = new if new.ndim > 1 and 0 < new.numel() < 500 else x
    return x


blocks = st.builds(
    Block,
    st.sampled_from(LAYERS),
    st.lists(st.sampled_from(MOVES), max_size=2),
    st.lists(st.sampled_from(MOVES + JOINS), max_size=3),
)


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(st.lists(blocks, min_size=1, max_size=3), st.sampled_from([(3, 4), (2, 3, 4), (2, 4, 3, 4)]))
def test_no_attribution_is_wrong(blocks: list[Block], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model, x = Drawn(blocks), torch.randn(shape)
    model(x)  # makes the layers
    oracle.check(model, lambda: model(x.clone().requires_grad_()))


MADE: list[Made] = [
    lambda m, x: m.a(x),
    lambda m, x: F.relu(m.a(x)),
    lambda m, x: F.relu(m.d(x)).clone(),
    lambda m, x: torch.zeros(5, 6),
]
SHARED: list[Move] = [
    lambda x, y: x.view(5, 6),
    lambda x, y: x[:],
    lambda x, y: x.detach(),
    lambda x, y: x.data,
    lambda x, y: x.contiguous(),
    lambda x, y: x.t().t(),
]
WRITTEN: list[Move] = [
    lambda x, y: x.mul_(2),
    lambda x, y: x.neg_(),
    lambda x, y: x.add_(y),
    lambda x, y: x.copy_(y),
    lambda x, y: F.relu_(x),
    lambda x, y: F.relu(x, inplace=True),
    lambda x, y: x.t().add_(y.t()),
    lambda x, y: x.__setitem__((slice(None), slice(3)), y[:, :3]),
    lambda x, y: x.data.add_(y.detach()),
    lambda x, y: setattr(x, "data", y),
    lambda x, y: x.view(-1)[:12].mul_(2),
]
COMPUTED: list[Move] = [lambda x, y: F.relu(x), lambda x, y: -x, lambda x, y: x + y]


class Register(nn.Module):
    """Tensors of one size, made, shared, written to and computed; the last two are read by a layer each."""

    def __init__(self, made: list[Made], steps: list[tuple[Move, int, int]]) -> None:
        super().__init__()
        self.made, self.steps = made, steps
        self.a, self.d = nn.Linear(4, 6), nn.Linear(4, 6)
        self.b, self.c = nn.Linear(6, 2), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        known = [make(self, x) for make in self.made]
        for step, i, j in self.steps:
            known.append(step(known[i % len(known)], known[j % len(known)]))
            known = [one for one in known if one is not None and one.shape == (5, 6)]
        return self.b(known[-1]) + self.c(known[-2])


steps = st.tuples(st.sampled_from(SHARED + WRITTEN + COMPUTED), st.integers(0, 5), st.integers(0, 5))


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(MADE), min_size=2, max_size=2), st.lists(steps, min_size=2, max_size=8))
def test_no_attribution_of_tensors_that_share_memory_is_wrong(
    made: list[Made], steps: list[tuple[Move, int, int]]
) -> None:
    torch.manual_seed(0)
    model, x = Register(made, steps), torch.randn(5, 4)
    try:
        model(x)
    except RuntimeError:  # torch forbids some changes of what has gradients
        reject()
    oracle.check(model, lambda: model(x.clone()))
