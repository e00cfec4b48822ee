"""The monitor from a command line, from YAML, and in the Trainers of both packages."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.cli import LightningCLI
from torch import nn
from torch.utils.data import DataLoader

from lightning_deadrelu import DeadReLUMonitor, LeakySlope, Reset

pytest.importorskip("sklearn")
EXAMPLES = Path(__file__).parents[1] / "examples"
FEW = [
    "--seed_everything=0",
    "--trainer.max_steps=3",
    "--trainer.logger=false",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.enable_checkpointing=false",
]
MONITOR = "--trainer.callbacks+=lightning_deadrelu.DeadReLUMonitor"
pytestmark = [
    pytest.mark.filterwarnings("ignore:LightningCLI's args parameter is intended"),
    pytest.mark.filterwarnings("ignore:dead_relu. more than 10% dead"),
]


def monitor_of(*arguments: str) -> DeadReLUMonitor:
    """Fit from a command line; return its monitor."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        from digits import Classifier, Digits
    finally:
        sys.path.remove(str(EXAMPLES))
    command = [*arguments, *FEW, "--model.width=8"]
    cli = LightningCLI(Classifier, Digits, args=["fit", *command], save_config_callback=None)
    (monitor,) = (one for one in cli.trainer.callbacks if isinstance(one, DeadReLUMonitor))
    assert monitor.report is not None
    assert "dead_relu/dead_fraction" in cli.trainer.callback_metrics
    return monitor


def test_a_flag():
    assert monitor_of(MONITOR, "--trainer.callbacks.remedy=reset").remedy == "reset"


def test_an_object():
    options = ("--trainer.callbacks.remedy=lightning_deadrelu.Reset", "--trainer.callbacks.remedy.cooldown=3")
    assert monitor_of(MONITOR, *options).remedy == Reset(cooldown=3)


def test_a_list():
    assert monitor_of(MONITOR, "--trainer.callbacks.remedy=[reset,leaky]").remedy == ["reset", "leaky"]


def test_other_options():
    options = ["every_n_steps=1", "window=2", "include=[relu]", "exclude=[net.relu2]", "unit_dims={net.*: -1}"]
    monitor = monitor_of(MONITOR, *(f"--trainer.callbacks.{option}" for option in options))
    assert (monitor.every_n_steps, monitor.window, monitor.unit_dims) == (1, 2, {"net.*": -1})
    assert [site.name for site in monitor.report.sites] == ["net.relu1", "net.relu3"]


REMEDIES = {
    "remedy: reset": "reset",
    "remedy: {class_path: lightning_deadrelu.LeakySlope, init_args: {patience: 2}}": LeakySlope(patience=2),
    "remedy: [{class_path: lightning_deadrelu.Reset, init_args: {cooldown: 2}}, gelu]": [Reset(cooldown=2), "gelu"],
}


@pytest.mark.parametrize("line", REMEDIES)
def test_yaml(line, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(
        "trainer:\n  callbacks:\n    - class_path: lightning_deadrelu.DeadReLUMonitor\n"
        f"      init_args:\n        every_n_steps: 1\n        {line}\n"
    )
    assert monitor_of("--config", str(config)).remedy == REMEDIES[line]


@pytest.mark.slow
def test_the_example():
    monitor = monitor_of("--config", str(EXAMPLES / "cli.yaml"))
    assert monitor.remedy == [Reset(cooldown=2, evidence=600), "leaky"]


def test_what_is_wrong_ends_with_a_reason(capsys):
    with pytest.raises(SystemExit, match="2"):
        monitor_of(MONITOR, "--trainer.callbacks.every_n_steps=often")
    assert "every_n_steps" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("options", [("fit", "--help"), ("fit", "--trainer.callbacks.help", MONITOR.split("=")[1])])
def test_help(options):
    command = [sys.executable, str(EXAMPLES / "digits.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "--model.width" in done.stdout or "Observe one training batch in this many" in done.stdout


@pytest.mark.parametrize("package", [lightning.pytorch, pytorch_lightning], ids=["lightning", "pytorch_lightning"])
def test_both_trainers(package, tmp_path):
    class Model(package.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 1))
            nn.init.constant_(self.net[0].bias[:2], -100.0)

        def training_step(self, batch, batch_idx):
            return self.net(batch).square().mean()

        def validation_step(self, batch, batch_idx):
            pass

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.01)

    monitor = DeadReLUMonitor(every_n_steps=2, window=2, remedy="reset")
    stopping = package.callbacks.EarlyStopping("dead_relu/dead_fraction", patience=10)
    logger = import_module(f"{package.__name__}.loggers").CSVLogger(tmp_path)
    trainer = package.Trainer(
        max_epochs=2, accelerator="cpu", logger=logger, callbacks=[monitor, stopping], log_every_n_steps=1
    )
    loader = DataLoader(torch.rand(800, 4), 100)
    trainer.fit(Model(), loader, loader)
    assert [event.units for event in monitor.events if event.action == "edited"] == [(0, 1)]
    assert trainer.callback_metrics["dead_relu/dead_fraction"] == monitor.report.dead_fraction == 0
    assert "dead_relu/dead_fraction" in Path(logger.log_dir, "metrics.csv").read_text()
