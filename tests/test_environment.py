import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from lightning_deadrelu import DeadReLUMonitor
from lightning_deadrelu.environment import VARIABLE, MonitorFromEnvironment, from_environment

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "max_steps": 4,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))

    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(*callbacks):
    trainer = Trainer(callbacks=list(callbacks), **QUIET)
    trainer.fit(Net(), DataLoader(torch.randn(64, 4), batch_size=16))
    return [one for one in trainer.callbacks if isinstance(one, DeadReLUMonitor)]


@pytest.mark.parametrize("written", [None, "", "0", "off"])
def test_without_the_variable_no_trainer_gets_a_monitor(monkeypatch, written):
    monkeypatch.delenv(VARIABLE, raising=False)
    if written is not None:
        monkeypatch.setenv(VARIABLE, written)
    assert Trainer(**QUIET).callbacks == Trainer(callbacks=from_environment(), **QUIET).callbacks == []


@pytest.mark.filterwarnings("ignore:dead_relu. the Trainer has no logger")
def test_every_trainer_gets_one_that_watches(monkeypatch):
    monkeypatch.setenv(VARIABLE, "every_n_steps=1; window=2; remedy=reset")
    monitor = fit()[0]
    assert type(monitor) is MonitorFromEnvironment
    assert (monitor.every_n_steps, monitor.window, monitor.remedy) == (1, 2, "reset")
    assert [site.name for site in monitor.report.sites] == ["net.1"]


@pytest.mark.filterwarnings("ignore:dead_relu. the Trainer has no logger")
def test_it_steps_back_where_there_is_one_in_code(monkeypatch):
    monkeypatch.setenv(VARIABLE, "remedy=reset")
    monitors = {type(one): one for one in fit(DeadReLUMonitor(remedy="reset", every_n_steps=1))}
    assert monitors[DeadReLUMonitor].report.sites
    assert monitors[MonitorFromEnvironment].report is None


@pytest.mark.filterwarnings("ignore:dead_relu. the Trainer has no logger")
def test_one_that_steps_back_keeps_its_key_in_checkpoints(monkeypatch):
    monkeypatch.setenv(VARIABLE, "1")
    trainer = Trainer(callbacks=[DeadReLUMonitor()], **QUIET)
    (monitor,) = (one for one in trainer.callbacks if isinstance(one, MonitorFromEnvironment))
    keys = []
    for _ in range(2):
        trainer.fit(Net(), DataLoader(torch.randn(64, 4), batch_size=16))
        keys.append(monitor.state_key)
    assert keys[0] == keys[1]


@pytest.mark.parametrize("written", ["yes please", "remedy=reset; 7"])
def test_what_cannot_be_read_is_refused(monkeypatch, written):
    monkeypatch.setenv(VARIABLE, written)
    with pytest.raises(ValueError, match=r"it is 1, or arguments of DeadReLUMonitor .* Try `DEAD_RELU_MONITOR='remedy"):
        from_environment()
