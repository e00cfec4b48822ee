"""Products of activations and sums over samples are followed, and never wrongly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from models import Net
from torch import Tensor, nn

from lightning_deadrelu.attribution import Attributions
from lightning_deadrelu.observe.watch import Watch

SOURCE, TARGET = torch.tensor([0, 1, 2, 3, 4, 0, 2]), torch.tensor([1, 2, 3, 4, 0, 2, 0])
ADJACENCY = torch.rand(5, 5, generator=torch.Generator().manual_seed(1)) + 0.1


class Model(nn.Module):
    """Two layers, a rectifier behind each, and something on the way from the one to the other."""

    def __init__(self, mix: Callable[[nn.Module, Tensor], Tensor], features: int = 6) -> None:
        super().__init__()
        self.mix, self.a, self.b = mix, nn.Linear(4, 6), nn.Linear(features, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.b(self.mix(self, F.relu(self.a(x))))))


def attended(model: Any, h: Tensor) -> Tensor:
    """Attend with fixed scores: values on the left, as in a self-attention over an image."""
    return (h.T @ ADJACENCY.softmax(-1)).T


def messages(model: Any, h: Tensor) -> Tensor:
    return torch.zeros(5, h.shape[-1]).index_add_(0, TARGET, h.index_select(0, SOURCE))


def averaged(model: Any, h: Tensor) -> Tensor:
    index = TARGET[:, None].expand(-1, h.shape[-1])
    return h.new_zeros(5, h.shape[-1]).scatter_reduce_(0, index, h[SOURCE], "mean", include_self=False)


def summed(model: Any, h: Tensor) -> Tensor:
    return torch.zeros_like(h).scatter_add(0, TARGET[:, None].expand(-1, h.shape[-1]), h[SOURCE])


def largest(model: Any, h: Tensor) -> Tensor:
    index = TARGET[:, None].expand(-1, h.shape[-1])
    rows = h.gather(0, SOURCE[:, None].expand(-1, h.shape[-1]))
    return torch.zeros_like(h).scatter_reduce(0, index, rows, "amax", include_self=False)


def in_heads(model: Any, h: Tensor) -> Tensor:
    values = h.view(1, 5, 2, 3).transpose(1, 2)
    mixed = F.scaled_dot_product_attention(torch.ones(1, 2, 5, 3), torch.ones(1, 2, 5, 3), values)
    return mixed.transpose(1, 2).reshape(5, 6)


FOLLOWED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a graph convolution": lambda model, h: ADJACENCY @ h,
    "a batch of graphs": lambda model, h: torch.bmm(ADJACENCY[None], h[None])[0],
    "values on the left": attended,
    "a sparse adjacency": lambda model, h: torch.sparse.mm(ADJACENCY.to_sparse(), h),
    "einsum": lambda model, h: torch.einsum("vw,wc->vc", ADJACENCY, h),
    "einsum with dots": lambda model, h: torch.einsum("...c,vw->v...c", h[None], ADJACENCY).sum(1),
    "einsum, turned": lambda model, h: torch.einsum("wc,vw->cv", h, ADJACENCY).T,
    "attention in heads": in_heads,
    "index_add": messages,
    "scatter_reduce": averaged,
    "scatter_add": summed,
    "gather and scatter": largest,
    "rows picked by tensors": lambda model, h: h[None][torch.zeros(5, dtype=torch.int64), TARGET[:5]],
    "a zero elsewhere": lambda model, h: torch.where(ADJACENCY[:, :1] > 0.5, h, 0.0),
    "a mask of its form": lambda model, h: h * torch.full_like(h, 0.5).bernoulli(),
    "a tensor moved to its side": lambda model, h: h * ADJACENCY[:, :1].double().to(h),
}


def traced(model: nn.Module) -> Attributions:
    watch = Watch(model)
    watch.trace()
    with watch:
        model(torch.randn(5, 4))
    return watch.attributions


@pytest.mark.parametrize("name", FOLLOWED)
def test_what_mixes_samples_and_keeps_units_has_known_readers(name: str) -> None:
    torch.manual_seed(0)
    model, x = Model(FOLLOWED[name]), torch.randn(5, 4)
    known = oracle.check(model, lambda: model(x.clone()))
    (first, second) = known.values()
    assert [one.name for one in first.outgoing] == ["b.weight"], first.no_outgoing
    assert [one.name for one in first.incoming] == ["a.weight", "a.bias"], first.no_incoming
    assert [one.name for one in second.incoming] == ["b.weight", "b.bias"], second.no_incoming


@pytest.mark.parametrize("name", FOLLOWED)
def test_a_layer_before_the_mixing_feeds_the_rectifier_behind_it(name: str) -> None:
    torch.manual_seed(0)
    model, x = Model(lambda model, h: F.relu(FOLLOWED[name](model, model.c(h)))), torch.randn(5, 4)
    model.c = nn.Linear(6, 6)
    known = oracle.check(model, lambda: model(x.clone()))
    fed = {slice.name: one for one in known.values() for slice in one.incoming}
    assert fed["c.weight"].outgoing[0].name == "b.weight"
    assert torch.equal(fed["c.weight"].incoming[0].units, fed["c.weight"].incoming[0].index[:, 0])


REFUSED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "units are summed up": lambda model, h: h @ torch.ones(6, 6),
    "added to something": lambda model, h: h.index_add(0, TARGET, h.index_select(0, SOURCE)),
    "units are scattered": lambda model, h: torch.zeros(5, 6).index_add_(1, torch.tensor([0, 1, 2, 3, 4, 0]), h),
    "added with a weight": lambda model, h: torch.zeros(5, 6).index_add_(0, TARGET, h[SOURCE], alpha=-1),
    "its own scores": lambda model, h: (h @ h.T) @ torch.ones(5, 6),
    "units are picked by a tensor": lambda model, h: h[:, torch.tensor([0, 2, 1, 3, 4, 5])],
    "one or the other": lambda model, h: torch.where(ADJACENCY[:, :1] > 0.5, h, 1.0),
    "letters twice": lambda model, h: torch.einsum("ii,ic->ic", h[:, :5], ADJACENCY[:, [0, 1, 2, 3, 4, 0]]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_mixes_units_is_refused(name: str) -> None:
    torch.manual_seed(0)
    model, x = Model(REFUSED[name]), torch.randn(5, 4)
    known = oracle.check(model, lambda: model(x.clone()))
    assert next(iter(known.values())).no_outgoing


# a stack of layers, and heads: how the first weight and the second are applied
SPELT = {
    "a stack": ((2, 4, 6), (2, 6, 3), lambda x, a, b: torch.bmm(F.relu(torch.bmm(x, a)), b)),
    "a stack for one input": ((2, 4, 6), (2, 6, 3), lambda x, a, b: F.relu(x[:1] @ a) @ b),
    "letters": ((6, 4), (6, 3), lambda x, a, b: torch.einsum("io,bti->bto", b, F.relu(torch.einsum("...i,oi", x, a)))),
    "letters and dots": ((6, 4), (6, 3), lambda x, a, b: torch.einsum("...i,io->...o", F.relu(x @ a.permute(1, 0)), b)),
    "heads": (
        (4, 2, 3),
        (3, 2, 5),
        lambda x, a, b: torch.einsum("bhtd,dho->bto", F.relu(torch.einsum("bti,ihd->bhtd", x, a)), b),
    ),
    "experts": (
        (3, 4, 6),
        (3, 6, 2),
        lambda x, a, b: torch.einsum("bteh,eho->bto", F.relu(torch.einsum("bti,eih->bteh", x, a)), b),
    ),
    "channels": ((6, 4), (6, 6), lambda x, a, b: torch.einsum("bct,cd->bdt", F.relu(a @ x.mT), b)),
}


@pytest.mark.parametrize("name", SPELT)
def test_a_weight_of_a_product_is_found_however_it_is_spelt(name: str) -> None:
    torch.manual_seed(0)
    first, second, function = SPELT[name]
    model = Net(
        lambda m, x: function(x, m.a, m.b), a=nn.Parameter(torch.rand(first)), b=nn.Parameter(torch.rand(second))
    )
    x = torch.rand(2, 5, 4)
    (one,) = oracle.check(model, lambda: model(x.clone())).values()
    assert [part.name for part in one.incoming] == ["a"], one.no_incoming
    assert [part.name for part in one.outgoing] == ["b"], one.no_outgoing


# -- graphs of earlier batches -----------------------------------------------------------------------------


class Remembering(nn.Module):
    """A loss that looks back at the losses of all batches so far, as some metrics do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 1))
        self.losses: list[Tensor] = []
        self.total: Any = 0.0

    def forward(self, x: Tensor) -> Tensor:
        self.losses.append(self.net(x).square().mean())
        self.total = self.total + self.losses[-1]
        return self.losses[-1] + 0 * (torch.stack(self.losses).mean() + self.total)


def test_a_graph_of_an_earlier_batch_reads_nothing_of_this_one() -> None:
    model = Remembering()
    model(torch.randn(5, 4))
    watch = Watch(model)
    for _ in range(3):
        watch.trace()
        with watch:
            model(torch.randn(5, 4))
        model(torch.randn(5, 4))
    (known,) = watch.attributions.values()
    assert not known.no_incoming + known.no_outgoing
    assert [one.name for one in known.outgoing] == ["net.2.weight"]


def test_what_code_out_of_sight_reads_in_this_batch_is_found_all_the_same() -> None:
    class Hidden(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.detach() * 2

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * 2

    known = traced(Model(lambda model, h: Hidden.apply(h)))
    assert "out of sight" in next(iter(known.values())).no_outgoing
