"""Promises 6 and 7 wherever the user's code raises: nothing is left behind, and a resumed run equals a whole one."""

from dataclasses import asdict
from functools import cache
from tempfile import TemporaryDirectory

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.core.hooks import CheckpointHooks, DataHooks, ModelHooks
from toys import Loader, Net, Verdicts, bare, batches, left_behind, mlp, run_of, tensors

from lightning_deadrelu.remedies import BiasWarming, LeakySlope

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:dead_relu"),
]

LADDER = ["reset", BiasWarming(at_once=True, steps=7), LeakySlope(ramp_steps=5), "thermal_kick", "wake_up", "gelu"]
REMEDIES = {"ladder": LADDER, "auto": "auto", "bias_warming": "bias_warming", "wake_up": "wake_up", "leaky": "leaky"}
SETTINGS = {"every_n_steps": 1, "window": 3, "min_samples": 10, "threshold": 0.0}

ELSEWHERE = ("_test_", "_predict_", "on_exception", "on_load_checkpoint", "load_state_dict", "state_key")
HOOKS = [name for name in vars(Callback) if name[0] != "_" and not any(part in name for part in ELSEWHERE)]
BEFORE_THE_STEP = {"on_train_batch_start", "on_before_zero_grad", "on_before_backward", "on_after_backward"}
BEFORE_THE_STEP |= {"on_before_optimizer_step"}
COUNTED_TWICE = BEFORE_THE_STEP | {"on_train_epoch_start"}  # by Lightning, which numbers steps that follow one higher


class StopHere(RuntimeError):
    """What the user's code raises."""


class Raises:
    """Counts the calls of some methods, and raises at one of them."""

    methods, hook, at = (), "", 0

    def __getattribute__(self, name):
        found = super().__getattribute__(name)
        if name not in type(self).methods:
            return found

        def counted(*args, **kwargs):
            self.calls[name] = self.calls.get(name, 0) + 1
            if name == self.hook and self.calls[name] == self.at:
                raise StopHere
            return found(*args, **kwargs)

        return counted


class RaisingCallback(Raises, Callback):
    methods = HOOKS

    def __init__(self, hook="", at=0):
        self.hook, self.at, self.calls = hook, at, {}


class OnceMore(Loader):
    """Hands a batch out again that was under way when it was saved."""

    def state_dict(self):
        return {"at": self.at - 1}


def new_model():
    torch.manual_seed(7)
    return Net(lr=0.05)


def train(model, remedy, raising, folder, ckpt=None, *, first=True):
    monitor = Verdicts(**SETTINGS, remedy=REMEDIES[remedy])
    callbacks = [raising, monitor] if first else [monitor, raising]
    callbacks += [ModelCheckpoint(folder, every_n_train_steps=7), OnExceptionCheckpoint(folder)]
    trainer = Trainer(**bare(callbacks=callbacks, enable_checkpointing=True, max_epochs=2), val_check_interval=8)
    kind = OnceMore if raising.hook in BEFORE_THE_STEP else Loader
    trainer.fit(model, kind(tensors(16)), batches(3), ckpt_path=ckpt)
    return asdict(run_of(monitor.state_dict())) | {"weights": model.state_dict()}


@cache
def whole_run(remedy):
    """Train without an error; return how that ends, and how often each hook is called."""
    raising = RaisingCallback()
    with TemporaryDirectory() as folder:
        return train(new_model(), remedy, raising, folder), raising.calls


NUMBERS_OF_STEPS = {"step", "steps", "first_step", "last_step", "estimated_step", "last_fired", "observed", "squares"}


def assert_equal(one, other, passing_over=frozenset()):
    """Compare two trees to the last bit, but for some keys."""
    if isinstance(one, tuple) and hasattr(one, "_asdict"):
        one, other = one._asdict(), other._asdict()
    if isinstance(one, dict):
        assert list(one) == list(other)
        for key in set(one) - passing_over:
            assert_equal(one[key], other[key], passing_over)
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_equal(a, b, passing_over)
    elif isinstance(one, torch.Tensor):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    else:
        assert one == other or (one != one and other != other)


CASES = [(remedy, True, hook) for remedy in REMEDIES for hook in HOOKS] + [("ladder", False, hook) for hook in HOOKS]


@pytest.mark.parametrize(("remedy", "first", "hook"), CASES)
def test_after_an_error_in_another_callback_a_resumed_run_equals_a_whole_one(remedy, first, hook, tmp_path):
    whole, calls = whole_run(remedy)
    at = max(1, calls[hook] * 2 // 3)
    model = new_model()
    before = left_behind(model)
    with pytest.raises(StopHere):
        train(model, remedy, RaisingCallback(hook, at), tmp_path, first=first)
    assert left_behind(model) == before
    saved = tmp_path / "on_exception.ckpt"
    saved = saved if saved.exists() else None
    resumed = train(new_model(), remedy, RaisingCallback(), tmp_path, saved, first=first)
    assert_equal(resumed, whole, NUMBERS_OF_STEPS if hook in COUNTED_TWICE else frozenset())


HOOKS_OF_MODULES = [name for kind in (ModelHooks, DataHooks, CheckpointHooks) for name in vars(kind) if name[0] != "_"]
HOOKS_OF_MODULES.remove("configure_sharded_model")  # its presence alone is refused


class RaisingNet(Raises, Net):
    methods = (*HOOKS_OF_MODULES, "training_step", "validation_step", "backward", "forward", "state_dict")
    methods += ("optimizer_step", "optimizer_zero_grad", "lr_scheduler_step", "configure_gradient_clipping")

    def __init__(self, hook="", at=0):
        self.hook, self.at, self.calls = hook, at, {}
        super().__init__(mlp(), lr=0.05)

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 100)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def test_after_an_error_in_the_users_module_nothing_is_left_behind(tmp_path):
    whole = RaisingNet()
    train(whole, "ladder", RaisingCallback(), tmp_path)
    assert {"training_step", "optimizer_step", "lr_scheduler_step", "on_validation_model_eval"} <= set(whole.calls)
    for hook, calls in whole.calls.items():
        model = RaisingNet(hook, max(1, calls * 2 // 3))
        before = left_behind(model)
        with pytest.raises(StopHere):
            train(model, "ladder", RaisingCallback(), tmp_path / hook)
        assert left_behind(model) == before, hook


@pytest.mark.parametrize("remedy", REMEDIES)
def test_remedies_act_in_these_runs(remedy):
    whole, _ = whole_run(remedy)
    assert "edited" in [event.action for event in whole["repair"]["events"]]
