"""Promise 8: a unit remedy touches only its units, and a reset changes the output by exactly nothing."""

import copy

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn
from toys import EVERYTHING, Net, assert_same, batches, fit, mlp

from lightning_deadrelu import DeadReLUMonitor
from lightning_deadrelu.remedies import BiasWarming, LeakySlope, Reset, SwapActivation, ThermalKick, WakeUp

OBJECTS = {
    "reset": Reset(),
    "thermal_kick": ThermalKick(depth=3.0),
    "bias_warming": BiasWarming(steps=15),
    "leaky": LeakySlope(ramp_steps=None, attempts=1),
    "ramp": LeakySlope(ramp_steps=12),
    "gelu": SwapActivation(activation="gelu"),
}
EAGER = {"every_n_steps": 1, "window": 4, "min_samples": 2, "threshold": 0.0}


class Compare(Callback):
    """Keeps everything that could differ, before and after the monitor's turn at each batch."""

    def __init__(self, probe, store):
        self.probe, self.store = probe, store

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        with torch.no_grad():
            logits = pl_module.net(self.probe)
        state = copy.deepcopy([pl_module.state_dict(), trainer.optimizers[0].state_dict()["state"], logits])
        self.store.append(state)


def around(monitor, probe):
    """Keep what is there on both sides of the monitor's turn; no callback comes before it."""
    before, after = [], []
    look, act = Compare(probe, before).on_train_batch_end, monitor.on_train_batch_end

    def turn(*batch):
        look(*batch)
        act(*batch)

    monitor.on_train_batch_end = turn
    return [monitor, Compare(probe, after)], before, after


def test_a_reset_revives_and_changes_the_output_by_exactly_nothing():
    torch.manual_seed(0)
    model, data = Net(mlp(3)), batches(24, 8)
    probe = torch.cat(list(data))
    monitor = DeadReLUMonitor(remedy="reset", **EAGER)
    callbacks, before, after = around(monitor, probe)
    fit(model, data, *callbacks)
    (edit,) = [event for event in monitor.events if event.action == "edited" and event.site == "net.1"][:1]
    (place,) = [
        i
        for i, (a, b) in enumerate(zip(before, after, strict=True))
        if not torch.equal(a[0]["net.0.weight"], b[0]["net.0.weight"])
    ][:1]
    assert edit.units == (0, 1, 2)
    assert place == edit.step
    assert torch.equal(before[place][2], after[place][2])
    untouched = [3, 4, 5, 6, 7]
    for name, rows in (
        ("net.0.weight", (untouched,)),
        ("net.0.bias", (untouched,)),
        ("net.2.weight", (slice(None), untouched)),
    ):
        assert torch.equal(before[place][0][name][rows], after[place][0][name][rows])
    for name in ("net.2.bias", "net.4.weight", "net.4.bias"):
        assert torch.equal(before[place][0][name], after[place][0][name])
    assert not monitor.report["net.1"].silent[:3].all()
    assert "revived" in [event.action for event in monitor.events]


@pytest.mark.parametrize("remedy", [BiasWarming(steps=15), WakeUp(), LeakySlope()], ids=["lift", "wake_up", "leaky"])
def test_what_brings_units_back_slowly_changes_nothing_at_the_edit(remedy):
    torch.manual_seed(0)
    data = batches(12, 8)
    monitor = DeadReLUMonitor(remedy=remedy, include=["net.1"], **EAGER)
    callbacks, before, after = around(monitor, torch.cat(list(data)))
    fit(Net(mlp(3)), data, *callbacks)
    edit = next(event for event in monitor.events if event.action == "edited")
    (old_weights, old_state, old_output), (weights, state, output) = before[edit.step], after[edit.step]
    assert torch.equal(old_output, output)
    assert_same(old_weights, weights)
    assert_same(old_state, state)


@pytest.mark.parametrize("remedy", OBJECTS.values(), ids=OBJECTS)
def test_only_dead_units_of_the_site_are_touched(remedy):
    torch.manual_seed(0)
    model, data = Net(mlp(3)), batches(12, 8)
    monitor = DeadReLUMonitor(remedy=remedy, include=["net.1"], **EAGER)
    callbacks, before, after = around(monitor, torch.cat(list(data)))
    fit(model, data, *callbacks)
    rows = {"net.0.weight": 0, "net.0.bias": 0, "net.2.weight": 1}
    for (weights, state, _), (new_weights, new_state, _) in zip(before, after, strict=True):
        for name, tensor in weights.items():
            kept = torch.equal(tensor, new_weights[name])
            if name in rows:
                live = torch.arange(3, tensor.shape[rows[name]])
                kept = torch.equal(
                    tensor.index_select(rows[name], live), new_weights[name].index_select(rows[name], live)
                )
            assert kept, name
        for number, name in enumerate(weights):
            for key, value in state[number].items():
                kept = torch.equal(value, new_state[number][key])
                if name in rows and value.ndim:
                    live = torch.arange(3, value.shape[rows[name]])
                    kept = torch.equal(
                        value.index_select(rows[name], live), new_state[number][key].index_select(rows[name], live)
                    )
                assert kept, (name, key)
    assert "edited" in [event.action for event in monitor.events]


class LastBlock(nn.Module):
    """A block whose backcast nobody reads, as the last of N-BEATS has it."""

    def __init__(self, frozen):
        super().__init__()
        self.fc, self.forecast, self.backcast = nn.Linear(4, 8), nn.Linear(8, 1), nn.Linear(8, 4)
        self.backcast.requires_grad_(not frozen)
        with torch.no_grad():
            self.fc.bias[:3] = -100.0

    def forward(self, x):
        h = torch.relu(self.fc(x))
        self.left = x - self.backcast(h)
        return self.forecast(h)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_layer_that_never_reaches_the_loss_does_not_block_a_reset_of_what_feeds_it(frozen):
    net = LastBlock(frozen)
    kept = net.backcast.weight.clone()
    monitor = DeadReLUMonitor(**EVERYTHING, remedy="reset")
    fit(Net(net), batches(12), monitor)
    assert [event.action for event in monitor.events][:1] == ["edited"], monitor.events
    assert not frozen or torch.equal(net.backcast.weight, kept)


class FrozenHead(LastBlock):
    def forward(self, x):
        return super().forward(x) + self.left.sum(1, keepdim=True)


def test_a_frozen_layer_that_reaches_the_loss_is_a_reader():
    monitor = DeadReLUMonitor(**EVERYTHING, remedy="reset")
    with pytest.warns(
        UserWarning, match=r"`net\.backcast\.weight` is not trained, so what is written there would stay"
    ):
        fit(Net(FrozenHead(True)), batches(12), monitor)
    assert not any(event.action == "edited" for event in monitor.events)
