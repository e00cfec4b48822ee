"""Train on two workers of Ray Train, and watch them as one: a verdict is about the samples of all workers together.

pip install -c constraints.txt ".[examples,ray]"
python examples/03_ray.py                  two CPU workers, half a minute, most of it Ray's start
python examples/03_ray.py --workers 4

The last epoch has learning rate 0. So its verdict, which the workers came to together, is about one set of weights,
those of the checkpoint; at the end it is held against an audit of that checkpoint in a single process.

Ray's callback reports at the end of each epoch what it finds in ``callback_metrics``. The monitor is called before it,
wherever it is listed, and has judged by then. The verdict on a window that is still open when training ends comes after
Ray's last report; here the windows end with the epochs.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # read when ray is imported

import ray.train.lightning
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from ray.train import Result, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_deadrelu import DeadReLUMonitor, find_dead_units

BATCHES = 10  # a worker sees its share of the digits in so many


class Classifier(LightningModule):
    """Three hidden layers. Nothing in here knows of Ray, or that it is watched."""

    def __init__(self, lr: float = 0.15, epochs: int = 6, width: int = 64) -> None:
        super().__init__()
        self.lr, self.epochs = lr, epochs
        self.net = nn.Sequential()
        for number in range(1, 4):
            self.net.add_module(f"linear{number}", nn.Linear(64 if number == 1 else width, width))
            self.net.add_module(f"relu{number}", nn.ReLU())
        self.net.add_module("head", nn.Linear(width, 10))

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)  # type: ignore[no-any-return]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), self.lr, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: epoch < self.epochs - 1)]


def load() -> TensorDataset:
    images, labels = load_digits(return_X_y=True)
    return TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels).long())


def train(settings: dict[str, Any]) -> None:
    """Train one worker; Ray runs this in a process of its own for each."""
    warnings.filterwarnings("ignore", message=".*does not have many workers|.*LeafSpec|.*has no logger|.*more than 10%")
    seed_everything(0, verbose=False)
    data = TensorDataset(*load()[: settings["rows"]])
    monitor = DeadReLUMonitor(every_n_steps=1, window=BATCHES, report_dir=settings["out"])
    trainer = Trainer(
        max_epochs=settings["epochs"],
        accelerator="cpu",
        strategy=ray.train.lightning.RayDDPStrategy(),
        plugins=[ray.train.lightning.RayLightningEnvironment()],
        callbacks=[monitor, ray.train.lightning.RayTrainReportCallback()],  # Ray reports what it finds at its turn
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    loader = DataLoader(data, len(data) // settings["workers"] // BATCHES, shuffle=True)
    ray.train.lightning.prepare_trainer(trainer).fit(Classifier(settings["lr"], settings["epochs"]), loader)
    if trainer.is_global_zero:
        Path(settings["out"], "report.txt").write_text(monitor.summary(), encoding="utf-8")


def launch(settings: dict[str, Any]) -> Result:
    trainer = TorchTrainer(
        train,
        train_loop_config=settings,
        scaling_config=ScalingConfig(num_workers=settings["workers"]),
        run_config=RunConfig(storage_path=settings["out"]),
    )
    return trainer.fit()


def compare(result: Result, together: dict[str, list[int]], images: Tensor) -> None:
    """Hold the dead units of each site against those that a single process finds in the checkpoint."""
    model = Classifier()
    with result.checkpoint.as_directory() as folder:
        model.load_state_dict(torch.load(Path(folder) / "checkpoint.ckpt", weights_only=True)["state_dict"])
    alone = {site.name: site.dead.nonzero().flatten().tolist() for site in find_dead_units(model, [images]).sites}
    if together != alone:
        raise SystemExit(f"The workers disagree with a single process.\nTogether: {together}\nAlone: {alone}")
    print(f"A single process finds the same {sum(map(len, alone.values()))} units dead.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--lr", type=float, default=0.15, help="learning rate of SGD with momentum 0.9")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--out", type=Path, default=Path("outputs"), help="folder for Ray's results and the page")
    args = parser.parse_args()
    rows = 1700 // (args.workers * BATCHES) * args.workers * BATCHES  # so many that no sampler has to pad
    out = str(args.out.resolve())  # workers run in folders of their own

    ray.init(num_cpus=args.workers + 1, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    result = launch({"workers": args.workers, "lr": args.lr, "epochs": args.epochs, "rows": rows, "out": out})
    print((args.out / "report.txt").read_text(encoding="utf-8"))
    print(f"\nRay's Result.metrics['dead_relu/dead_fraction'] is {result.metrics['dead_relu/dead_fraction']:.4f}.")
    sites = json.loads((args.out / "report.json").read_text(encoding="utf-8"))["sites"]
    compare(result, {site["name"]: site["dead"] for site in sites}, load()[:rows][0])


if __name__ == "__main__":
    main()
