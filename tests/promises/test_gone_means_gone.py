"""Promise 6: after fit, an exception or Ctrl-C nothing watches, and a copy made meanwhile never does."""

import copy
import gc
import io
import pickle

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    EarlyStopping,
    ModelCheckpoint,
)
from toys import EVERYTHING, WITHIN, Log, Net, Nosy, Verdicts, bare, batches, fit, left_behind, mlp, run_of, watchers

from lightning_deadrelu import DeadReLUMonitor
from lightning_deadrelu.observe.compiled_limits import Room
from lightning_deadrelu.remedies import BiasWarming, LeakySlope, WakeUp


class Deserter(Net):
    """Does something odd at one place of the third batch."""

    def __init__(self, where, what):
        super().__init__()
        self.where, self.what = where, what

    def _act(self, where):
        return self.what() if where == self.where and len(self.losses) == 3 else None

    def on_train_batch_start(self, batch, batch_idx):
        return self._act("on_train_batch_start")

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self._act("training_step")
        return loss

    def backward(self, loss):
        self._act("backward")
        loss.backward()

    def optimizer_step(self, epoch, batch_idx, optimizer, closure):
        optimizer.step(closure)
        self._act("optimizer_step")


def interrupt(error):
    def act():
        raise error("stop here")

    return act


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["on_train_batch_start", "training_step", "backward", "optimizer_step"])
def test_after_an_exception_nothing_watches(where, error):
    monitor = DeadReLUMonitor(**EVERYTHING)
    trainer = Trainer(**bare(callbacks=[monitor]))
    with pytest.raises(SystemExit if error is KeyboardInterrupt else error):
        trainer.fit(Deserter(where, interrupt(error)), batches(6))
    assert watchers() == []
    assert run_of(monitor.state_dict()).progress.window.observations in (2, 3)


def test_an_epoch_that_is_skipped_half_way_leaves_nothing_behind():
    nosy, log = Nosy(), Log()
    monitor, model = Verdicts(**EVERYTHING), Deserter("on_train_batch_start", lambda: -1)
    early = EarlyStopping("dead_relu/dead_fraction", mode="max", patience=9)
    fit(model, batches(6), monitor, nosy, early, max_epochs=3, logger=log)
    assert len(model.losses) == 3  # the epoch ended, and all further ones at once
    assert nosy.armed <= WITHIN
    assert watchers() == []
    assert monitor.report.sites[0].samples == 15


class Sore(Callback):
    """Fails again when it is told that training has failed, and so keeps callbacks behind it from being told."""

    def on_exception(self, trainer, pl_module, exception):
        raise OSError("disk full")


def state_of(model):
    """What there may be of ours in the process, and in a model."""
    return left_behind(model), [type(module) for module in model.modules()]


CASES = {
    "watching": (None, False),
    "watching compiled code": (None, True),
    "a term": (BiasWarming(at_once=True, steps=99), False),
    "slopes": (LeakySlope(ramp_steps=99), False),
    "a push": (WakeUp(), False),
}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("case", CASES)
def test_nothing_stays_where_another_callback_fails_on_hearing_of_an_error(case, error):
    class Doomed(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if batch_idx == 9:
                inside.append(state_of(plain) != before)
                raise error("stop here")
            return loss

    (remedy, compiled), plain, inside = CASES[case], mlp(), []
    gc.collect()
    Room.close_for(Nosy)  # watches of other tests were never closed; their end would change the limits below
    before = state_of(plain)
    model = Doomed(torch.compile(plain, backend="eager") if compiled else plain)
    monitor = DeadReLUMonitor(**{**EVERYTHING, "window": 2}, remedy=remedy)
    trainer = Trainer(**bare(callbacks=[Sore(), monitor]))
    with pytest.raises(OSError, match="disk full"):
        trainer.fit(model, batches(12))
    assert inside == [True]
    assert state_of(plain) == before
    assert trainer.callbacks[0] is monitor


class Copies(Callback):
    """Copies and pickles model and monitor while the monitor watches."""

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        monitor = trainer.callbacks[0]
        assert watchers()
        self.monitors = [copy.deepcopy(monitor), pickle.loads(pickle.dumps(monitor))]
        self.models = [copy.deepcopy(pl_module.net), pickle.loads(pickle.dumps(pl_module.net))]
        for model in self.models:
            model(torch.zeros(50, 4))


class Described(Net):
    def __init__(self, net):
        super().__init__(net)
        self.save_hyperparameters()


@pytest.mark.filterwarnings("ignore:Attribute 'net' is an instance of `nn.Module`", "ignore:dead_relu")
@pytest.mark.parametrize("options", [{}, {"gradient_evidence": True, "checkup": True, "remedy": "reset"}])
def test_copies_are_inert_and_checkpoints_can_hold_the_model(options, tmp_path):
    monitor, copies = DeadReLUMonitor(every_n_steps=1, **options), Copies()
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1)
    fit(Described(mlp()), batches(4), monitor, copies, saver, enable_checkpointing=True)
    assert len(list(tmp_path.glob("*.ckpt"))) == 4
    assert monitor.report.sites[0].samples == 20
    for other in copies.monitors:
        assert other.every_n_steps == 1
        assert other.state_dict() == {}
        assert not hasattr(other, "log")
        fit(Net(), batches(2), other)
        assert other.report.sites[0].samples == 10
    assert pickle.loads(pickle.dumps(monitor)).report.to_dict() == monitor.report.to_dict()
    torch.save(monitor, buffer := io.BytesIO())
    assert buffer.tell() < 100_000
