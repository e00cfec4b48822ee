"""Small nets, and by hand: which rectifier calls they make, which of these share a site, where the units are.

``Case.calls`` spells one word per call in the order of execution: the site's name, ``@``, and the dimensions
that hold its units. ``-`` is a call that is no site, ``?name`` one that cannot be watched.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts


class Case(NamedTuple):
    """A net, its input shapes (or a function that makes its inputs), and its calls."""

    build: Callable[[], nn.Module]
    inputs: Any
    calls: str
    run: Callable[..., Any] = lambda model, *inputs: model(*inputs)
    outputs_differ: bool = False


class Net(nn.Module):
    """A module from a function of itself and its inputs."""

    def __init__(self, function: Callable[..., Any], **children: Any) -> None:
        super().__init__()
        self.function = function
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


def sequential(*layers: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*layers)


def net(function: Callable[..., Any], **children: Callable[[], Any]) -> Callable[[], nn.Module]:
    """Build a :class:`Net` anew at each call."""
    return lambda: Net(function, **{name: child() for name, child in children.items()})


def linear(into: int = 4, out: int = 6, **kwargs: Any) -> Callable[[], nn.Module]:
    return partial(nn.Linear, into, out, **kwargs)


def parameter(*shape: int) -> Callable[[], nn.Parameter]:
    return lambda: nn.Parameter(torch.randn(shape))


class MyReLU(nn.ReLU):
    """A user's own rectifier class."""


class BasicBlock(nn.Module):
    """As in torchvision: one ``nn.ReLU`` for both calls."""

    def __init__(self, into: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(into, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.downsample = None
        if stride != 1 or into != out:
            self.downsample = nn.Sequential(nn.Conv2d(into, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    """As in torchvision: one ``nn.ReLU`` for three calls of two widths."""

    def __init__(self, into: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(into, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, width * 4, 1, bias=False), nn.BatchNorm2d(width * 4)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential(nn.Conv2d(into, width * 4, 1, stride, bias=False), nn.BatchNorm2d(width * 4))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += self.downsample(x)
        return self.relu(out)


def resnet(*blocks: nn.Module) -> Callable[[], nn.Module]:
    stem = [nn.Conv2d(3, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    return lambda: nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(2))


class PreNormBlock(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc(F.relu(self.norm(x)))


class Mlp(nn.Module):
    def __init__(self, width: int = 4, hidden: int = 6, act: nn.Module | None = None) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(width, hidden), act or nn.ReLU(), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class SquaredReLU(nn.Module):
    """As transformers' ``relu2``: no parameters, a functional relu inside."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.square(F.relu(x))


class ConvNeXtBlock(nn.Module):
    """Channels last for norm and MLP."""

    def __init__(self, dim: int = 4) -> None:
        super().__init__()
        self.dwconv, self.norm = nn.Conv2d(dim, dim, 3, padding=1, groups=dim), nn.LayerNorm(dim)
        self.pwconv1, self.pwconv2 = nn.Linear(dim, 3 * dim), nn.Linear(3 * dim, dim)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        return x + self.pwconv2(self.act(self.pwconv1(hidden))).permute(0, 3, 1, 2)


class LinearAttention(nn.Module):
    """Heads of relu features: a unit is one feature of one head."""

    def __init__(self, dim: int = 6, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)

    def split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], self.heads, -1).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = F.relu(self.split(self.q(x))), F.relu(self.split(self.k(x))), self.split(self.v(x))
        return (q @ (k.transpose(-1, -2) @ v)).transpose(1, 2).flatten(2)


class MoE(nn.Module):
    """One expert is chosen for each token; an expert may get none."""

    def __init__(self, experts: int = 3) -> None:
        super().__init__()
        self.router = nn.Linear(4, experts)
        self.experts = nn.ModuleList(Mlp() for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        choice = torch.arange(len(tokens)) % 2  # the third expert gets none
        out = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            mine = torch.where(choice == number)[0]
            out[mine] = expert(tokens[mine])
        return out.view_as(x)


class Checkpointed(nn.Module):
    def __init__(self, **how: Any) -> None:
        super().__init__()
        self.stem, self.mlp, self.how = nn.Linear(4, 4), Mlp(), how

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.mlp, self.stem(x), **self.how)


def keep_matmuls(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = op in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


class OwnLinear(torch.autograd.Function):
    """A layer that computes where no torch function is seen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.ops.aten.mm(x, weight.t())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.t() @ x


class Tagged(Tensor):
    """A tensor subclass that keeps its class through every function."""


def tagged(*shape: int) -> tuple[Tensor]:
    return (torch.randn(shape).as_subclass(Tagged),)


class Hinge(nn.Module):
    """A loss module."""

    def forward(self, score: Tensor, real: Tensor) -> Tensor:
        return F.relu(1 - score * real.sign()).mean()


def iou(a: Tensor, b: Tensor) -> Tensor:
    low, high = torch.maximum(a[:, :2], b[:, :2]), torch.minimum(a[:, 2:], b[:, 2:])
    return (high - low).clamp(min=0).prod(-1)


def one_hot_tokens(*shape: int) -> tuple[Tensor]:
    return (torch.arange(torch.Size(shape).numel()).view(shape) % 5,)


FORMS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "F.relu": ("relu", lambda x: F.relu(x)),
    "F.relu(x, True)": ("relu", lambda x: F.relu(x, True)),
    "F.relu(inplace=True)": ("relu", lambda x: F.relu(x, inplace=True)),
    "F.relu(input=x)": ("relu", lambda x: F.relu(input=x)),
    "F.relu_": ("relu", lambda x: F.relu_(x)),
    "torch.relu": ("relu", lambda x: torch.relu(x)),
    "torch.relu(input=x)": ("relu", lambda x: torch.relu(input=x)),
    "torch.relu_": ("relu", lambda x: torch.relu_(x)),
    "x.relu()": ("relu", lambda x: x.relu()),
    "x.relu_()": ("relu", lambda x: x.relu_()),
    "F.relu6": ("relu6", lambda x: F.relu6(x)),
    "F.relu6(inplace=True)": ("relu6", lambda x: F.relu6(x, inplace=True)),
    "F.threshold": ("threshold", lambda x: F.threshold(x, 0.1, 0.0)),
    "F.threshold(inplace=True)": ("threshold", lambda x: F.threshold(x, 0.1, 0.0, True)),
    "F.threshold_": ("threshold", lambda x: F.threshold_(x, 0.0, 0.0)),
    "x.clamp(min=0)": ("clamp", lambda x: x.clamp(min=0)),
    "x.clamp(0)": ("clamp", lambda x: x.clamp(0)),
    "x.clamp_(0)": ("clamp", lambda x: x.clamp_(0)),
    "x.clip(min=0.0)": ("clamp", lambda x: x.clip(min=0.0)),
    "torch.clamp": ("clamp", lambda x: torch.clamp(x, min=0)),
    "torch.clamp(out=x)": ("clamp", lambda x: torch.clamp(x.detach(), min=0, out=torch.empty_like(x))),
    "x.clamp_min(0)": ("clamp", lambda x: x.clamp_min(0)),
    "x.clamp_min_(0.0)": ("clamp", lambda x: x.clamp_min_(0.0)),
    "torch.clamp_min(x, min=0)": ("clamp", lambda x: torch.clamp_min(x, min=0)),
    "torch.maximum": ("maximum", lambda x: torch.maximum(x, torch.zeros_like(x))),
    "torch.maximum(zeros, x)": ("maximum", lambda x: torch.maximum(torch.zeros_like(x), x)),
    "torch.maximum(x, zero)": ("maximum", lambda x: torch.maximum(x, torch.tensor(0.0))),
    "torch.max(x, zeros)": ("maximum", lambda x: torch.max(x, torch.zeros(6))),
    "x.max(other=zeros)": ("maximum", lambda x: x.max(other=x.new_zeros(1))),
    "torch.fmax": ("maximum", lambda x: torch.fmax(x, torch.zeros(()))),
    "F.hardtanh(0, 1)": ("hardtanh", lambda x: F.hardtanh(x, 0, 1)),
    "F.hardtanh(min_val=0)": ("hardtanh", lambda x: F.hardtanh(x, min_val=0.0, max_val=2.0)),
    "F.hardtanh_": ("hardtanh", lambda x: F.hardtanh_(x, 0.0, 1.0)),
    "F.hardswish": ("hardswish", lambda x: F.hardswish(x)),
    "F.leaky_relu(0)": ("relu", lambda x: F.leaky_relu(x, 0.0)),
}
NOT_RECTIFIERS: dict[str, Callable[[Tensor], Tensor]] = {
    "clamp(0, 1)": lambda x: x.clamp(0, 1),
    "clamp(max=0)": lambda x: x.clamp(max=0),
    "clamp(min=1e-6)": lambda x: x.clamp(min=1e-6),
    "hardtanh": F.hardtanh,
    "maximum of two": lambda x: torch.maximum(x, x.flip(-1)),
    "max over a dimension": lambda x: x.max(dim=-1).values,
    "amax": lambda x: x.amax(),
    "tanh": torch.tanh,
}

MODULES: dict[str, Callable[[], nn.Module]] = {
    "ReLU": nn.ReLU,
    "ReLU(inplace)": partial(nn.ReLU, inplace=True),
    "ReLU6": nn.ReLU6,
    "ReLU6(inplace)": partial(nn.ReLU6, inplace=True),
    "Threshold": partial(nn.Threshold, 0.2, 0.0),
    "Threshold(-1, 5)": partial(nn.Threshold, -1.0, 5.0),
    "Hardtanh(0, 1)": partial(nn.Hardtanh, 0.0, 1.0),
    "Hardtanh(0, 2, inplace)": partial(nn.Hardtanh, 0.0, 2.0, inplace=True),
    "Hardswish": nn.Hardswish,
    "Hardswish(inplace)": partial(nn.Hardswish, inplace=True),
    "a subclass": MyReLU,
    "LeakyReLU(0)": partial(nn.LeakyReLU, 0.0),
}


def twice(model: nn.Module, a: Tensor, b: Tensor) -> Tensor:
    """Call as a training step calls a discriminator: on real, then on fake."""
    return model.d(a).mean() - model.d(b).mean()


def unroll(model: Any, x: Tensor) -> Tensor:
    h = x.new_zeros(len(x), 6)
    for t in range(x.shape[1]):
        h = F.relu(model.inp(x[:, t]) + model.hid(h))
    return h


def shared_residual(model: Any, x: Tensor) -> Tensor:
    x = model.stem(x)
    for _ in range(3):
        x = model.block(x)
    return x


def dense(model: Any, x: Tensor) -> Tensor:
    for layer in (model.one, model.two):
        x = torch.cat([x, layer(F.relu(x))], 1)
    return x


def glu(model: Any, x: Tensor) -> Tensor:
    a, b = model.fc(x).chunk(2, -1)
    return F.relu(a) * F.relu(b)


def crelu(model: Any, x: Tensor) -> Tensor:
    z = model.fc(x)
    return torch.cat([F.relu(z), F.relu(-z)], -1)


def heads_from_fused(model: Any, x: Tensor) -> Tensor:
    q, k, _ = model.qkv(x).view(*x.shape[:-1], 3, 2, 3).unbind(-3)
    return F.relu(q) * F.relu(k)


def skipping(model: Any, x: Tensor, skip: bool = False) -> Tensor:
    x = model.one(x)
    return model.two(x if skip else model.maybe(x))


def scripted() -> nn.Module:
    return torch.jit.script(nn.Linear(4, 6))


def with_norm(norm: Callable[[nn.Module], nn.Module], **how: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(norm(nn.Linear(4, 6, **how)), nn.ReLU())


def encoder(**how: Any) -> Callable[[], nn.Module]:
    return partial(nn.TransformerEncoderLayer, 4, 2, 6, dropout=0.1, **how)


def conv_nd(dims: int, **how: Any) -> Callable[[], nn.Module]:
    return partial((nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1], 4, 6, 3, padding=1, **how)


CASES: dict[str, Case] = {
    **{
        f"module {name}": Case(lambda act=act: nn.Sequential(nn.Linear(4, 6), act()), [(5, 4)], "1@-1")
        for name, act in MODULES.items()
    },
    **{
        f"functional {name}": Case(net(lambda m, x, f=f: f(m.fc(x)), fc=linear()), [(5, 4)], f"{kind}@-1")
        for name, (kind, f) in FORMS.items()
    },
    **{
        f"no rectifier: {name}": Case(net(lambda m, x, f=f: f(m.fc(x)), fc=linear()), [(5, 4)], "")
        for name, f in NOT_RECTIFIERS.items()
    },
    # shared modules
    "one relu for layers of several widths": Case(
        net(
            lambda m, x: m.act(m.c(m.act(m.b(m.act(m.a(x)))))),
            a=linear(),
            b=linear(6, 3),
            c=linear(3, 6),
            act=nn.ReLU,
        ),
        [(5, 4)],
        "act@-1 act-1@-1 act-2@-1",
    ),
    "ResNet of basic blocks": Case(
        lambda: resnet(BasicBlock(4, 4), BasicBlock(4, 6, 2))(),
        [(2, 3, 16, 16)],
        "2@-3 4.relu@-3 4.relu-1@-3 5.relu@-3 5.relu-1@-3",
    ),
    "ResNet of bottlenecks": Case(
        lambda: resnet(Bottleneck(4, 2), Bottleneck(8, 3, 2))(),
        [(2, 3, 16, 16)],
        "2@-3 4.relu@-3 4.relu-1@-3 4.relu-2@-3 5.relu@-3 5.relu-1@-3 5.relu-2@-3",
    ),
    # one layer called several times
    "discriminator on real and fake": Case(
        lambda: Net(lambda m: None, d=nn.Sequential(nn.Linear(4, 6), nn.ReLU())),
        [(5, 4), (3, 4)],
        "d.1@-1 d.1@-1",
        twice,
    ),
    "functional discriminator on real and fake": Case(
        lambda: Net(lambda m: None, d=Net(lambda m, x: F.relu(m.fc(x)), fc=nn.Linear(4, 6))),
        [(5, 4), (3, 4)],
        "d-relu@-1 d-relu@-1",
        twice,
    ),
    "siamese": Case(
        net(lambda m, a, b: F.cosine_similarity(m.e(a), m.e(b)), e=sequential(nn.Linear(4, 6), nn.ReLU())),
        [(5, 4), (5, 4)],
        "e.1@-1 e.1@-1",
    ),
    "unrolled recurrence": Case(net(unroll, inp=linear(), hid=linear(6, 6)), [(5, 3, 4)], "relu@-1 relu@-1 relu@-1"),
    "ALBERT-style sharing": Case(
        net(lambda m, x: m.mlp(m.mlp(m.mlp(x))), mlp=Mlp), [(5, 3, 4)], "mlp.act@-1 mlp.act@-1 mlp.act@-1"
    ),
    "shared pre-activation residual block": Case(
        net(shared_residual, stem=linear(4, 4), block=PreNormBlock),
        [(5, 4)],
        "block-relu@-1 block-relu@-1 block-relu@-1",
    ),
    "the same layer behind two relus": Case(
        net(lambda m, x: m.b(m.fc(m.a(m.fc(x)))), fc=linear(4, 4), a=nn.ReLU, b=nn.ReLU), [(5, 4)], "a@-1 b@-1"
    ),
    # transformer layers
    "encoder layer, relu by name": Case(encoder(activation="relu"), [(3, 2, 4)], "relu@-1"),
    "encoder layer, F.relu": Case(encoder(activation=F.relu, batch_first=True), [(2, 3, 4)], "relu@-1"),
    "encoder layer, norm first": Case(encoder(norm_first=True, batch_first=True), [(2, 3, 4)], "relu@-1"),
    "encoder layer, nn.ReLU": Case(encoder(activation=nn.ReLU()), [(3, 2, 4)], "activation@-1"),
    "encoder layer, unbatched": Case(encoder(), [(3, 4)], "relu@-1"),
    "encoder": Case(
        lambda: nn.TransformerEncoder(encoder(batch_first=True)(), 2, enable_nested_tensor=False),
        [(2, 3, 4)],
        "layers.0-relu@-1 layers.1-relu@-1",
    ),
    "decoder layer": Case(
        lambda: nn.TransformerDecoderLayer(4, 2, 6, batch_first=True), [(2, 3, 4), (2, 5, 4)], "relu@-1"
    ),
    # shapes
    "[B, T, F]": Case(sequential(nn.Linear(4, 6), nn.ReLU()), [(2, 3, 4)], "1@-1"),
    "[B, H, W, F]": Case(sequential(nn.Linear(4, 6), nn.ReLU()), [(2, 3, 5, 4)], "1@-1"),
    "[F]": Case(sequential(nn.Linear(4, 6), nn.ReLU()), [(4,)], "1@-1"),
    "[B, C, L]": Case(lambda: nn.Sequential(conv_nd(1)(), nn.ReLU()), [(2, 4, 6)], "1@-2"),
    "[C, L]": Case(lambda: nn.Sequential(conv_nd(1)(), nn.ReLU()), [(4, 6)], "1@-2"),
    "NCHW": Case(lambda: nn.Sequential(conv_nd(2)(), nn.BatchNorm2d(6), nn.ReLU()), [(2, 4, 6, 6)], "2@-3"),
    "CHW": Case(lambda: nn.Sequential(conv_nd(2)(), nn.ReLU()), [(4, 6, 6)], "1@-3"),
    "NCDHW": Case(lambda: nn.Sequential(conv_nd(3)(), nn.ReLU()), [(2, 4, 6, 6, 6)], "1@-4"),
    "channels last": Case(
        lambda: nn.Sequential(conv_nd(2)(), nn.ReLU()).to(memory_format=torch.channels_last), [(2, 4, 6, 6)], "1@-3"
    ),
    "NHWC": Case(ConvNeXtBlock, [(2, 4, 5, 5)], "act@-1"),
    "sequence as image columns": Case(
        net(lambda m, x: F.relu(m.fc(x).transpose(1, 2)), fc=linear()), [(2, 3, 4)], "relu@-2"
    ),
    "batch norm over a transposed sequence": Case(
        net(lambda m, x: m.act(m.bn(m.fc(x).transpose(1, 2))), fc=linear(), bn=lambda: nn.BatchNorm1d(6), act=nn.ReLU),
        [(2, 3, 4)],
        "act@-2",
    ),
    "tokens flattened": Case(
        net(lambda m, x: F.relu(m.fc(x).view(-1, 6)).view(2, 3, 6), fc=linear()), [(2, 3, 4)], "relu@-1"
    ),
    "image flattened into features": Case(
        net(lambda m, x: F.relu(m.conv(x).flatten(1)), conv=conv_nd(2)), [(2, 4, 3, 3)], "relu@-1"
    ),
    "image flattened into tokens": Case(
        net(lambda m, x: F.relu(m.conv(x).flatten(2).transpose(1, 2)), conv=conv_nd(2)), [(2, 4, 3, 3)], "relu@-1"
    ),
    "pooled image": Case(net(lambda m, x: F.relu(m.conv(x).mean((2, 3))), conv=conv_nd(2)), [(2, 4, 3, 3)], "relu@-1"),
    "pooled sequence": Case(net(lambda m, x: F.relu(m.fc(x).mean(1)), fc=linear()), [(2, 3, 4)], "relu@-1"),
    "class token": Case(net(lambda m, x: F.relu(m.fc(x)[:, 0]), fc=linear()), [(2, 3, 4)], "relu@-1"),
    "first pixel": Case(net(lambda m, x: F.relu(m.conv(x)[..., 0, 0]), conv=conv_nd(2)), [(2, 4, 6, 6)], "relu@-1"),
    "linear attention": Case(LinearAttention, [(2, 3, 6)], "relu@-3,-1 relu-1@-3,-1"),
    "heads of a fused projection": Case(
        net(heads_from_fused, qkv=linear(4, 18)), [(2, 3, 4)], "relu@-2,-1 relu-1@-2,-1"
    ),
    "pixel shuffle": Case(
        net(lambda m, x: F.relu(F.pixel_shuffle(m.conv(x), 2)), conv=lambda: nn.Conv2d(4, 8, 1)),
        [(2, 4, 3, 3)],
        "relu@-3",
    ),
    "a single unit, squeezed": Case(net(lambda m, x: F.relu(m.fc(x).squeeze(-1)), fc=linear(4, 1)), [(5, 4)], "?relu"),
    "one unit of many": Case(net(lambda m, x: F.relu(m.fc(x)[:, 0]), fc=linear()), [(5, 4)], "?relu"),
    "mean over units": Case(net(lambda m, x: F.relu(m.fc(x).mean(-1)), fc=linear()), [(2, 3, 4)], "?relu"),
    "mean over channels": Case(net(lambda m, x: F.relu(m.conv(x).mean(1)), conv=conv_nd(2)), [(2, 4, 3, 3)], "?relu"),
    # parts and joins
    "chunk": Case(net(glu, fc=linear(4, 12)), [(5, 4)], "relu@-1 relu-1@-1"),
    "slices": Case(
        net(lambda m, x: F.relu(m.fc(x)[:, :3]) + F.relu(m.fc(x)[:, 3:]), fc=linear()), [(5, 4)], "relu@-1 relu-1@-1"
    ),
    "the same slice twice": Case(
        net(lambda m, x: F.relu(m.fc(x)[:, :3]) + F.relu(m.fc(x)[:, :3]), fc=linear()), [(5, 4)], "relu@-1 relu@-1"
    ),
    "split by sizes": Case(
        net(lambda m, x: [F.relu(part) for part in m.fc(x).split([2, 4], -1)], fc=linear()),
        [(5, 4)],
        "relu@-1 relu-1@-1",
    ),
    "batch split, same units": Case(
        net(lambda m, x: [F.relu(part) for part in m.fc(x).chunk(2, 0)], fc=linear()), [(4, 4)], "relu@-1 relu@-1"
    ),
    "CReLU": Case(net(crelu, fc=linear()), [(5, 4)], "relu@-1 relu-1@-1"),
    "negated twice": Case(
        net(lambda m, x: F.relu(m.fc(x)) + F.relu(m.fc(x).neg().neg()), fc=linear()), [(5, 4)], "relu@-1 relu@-1"
    ),
    "DenseNet concatenation": Case(
        net(dense, one=lambda: nn.Conv2d(4, 3, 3, padding=1), two=lambda: nn.Conv2d(7, 3, 3, padding=1)),
        [(2, 4, 5, 5)],
        "- relu@-3",
    ),
    "residual sum of two layers": Case(
        net(lambda m, x: F.relu(m.a(x) + m.b(x)), a=linear(), b=linear()), [(5, 4)], "relu@-1"
    ),
    # convolutions
    "grouped": Case(lambda: nn.Sequential(conv_nd(2, groups=2)(), nn.ReLU()), [(2, 4, 5, 5)], "1@-3"),
    "depthwise": Case(lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=4), nn.ReLU()), [(2, 4, 5, 5)], "1@-3"),
    "transposed": Case(lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3), nn.ReLU()), [(2, 4, 5, 5)], "1@-3"),
    "transposed 1d": Case(lambda: nn.Sequential(nn.ConvTranspose1d(4, 6, 3), nn.ReLU()), [(2, 4, 5)], "1@-2"),
    "group norm": Case(lambda: nn.Sequential(conv_nd(2)(), nn.GroupNorm(2, 6), nn.ReLU()), [(2, 4, 5, 5)], "2@-3"),
    "instance norm without weights": Case(
        lambda: nn.Sequential(conv_nd(1)(), nn.InstanceNorm1d(6), nn.ReLU()), [(2, 4, 5)], "2@-2"
    ),
    "pools and dropout in between": Case(
        lambda: nn.Sequential(conv_nd(2)(), nn.MaxPool2d(2), nn.Dropout2d(0.5), nn.Upsample(scale_factor=2), nn.ReLU()),
        [(2, 4, 6, 6)],
        "4@-3",
    ),
    # experts
    "experts": Case(MoE, [(2, 3, 4)], "experts.0.act@-1 experts.1.act@-1"),
    "stacked experts, bmm": Case(
        net(lambda m, x: F.relu(torch.bmm(x, m.w)), w=parameter(3, 4, 6)), [(3, 5, 4)], "relu@-3,-1"
    ),
    "stacked experts, einsum": Case(
        net(lambda m, x: F.relu(torch.einsum("ebd,edf->ebf", x, m.w)), w=parameter(3, 4, 6)),
        [(3, 5, 4)],
        "relu@-3,-1",
    ),
    "stacked experts, einsum over tokens": Case(
        net(lambda m, x: F.relu(torch.einsum("bd,edf->bef", x, m.w)), w=parameter(3, 4, 6)), [(5, 4)], "relu@-2,-1"
    ),
    "one expert of a stack": Case(
        net(lambda m, x: F.relu(x @ m.w[0]) + F.relu(x @ m.w[1]), w=parameter(3, 4, 6)),
        [(5, 4)],
        "relu@-1 relu-1@-1",
    ),
    "weight on the left": Case(net(lambda m, x: F.relu(m.w @ x), w=parameter(6, 4)), [(4, 5)], "relu@-2"),
    "weight transposed": Case(net(lambda m, x: F.relu(x @ m.w.T), w=parameter(6, 4)), [(5, 4)], "relu@-1"),
    "experts picked one by one by an index tensor": Case(
        net(
            lambda m, x: [F.relu(F.linear(x, m.w[i])) for i in torch.arange(2)],
            w=parameter(3, 6, 4),
        ),
        [(5, 4)],
        "relu@-1 relu-1@-1",
    ),
    "an expert gathered for each token": Case(
        net(lambda m, x: F.relu(torch.bmm(m.w[torch.arange(5) % 3], x[:, :, None])[..., 0]), w=parameter(3, 6, 4)),
        [(5, 4)],
        "relu@-1",
    ),
    "layers on learned queries": Case(
        net(lambda m, x: m.b(F.relu(m.a(m.queries))) + x, queries=parameter(5, 4), a=linear(), b=linear(6, 4)),
        [(5, 4)],
        "relu@-1",
    ),
    "two layers on learned queries": Case(
        net(lambda m, x: F.relu(m.b(F.relu(m.a(m.queries)))) + x, queries=parameter(5, 4), a=linear(), b=linear(6, 4)),
        [(5, 4)],
        "relu@-1 relu-1@-1",
    ),
    "low-rank update of a weight": Case(
        net(
            lambda m, x: F.relu(F.linear(x, m.fc.weight + m.b @ m.a)),
            fc=linear(),
            a=parameter(2, 4),
            b=parameter(6, 2),
        ),
        [(5, 4)],
        "relu@-1",
    ),
    # activations without parameters, computed weights
    "squared relu": Case(net(lambda m, x: m.mlp(x), mlp=lambda: Mlp(act=SquaredReLU())), [(5, 4)], "mlp.act-relu@-1"),
    "squared relu at the root": Case(lambda: Mlp(act=SquaredReLU()), [(5, 4)], "act-relu@-1"),
    "weight norm": Case(with_norm(nn.utils.parametrizations.weight_norm), [(5, 4)], "1@-1"),
    "spectral norm": Case(with_norm(nn.utils.parametrizations.spectral_norm), [(5, 4)], "1@-1"),
    "spectral norm alone": Case(with_norm(nn.utils.parametrizations.spectral_norm, bias=False), [(5, 4)], "1@-1"),
    "tied weights": Case(
        net(
            lambda m, x: F.linear(F.relu(m.decode(F.relu(m.encode(x)))), m.encode.weight),
            encode=linear(4, 6, bias=False),
            decode=linear(6, 4),
        ),
        [(5, 4)],
        "relu@-1 relu-1@-1",
    ),
    "bilinear": Case(
        lambda: Net(lambda m, a, b: F.relu(m.bi(a, b)), bi=nn.Bilinear(4, 3, 6)), [(5, 4), (5, 3)], "relu@-1"
    ),
    "embedding": Case(lambda: nn.Sequential(nn.Embedding(5, 6), nn.ReLU()), partial(one_hot_tokens, 2, 3), "1@-1"),
    "scale and shift only": Case(
        net(lambda m, x: F.relu(x * m.scale + m.shift), scale=parameter(6), shift=parameter(6)), [(5, 6)], "relu@-1"
    ),
    "attention scores": Case(
        net(lambda m, x: F.relu(m.q(x) @ m.k(x).transpose(1, 2)), q=linear(), k=linear()), [(2, 3, 4)], "?relu"
    ),
    "attention values": Case(
        net(lambda m, x: F.relu(F.scaled_dot_product_attention(x, x, m.v(x))), v=linear(4, 6)), [(2, 3, 4)], "relu@-1"
    ),
    "attention values, by hand": Case(
        net(
            lambda m, x: F.relu((m.q(x) @ m.k(x).transpose(1, 2)).softmax(-1) @ m.v(x)),
            q=linear(),
            k=linear(),
            v=linear(4, 5),
        ),
        [(2, 3, 4)],
        "relu@-1",
    ),
    "neighbours mixed by a fixed matrix": Case(
        net(lambda m, x: F.relu(torch.eye(5) @ m.fc(x)), fc=linear()), [(5, 4)], "relu@-1"
    ),
    "relu of a pooled relu": Case(
        net(lambda m, x: F.relu(F.avg_pool1d(F.relu(m.conv(x)), 2) - 0.1), conv=conv_nd(1)),
        [(2, 4, 6)],
        "relu@-2 relu-1@-2",
    ),
    # producers out of sight
    "own autograd function": Case(
        net(
            lambda m, x: F.relu(m.fc(x)),
            fc=lambda: Net(lambda m, x: OwnLinear.apply(x, m.weight), weight=nn.Parameter(torch.randn(6, 4))),
        ),
        [(5, 4)],
        "relu@-1",
    ),
    "own autograd function in place": Case(
        net(lambda m, x: F.relu(OwnLinear.apply(x, m.weight)), weight=parameter(6, 4)), [(5, 4)], "relu@-1"
    ),
    "scripted producer": Case(lambda: nn.Sequential(scripted(), nn.ReLU()), [(5, 4)], "1@-1"),
    "relu on data": Case(net(lambda m, x: m.fc(m.act(x)), fc=linear(), act=nn.ReLU), [(5, 4)], "act@-1"),
    "functional relu on data": Case(net(lambda m, x: m.fc(F.relu(x)), fc=linear()), [(5, 4)], "-"),
    # checkpointing: once, not again in backward
    "checkpoint": Case(partial(Checkpointed, use_reentrant=False), [(5, 4)], "mlp.act@-1"),
    "reentrant checkpoint": Case(partial(Checkpointed, use_reentrant=True), [(5, 4)], "mlp.act@-1"),
    "selective checkpoint": Case(
        partial(
            Checkpointed,
            use_reentrant=False,
            context_fn=partial(create_selective_checkpoint_contexts, keep_matmuls),
        ),
        [(5, 4)],
        "mlp.act@-1",
    ),
    # odd ways to call
    "functional_call": Case(
        lambda: Net(lambda m: None, mlp=Mlp()),
        [(5, 4)],
        "mlp.act@-1",
        lambda m, x: torch.func.functional_call(m.mlp, dict(m.mlp.named_parameters()), x),
    ),
    "functional_call with other values": Case(
        lambda: Net(lambda m: None, mlp=Mlp()),
        [(5, 4)],
        "mlp.act@-1",
        lambda m, x: torch.func.functional_call(m.mlp, {k: 2 * p for k, p in m.mlp.named_parameters()}, x),
    ),
    "tensor subclass": Case(lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU()), partial(tagged, 5, 4), "1@-1"),
    # what is no layer
    "hinge in a training step": Case(
        Mlp, [(5, 4), (5, 4)], "act@-1 -", lambda m, x, y: F.relu(1 - m(x) * y.sign()).mean()
    ),
    "hinge in a loss module": Case(
        lambda: Net(lambda m, x: m.mlp(x), mlp=Mlp(), loss=Hinge()),
        [(5, 4), (5, 4)],
        "mlp.act@-1 ?loss-relu",
        lambda m, x, y: m.loss(m(x), y),
    ),
    "overlap of boxes in a training step": Case(Mlp, [(5, 4), (5, 4)], "act@-1 -", lambda m, x, y: iou(m(x), y).sum()),
}


def inputs_of(case: Case) -> tuple[Tensor, ...]:
    return case.inputs() if callable(case.inputs) else tuple(torch.randn(shape) for shape in case.inputs)
