"""Remedies at work in a real Trainer: what they change, what they leave, and when."""

from dataclasses import dataclass
from typing import ClassVar
from unittest import mock

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn
from toys import Loader, Log, Net, assert_same, bare, batches, fit, mlp, tensors
from two_ranks import ddp_trainer, on_two_ranks

from lightning_deadrelu import DeadReLUMonitor, restore_activations, watch
from lightning_deadrelu.remedies import (
    Activation,
    BiasWarming,
    Edits,
    LeakySlope,
    Lift,
    Push,
    Remedy,
    Reset,
    SwapActivation,
    ThermalKick,
    WakeUp,
    Warmth,
    Write,
)
from lightning_deadrelu.repair.event import Event
from lightning_deadrelu.repair.repair import Repair
from lightning_deadrelu.statistics.confirmation import Confirmation

FLAGS = ["auto", "reset", "thermal_kick", "bias_warming", "wake_up", "leaky", "leaky_relu", "rrelu", "elu", "selu"]
FLAGS += ["gelu", "silu"]
OBJECTS = {
    "reset": Reset(),
    "thermal_kick": ThermalKick(depth=3.0),
    "bias_warming": BiasWarming(steps=15),
    "at_once": BiasWarming(steps=15, at_once=True),
    "wake_up": WakeUp(max_steps=20),
    "leaky": LeakySlope(ramp_steps=None, attempts=1, cooldown=10),
    "ramp": LeakySlope(ramp_steps=12),
    "gelu": SwapActivation(activation="gelu"),
}
EAGER = {"every_n_steps": 1, "window": 4, "min_samples": 2, "threshold": 0.0}


def actions(monitor):
    return [event.action for event in monitor.events]


@pytest.mark.parametrize("flag", FLAGS)
def test_a_healthy_run_stays_as_it_was_to_the_last_bit(flag):
    def run(*callbacks):
        torch.manual_seed(3)
        model = Net(nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1)))
        trainer = fit(model, batches(30, 20), *callbacks, max_epochs=2)
        return model.state_dict(), trainer.optimizers[0].state_dict(), torch.get_rng_state()

    monitor = DeadReLUMonitor(remedy=flag, every_n_steps=2, window=5, threshold=0.0)
    assert_same(run(monitor), run())
    assert monitor.report.dead_units == 0
    assert monitor.events == ()


@pytest.mark.parametrize("remedy", ["reset", "thermal_kick"])
def test_remedies_bring_units_back_for_good(remedy):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 1))
    with torch.no_grad():
        net[0].bias[:16] = -4.0
        net[0].weight[:16] *= 0.3
    monitor = DeadReLUMonitor(remedy=remedy, every_n_steps=1, window=5, min_samples=20, threshold=0.0)
    fit(Net(net), batches(200, 16), monitor, max_epochs=2)
    assert monitor.report["net.1"].dead.sum() <= 4
    assert sum(event.action == "revived" for event in monitor.events) >= 1


def test_what_survives_the_anneal_is_measured_and_said():
    torch.manual_seed(0)
    monitor = DeadReLUMonitor(remedy=BiasWarming(steps=10, attempts=1), include=["net.1"], **EAGER)
    fit(Net(mlp(3), lr=0.001), batches(60, 8), monitor)
    edit, outcome = monitor.events[:2]
    assert (edit.action, outcome.action in ("revived", "failed")) == ("edited", True)
    assert outcome.step >= edit.step + 10
    alive = 3 - int(monitor.report["net.1"].silent[:3].sum())
    assert outcome.reason.startswith(f"{alive} of 3 repaired units fire")


def test_a_dry_run_says_what_it_would_do_and_does_nothing():
    def run(*callbacks):
        torch.manual_seed(0)
        model = Net(mlp(3))
        trainer = fit(model, batches(12, 8), *callbacks)
        return model.state_dict(), trainer.optimizers[0].state_dict()

    monitor = DeadReLUMonitor(remedy=Reset(dry_run=True), **EAGER)
    assert_same(run(monitor), run())
    assert set(actions(monitor)) == {"would edit"}


def test_units_that_fire_once_more_are_not_edited():
    """Silence is confirmed on one more observed batch: here all units come back in it."""
    data = [torch.ones(8, 4)] * 4 + [-torch.ones(8, 4)] * 3
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 1))
    nn.init.constant_(net[0].weight, -1.0)
    monitor = DeadReLUMonitor(remedy="reset", **EAGER)
    model = Net(net, lr=0.0)
    fit(model, torch.utils.data.DataLoader(data, batch_size=None), monitor)
    assert "edited" not in actions(monitor)
    assert (net[0].weight == -1).all()


class Gan(LightningModule):
    """A discriminator whose first unit fires on real data alone, and whose second never does."""

    def __init__(self):
        super().__init__()
        self.critic = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
        with torch.no_grad():
            self.critic[0].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-1.0, -1.0]]))
            self.critic[0].bias.copy_(torch.tensor([0.0, -100.0, 3.0, 3.0]))

    def training_step(self, batch, batch_idx):
        real = self.critic(torch.ones(8, 2))
        fake = self.critic(-torch.ones(8, 2))
        return (fake - real).mean() * 0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_live_unit_of_a_layer_called_several_times_is_never_edited():
    torch.manual_seed(0)
    model = Gan()
    first = model.critic[0].weight[0].clone()
    monitor = DeadReLUMonitor(remedy="reset", **EAGER)
    fit(model, batches(20), monitor)
    edits = [event for event in monitor.events if event.action == "edited"]
    assert edits
    assert all(0 not in event.units for event in edits)
    assert edits[0].units == (1,)
    assert torch.equal(model.critic[0].weight[0], first)


# -- as written by users ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"remedy": "rest"}, "Did you mean `remedy='reset'`"),
        ({"remedy": "prelu"}, "swap_activations_"),
        ({"remedy": "reset", "threshold": 1.0}, "no remedy would ever act"),
        ({"remedy": []}, "an empty list names no remedy"),
        ({"remedy": 3}, "flag"),
        ({"remedy": Reset}, r"Reset\(\)"),
    ],
)
def test_what_cannot_work_is_refused_at_construction(settings, message):
    with pytest.raises(MisconfigurationException, match=message):
        DeadReLUMonitor(**settings)


@dataclass(frozen=True, kw_only=True)
class Explode(Remedy):
    """Does harm."""

    def propose(self, view, generator):
        bias = view.attribution.bias.of(view.units)
        return Edits(writes=(Write(bias, 1e4),))


@dataclass(frozen=True, kw_only=True)
class Broken(Remedy):
    def propose(self, view, generator):
        raise RuntimeError("no idea")


def test_harm_is_noticed_logged_and_not_repeated():
    torch.manual_seed(0)
    monitor = DeadReLUMonitor(remedy=Explode(attempts=1), **EAGER)
    fit(Net(mlp(3)), batches(60, 8), monitor)
    first = [action for action, event in zip(actions(monitor), monitor.events, strict=True) if event.site == "net.1"]
    assert first == ["edited", "harmed", "given up"]


@dataclass(frozen=True, kw_only=True)
class Misshapen(Remedy):
    def propose(self, view, generator):
        return Edits(writes=(Write(view.attribution.bias.of(view.units), torch.zeros(17)),))


@dataclass(frozen=True, kw_only=True)
class Idle(Remedy):
    def propose(self, view, generator):
        return Edits()


@pytest.mark.parametrize(
    ("remedy", "reason"),
    [
        (Broken(), "its `propose` failed: RuntimeError: no idea"),
        (Misshapen(), r"its values have shape \(17,\)"),
        (Idle(), "it proposes nothing"),
    ],
    ids=["broken", "misshapen", "idle"],
)
def test_a_remedy_of_the_users_that_fails_gives_way_to_the_next(remedy, reason):
    torch.manual_seed(0)
    monitor = DeadReLUMonitor(remedy=[remedy, "reset"], include=["net.1"], **EAGER)
    with pytest.warns(UserWarning, match=reason):
        fit(Net(mlp(3)), batches(40, 8), monitor)
    assert actions(monitor)[:3] == ["refused", "escalated", "edited"]
    assert monitor.report.step == 39


def test_what_is_not_trained_is_not_edited():
    torch.manual_seed(0)
    model = Net(mlp(3))
    model.net[2].weight.requires_grad = False
    before = model.net[2].weight.clone()
    monitor = DeadReLUMonitor(remedy="reset", include=["net.1"], **EAGER)
    with pytest.warns(UserWarning, match="refused `net.1`: `net.2.weight` is not trained"):
        fit(model, batches(20, 8), monitor)
    assert torch.equal(model.net[2].weight, before)


class Taking(Net):
    """Two tasks take turns, batch by batch; half of the units are for one of them alone."""

    def __init__(self):
        super().__init__(nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1)), lr=0.0)
        with torch.no_grad():
            self.net[0].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat_interleave(4, 0))
            self.net[0].bias.zero_()

    def training_step(self, batch, batch_idx):
        task = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])[batch_idx % 2]
        return self.net(task.expand(8, 2)).pow(2).mean()


@pytest.mark.slow
def test_observation_does_not_beat_with_the_rhythm_of_the_training():
    torch.manual_seed(0)
    model = Taking()
    monitor = DeadReLUMonitor(remedy="reset", every_n_steps=10, window=10, min_samples=20, threshold=0.0)
    fit(model, batches(1000), monitor)
    assert monitor.report.dead_units == 0
    assert monitor.events == ()


class Heads(Net):
    """Two heads take turns, so that a batch meets but one of the readers."""

    def __init__(self):
        super().__init__(nn.ModuleList([nn.Sequential(nn.Linear(4, 8), nn.ReLU()), nn.Linear(8, 1), nn.Linear(8, 1)]))
        with torch.no_grad():
            self.net[0][0].bias[:3] = -100.0

    def training_step(self, batch, batch_idx):
        return (self.net[1 + batch_idx % 2](self.net[0](batch)) - 1).pow(2).mean()


class Outputs(Callback):
    def __init__(self, probe, store):
        self.probe, self.store = probe, store

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        body, *heads = pl_module.net
        with torch.no_grad():
            self.store.append([head(body(self.probe)) for head in heads])


def test_readers_that_take_turns_are_all_found():
    torch.manual_seed(0)
    data = batches(60, 8)
    before, after = [], []
    probe = torch.cat(list(data))
    monitor = DeadReLUMonitor(remedy="reset", every_n_steps=2, window=4, min_samples=2, threshold=0.0)
    fit(Heads(), data, Outputs(probe, before), monitor, Outputs(probe, after))
    (edit, *_) = [event for event in monitor.events if event.action == "edited"]
    assert edit.units == (0, 1, 2)
    assert {one.name for one in monitor.attribution["net.0.1"].outgoing} == {"net.1.weight", "net.2.weight"}
    assert_same(before[edit.step], after[edit.step])


def test_padding_and_a_mean_before_the_rectifier_keep_no_unit_from_its_remedy():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.act, self.head = nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)
            with torch.no_grad():
                self.fc.bias[:3] = -0.3
                self.fc.weight[:3] *= 0.3  # fires on single tokens, never on their mean

        def forward(self, x):
            return self.head(self.act(self.fc(x.unflatten(0, (-1, 64))).mean(1)))

    torch.manual_seed(0)
    monitor = DeadReLUMonitor(remedy="reset", **EAGER)
    fit(Net(Pooled(), lr=0.0), batches(20, 256), monitor)
    assert any(event.action == "edited" for event in monitor.events)


def test_a_threshold_is_minded_by_new_units():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Threshold(2.0, 0.0), nn.Linear(8, 1))
    with torch.no_grad():
        net[0].bias[:4] = -100.0
    monitor = DeadReLUMonitor(remedy=Reset(attempts=1), **EAGER)
    fit(Net(net), batches(30, 32), monitor)
    assert actions(monitor)[:2] == ["edited", "revived"]


def test_one_batch_in_every_n_steps_is_observed_at_a_place_that_changes():
    monitor = DeadReLUMonitor(remedy="reset", every_n_steps=10)
    due = [batch for batch in range(1000) if monitor._settings.is_due(batch)]
    assert [batch // 10 for batch in due] == list(range(100))
    assert due[0] == 0
    assert {batch % 10 for batch in due} == set(range(10))
    plain = DeadReLUMonitor(every_n_steps=10)
    assert [batch for batch in range(1000) if plain._settings.is_due(batch)] == list(range(0, 1000, 10))


def test_two_monitors_with_remedies_are_refused():
    pair = DeadReLUMonitor(remedy="reset"), DeadReLUMonitor(remedy="leaky", name="second")
    with pytest.raises(MisconfigurationException, match="would edit the same units"):
        fit(Net(), batches(2), *pair)
    fit(Net(), batches(2), pair[0], DeadReLUMonitor(name="third"))


class Residual(nn.Module):
    """Its last rectifier sits behind an addition, on the identity path."""

    def __init__(self):
        super().__init__()
        self.stem, self.inner, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 1)
        self.act1, self.act2 = nn.ReLU(), nn.ReLU()
        with torch.no_grad():
            self.inner.bias[:4] = -1000.0

    def forward(self, x):
        x = self.act1(self.stem(x))
        return self.head(self.act2(self.inner(x) + x))


def test_what_cannot_be_traced_is_refused_by_name_once_and_the_next_remedy_tried():
    torch.manual_seed(0)
    monitor = DeadReLUMonitor(remedy=["reset", "leaky"], include=["net.act2"], **EAGER)
    with pytest.warns(UserWarning, match=r"Reset refused `net.act2`: .*identity") as told:
        fit(Net(Residual()), batches(40, 8), monitor)
    assert sum("refused" in str(one.message) for one in told) == 1
    assert actions(monitor)[:3] == ["refused", "escalated", "edited"]


def test_an_optimizer_whose_state_is_unknown_is_refused():
    class Odd(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    self.state[p]["riddle"] = torch.ones_like(p)
            return super().step(closure)

    torch.manual_seed(0)
    monitor = DeadReLUMonitor(remedy="reset", include=["net.1"], **EAGER)
    with pytest.warns(UserWarning, match="refused `net.1`: .*riddle"):
        fit(Net(mlp(3), optimizer=Odd), batches(20, 8), monitor)
    assert actions(monitor) == ["refused", "given up"]


@pytest.mark.filterwarnings("ignore:.*Checkpoint directory")
def test_averaged_copies_are_left_alone_and_that_is_said_once():
    torch.manual_seed(0)
    monitor = DeadReLUMonitor(remedy="reset", **EAGER)
    average = WeightAveraging()
    with pytest.warns(UserWarning, match="averaged copies of the weights .* are left alone") as told:
        fit(Net(mlp(3)), batches(40, 8), monitor, average)
    assert sum("averaged copies" in str(one.message) for one in told) == 1


def test_attribution_prints_as_a_table():
    monitor = DeadReLUMonitor(remedy=Reset(dry_run=True), **EAGER)
    assert monitor.attribution is None
    fit(Net(), batches(3), monitor)
    text = str(monitor.attribution)
    assert "net.1" in text
    assert "net.0.bias" in text


def test_edited_units_are_logged():
    torch.manual_seed(0)
    log, monitor = Log(), DeadReLUMonitor(remedy="reset", include=["net.1"], **EAGER)
    fit(Net(mlp(3)), batches(40, 8), monitor, logger=log)
    edited = sum(len(event.units) for event in monitor.events if event.action == "edited")
    assert sum(metrics["dead_relu_details/remedied_units"] for _, metrics in log.verdicts()) == edited > 0
    assert sum(metrics["dead_relu/revived_units"] for _, metrics in log.verdicts()) > 0


def test_events_are_bounded():
    repair = Repair([Reset()], 0.1, 299, lambda event: None)
    repair._record(Event(step, "fc", "edited", "Reset", tuple(range(1000))) for step in range(2000))
    assert len(repair.events) == 100
    assert repair.events[-1].step == 1999


# -- terms that fade -------------------------------------------------------------------------------------


class Peek(Callback):
    """Looks at the model where no term may be seen."""

    def __init__(self):
        self.outputs, self.inside = [], []

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        plain = nn.Sequential(*[type(m)() if isinstance(m, nn.ReLU) else m for m in pl_module.net])
        self.outputs.append(torch.equal(pl_module.net(batch), plain(batch)))


def test_validation_never_sees_a_term():
    torch.manual_seed(0)
    monitor, peek = DeadReLUMonitor(remedy=BiasWarming(steps=100, at_once=True), **EAGER), Peek()
    fit(Net(mlp(3)), batches(20, 8), monitor, peek, val=batches(2), val_check_interval=4)
    assert "edited" in actions(monitor)
    assert peek.outputs
    assert all(peek.outputs)


def test_a_term_in_flight_is_dropped_when_training_ends_and_that_is_said():
    torch.manual_seed(0)
    model, monitor = Net(mlp(3)), DeadReLUMonitor(remedy=BiasWarming(steps=1000, at_once=True), **EAGER)
    fit(model, batches(20, 8), monitor)
    assert actions(monitor)[-1] == "dropped"
    assert not any(module._forward_hooks for module in model.modules())


@dataclass(frozen=True, kw_only=True)
class TermOrPush(Remedy):
    """Adds a term before the first rectifier, and pushes the units of the other."""

    needs: ClassVar = frozenset({"outlet"})

    def propose(self, view, generator):
        if view.report.name == "1":
            return Edits(warmth=Warmth(view.units * 0.1, 500))
        return Edits(push=Push(view.units, steps=500))


def dropped_edits(steps, state=None):
    """Train for some steps, from a state if one is given; return what was dropped at the end, and the state before."""
    model = mlp(3)
    with torch.no_grad():
        model[2].bias[:2] = -100.0
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    with watch(model, optimizer, remedy=TermOrPush(), **EAGER) as monitor:
        if state:
            monitor.load_state_dict(state)
        for batch in tensors(steps, 8):
            model(batch).sum().backward()
            optimizer.step()
            monitor.step()
        state = monitor.state_dict()
    return [event.site for event in monitor.events if event.action == "dropped"], state


def test_edits_are_dropped_in_one_order_whether_the_run_was_resumed_or_not():
    names, state = dropped_edits(12)
    assert len(names) == 2
    assert dropped_edits(2, state)[0] == names


@pytest.mark.parametrize(
    "remedy", [BiasWarming(steps=1000, at_once=True), LeakySlope(ramp_steps=1000)], ids=["gamma", "ramp"]
)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_gone_means_gone_also_after_an_error(remedy, error):
    class Stop(Callback):
        def on_before_backward(self, trainer, pl_module, loss):
            if trainer.global_step == 15:
                raise error

    torch.manual_seed(0)
    model, monitor = Net(mlp(3)), DeadReLUMonitor(remedy=remedy, **EAGER)
    with pytest.raises((error, SystemExit)):
        fit(model, batches(20, 8), monitor, Stop())
    assert "edited" in actions(monitor)
    assert not any(module._forward_hooks for module in model.modules())
    assert [type(module) for module in model.net] == [type(module) for module in mlp()]


def test_a_checkpoint_saved_after_an_error_holds_the_terms_in_flight(tmp_path):
    class Stop(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 15:
                raise RuntimeError

        def on_exception(self, trainer, pl_module, exception):
            trainer.save_checkpoint(tmp_path / "error.ckpt")

    with pytest.raises(RuntimeError):
        run_to_the_end(BiasWarming(steps=30, at_once=True), tensors(20, 8), Stop())
    (state,) = torch.load(tmp_path / "error.ckpt", weights_only=True)["callbacks"].values()
    assert {term["site"] for term in state["run"]["repair"]["editor"]["schedule"]["offsets"]} >= {"net.1"}
    assert {lift["site"] for lift in state["run"]["repair"]["editor"]["schedule"]["lifts"]} >= {"net.1"}


@pytest.mark.parametrize("later", [None, "reset", ["reset", "leaky"]], ids=str)
def test_a_run_may_go_on_with_other_remedies(later, tmp_path):
    items = tensors(20, 8)
    run_to_the_end(["bias_warming", LeakySlope(ramp_steps=50)], items, Save(tmp_path))
    for path in sorted(tmp_path.glob("*.ckpt"))[::4]:
        monitor, _, _ = run_to_the_end(later, items, ckpt=path)
        assert monitor.failure is None
        assert monitor.report is not None


def test_activations_are_saved_also_once_the_watch_has_failed(tmp_path):
    torch.manual_seed(0)
    calls = []

    def mask(batch):
        calls.append(1)
        if len(calls) > 15:
            raise ValueError("broken")

    monitor = DeadReLUMonitor(remedy="gelu", include=["net.1"], mask=mask, **EAGER)
    model = Net(mlp(3))
    with pytest.warns(UserWarning, match="watches no longer"):
        trainer = fit(model, batches(30, 8), monitor)
    assert isinstance(model.net[1], nn.GELU)
    trainer.save_checkpoint(tmp_path / "late.ckpt")
    fresh = restore_activations(Net(mlp(3)), tmp_path / "late.ckpt")
    assert isinstance(fresh.net[1], nn.GELU)
    resumed = Net(mlp(3))
    with pytest.warns(UserWarning, match="had failed when the checkpoint was saved"):
        fit(resumed, batches(30, 8), DeadReLUMonitor(remedy="gelu", **EAGER), ckpt=tmp_path / "late.ckpt", max_epochs=2)
    assert isinstance(resumed.net[1], nn.GELU)


def test_a_ladder_that_starts_with_an_activation_goes_on_with_a_reset():
    torch.manual_seed(0)
    model, monitor = (
        Net(mlp(3)),
        DeadReLUMonitor(remedy=[LeakySlope(ramp_steps=None, attempts=1), "reset"], include=["net.1"], **EAGER),
    )
    fit(model, batches(80, 8), monitor)
    assert actions(monitor)[:5] == ["edited", "failed", "escalated", "edited", "revived"]
    assert type(model.net[1]) is nn.ReLU


def test_a_unit_under_a_term_is_judged_without_it():
    torch.manual_seed(0)
    monitor = DeadReLUMonitor(remedy=BiasWarming(steps=10_000, at_once=True), include=["net.1"], **EAGER)
    fit(Net(mlp(3), lr=0.0), batches(40, 8), monitor)
    assert monitor.report["net.1"].dead[:3].all()


# -- swapped activations ---------------------------------------------------------------------------------


def test_a_ramp_ends_in_a_pure_relu():
    torch.manual_seed(0)
    model, monitor = Net(mlp(3)), DeadReLUMonitor(remedy=LeakySlope(ramp_steps=5, attempts=1), **EAGER)
    fit(model, batches(60, 8), monitor)
    assert "edited" in actions(monitor)
    assert [type(module) for module in model.net] == [type(module) for module in mlp()]


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*Checkpoint directory")
def test_testing_from_a_checkpoint_puts_the_activations_back(tmp_path):
    torch.manual_seed(0)
    monitor = DeadReLUMonitor(remedy="gelu", include=["net.1"], **EAGER)
    trainer = fit(Net(mlp(3)), batches(20, 8), monitor)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    fresh, again = Net(mlp(3)), DeadReLUMonitor(remedy="gelu", include=["net.1"], **EAGER)
    assert isinstance(fresh.net[1], nn.ReLU)
    Trainer(**bare(callbacks=[again])).test(fresh, batches(2), ckpt_path=tmp_path / "end.ckpt", weights_only=True)
    assert isinstance(fresh.net[1], nn.GELU)


def test_testing_an_earlier_checkpoint_takes_later_exchanges_back(tmp_path):
    torch.manual_seed(0)
    monitor = DeadReLUMonitor(remedy="gelu", include=["net.1"], **EAGER)
    model = Net(mlp(3))

    class First(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 0:
                trainer.save_checkpoint(tmp_path / "first.ckpt")

    trainer = fit(model, batches(20, 8), monitor, First())
    assert isinstance(model.net[1], nn.GELU)
    trainer.test(model, batches(2), ckpt_path=tmp_path / "first.ckpt", weights_only=True)
    assert isinstance(model.net[1], nn.ReLU)


# -- in whatever way it is trained -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{"precision": "bf16-mixed"}, {"precision": "bf16-true"}, {"precision": "64-true"}, {"accumulate_grad_batches": 3}],
    ids=str,
)
@pytest.mark.parametrize("remedy", ["reset", "bias_warming", "leaky"])
def test_precision_and_accumulation(remedy, options):
    torch.manual_seed(0)
    monitor = DeadReLUMonitor(remedy=remedy, include=["net.1"], **EAGER)
    fit(Net(mlp(3)), batches(60, 8), monitor, **options)
    assert "edited" in actions(monitor)
    if remedy == "reset":
        assert "revived" in actions(monitor)


class ByHand(Net):
    """Takes two optimizer steps a batch."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for _ in range(2):
            self.optimizers().zero_grad()
            loss = (self(batch) - 1).pow(2).mean()
            self.manual_backward(loss)
            self.optimizers().step()


@pytest.mark.parametrize("remedy", ["reset", "bias_warming", LeakySlope(ramp_steps=6)], ids=str)
def test_manual_optimisation(remedy):
    torch.manual_seed(0)
    monitor = DeadReLUMonitor(remedy=remedy, include=["net.1"], **EAGER)
    model = ByHand(mlp(3))
    fit(model, batches(60, 8), monitor)
    assert "edited" in actions(monitor)


class Checkpointed(Net):
    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.net, x, use_reentrant=False)


@pytest.mark.parametrize("remedy", OBJECTS.values(), ids=OBJECTS)
def test_activation_checkpointing(remedy):
    torch.manual_seed(0)
    monitor = DeadReLUMonitor(remedy=remedy, include=["net.1"], **EAGER)
    fit(Checkpointed(mlp(3)), batches(60, 8), monitor)
    assert "edited" in actions(monitor)


@pytest.mark.slow
@pytest.mark.parametrize("remedy", ["reset", "wake_up", "leaky", "gelu"])
def test_a_compiled_model_is_repaired(remedy):
    torch.manual_seed(0)
    monitor = DeadReLUMonitor(remedy=remedy, include=["net.1"], **EAGER)
    model = Net(mlp(3))
    fit(torch.compile(model, backend="eager"), batches(40, 8), monitor)
    assert "edited" in actions(monitor)
    torch.compiler.reset()


def test_warming_at_once_is_refused_for_a_compiled_model():
    torch.manual_seed(0)
    monitor = DeadReLUMonitor(remedy=BiasWarming(at_once=True), include=["net.1"], **EAGER)
    with pytest.warns(UserWarning, match="BiasWarming refused `net.1`: the model is compiled"):
        fit(torch.compile(Net(mlp(3)), backend="eager"), batches(20, 8), monitor)
    torch.compiler.reset()


def test_a_compiled_model_is_lifted():
    torch.manual_seed(0)
    monitor = DeadReLUMonitor(remedy=BiasWarming(steps=5), include=["net.1"], **EAGER)
    fit(torch.compile(Net(mlp(3)), backend="eager"), batches(40, 8), monitor)
    assert actions(monitor)[:2] == ["edited", "revived"]
    torch.compiler.reset()


class Adaptive(Net):
    """Trains with an optimizer that keeps some of its state for many entries at once."""

    def configure_optimizers(self):
        return torch.optim.Adafactor(self.parameters(), lr=0.01)


def test_state_for_many_entries_at_once_is_left_alone_and_that_is_said():
    torch.manual_seed(0)
    monitor = DeadReLUMonitor(remedy="reset", include=["net.1"], **EAGER)
    fit(Adaptive(mlp(3)), batches(20, 8), monitor)
    assert "`Adafactor` keeps `row_var`, `col_var` for many entries at once" in monitor.events[0].reason


@pytest.mark.parametrize("strategy", ["FSDPStrategy", "DeepSpeedStrategy"])
def test_strategies_that_shard_are_watched_and_not_repaired(strategy):
    torch.manual_seed(0)
    monitor = DeadReLUMonitor(remedy="reset", **EAGER)

    sharding = type(strategy, (SingleDeviceStrategy,), {"strategy_name": "like_another"})
    with pytest.warns(UserWarning, match=f"`{strategy}` shards parameters .*; watching goes on"):
        fit(Net(mlp(3)), batches(20, 8), monitor, strategy=sharding("cpu"))
    assert monitor.events == ()
    assert monitor.report.dead_units >= 3


@pytest.mark.ranks
def test_ranks_that_would_edit_otherwise_do_not_edit():
    for events, state in on_two_ranks(repaired_unevenly):
        assert [action for _, _, action, *_ in events][:2] == ["refused", "given up"]
        assert "the ranks propose different edits" in events[0][5]
        assert torch.equal(state["net.0.bias"][:3], torch.full((3,), -100.0))


def repaired_unevenly(rank):
    torch.manual_seed(0)
    model = Net(mlp(3), lr=0.0)
    monitor = DeadReLUMonitor(remedy=Reset(tries=1 + 7 * rank), include=["net.1"], **EAGER)
    ddp_trainer(callbacks=[monitor]).fit(model, batches(20, 8, seed=rank))
    return [tuple(event) for event in monitor.events], model.state_dict()


def failing_on_one_rank(rank, where):
    torch.manual_seed(0)
    monitor = DeadReLUMonitor(remedy="reset", **EAGER)
    trainer = ddp_trainer(callbacks=[monitor], max_epochs=2)
    model = Net(mlp(3))
    if rank == 1:
        places = {"propose": (Reset, "propose"), "see": (Confirmation, "__call__"), "decide": (Repair, "decide")}
        owner, name = places[where]
        mock.patch.object(owner, name, side_effect=MemoryError).start()
    try:
        trainer.fit(model, batches(20, 8, seed=rank))
    finally:
        mock.patch.stopall()
    return model.state_dict()


@pytest.mark.ranks
@pytest.mark.parametrize("where", ["propose", "see", "decide"])
def test_a_failure_on_one_rank_leaves_ranks_equal(where):
    first, second = on_two_ranks(failing_on_one_rank, where)
    assert_same(first, second)


# -- ranks and resuming ----------------------------------------------------------------------------------


def repaired(rank, remedy, options):
    torch.manual_seed(0)
    model = Net(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 1)))
    with torch.no_grad():
        model.net[0].bias[:3] = -4.0
    torch.manual_seed(rank)
    monitor = DeadReLUMonitor(remedy=remedy, **EAGER)
    trainer = ddp_trainer(callbacks=[monitor], **options)
    trainer.fit(model, batches(30, 8, seed=rank))
    events = [tuple(event)[:6] for event in monitor.events]
    return events, model.state_dict(), trainer.optimizers[0].state_dict()["state"]


@pytest.mark.ranks
@pytest.mark.parametrize("remedy", [*OBJECTS, "ladder"])
def test_two_ranks_end_bit_equal(remedy):
    given = ["thermal_kick", "reset", "leaky"] if remedy == "ladder" else OBJECTS[remedy]
    first, second = on_two_ranks(repaired, given, {"accumulate_grad_batches": 2} if remedy == "reset" else {})
    assert any(action == "edited" for _, _, action, *_ in first[0])
    assert_same(first, second)


def run_to_the_end(remedy, items, *callbacks, ckpt=None, **options):
    torch.manual_seed(0)
    model = Net(mlp(3), lr=0.02)
    monitor = DeadReLUMonitor(remedy=remedy, **{**EAGER, "every_n_steps": 2, "window": 3, **options})
    trainer = fit(model, Loader(items), monitor, *callbacks, ckpt=ckpt, max_epochs=2)
    return monitor, model, trainer


class Save(Callback):
    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


@pytest.mark.parametrize("remedy", OBJECTS.values(), ids=OBJECTS)
def test_interrupted_and_resumed_equals_uninterrupted_also_in_mid_anneal(remedy, tmp_path):
    items = tensors(20, 8)
    monitor, model, trainer = run_to_the_end(remedy, items, Save(tmp_path))
    assert "edited" in actions(monitor)
    for step in (5, 7, 8, 9, 11, 14, 21, 26, 33):
        again, resumed, resumed_trainer = run_to_the_end(remedy, items, ckpt=tmp_path / f"{step}.ckpt")
        assert repr(again.events) == repr(monitor.events), step
        assert_same(resumed.state_dict(), model.state_dict())
        assert_same(resumed_trainer.optimizers[0].state_dict()["state"], trainer.optimizers[0].state_dict()["state"])


def test_a_check_up_of_a_resumed_run_takes_nothing_from_the_confirmation_of_an_edit(tmp_path):
    items = tensors(20, 8)
    monitor, model, _ = run_to_the_end(Reset(), items, Save(tmp_path))
    edited = next(event.step for event in monitor.events if event.action == "edited")
    resumed = run_to_the_end(Reset(), items, ckpt=tmp_path / f"{edited}.ckpt", checkup=True)[1]
    assert_same(resumed.state_dict(), model.state_dict())


def test_the_state_of_a_repair_is_plain(tmp_path):
    items = tensors(20, 8)
    run_to_the_end(["bias_warming", "reset", "leaky"], items, Save(tmp_path))
    saved = list(tmp_path.glob("*.ckpt"))
    assert len(saved) == 40
    for path in saved:
        torch.load(path, weights_only=True)


def test_a_slope_that_harmed_is_taken_back():
    torch.manual_seed(0)
    model = Net(mlp(3), lr=0.0)  # dead units lie 100 below the hinge
    monitor = DeadReLUMonitor(remedy=LeakySlope(slope=0.5, ramp_steps=None, attempts=1), include=["net.1"], **EAGER)
    fit(model, batches(16, 8), monitor)
    (harmed,) = [event for event in monitor.events if event.action == "harmed"]
    assert "the activation before was put back" in harmed.reason
    assert type(model.net[1]) is nn.ReLU


@dataclass(frozen=True, kw_only=True)
class Several(Remedy):
    """Does harm by a term, beside other edits that take many batches."""

    parts: tuple[str, ...] = ()

    def propose(self, view, generator):
        ones, rise = view.units.float(), Write(view.attribution.bias.of(view.units), 0.1)
        parts = {
            "lift": Lift((rise,), 99),
            "push": Push(view.units, steps=99),
            "warmth": Warmth(1e4 * ones, 99),
            "slope for a time": Activation("leaky_relu", ones / 100, 99),
            "slope": Activation("leaky_relu", ones / 100),
        }
        return Edits(**{part.split()[0].replace("slope", "activation"): parts[part] for part in self.parts})


TAKEN_BACK = {
    "warmth": "its term was dropped",
    "warmth, slope for a time": "its term was dropped",  # two terms, said once
    "lift, warmth": "its lift was stopped and its term was dropped",
    "push, warmth": "its push was stopped and its term was dropped",
    "warmth, slope": "its term was dropped and the activation before was put back",
}


@pytest.mark.parametrize("parts", TAKEN_BACK)
def test_an_event_of_harm_says_once_what_was_taken_back(parts):
    torch.manual_seed(0)
    model = Net(mlp(3), lr=0.0)
    monitor = DeadReLUMonitor(remedy=Several(parts=tuple(parts.split(", ")), attempts=1), include=["net.1"], **EAGER)
    fit(model, batches(16, 8), monitor)
    (harmed,) = [event for event in monitor.events if event.action == "harmed"]
    assert harmed.reason.partition("; ")[2] == TAKEN_BACK[parts]
    assert type(model.net[1]) is nn.ReLU


@pytest.mark.parametrize("remedy", ["leaky", LeakySlope(ramp_steps=99), LeakySlope(ramp_steps=None), "gelu"])
def test_what_others_put_in_a_place_that_was_exchanged_is_judged_as_what_it_is(remedy):
    class Exchanging(Net):
        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == 9:
                self.net[1] = nn.GELU()

    monitor, model = DeadReLUMonitor(remedy=remedy, **EAGER), Exchanging(mlp(3))
    with pytest.warns(UserWarning, match=r"`net\.1` did not run in this window"):
        fit(model, batches(24, 8), monitor)
    assert any(event.action == "edited" and event.step < 9 for event in monitor.events)
    assert type(model.net[1]) is nn.GELU
    assert monitor.report["net.1"].samples == 0
    assert monitor.failure is None
