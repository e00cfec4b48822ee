"""What is attributed is true, and what cannot be is refused in words."""

from __future__ import annotations

import pickle
import weakref
from collections.abc import Callable
from typing import Any

import families
import oracle
import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES
from models import CASES, Case, MoE, Net, conv_nd, inputs_of, linear, net, parameter, sequential
from recorder import no_fast_path
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lightning_deadrelu.attribution import Attributions, Tracer, joined_over_ranks
from lightning_deadrelu.attribution.labels import Origin
from lightning_deadrelu.attribution.result import Attribution
from lightning_deadrelu.model.rectifiers import Rectifier
from lightning_deadrelu.model.sites import names_of
from lightning_deadrelu.observe.probe import Probe
from lightning_deadrelu.observe.watch import NOT_TRACED, Watch


@pytest.fixture(autouse=True)
def _one_thread_and_no_fast_path() -> Any:
    torch.set_num_threads(1)
    with no_fast_path():
        yield


def ready(case: Case) -> tuple[nn.Module, Callable[[], Any]]:
    torch.manual_seed(0)
    model, inputs = case.build(), inputs_of(case)
    with torch.no_grad():
        case.run(model, *inputs)  # lazy layers
    return model, lambda: case.run(model, *(one.clone() for one in inputs))


@pytest.mark.filterwarnings("ignore:None of the inputs")
@pytest.mark.parametrize("name", CASES)
def test_no_attribution_of_the_zoo_is_wrong(name: str) -> None:
    oracle.check(*ready(CASES[name]))


COMPLETE = {"OPT": 2, "T5": 4, "Bert": 2, "ConvNeXt": 2, "ViT": 2, "T5, gated": 4}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*COMPLETE, "ResNet, basic", "RegNet y", "Switch", "LeViT", "VITS", "BiT", "DPT"])
def test_no_attribution_of_a_family_is_wrong(name: str) -> None:
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    model, inputs = families.build(FAMILIES[name]).train(), families.inputs_of(FAMILIES[name])
    known = oracle.check(model, lambda: dict(model(**inputs)), 0)
    assert known
    if name in COMPLETE:
        assert sum(bool(one.incoming and one.outgoing) for one in known.values()) == len(known) == COMPLETE[name]


# -- what is found, and what is refused -------------------------------------------------------------------


class Siamese(nn.Module):
    """One encoder for two views; the head reads their product."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.fc(x)) * F.relu(self.fc(-x)))


class TokenMixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.mix = nn.Linear(4, 6), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(F.relu(self.fc(x)).transpose(1, 2))


def gated(model: Any, x: Tensor) -> Tensor:
    a, b = model.fc(x).chunk(2, -1)
    return model.head(F.relu(a) * b)


def shuffled(model: Any, x: Tensor) -> Tensor:
    h = F.relu(model.a(x))
    n, c, *size = h.shape
    return model.b(h.view(n, 2, c // 2, *size).transpose(1, 2).reshape(n, c, *size))


def concatenated(model: Any, x: Tensor) -> Tensor:
    return model.c(torch.cat([F.relu(model.a(x)), x, F.relu(model.b(x))], -1))


def squeeze_and_excite(model: Any, x: Tensor) -> Tensor:
    h = F.relu(model.a(x))
    gate = model.up(F.relu(model.down(h.mean((2, 3)))))[..., None, None].sigmoid()
    return model.b(h * gate)


def flattened(model: Any, x: Tensor) -> Tensor:
    return model.fc(F.max_pool2d(F.relu(model.conv(x)), 2).flatten(1))


def shared_reader(model: Any, x: Tensor) -> Tensor:
    return model.b(F.relu(model.a(x))) + model.b(x)


def raw_reader(model: Any, x: Tensor) -> Tensor:
    z = model.a(x)
    return model.b(F.relu(z)) + model.c(z)


def logged(model: Any, x: Tensor) -> Tensor:
    h = F.relu(model.a(x))
    model.seen = (h > 0).float().mean(), h.detach().std(), h.detach().mean(0)
    return model.b(h)


def log_used(model: Any, x: Tensor) -> Tensor:
    h = F.relu(model.a(x))
    return model.b(h / h.detach().std())


def penalised(model: Any, x: Tensor) -> Tensor:
    return (
        model.b(F.relu(model.a(x))).sum()
        + model.a.weight.pow(2).sum()
        + (model.b.weight @ model.b.weight.T).abs().max()
    )


def through_a_view(model: Any, x: Tensor) -> Tensor:
    z = model.a(x)
    view = z.view(-1)
    F.relu_(z)
    return model.b(z) + view.view(5, 6).sum(-1, keepdim=True)


def changed_twice(model: Any, x: Tensor) -> Tensor:
    z = model.a(x).clone()
    view, other = z.view(5, 6), z.view(5, 6)
    F.relu_(view)
    return model.b(F.relu(other.mul_(-1)))


def into_zeros(model: Any, x: Tensor) -> Tensor:
    zeros, h = torch.zeros(5, 6), F.relu(model.a(x))
    zeros.data.add_(h.detach())
    return model.c(h) + model.b(zeros)


def through_a_view_that_is_gone(model: Any, x: Tensor) -> Tensor:
    h, z = F.relu(model.c(x)), model.a(x)
    h.t().add_(z.t())
    return model.b(h) + model.d(F.relu(z))


def out_of_sight(model: Any, x: Tensor) -> Tensor:
    h = F.relu(model.a(x))
    return model.b(h) + Halve.apply(h).sum(-1, keepdim=True)


class Halve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            return x.detach() / 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad / 2


class Written(nn.Module):
    """Keeps a mean of its activations in a buffer, and reads it."""

    def __init__(self, write: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b, self.c, self.write = nn.Linear(4, 6), nn.Linear(6, 2), nn.Linear(6, 2), write
        self.register_buffer("mu", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        kept, h = self.c(self.mu), F.relu(self.a(x))
        self.write(self, h.detach().mean(0))
        return self.b(h) + kept


def assigned(model: Any, mean: Tensor) -> None:
    model.mu = mean


WAYS_TO_WRITE: dict[str, Callable[[Any, Tensor], Any]] = {
    "lerp": lambda m, mean: m.mu.lerp_(mean, 0.1),
    "copy": lambda m, mean: m.mu.copy_(mean),
    "two steps": lambda m, mean: m.mu.mul_(0.9).add_(mean, alpha=0.1),
    "add": lambda m, mean: m.mu.add_(mean),
    "operator": lambda m, mean: m.mu.__iadd__(mean),
    "a view": lambda m, mean: m.mu[:3].copy_(mean[:3]),
    "out": lambda m, mean: torch.mul(mean, 2, out=m.mu),
    "assignment": assigned,
}


@pytest.mark.parametrize("way", WAYS_TO_WRITE)
def test_what_a_buffer_keeps_is_read(way: str) -> None:
    model = Written(WAYS_TO_WRITE[way])
    (one,) = oracle.attribute(model, lambda: model(torch.randn(5, 4))).values()
    assert_said("a.weight a.bias", [part.name for part in one.incoming], one.no_incoming)
    assert "the tensor `mu` keeps it" in one.no_outgoing or "`mul` reads it" in one.no_outgoing


def test_what_is_written_to_a_buffer_of_anything_else_is_not_read() -> None:
    model = Written(lambda m, mean: m.mu.add_(1).lerp_(m.mu.type_as(mean), 0.1))
    (one,) = oracle.attribute(model, lambda: model(torch.randn(5, 4))).values()
    assert_said("b.weight", [part.name for part in one.outgoing], one.no_outgoing)


class Foreign(torch.autograd.Function):
    """Computes in NumPy what no gradient goes through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, h: Tensor, into: bool) -> Tensor:
        more = h.detach().numpy().sum(1, keepdims=True)
        if not into:
            return x + torch.from_numpy(more)
        out = torch.empty(x.shape)
        out.numpy()[:] = x.detach().numpy() + more
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None, None


def foreign(into: bool) -> Callable[[Any, Tensor], Tensor]:
    def forward(model: Any, x: Tensor) -> Tensor:
        h = F.relu(model.a(x))
        return Foreign.apply(model.b(h), h, into).sin()

    return forward


def checkpointed(model: Any, x: Tensor) -> Tensor:
    def block(x: Tensor) -> Tensor:
        return F.relu(model.a(x))

    return model.b(checkpoint(block, x.requires_grad_(), use_reentrant=True))


def padded(model: Any, x: Tensor) -> Tensor:
    return model.b(F.relu(model.emb(x.abs().long() % 5)))


def tied_embedding(model: Any, x: Tensor) -> Tensor:
    return F.linear(model.b(F.relu(model.a(model.emb(x.abs().long() % 5)))), model.emb.weight)


def norm_on_the_side(model: Any, x: Tensor) -> Tensor:
    z = model.a(x)
    return model.b(torch.cat([F.relu(z), model.bn(z).sigmoid()], -1))


def u_net(model: Any, x: Tensor) -> Tensor:
    high = F.relu(model.down(x))
    low = F.relu(model.low(F.max_pool2d(high, 2)))
    return model.out(torch.cat([high, model.up(low)], 1))


def side_by_side(model: Any, x: Tensor) -> Tensor:
    return model.b(F.relu(torch.stack([model.a(x), model.c(x)], -1)).flatten(1))


def point_net(model: Any, x: Tensor) -> Tensor:
    h = F.relu(model.a(x))
    return model.b(torch.cat([h, h.max(1, keepdim=True).values.expand_as(h)], -1))


def overwritten(model: Any, x: Tensor) -> Tensor:
    z = model.a(x)
    z[:, 0] = 0.0
    return model.b(F.relu(z))


def norm_of_residual(model: Any, x: Tensor) -> Tensor:
    x = model.stem(x)
    x = x + model.a(F.relu(model.bn(x)))
    return model.b(x)


def tied_by_data() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))
    model[2].weight.data = model[0].weight.data.t()
    return model


def reader_in_two_parameters() -> nn.Module:
    model = Net(lambda m, x: m.b(F.relu(m.a(x))) + F.linear(m.c(x), m.d), a=nn.Linear(4, 6), b=nn.Linear(6, 2))
    model.c, model.d = nn.Linear(4, 6), nn.Parameter(model.b.weight.detach())
    return model


def reader_in_a_view() -> nn.Module:
    model = Net(lambda m, x: m.b(F.relu(m.a(x))) + m.c(x) @ m.view.T, a=nn.Linear(4, 6), b=nn.Linear(6, 2))
    model.c, model.view = nn.Linear(4, 6), model.b.weight.detach()
    return model


def in_one_storage() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    flat = nn.utils.parameters_to_vector(model.parameters()).detach()
    nn.utils.vector_to_parameters(flat, model.parameters())
    assert model[0].weight.untyped_storage().data_ptr() == model[2].bias.untyped_storage().data_ptr()
    return model


PAIR = {"a": linear(), "b": linear(6, 2)}
TWO_READERS = {**PAIR, "c": linear(6, 2)}
IMAGES = [(2, 4, 6, 6)]

# a net, its inputs, and what is said of each site: names, or a part of the refusal after "!"
EXPECTED: dict[str, tuple[Callable[[], nn.Module], list[Any], list[tuple[str, str]]]] = {
    "MLP": (sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), [(5, 4)], [("0.weight 0.bias", "2.weight")]),
    "convolution, norm, relu": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 3)),
        IMAGES,
        [("0.weight 0.bias 1.weight 1.bias 1.running_mean 1.running_var", "3.weight")],
    ),
    "flattening": (
        net(flattened, conv=lambda: nn.Conv2d(4, 6, 3), fc=linear(24, 2)),
        IMAGES,
        [("conv.weight conv.bias", "fc.weight")],
    ),
    "grouped convolutions": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.ReLU(), nn.Conv2d(6, 6, 1, groups=3)),
        IMAGES,
        [("0.weight 0.bias", "2.weight")],
    ),
    "depthwise convolutions": (
        lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=4), nn.ReLU6(), nn.Conv2d(8, 8, 1, groups=8)),
        IMAGES,
        [("0.weight 0.bias", "2.weight")],
    ),
    "transposed convolutions": (
        lambda: nn.Sequential(
            nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False), nn.ReLU(), nn.ConvTranspose2d(6, 6, 3, groups=3)
        ),
        IMAGES,
        [("0.weight", "2.weight")],
    ),
    "a kernel turned round": (
        net(lambda m, x: F.conv2d(F.relu(m.a(x)), m.k.transpose(0, 1)), a=conv_nd(2), k=parameter(6, 6, 1, 1)),
        IMAGES,
        [("a.weight a.bias", "!in another order")],
    ),
    "parameters of a function": (
        net(
            lambda m, x: torch.addmm(m.c, F.relu(x @ m.a + m.d), m.b),
            a=parameter(4, 6),
            b=parameter(6, 2),
            c=parameter(2),
            d=parameter(6),
        ),
        [(5, 4)],
        [("a d", "b")],
    ),
    "gate": (net(gated, fc=linear(4, 12), head=linear(6, 2)), [(5, 4)], [("fc.weight fc.bias", "head.weight")]),
    "channel shuffle": (
        net(shuffled, a=conv_nd(2), b=lambda: nn.Conv2d(6, 6, 1, groups=3)),
        IMAGES,
        [("a.weight a.bias", "b.weight")],
    ),
    "concatenation": (
        net(concatenated, a=linear(), b=linear(4, 3), c=linear(13, 2)),
        [(5, 4)],
        [("a.weight a.bias", "c.weight"), ("b.weight b.bias", "c.weight")],
    ),
    "squeeze and excitation": (
        net(squeeze_and_excite, a=conv_nd(2), b=lambda: nn.Conv2d(6, 2, 1), down=linear(6, 3), up=linear(3, 6)),
        IMAGES,
        [("a.weight a.bias", "down.weight b.weight"), ("down.weight down.bias", "up.weight")],
    ),
    "dropout and pools behind": (
        lambda: nn.Sequential(
            nn.Conv2d(4, 6, 3),
            nn.ReLU(),
            nn.Dropout2d(),
            nn.AvgPool2d(2),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(6, 2, 1),
        ),
        IMAGES,
        [("0.weight 0.bias", "5.weight")],
    ),
    "a product of two views": (Siamese, [(5, 4)], [("fc.weight fc.bias", "head.weight")]),
    "logging": (net(logged, **PAIR), [(5, 4)], [("a.weight a.bias", "b.weight")]),
    "norm over a residual stream": (
        net(norm_of_residual, stem=linear(4, 6), bn=lambda: nn.BatchNorm1d(6), a=linear(6, 6), b=linear(6, 2)),
        [(5, 4)],
        [("bn.weight bn.bias bn.running_mean bn.running_var", "a.weight")],
    ),
    "norm on the side": (
        net(norm_on_the_side, a=linear(), bn=lambda: nn.BatchNorm1d(6, affine=False), b=linear(12, 2)),
        [(5, 4)],
        [("!`a.weight` also feeds `linear`", "b.weight")],
    ),
    "U-Net": (
        net(
            u_net,
            down=lambda: nn.Conv2d(4, 6, 1),
            low=lambda: nn.Conv2d(6, 5, 1),
            up=lambda: nn.ConvTranspose2d(5, 3, 2, 2),
            out=lambda: nn.Conv2d(9, 2, 1),
        ),
        IMAGES,
        [("down.weight down.bias", "low.weight out.weight"), ("low.weight low.bias", "up.weight")],
    ),
    "layers side by side": (
        net(side_by_side, a=linear(), b=linear(12, 2), c=linear()),
        [(5, 4)],
        [("a.weight a.bias c.weight c.bias", "b.weight")],
    ),
    "a difference": (
        net(lambda m, x: m.b(F.relu(m.a(x) - m.c(x))), **PAIR, c=linear()),
        [(5, 4)],
        [("!negated", "b.weight")],
    ),
    "points and their maximum": (
        net(point_net, a=linear(), b=linear(12, 2)),
        [(2, 5, 4)],
        [("a.weight a.bias", "b.weight")],
    ),
    "relu twice": (
        net(lambda m, x: m.b(F.relu(F.relu(m.a(x)))), **PAIR),
        [(5, 4)],
        [("a.weight a.bias", "b.weight"), ("!it rectifies what `relu` puts out", "b.weight")],
    ),
    "overwritten in part": (net(overwritten, **PAIR), [(5, 4)], [("!passes through `setitem`", "b.weight")]),
    "layer norm": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 2)),
        [(5, 4)],
        [("1.weight 1.bias", "3.weight")],
    ),
    "layer norm without weights": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6, elementwise_affine=False), nn.ReLU(), nn.Linear(6, 2)),
        [(5, 4)],
        [("!`layer_norm` mixes the units", "3.weight")],
    ),
    "norm behind": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.BatchNorm1d(6), nn.Linear(6, 2)),
        [(5, 4)],
        [("0.weight 0.bias", "!makes a constant of a silent unit")],
    ),
    "identity path": (
        net(lambda m, x: m.b(F.relu(m.a(x) + x)), a=linear(4, 4), b=linear(4, 2)),
        [(5, 4)],
        [("!an identity path joins", "b.weight")],
    ),
    "one layer for two inputs": (
        net(shared_reader, a=linear(4, 4), b=linear(4, 2)),
        [(5, 4)],
        [("a.weight a.bias", "!`b.weight` also multiplies other things")],
    ),
    "raw reader": (
        net(raw_reader, **PAIR, c=linear(6, 2)),
        [(5, 4)],
        [("!`a.weight` also feeds `linear`", "b.weight")],
    ),
    "a logged value comes back": (
        net(log_used, **PAIR),
        [(5, 4)],
        [("a.weight a.bias", "!`std` (it joins units) reads it")],
    ),
    "a view of what is changed in place": (
        net(through_a_view, **PAIR),
        [(5, 4)],
        [("!`a.weight` also feeds a change in place", "!a view of it is read")],
    ),
    "written to where no change is counted": (
        net(lambda m, x: ((h := F.relu(m.a(x))).data.add_(1), m.b(h))[1], **PAIR),
        [(5, 4)],
        [("a.weight a.bias", "!a view of it is read")],
    ),
    "zeros written to where no change is counted": (
        net(into_zeros, **TWO_READERS),
        [(5, 4)],
        [("a.weight a.bias", "!`add` reads it")],
    ),
    "written to by a view that is gone": (
        net(through_a_view_that_is_gone, **PAIR, c=linear(), d=linear(6, 2)),
        [(5, 4)],
        [("c.weight c.bias", "!`add` reads it"), ("!`a.weight` also feeds a change in place", "d.weight")],
    ),
    "a changed view is changed again": (
        net(changed_twice, **PAIR),
        [(5, 4)],
        [("!it is changed in place", "!a view of it is read")],
    ),
    "given other data": (
        net(
            lambda m, x: (setattr(z := torch.zeros(5, 6), "data", h := F.relu(m.a(x))), m.c(h) + m.b(z))[1],
            **TWO_READERS,
        ),
        [(5, 4)],
        [("a.weight a.bias", "!a view of it is read")],
    ),
    "a leaf behind a detach": (
        net(lambda m, x: m.c((h := F.relu(m.a(x))).detach().requires_grad_()) + m.b(h), **TWO_READERS),
        [(5, 4)],
        [("a.weight a.bias", "c.weight b.weight")],
    ),
    "moved by a pad": (
        net(lambda m, x: m.b(F.pad(F.relu(m.a(x)), (-1, 1))), **PAIR),
        [(5, 4)],
        [("a.weight a.bias", "b.weight")],
    ),
    "attention to itself": (
        net(lambda m, x: m.b(F.scaled_dot_product_attention(h := F.relu(m.a(x)), h, h)), **PAIR),
        [(2, 5, 4)],
        [("a.weight a.bias", "!multiplies a tensor by itself")],
    ),
    "read out of sight": (
        net(out_of_sight, **PAIR),
        [(5, 4)],
        [("a.weight a.bias", "!code out of sight reads it")],
    ),
    "foreign code and torch in one function": (
        net(foreign(False), **PAIR),
        [(5, 4)],
        [("a.weight a.bias", "!code out of sight reads it")],
    ),
    "foreign code that fills a tensor": (
        net(foreign(True), **PAIR),
        [(5, 4)],
        [("a.weight a.bias", "!code out of sight reads it")],
    ),
    "a checkpoint": (net(checkpointed, **PAIR), [(5, 4)], [("a.weight a.bias", "b.weight")]),
    "embedding with a padding row": (
        net(padded, emb=lambda: nn.Embedding(5, 6, padding_idx=0), b=linear(6, 2)),
        [(5, 3)],
        [("!a padding row", "b.weight")],
    ),
    "tied embedding": (
        net(tied_embedding, emb=lambda: nn.Embedding(5, 4), a=linear(), b=linear(6, 4)),
        [(5, 3)],
        [("a.weight a.bias", "b.weight")],
    ),
    "tied layers": (
        net(lambda m, x: F.linear(F.relu(F.linear(x, m.w)), m.w.T), w=parameter(6, 4)),
        [(5, 4)],
        [("!tied weights", "!tied weights")],
    ),
    "layers tied by their data": (
        tied_by_data,
        [(5, 4)],
        [("!`0.weight` shares memory with `2.weight`", "!`2.weight` shares memory with `0.weight`")],
    ),
    "a reader in two parameters": (
        reader_in_two_parameters,
        [(5, 4)],
        [("a.weight a.bias", "!shares memory with `d`")],
    ),
    "a reader in a view": (reader_in_a_view, [(5, 4)], [("a.weight a.bias", "!`b.weight` is also used by")]),
    "parameters in one storage": (in_one_storage, [(5, 4)], [("0.weight 0.bias", "2.weight")]),
    "tokens mixed": (TokenMixer, [(2, 3, 4)], [("fc.weight fc.bias", "!not unit by unit")]),
    "both signs": (
        net(lambda m, x: m.b(torch.cat([F.relu(z := m.a(x)), F.relu(-z)], -1)), a=linear(), b=linear(12, 2)),
        [(5, 4)],
        [("!`a.weight` also feeds `relu`", "b.weight"), ("!negated", "b.weight")],
    ),
    "computed weight": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 6)), nn.ReLU(), nn.Linear(6, 2)),
        [(5, 4)],
        [("!its weight is computed", "2.weight")],
    ),
    "a reader with a computed weight": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.utils.parametrizations.weight_norm(nn.Linear(6, 2))),
        [(5, 4)],
        [("0.weight 0.bias", "!its weight is computed")],
    ),
    "loud silence": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.Threshold(0.0, 5.0), nn.Linear(6, 2)),
        [(5, 4)],
        [("0.weight 0.bias", "!a silent unit puts out 5")],
    ),
    "nobody reads": (
        net(lambda m, x: (F.relu(m.a(x)).detach(), m.b(x))[1], a=linear(), b=linear(4, 2)),
        [(5, 4)],
        [("a.weight a.bias", "!nothing was seen to read it")],
    ),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_found_and_refused(name: str) -> None:
    build, shapes, expected = EXPECTED[name]
    known = oracle.check(*ready(Case(build, shapes, "")))
    assert len(known) == len(expected)
    for one, (fed, read) in zip(known.values(), expected, strict=True):
        assert_said(fed, [part.name for part in one.incoming], one.no_incoming)
        assert_said(read, [part.name for part in one.outgoing], one.no_outgoing)


def assert_said(expected: str, names: list[str], refusal: str) -> None:
    if expected.startswith("!"):
        assert expected[1:] in refusal
        assert not names
    else:
        assert names == expected.split(), refusal


def test_penalties_on_weights_are_no_readers() -> None:
    model = net(penalised, **PAIR)()
    (one,) = oracle.attribute(model, lambda: model(torch.randn(5, 4))).values()
    assert_said("a.weight a.bias", [part.name for part in one.incoming], one.no_incoming)
    assert_said("b.weight", [part.name for part in one.outgoing], one.no_outgoing)


def test_the_bias_that_counts_is_the_last_one() -> None:
    with_norm = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))
    (one,) = oracle.attribute(with_norm, lambda: with_norm(torch.randn(5, 4))).values()
    assert one.bias is not None
    assert (one.bias.name, one.bias.role) == ("1.bias", "shift")
    assert one.outlet is not None
    assert (one.outlet.path, one.outlet.dim, one.outlet.channels.tolist()) == ("1", -1, list(range(6)))


@pytest.mark.parametrize(("pool", "fits"), [(nn.AvgPool2d(2), True), (nn.AvgPool2d(3, 1, 1), False)])
def test_an_outlet_hands_on_what_is_added(pool: nn.Module, fits: bool) -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 1), pool, nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(6, 2, 1))
    (one,) = oracle.check(model, lambda: model(torch.ones(2, 4, 6, 6))).values()
    assert one.incoming
    assert bool(one.outlet) == fits


def test_a_layer_added_to_itself_is_no_outlet() -> None:
    for twice in (lambda m, x: m.a(x) + m.a(-x), lambda m, x: (z := m.a(x)) + z):
        model = net(lambda m, x, twice=twice: m.b(F.relu(twice(m, x))), **PAIR)()
        (one,) = oracle.check(model, lambda model=model: model(torch.ones(5, 4))).values()
        assert one.incoming
        assert one.outlet is None


def test_a_layer_whose_output_has_another_shape_elsewhere_is_no_outlet() -> None:
    layers = {"a": conv_nd(2), "norm": lambda: nn.GroupNorm(2, 6), "b": linear(6, 2)}
    model = net(lambda m, x: m.norm(F.relu(m.norm(m.a(x))).mean(3)), **layers)()
    (one,) = oracle.check(model, lambda: model(torch.rand(2, 4, 6, 6))).values()
    assert one.outlet is None


def test_a_layer_on_the_way_to_some_calls_of_a_site_is_no_outlet() -> None:
    layers = {"a": linear(4, 6, bias=False), "norm": lambda: nn.BatchNorm1d(6, affine=False).eval(), "b": linear(6, 2)}
    model = net(lambda m, x: m.b(F.relu(z := m.a(x)) * F.relu(m.norm(z))), **layers)()
    (one,) = oracle.check(model, lambda: model(torch.rand(5, 4))).values()
    assert one.incoming
    assert "some calls of" in one.no_outlet


def test_flattening_gives_a_unit_all_its_columns() -> None:
    model = Net(flattened, conv=nn.Conv2d(4, 6, 3), fc=nn.Linear(24, 2))
    (one,) = oracle.attribute(model, lambda: model(torch.randn(2, 4, 6, 6))).values()
    reader = one.outgoing[0].of(torch.arange(6) == 2)
    assert reader.index.flatten().tolist() == [8, 9, 10, 11]


# -- over batches, and when something fails ---------------------------------------------------------------


def step(watch: Watch, model: nn.Module, x: Tensor, trace: bool = True) -> None:
    if trace:
        watch.trace()
    with watch.probe:
        model(x).sum()


def test_batches_add_up() -> None:
    model = MoE()
    watch = Watch(model)
    step(watch, model, torch.randn(1, 1, 4))
    assert len(watch.attributions) == 1
    step(watch, model, torch.randn(2, 3, 4))
    known = watch.attributions
    assert list(known) == ["experts.0.act", "experts.1.act"]
    assert all(one.incoming and one.outgoing for one in known.values())


def test_what_another_batch_reads_is_a_reader() -> None:
    model = net(lambda m, x: m.b(h) if len(h := F.relu(m.a(x))) > 2 else h, **PAIR)()
    watch = Watch(model)
    step(watch, model, torch.randn(5, 4))
    assert next(iter(watch.attributions.values())).outgoing
    step(watch, model, torch.randn(2, 4))
    assert "`sum`" in next(iter(watch.attributions.values())).no_outgoing


def test_a_site_not_traced_is_refused() -> None:
    model = sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))()
    watch = Watch(model)
    step(watch, model, torch.randn(5, 4), trace=False)
    (one,) = watch.attributions.values()
    assert "it has not run while" in one.no_incoming
    assert one.no_outgoing
    assert one.no_outlet


def test_an_error_in_tracing_stops_nothing_and_refuses_all(monkeypatch: pytest.MonkeyPatch) -> None:
    model = sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU())()
    watch = Watch(model)
    step(watch, model, torch.randn(5, 4))
    monkeypatch.setattr("lightning_deadrelu.attribution.tracer.follow", lambda step: 1 / 0)
    step(watch, model, torch.randn(5, 4))
    assert watch.probe.failure is None
    for one in watch.attributions.values():
        assert one.no_incoming == "it could not be traced: ZeroDivisionError: division by zero"
        assert one.no_outgoing == one.no_outlet == one.no_incoming
        assert not one.incoming + one.outgoing


def test_a_batch_is_let_go() -> None:
    model = sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))()
    watch = Watch(model)
    watch.trace()
    with watch.probe:
        hidden = model[1](model[0](torch.randn(5, 4)))
        gone = weakref.ref(hidden)
        del hidden
    assert gone() is None
    assert not watch.probe.is_subscribed


def over_ranks(model: nn.Module, *steps: Callable[[], Any], fail: bool = False) -> dict[str, Attribution]:
    """Join what ranks tell of which each has run one step; the last one's tracer may fail. By what feeds a site."""
    watches = [Watch(model) for _ in steps]
    for watch, run in zip(watches, steps, strict=True):
        watch.trace()
        with watch.probe, pytest.MonkeyPatch.context() as patch:
            if fail and watch is watches[-1]:
                patch.setattr(Tracer, "_see", lambda *args: 1 / 0)
            run().sum()
    layout = list(dict.fromkeys(site for watch in watches for site in watch.sites))
    for watch in watches:
        watch.adopt(layout)
    theirs = [pickle.loads(pickle.dumps(watch.attributions)) for watch in watches]
    known = joined_over_ranks(theirs, NOT_TRACED).values()
    return {site.source[-1].rpartition(".")[0]: one for site, one in zip(layout, known, strict=True)}


BRANCHES = {
    "another branch": lambda m, x: m.head(F.relu(m.b(x))),
    "the input": lambda m, x: m.head(x),
    "half of it": lambda m, x: m.head(F.pad(F.relu(m.a(x))[:, :3], (3, 0))),
    "a part of its weight": lambda m, x: F.linear(F.relu(m.b(x)), m.head.weight[:1]),
}


@pytest.mark.parametrize("name", BRANCHES)
def test_a_reader_that_another_rank_uses_otherwise_is_refused(name: str) -> None:
    layers = {"a": linear(6, 6), "b": linear(6, 6), "head": linear(6, 2)}
    model, x = net(lambda m, branch: branch(m, x), **layers)(), torch.randn(5, 6)
    steps = [lambda: model(lambda m, x: m.head(F.relu(m.a(x)))), lambda: model(BRANCHES[name])]
    for order in (steps, steps[::-1]):
        one = over_ranks(model, *order)["a"]
        assert one.no_outgoing == "ranks differ in what they use `head.weight` for"
        assert not one.outgoing
        assert one.incoming


def test_a_layer_that_another_rank_uses_otherwise_is_refused() -> None:
    model = net(lambda m, sides: m.b(F.relu(m.a(x))) if sides else m.c(m.a(x)), **PAIR, c=linear(6, 3))()
    x = torch.randn(5, 4)
    one = over_ranks(model, lambda: model(True), lambda: model(False))["a"]
    assert one.no_incoming == "ranks differ in what they use `a.weight` for"
    assert one.no_outlet == "ranks differ in what they use `a` for"
    assert [part.name for part in one.outgoing] == ["b.weight"]


def test_experts_of_several_ranks_are_joined() -> None:
    model = MoE()
    known = over_ranks(model, *(lambda expert=expert: expert(torch.randn(3, 4)) for expert in model.experts))
    assert list(known) == [f"experts.{n}.fc1" for n in range(3)]
    assert all(one.incoming and one.outgoing and one.outlet for one in known.values())


def test_a_rank_whose_tracing_failed_refuses_for_all() -> None:
    model = sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))()
    (one,) = over_ranks(model, *[lambda: model(torch.randn(5, 4))] * 2, fail=True).values()
    assert (
        one.no_incoming
        == one.no_outgoing
        == one.no_outlet
        == "it could not be traced: ZeroDivisionError: division by zero"
    )


class Untouched(TorchDispatchMode):
    """Fails where the tracer looks at a tensor that it did not make itself."""

    watching = False

    def __init__(self) -> None:
        super().__init__()
        self.own: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.watching:
            if func is torch.ops.aten.lift_fresh.default:  # a number of Python's
                self.own += args
            for one in oracle.tensors(list(args)):
                assert any(one is other for other in self.own), func
            self.own += oracle.tensors(result)
        return result


def test_no_number_of_the_model_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    modes, see = [Untouched()], Tracer._see

    def watched(self: Tracer, *args: Any) -> None:
        modes[-1].watching = True
        try:
            see(self, *args)
        finally:
            modes[-1].watching = False

    monkeypatch.setattr(Tracer, "_see", watched)
    for name in ("ResNet of basic blocks", "experts", "encoder layer, norm first", "pools and dropout in between"):
        model, run = ready(CASES[name])
        modes.append(Untouched())
        with modes[-1]:
            oracle.attribute(model, run)


def test_training_is_the_same_when_traced() -> None:
    def trained(trace: bool) -> list[Tensor]:
        model, run = ready(CASES["ResNet of bottlenecks"])
        watch = Watch(model)
        if trace:
            watch.trace()
        torch.manual_seed(3)
        with watch.probe:
            run().sum().backward()
        return [torch.rand(3), *(p.grad for p in model.parameters() if p.grad is not None)]

    assert oracle.same(trained(False), trained(True))


def test_a_constant_term_on_the_way_is_no_identity_path() -> None:
    model = sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 3))()
    known = []
    for term in (torch.rand(6, 1, 1), torch.rand(2, 6, 4, 4)):
        handle = model[0].register_forward_hook(lambda module, args, output, term=term: output + term)
        known += oracle.check(model, lambda: model(torch.ones(2, 4, 6, 6))).values()
        handle.remove()
    assert known[0].incoming
    assert known[0].outlet
    assert "identity path" in known[1].no_incoming


def test_a_swapped_activation_is_loud_for_as_long_as_it_is_there() -> None:
    model = sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))()
    tracer = Tracer(model)
    for act in (nn.ReLU(), nn.LeakyReLU(0.1), nn.ReLU()):
        judged = Probe(model, lambda *call: None)
        judged.router.subscribe_calls(tracer)
        model[1] = act
        if isinstance(act, nn.LeakyReLU):
            judged.substitutes = {"1": Rectifier("relu", plain=True)}
        with judged:
            model(torch.randn(5, 4)).sum()
        (one,) = tracer.attributions().values()
        assert one.incoming
        assert bool(one.outgoing) == isinstance(act, nn.ReLU), one


def test_sharded_parameters_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Parameter, "device_mesh", "mesh", raising=False)
    model = sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))()
    (one,) = oracle.attribute(model, lambda: model(torch.randn(5, 4))).values()
    assert one.no_incoming == one.no_outgoing == "its parameters are sharded"


def test_attributions_print_as_a_table() -> None:
    model = sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))()
    known = oracle.attribute(model, lambda: model(torch.randn(5, 4)))
    shown = Attributions(dict(zip(names_of(known), known.values(), strict=True)))
    assert list(shown) == ["1"]
    assert isinstance(shown["1"], Attribution)
    head, row = str(shown).splitlines()
    assert head.split() == ["layer", "fed", "by", "bias", "that", "counts", "read", "by", "refused", "because"]
    assert row.split() == ["1", "0.weight,", "0.bias", "0.bias", "2.weight", "-"]


def test_rows_are_found_in_a_view() -> None:
    origin = Origin("w", "reader", (0, 2), (2, 3), (2, 4, 3))
    assert origin.rows == 6
    assert origin.places(torch.tensor([4])).tolist() == [[1, 1]]


@pytest.mark.parametrize("sliced", [False, True])
def test_an_edit_by_hand_behind_a_step_does_not_end_the_tracing(sliced: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    watch = Watch(model)
    watch.trace()
    with watch:
        model(torch.randn(3, 4)).sum().backward()
        with torch.no_grad():
            if sliced:
                model[0].bias[:3] -= 1.0
            else:
                model[0].bias -= 1.0
    assert watch.tracer.failure == ""
