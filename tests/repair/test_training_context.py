"""What can be told of a model in training: which of its modules are compiled."""

import torch
from lightning.pytorch.utilities.compile import from_compiled
from torch import nn
from toys import Net

from lightning_deadrelu.repair.training_context import is_compiled


class Decorated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)

    @torch.compile(backend="eager")
    def forward(self, x):
        return self.fc(x)


def test_what_is_compiled():
    def inner() -> nn.Module:
        return nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Linear(2, 2))

    plain = inner()
    assert not is_compiled(plain, "0.0")
    assert is_compiled(torch.compile(plain, backend="eager"), "0.0")
    assert not is_compiled(plain, "0.0")  # what wraps it is not seen from inside
    part = inner()
    part[0] = torch.compile(part[0], backend="eager")
    assert is_compiled(part, "0.0")
    assert not is_compiled(part, "1")
    method = inner()
    method[0].compile(backend="eager")
    assert is_compiled(method, "0.0")
    assert not is_compiled(method, "1")
    leaf = inner()
    leaf[1].compile(backend="eager")
    assert is_compiled(leaf, "1")
    assert not is_compiled(leaf, "0.0")
    assert is_compiled(Decorated(), "fc")
    wrapped = nn.Module()
    wrapped.module = method  # as data parallelism does
    assert is_compiled(wrapped, "0.0")
    assert not is_compiled(wrapped, "1")
    lightning = Net()
    assert not is_compiled(lightning, "net.0")


def test_a_compiled_lightning_module_is_told():
    assert is_compiled(from_compiled(torch.compile(Net(), backend="eager")), "net.0")
