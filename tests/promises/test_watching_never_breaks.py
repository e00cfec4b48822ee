"""Promise 10: an error of the monitor ends the watch, and neither the run nor its checkpoints."""

from contextlib import suppress

import pytest
import torch
from lightning.pytorch.callbacks import (
    EarlyStopping,
    ModelCheckpoint,
)
from torch import nn
from toys import EVERYTHING, KEY, Net, batches, fit, mlp, watchers

from lightning_deadrelu import DeadReLUMonitor
from lightning_deadrelu.monitor import monitor as monitoring
from lightning_deadrelu.monitor import verdicts, window_end
from lightning_deadrelu.remedies import LeakySlope


def broken(*args, **kwargs):
    raise RuntimeError("a bug of ours")


@pytest.mark.parametrize("place", ["judge", "count", "watch", "restore", "unwatched"])
def test_a_failure_of_the_monitor_neither_ends_the_run_nor_loses_a_checkpoint(place, monkeypatch, tmp_path):
    owner, name = {
        "judge": (verdicts, "judge"),
        "count": (monitoring.Watch, "_take"),
        "watch": (monitoring, "Watch"),
        "restore": (window_end, "merged"),
        "unwatched": (monitoring.Watch, "unwatched"),
    }[place]
    monkeypatch.setattr(owner, name, broken)
    model, monitor = Net(), DeadReLUMonitor(**EVERYTHING)
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1)
    with pytest.warns(UserWarning, match="dead_relu: the monitor failed and watches no longer") as record:
        fit(
            model,
            batches(12),
            monitor,
            saver,
            EarlyStopping(KEY),
            val=batches(1),
            max_epochs=2,
            enable_checkpointing=True,
        )
    ours = [str(warning.message) for warning in record if "the monitor failed" in str(warning.message)]
    assert len(ours) == 1
    assert "a bug of ours" in ours[0]
    assert len(model.losses) == 24
    assert len(list(tmp_path.glob("*.ckpt"))) == 8
    assert watchers() == []


class Sealed(nn.Sequential):
    """Takes no other modules from some batch on."""

    sealed = False

    def __setattr__(self, name, value):
        if self.sealed and isinstance(value, nn.Module):
            raise TypeError("sealed")
        super().__setattr__(name, value)


@pytest.mark.parametrize("when", range(5, 9))
def test_a_term_that_cannot_be_taken_out_ends_the_watch_alone(when):
    class Sealing(Net):
        def training_step(self, batch, batch_idx):
            self.net.sealed = batch_idx >= when
            return super().training_step(batch, batch_idx)

    model, monitor = Sealing(Sealed(*mlp())), DeadReLUMonitor(**EVERYTHING, remedy=LeakySlope(ramp_steps=99))
    with pytest.warns(UserWarning, match="(?s)the monitor failed and watches no longer.*sealed") as record:
        fit(model, batches(12), monitor)
    assert len([one for one in record if "the monitor failed" in str(one.message)]) == 1
    assert len(model.losses) == 12
    assert watchers() == []
    assert isinstance(monitor.failure, TypeError)


def test_what_a_user_raises_on_a_verdict_ends_the_run():
    class Strict(DeadReLUMonitor):
        def on_verdict(self, trainer, pl_module, report):
            if report.dead_fraction > self.threshold:
                raise RuntimeError("too many dead units")

    model = Net()
    with pytest.raises(RuntimeError, match="too many dead units"):
        fit(model, batches(12), Strict(**EVERYTHING))
    assert len(model.losses) == 4
    assert watchers() == []


class Exports(Net):
    """Traces itself for deployment in the middle of a training step."""

    def training_step(self, batch, batch_idx):
        if batch_idx < 2:
            self.exported = torch.jit.trace(self.net, batch)
        return super().training_step(batch, batch_idx)


class Tries(Net):
    """Tries shapes until one fits."""

    def forward(self, x):
        h = self.net[:2](x)
        for shape in ((3, 3, 7), (5, 9)):
            with suppress(RuntimeError):
                h = h + torch.zeros(shape)
        for layer in (self.net[0], self.net[2]):
            with suppress(RuntimeError):
                out = layer(h)
        return self.net[3:](out)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*torch.jit", "ignore:Converting a tensor")
@pytest.mark.parametrize("kind", [Exports, Tries])
@pytest.mark.parametrize("remedy", [None, "reset"])
def test_a_traced_export_and_a_shape_error_that_the_model_catches_end_nothing(kind, remedy):
    def train(build, **options):
        torch.manual_seed(3)
        model, monitor = build(), DeadReLUMonitor(**EVERYTHING, **options)
        fit(model, batches(8), monitor)
        return monitor.report, model.losses

    (report, losses), (expected, same) = train(kind, remedy=remedy), train(Net, remedy=remedy)
    assert [site.samples for site in report.sites] == [site.samples for site in expected.sites] == [20, 20]
    assert [site.dead.tolist() for site in report.sites] == [site.dead.tolist() for site in expected.sites]
    assert losses == same
