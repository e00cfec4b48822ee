"""Train a small network on scikit-learn's digits at a learning rate that is too high, and watch its units die.

python examples/01_watch.py               half of the first layer dies, and the accuracy hardly shows it
python examples/01_watch.py --lr 0.02     the same network in better health
python examples/01_watch.py --data DIR    Fashion-MNIST or MNIST, from the idx or idx.gz files in DIR
"""

from __future__ import annotations

import argparse
import gzip
import logging
import os
import warnings
from pathlib import Path

os.environ.setdefault("WANDB_SILENT", "true")  # read when wandb is imported

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_deadrelu import DeadReLUMonitor


class Classifier(LightningModule):
    """Four hidden layers. Nothing in here knows that it is watched."""

    def __init__(self, inputs: int, lr: float, width: int = 128) -> None:
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(nn.Flatten())
        for number in range(1, 5):
            self.net.add_module(f"linear{number}", nn.Linear(inputs if number == 1 else width, width))
            self.net.add_module(f"relu{number}", nn.ReLU())
        self.net.add_module("head", nn.Linear(width, 10))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        self.log("dead", self.trainer.callback_metrics["dead_relu/dead_fraction"], prog_bar=True, logger=False)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        correct = self.net(batch[0]).argmax(1) == batch[1]
        self.log("accuracy", correct.float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.lr, momentum=0.9)


def load(folder: Path | None) -> TensorDataset:
    """Read the digits, or the images and labels that an idx data set keeps for training."""
    images, labels = load_digits(return_X_y=True) if folder is None else (read_idx(folder, k) for k in (3, 1))
    return TensorDataset(torch.tensor(images / images.max(), dtype=torch.float32), torch.tensor(labels).long())


def read_idx(folder: Path, dimensions: int) -> np.ndarray:
    path = next(folder.glob(f"train-*idx{dimensions}-ubyte*"))
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    shape = np.frombuffer(raw, ">i4", dimensions, offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def make_logger(kind: str, folder: Path) -> Logger | bool:
    """Nothing here needs an account or a network; W&B keeps its runs on disk until they are synced."""
    if kind == "wandb":
        return WandbLogger(project="dead-relu", save_dir=folder, offline=True)
    if kind == "mlflow":
        return MLFlowLogger("dead-relu", tracking_uri=f"sqlite:///{folder}/mlflow.db")
    return {"tensorboard": TensorBoardLogger, "csv": CSVLogger}[kind](folder) if kind != "none" else False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lr", type=float, default=0.15, help="learning rate of SGD with momentum 0.9")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--data", type=Path, help="folder with idx files")
    parser.add_argument("--logger", choices=["wandb", "tensorboard", "csv", "mlflow", "none"], default="wandb")
    parser.add_argument("--out", type=Path, default=Path("outputs"), help="folder for runs and the picture")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # for layers as small as these, threads only wait for one another
    seed_everything(0, verbose=False)

    data = load(args.data)
    train, held_out = random_split(data, [0.8, 0.2])
    model = Classifier(data[0][0].numel(), args.lr)
    monitor = DeadReLUMonitor(every_n_steps=2)
    logger = make_logger(args.logger, args.out)
    trainer = Trainer(
        max_epochs=args.epochs,
        accelerator="cpu",
        callbacks=[monitor],
        logger=logger,
        log_every_n_steps=10,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(train, 64, shuffle=True), DataLoader(held_out, 512))

    report = monitor.report
    assert report is not None
    accuracy, dead = trainer.callback_metrics["accuracy"], report.dead_fraction
    better = "; --lr 0.02 keeps them alive" if dead > 0.1 else ""
    print(f"\nLearning rate {args.lr:g}: accuracy {accuracy:.1%}, {dead:.0%} of the units dead{better}.")
    picture = args.out / "dead_relu.png"
    monitor.plot()[0].savefig(picture)
    print(f"Picture: {picture}")
    if isinstance(logger, WandbLogger):
        run = Path(logger.experiment.dir).parent
        print(f"W&B run: {run}\n  look at it: wandb leet {run}\n  upload it:  wandb sync {run}")


if __name__ == "__main__":
    for name in ("lightning.pytorch", "mlflow"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers|.*LeafSpec")
    main()
