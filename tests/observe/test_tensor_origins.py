"""Where a tensor comes from is the same whether a call is followed anew or like one before."""

from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from lightning_deadrelu.observe import site_resolver, tensor_origins
from lightning_deadrelu.observe.probe import Probe

CALLS = [
    lambda net, x, y: F.linear(x, net.one),
    lambda net, x, y: F.linear(x, net.two, net.bias),
    lambda net, x, y: net.norm(x),
    lambda net, x, y: F.batch_norm(x, net.mean, net.var, training=True),
    lambda net, x, y: x + y,
    lambda net, x, y: x * net.constant,
    lambda net, x, y: torch.cat([x, y], 1),
    lambda net, x, y: torch.cat([y, x], -1),
    lambda net, x, y: torch.stack([x, y]).sum(0),
    lambda net, x, y: x @ y.transpose(1, 2),
    lambda net, x, y: torch.matmul(x, net.one),
    lambda net, x, y: torch.einsum("bij,bjk->bik", x, y),
    lambda net, x, y: x.transpose(1, 2),
    lambda net, x, y: x.transpose(0, 2),
    lambda net, x, y: x.permute(2, 0, 1),
    lambda net, x, y: x.permute(1, 2, 0),
    lambda net, x, y: x.movedim(-1, 1),
    lambda net, x, y: x.sum(1)[None] + y,
    lambda net, x, y: x.sum(2)[None] + y,
    lambda net, x, y: torch.einsum("bij,bkj->bik", x, y),
    lambda net, x, y: x.reshape(6, 6, -1),
    lambda net, x, y: x.reshape(-1, 6, 6),
    lambda net, x, y: x.flatten(1).view(*y.shape),
    lambda net, x, y: x.unsqueeze(1).squeeze(1),
    lambda net, x, y: x.sum(1, keepdim=True).expand_as(y),
    lambda net, x, y: x.mean(dim=2, keepdim=True) + y,
    lambda net, x, y: x.flip(-1),
    lambda net, x, y: x[:, :3],
    lambda net, x, y: x.narrow(2, 0, 3),
    lambda net, x, y: x.chunk(2, -1)[1],
    lambda net, x, y: x.softmax(-1) @ y,
    lambda net, x, y: F.pad(x, (0, 1)),
    lambda net, x, y: -x,
    lambda net, x, y: x.clone().add_(y),
    lambda net, x, y: x.float().contiguous(),
    lambda net, x, y: F.relu(x),
    lambda net, x, y: F.relu(x) + y,
]


class Net(nn.Module):
    """Makes the calls that it is told to, each of two tensors it has."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6, 6))
        self.bias, self.norm = nn.Parameter(torch.randn(6)), nn.BatchNorm1d(6)
        for name in ("mean", "var", "constant"):
            self.register_buffer(name, torch.ones(6))

    def forward(self, x, calls):
        known = [F.linear(x, self.one), x]
        for number, one, other in calls:
            with suppress(RuntimeError, IndexError, ValueError):  # sizes that do not fit
                made = CALLS[number](self, known[one % len(known)], known[other % len(known)])
                if 0 < made.numel() < 5000 and made.ndim == 3:
                    known.append(made)
        return [F.relu(made) for made in known]


calls = st.lists(st.tuples(st.integers(0, len(CALLS) - 1), st.integers(0, 9), st.integers(0, 9)), max_size=8)


def sites(probe, seen, net, program):
    seen.clear()
    with probe:
        net(torch.randn(6, 6, 6), program)
    assert probe.failure is None
    return list(seen)


@pytest.fixture(scope="module")
def watched():
    """Give a network, a probe that has seen many forwards of it, and what that sees."""
    torch.manual_seed(0)
    net, seen = Net(), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(site_resolver, "_MOST_WIDTHS", 1000)  # else a site is passed over that has many
        yield net, Probe(net, lambda site, rectifier, x, out, dims: seen.append((site, dims))), seen


@settings(max_examples=150, deadline=None)
@given(calls)
def test_a_probe_that_has_seen_other_forwards_sees_what_a_new_one_does(watched, program):
    net, probe, seen = watched
    fresh: list = []
    new = Probe(net, lambda site, rectifier, x, out, dims: fresh.append((site, dims)))
    expected = sites(new, fresh, net, program)
    assert sites(probe, seen, net, program) == expected
    assert sites(probe, seen, net, program) == expected


@pytest.mark.parametrize("name", ["resnet", "attention", "views"])
def test_no_call_is_followed_twice(monkeypatch, name):
    made = {
        "resnet": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()),
        "attention": lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True),
        "views": lambda: nn.Sequential(nn.Linear(8, 12), nn.Unflatten(-1, (3, 4)), nn.ReLU(), nn.Flatten(1)),
    }
    model = made[name]()
    x = torch.randn(2, 3, 8, 8) if name == "resnet" else torch.randn(2, 5, 8)
    probe, followed = Probe(model, lambda *call: None), []
    follow = tensor_origins.follow
    monkeypatch.setattr(tensor_origins, "follow", lambda call, known: followed.append(call.name) or follow(call, known))
    with probe:
        model(x)
    first = len(followed)
    followed.clear()
    with probe:
        model(x)
    assert len(followed) <= 2 < first, followed  # what reads the model's input, or returns several tensors


class Hidden(torch.autograd.Function):
    """Computes a weight where nobody looks."""

    @staticmethod
    def forward(ctx, weight):
        return torch.from_numpy(weight.detach().numpy() * 2)


class Scaled(nn.Linear):
    def forward(self, x):
        return F.relu(F.linear(x.flatten(1), Hidden.apply(self.weight).contiguous().to(x.dtype, copy=True)))


class Stretch(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return F.relu(x.flatten(1) * self.scale)


def test_of_a_parameter_that_another_tensor_stands_in_for_the_module_tells():
    model, other, seen = nn.Sequential(Stretch(), nn.Linear(4, 2)), Stretch(), []
    with Probe(model, lambda site, *call: seen.append((site.owner, site.source))):
        torch.func.functional_call(model, {"0.scale": other.scale.clone()}, torch.randn(3, 4))
    assert seen == [("0", ("0.scale",))]


def test_of_a_weight_computed_out_of_sight_the_module_tells_at_each_call():
    model, seen = nn.Sequential(Scaled(4, 6, bias=False), Scaled(6, 6, bias=False)), []
    probe = Probe(model, lambda site, *call: seen.append((site.owner, site.source)))
    for _ in range(2):
        with probe:
            model(torch.randn(3, 4))
    assert probe.failure is None
    assert seen == 2 * [("0", ("0.weight",)), ("1", ("1.weight",))]
