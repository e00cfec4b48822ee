"""What torch's own modules do is the same whether told from them or from the functions that they call."""

from contextlib import suppress

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from lightning_deadrelu.observe.probe import Probe


def opaque(module):
    """Have all functions that a module calls looked at, as those of a user's own modules are."""
    for one in module.modules():
        vars(one)["forward"] = one.forward  # an attribute of the instance's own
    return module


LEAVES = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Dropout(0.2), nn.Linear(6, 5), nn.GELU()), (7, 4)),
    "one dimension": (lambda: nn.Sequential(nn.Conv1d(3, 4, 2), nn.BatchNorm1d(4), nn.ReLU(inplace=True)), (5, 3, 6)),
    "two dimensions": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 2, padding=1, padding_mode="circular"), nn.BatchNorm2d(4), nn.ReLU()),
        (5, 3, 6, 6),
    ),
    "three dimensions": (lambda: nn.Sequential(nn.Conv3d(3, 4, 2), nn.BatchNorm3d(4), nn.ReLU()), (2, 3, 4, 4, 4)),
    "norm behind": (lambda: nn.Sequential(nn.Linear(4, 6, bias=False), nn.LayerNorm(6), nn.ReLU()), (7, 2, 4)),
    "old weight norm": (lambda: nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 6)), nn.ReLU()), (7, 4)),
    "pruned": (lambda: nn.Sequential(prune.random_unstructured(nn.Linear(4, 6), "weight", 0.3), nn.ReLU()), (7, 4)),
    "a layer used twice": (
        lambda: (lambda fc, act: nn.Sequential(fc, act, fc, act))(nn.Linear(4, 4), nn.ReLU()),
        (7, 4),
    ),
    "transformer": (lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), (3, 5, 4)),
}


@pytest.mark.parametrize("name", LEAVES)
def test_torchs_own_modules_are_what_the_functions_that_they_call_are(name):
    build, shape = LEAVES[name]
    told = []
    for see in (opaque, lambda module: module):
        torch.manual_seed(0)
        model, seen = see(build()), []
        probe = Probe(model, lambda site, rectifier, x, out, dims, seen=seen: seen.append((site, dims, x.clone(), out)))
        for _ in range(3):
            with probe:
                model(torch.randn(shape)).sum().backward()
        assert probe.failure is None
        told.append(seen)
    assert len(told[0]) == len(told[1]) > 0
    for one, other in zip(*told, strict=True):
        assert one[:2] == other[:2]
        assert all(torch.equal(x, y) for x, y in zip(one[2:], other[2:], strict=True))


def test_a_module_of_torch_that_fails_leaves_the_probe_looking():
    model, seen = nn.Sequential(nn.Linear(4, 6), nn.ReLU()), []
    with Probe(model, lambda site, *call: seen.append(site.owner)) as probe:
        with pytest.raises(RuntimeError):
            model(torch.randn(2, 3))
        model(torch.randn(2, 4))
        with probe_of_another(), suppress(RuntimeError):
            model(torch.randn(2, 3))
        model(torch.randn(2, 4))
    assert seen == ["1", "1"]
    assert probe.failure is None


def probe_of_another():
    return Probe(nn.ReLU(), lambda *call: None)


def test_what_a_users_own_hook_computes_is_seen():
    model, seen = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2)), []
    model[1].register_forward_pre_hook(lambda module, args: (F.relu(args[0]),))
    with Probe(model, lambda site, *call: seen.append((site.owner, site.source))):
        model(torch.randn(2, 4))
    assert seen == [("1", ("0.bias", "0.weight"))]


def test_a_class_of_torch_that_was_given_another_forward_is_looked_into(monkeypatch):
    forward, seen = nn.Linear.forward, []
    monkeypatch.setattr(nn.Linear, "forward", lambda module, x: F.relu(forward(module, x)))
    with Probe(nn.Linear(4, 6), lambda site, *call: seen.append((site.owner, site.source))) as probe:
        probe.model(torch.randn(2, 4))
    assert seen == [("", ("bias", "weight"))]


@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
@pytest.mark.parametrize("everywhere", [False, True])
def test_what_torch_puts_before_a_module_with_backward_hooks_is_seen(monkeypatch, register, everywhere):
    model, seen = nn.Sequential(nn.Linear(4, 6), nn.ReLU()), []
    monkeypatch.setattr(nn.modules.module, "_global_is_full_backward_hook", None)  # which registering sets for good
    add = (
        getattr(nn.modules.module, register.replace("_full", "_module_full"))
        if everywhere
        else getattr(model[1], register)
    )
    handle = add(lambda *args: None)
    try:
        with Probe(model, lambda site, *call: seen.append((site.owner, site.source))):
            model(torch.randn(2, 4, requires_grad=True)).sum().backward()
    finally:
        handle.remove()
    assert seen == [("1", ("0.bias", "0.weight"))]
