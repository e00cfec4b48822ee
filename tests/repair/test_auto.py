"""`remedy="auto"` does at each site what can be done there, and a remedy that is refused hands over to the next."""

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from torch import nn
from toys import Net, batches, fit, mlp

from lightning_deadrelu import DeadReLUMonitor, watch

EAGER = {"every_n_steps": 1, "window": 4, "min_samples": 2, "threshold": 0.0}


class Computed(nn.Module):
    """The weight before the rectifier is computed anew in each forward."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(4, 8), nn.Linear(8, 1)

    def forward(self, x):
        weight = self.first.weight - self.first.weight.mean(1, keepdim=True)
        return self.head(F.relu(F.linear(x, weight, self.first.bias)))


class Summed(nn.Module):
    """A layer whose output is added up, which no reset can follow."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(4, 8), nn.Linear(8, 1)

    def forward(self, x):
        h = F.relu(self.first(x))
        return self.head(h) + h.cumsum(-1)[..., -1:]


class Normed(nn.Module):
    """A norm over the samples, written out by hand; it may keep the mean for later."""

    def __init__(self, keeps=False):
        super().__init__()
        self.keeps, self.first, self.head = keeps, nn.Linear(4, 8), nn.Linear(8, 1)
        self.shift = nn.Parameter(torch.zeros(8))
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x):
        x = self.first(x)
        if self.keeps:
            self.mean.lerp_(x.detach().mean(0), 0.1)
        x = x - x.mean(0)
        return self.head(F.relu(x / (x.square().mean(0) + 1e-5).sqrt() + self.shift))


class KeepingNormed(Normed):
    def __init__(self):
        super().__init__(keeps=True)


def with_dead_units(net, count=3):
    with torch.no_grad():
        getattr(net, "shift", net.first.bias)[:count] = -3.0
    return net


@pytest.mark.filterwarnings("ignore:.*refused")
@pytest.mark.parametrize(
    ("make", "taken"),
    [
        (Computed, ["Reset", "BiasWarming", "WakeUp"]),
        (Summed, ["Reset", "BiasWarming"]),
        (KeepingNormed, ["Reset", "BiasWarming", "WakeUp"]),
    ],
)
def test_what_is_refused_hands_over_to_what_asks_for_less(make, taken):
    torch.manual_seed(0)
    net, monitor = with_dead_units(make()), DeadReLUMonitor(remedy="auto", **EAGER)
    fit(Net(net, lr=0.05), batches(120, 8), monitor)
    tried = [(event.remedy, event.action) for event in monitor.events]
    for remedy in taken[:-1]:
        assert (remedy, "refused") in tried
        assert (remedy, "edited") not in tried
    assert (taken[-1], "edited") in tried
    assert not any(action == "given up" for _, action in tried)


def test_a_reset_is_what_comes_first():
    torch.manual_seed(0)
    monitor = DeadReLUMonitor(remedy="auto", **EAGER)
    fit(Net(mlp(3)), batches(24, 8), monitor)
    assert {event.remedy for event in monitor.events} == {"Reset"}


def test_a_reset_behind_a_norm_written_by_hand_changes_nothing_and_revives():
    torch.manual_seed(0)
    net, x, outputs = with_dead_units(Normed()), torch.randn(64, 4), []

    class Looking(Callback):
        """Reads the output right before and behind the edit."""

        def on_train_batch_start(self, *args):
            outputs.append(net(x).detach())

        def on_train_batch_end(self, *args):
            outputs.append(net(x).detach())

    monitor = DeadReLUMonitor(remedy="auto", **EAGER)
    fit(Net(net, lr=0.0), batches(24, 8), monitor, Looking())
    edited = [event for event in monitor.events if event.action == "edited"]
    assert {(event.remedy, event.units) for event in edited} == {("Reset", (0, 1, 2))}
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    assert not monitor.report.sites[0].silent.any()


def test_a_loop_of_ones_own_wakes_units_too():
    torch.manual_seed(0)
    net = with_dead_units(Computed())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    with watch(net, optimizer, remedy="wake_up", **EAGER) as monitor:
        for _ in range(300):
            loss = (net(torch.randn(8, 4)) - torch.randn(8, 1)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            monitor.step(loss)
    assert monitor.events[0].action == "edited"
    assert not monitor.report.sites[0].silent[:3].all()
    assert not net._forward_hooks
