"""The callback beside others, under several ways to train, and from the command line."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    EarlyStopping,
    ModelCheckpoint,
)
from torch import nn
from toys import EVERYTHING, KEY, Log, Net, bare, batches, fit, mlp

from lightning_deadrelu import DeadReLUMonitor


@pytest.mark.parametrize("val", [None, 2], ids=["without validation", "with validation"])
@pytest.mark.parametrize("first", [True, False], ids=["monitor first", "monitor last"])
def test_others_find_the_key_with_default_settings(val, first, tmp_path):
    monitor = DeadReLUMonitor()
    others = [EarlyStopping(KEY, divergence_threshold=0.1), ModelCheckpoint(tmp_path, monitor=KEY, mode="min")]
    callbacks = [monitor, *others] if first else [*others, monitor]
    loader = batches(44, 64)
    trainer = fit(Net(), loader, *callbacks, val=val and batches(val), max_epochs=3, enable_checkpointing=True)
    assert trainer.current_epoch == 1  # stopped, as 3 of 14 units are dead
    assert float(others[1].best_model_score) == pytest.approx(monitor.report.dead_fraction)
    assert monitor.report.dead_fraction >= 3 / 14


def test_the_key_is_there_from_the_first_step(tmp_path):
    seen = []

    class Reader(Callback):
        def on_train_batch_start(self, trainer, *args):
            seen.append(float(trainer.callback_metrics[KEY]))

    saver = ModelCheckpoint(tmp_path, monitor=KEY, every_n_train_steps=1)
    fit(Net(), batches(5), Reader(), DeadReLUMonitor(**EVERYTHING), saver, val=batches(1), enable_checkpointing=True)
    assert seen == [0.0] * 4 + [pytest.approx(3 / 14, abs=0.2)]
    assert seen[-1] > 0.2


def test_a_plateau_scheduler_finds_the_key_at_its_first_step():
    class Scheduled(Net):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            return [optimizer], [{"scheduler": scheduler, "monitor": KEY, "interval": "step"}]

    fit(Scheduled(), batches(4), DeadReLUMonitor())


def test_several_fits_on_one_trainer_start_anew():
    monitor, model = DeadReLUMonitor(every_n_steps=1), Net()
    trainer = fit(model, batches(4), monitor)
    first = monitor.report
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, batches(6))
    assert [first.sites[0].samples, monitor.report.sites[0].samples] == [20, 30]
    assert trainer.global_step == 10


def test_another_model_on_the_same_monitor():
    monitor = DeadReLUMonitor(every_n_steps=1)
    fit(Net(), batches(4), monitor)
    fit(Net(nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 1))), batches(2), monitor)
    assert [(site.units, site.samples) for site in monitor.report.sites] == [(9, 10)]


def test_layers_made_in_configure_model():
    class Late(Net):
        def __init__(self):
            super().__init__(nn.Identity())

        def configure_model(self):
            self.net = mlp()

    monitor = DeadReLUMonitor(**EVERYTHING)
    fit(Late(), batches(4), monitor)
    assert monitor.report["net.1"].dead.sum() >= 3


ALL_OF_IT = {"checkup": True, "gradient_evidence": True}


@pytest.mark.filterwarnings(
    "ignore:Lazy modules", "ignore:.*uninitialized parameter", "ignore:A layer with UninitializedParameter"
)
@pytest.mark.parametrize(
    "options", [{}, {"remedy": "reset"}, {"remedy": "auto", "checkup": True, "gradient_evidence": True}]
)
@pytest.mark.parametrize("made", ["before", "in the first batch"])
def test_lazy_layers(made, options):
    class Killed(Net):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if batch_idx == 0:
                nn.init.constant_(self.net[1].bias[:3].detach(), -100.0)

    monitor = DeadReLUMonitor(**EVERYTHING, **options)
    net = nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(1))
    model = Killed(net)
    if made == "before":
        net(torch.zeros(2, 4))
    fit(model, batches(16), monitor)
    assert monitor.failure is None
    assert monitor.report["net.2"].dead.tolist() == [not options] * 3 + [False] * 5
    assert [event.action for event in monitor.events][:2] == (["edited", "revived"] if options else [])


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_both_packages(package):
    pl = pytest.importorskip(package)

    class Model(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def training_step(self, batch, batch_idx):
            return self.net(batch).pow(2).mean()

        configure_optimizers = Net.configure_optimizers
        optimizer, lr = torch.optim.SGD, 0.01

    log, monitor = Log(), DeadReLUMonitor(**EVERYTHING)
    trainer = pl.Trainer(**bare(callbacks=[monitor, pl.callbacks.EarlyStopping(KEY)], logger=log, max_epochs=2))
    trainer.fit(Model(), batches(6))
    assert monitor.report.dead_units >= 3
    assert [step for step, _ in log.verdicts()] == [3, 7, 11]


@pytest.mark.slow
def test_a_compiled_module():
    torch.compiler.reset()
    model, monitor = Net(), DeadReLUMonitor(every_n_steps=2, window=2, min_samples=1)
    model.net = torch.compile(model.net, backend="eager")
    fit(model, batches(4), monitor)
    assert [site.name for site in monitor.report.sites] == ["net.1", "net.3"]
    assert monitor.report.sites[0].samples == 10
    compiled, monitor = torch.compile(Net(), backend="eager"), DeadReLUMonitor(every_n_steps=2, window=2, min_samples=1)
    fit(compiled, batches(4), monitor)
    assert [site.name for site in monitor.report.sites] == ["net.1", "net.3"]
    assert monitor.report.units == 14


@pytest.mark.filterwarnings("ignore:No seed found", "ignore:LightningCLI's args parameter is intended")
def test_the_command_line(tmp_path, monkeypatch):
    from lightning.pytorch.cli import LightningCLI

    class Commanded(Net):
        def __init__(self):
            super().__init__()

        def train_dataloader(self):
            return batches(6)

    monkeypatch.chdir(tmp_path)
    args = ["fit", *(f"--trainer.{key}={value}" for key, value in bare(logger="false").items())]
    args += ["--trainer.callbacks+=lightning_deadrelu.DeadReLUMonitor", "--trainer.callbacks.every_n_steps=5"]
    args += ["--trainer.callbacks.include=[net.1]"]
    cli = LightningCLI(Commanded, args=args, save_config_callback=None)
    monitor = next(c for c in cli.trainer.callbacks if isinstance(c, DeadReLUMonitor))
    assert monitor.every_n_steps == 5
    assert monitor.report.sites[0].samples == 10
    with pytest.raises(SystemExit):
        LightningCLI(Commanded, args=[*args, "--trainer.callbacks.every_n_steps=often"], save_config_callback=None)


def test_its_repr_names_what_was_changed():
    assert repr(DeadReLUMonitor(window=3, remedy="reset")) == "DeadReLUMonitor(window=3, remedy='reset')"
