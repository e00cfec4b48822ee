"""Train a narrow network, let one bad batch kill half of it, and let a flag bring units and accuracy back.

python examples/02_repair.py                            two runs with the same bad batch, without a remedy and with one
python examples/02_repair.py --remedy bias_warming      another remedy; see `DeadReLUMonitor`
python examples/02_repair.py --remedy reset leaky       the second where the first does not help
"""

from __future__ import annotations

import argparse
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("WANDB_SILENT", "true")  # read when wandb is imported

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, random_split

from lightning_deadrelu import DeadReLUMonitor, LivenessReport


class Classifier(LightningModule):
    """Two hidden layers of twelve units: each of them counts. Nothing in here knows that it is watched, or repaired."""

    def __init__(self, lr: float, bad_step: int, width: int = 12) -> None:
        super().__init__()
        self.lr, self.bad_step = lr, bad_step
        self.net = nn.Sequential()
        self.net.add_module("linear1", nn.Linear(64, width))
        self.net.add_module("relu1", nn.ReLU())
        self.net.add_module("linear2", nn.Linear(width, width))
        self.net.add_module("relu2", nn.ReLU())
        self.net.add_module("head", nn.Linear(width, 10))
        self.accuracies: list[tuple[int, float]] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = self.lr * (1.5 if batch_idx == self.bad_step else 1.0)
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        accuracy = (self.net(batch[0]).argmax(1) == batch[1]).float().mean()
        self.log("accuracy", accuracy)
        self.accuracies.append((self.global_step, float(accuracy)))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.lr)


class Batches(IterableDataset[list[Tensor]]):
    """Training batches, one of which is ten times too large and wrongly labelled."""

    def __init__(self, data: TensorDataset, steps: int, bad_step: int, seed: int) -> None:
        self.images, self.labels = data[:]
        self.steps, self.bad_step, self.seed = steps, bad_step, seed

    def __iter__(self) -> Iterator[list[Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)  # both runs see the same batches
        for step in range(self.steps):
            rows = torch.randint(len(self.images), (32,), generator=generator)
            images, labels = self.images[rows], self.labels[rows]
            yield [images * 10, (labels + 1) % 10] if step == self.bad_step else [images, labels]


class Recorder(DeadReLUMonitor):
    """The monitor, with a memory: each verdict passes through ``on_verdict``, which is there to be overridden."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.verdicts: list[LivenessReport] = []

    def on_verdict(self, trainer: Trainer, pl_module: LightningModule, report: LivenessReport) -> None:
        self.verdicts.append(report)


def run(name: str, remedy: list[str] | None, args: argparse.Namespace) -> tuple[Recorder, list[tuple[int, float]]]:
    """Train once, and return the monitor and the accuracies; the seed makes the runs alike until the first edit."""
    print(f"\n-- {name} --\n")
    seed_everything(args.seed, verbose=False)
    train, held_out = random_split(load(), [0.8, 0.2])
    bad_step = args.steps // 4
    model = Classifier(args.lr, bad_step)
    monitor = Recorder(every_n_steps=2, threshold=0, remedy=remedy)
    logger = make_logger(args.logger, args.out, name)
    trainer = Trainer(
        max_steps=args.steps,
        val_check_interval=20,
        num_sanity_val_steps=0,
        accelerator="cpu",
        callbacks=[monitor],
        logger=logger,
        log_every_n_steps=10,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    batches = Batches(TensorDataset(*train[:]), args.steps, bad_step, args.seed)
    trainer.fit(model, DataLoader(batches, batch_size=None), DataLoader(held_out, 512))
    tell(monitor, model.accuracies[-1][1], logger)
    return monitor, model.accuracies


def load() -> TensorDataset:
    images, labels = load_digits(return_X_y=True)
    return TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels).long())


def tell(monitor: Recorder, accuracy: float, logger: Logger | bool) -> None:
    for event in monitor.events:
        print(event)
    print(f"Accuracy {accuracy:.1%}.")
    if isinstance(logger, WandbLogger):
        folder = Path(logger.experiment.dir).parent
        logger.experiment.finish()  # or the next run would go on in this one
        print(f"W&B run: {folder}\n  look at it: wandb leet {folder}\n  upload it:  wandb sync {folder}")


def make_logger(kind: str, folder: Path, name: str) -> Logger | bool:
    """Nothing here needs an account or a network; W&B keeps its runs on disk until they are synced."""
    if kind == "wandb":
        return WandbLogger(name, project="dead-relu", save_dir=folder, offline=True)
    return {"tensorboard": TensorBoardLogger, "csv": CSVLogger}[kind](folder, name) if kind != "none" else False


Curve = list[tuple[int, float]]


def draw(runs: dict[str, tuple[Recorder, Curve]], bad_step: int, title: str, path: Path) -> None:
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=14, fontweight="bold")
    left, right = figure.subplots(1, 2)
    for (name, (monitor, accuracies)), colour in zip(runs.items(), ("#d55e00", "#0072b2"), strict=True):
        dead = [(report.step, report.dead_fraction) for report in monitor.verdicts]
        for axes, curve in ((left, dead), (right, accuracies)):
            axes.plot(*zip(*curve, strict=True), color=colour, linewidth=2.2)
            axes.annotate(f" {name}", curve[-1], color=colour, va="center", fontsize=13, annotation_clip=False)
    for axes, label, height in ((left, "dead units", 0.97), (right, "accuracy on held-out digits", 0.03)):
        finish(axes, label, bad_step, height)
    figure.savefig(path, dpi=160)


def finish(axes: Axes, label: str, bad_step: int, height: float) -> None:
    axes.axvline(bad_step, color="0.6", linewidth=1, linestyle=":", zorder=1)
    axes.annotate(" one bad batch", (bad_step, height), color="0.4", va="center", fontsize=13)
    axes.set_title(label, loc="left", fontsize=14)
    axes.set(ylim=(-0.02, 1.02), xlim=(0, None))
    axes.set_xlabel("training batches", fontsize=13)
    axes.tick_params(labelsize=13)
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--remedy", nargs="+", default=["auto"], help="flags, the next where the one before failed")
    parser.add_argument("--lr", type=float, default=0.1, help="learning rate of SGD")
    parser.add_argument("--seed", type=int, default=109, help="by default the median of 100 to 110, by accuracy")
    parser.add_argument("--steps", type=int, default=4000, help="training batches; a quarter comes before the bad one")
    parser.add_argument("--logger", choices=["wandb", "tensorboard", "csv", "none"], default="wandb")
    parser.add_argument("--out", type=Path, default=Path("outputs"), help="folder for runs and the picture")
    args = parser.parse_args()
    torch.set_num_threads(1)  # for layers as small as these, threads only wait for one another
    args.out.mkdir(parents=True, exist_ok=True)

    remedies: dict[str, list[str] | None] = {"no remedy": None, ", then ".join(args.remedy): args.remedy}
    runs = {name: run(name, remedy, args) for name, remedy in remedies.items()}
    dead, accuracies = ([f"{one:.0%}" for one in pair] for pair in zip(*map(ends, runs.values()), strict=True))
    finding = (
        f"Dead units: {dead[0]} without a remedy, {dead[1]} with it. Accuracy: {accuracies[0]} and {accuracies[1]}"
    )
    draw(runs, args.steps // 4, finding, args.out / "repair.png")
    print(f"\n{finding}.")
    print(f"Picture: {args.out / 'repair.png'}")


def ends(result: tuple[Recorder, Curve]) -> tuple[float, float]:
    monitor, accuracies = result
    return monitor.verdicts[-1].dead_fraction, accuracies[-1][1]


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers|.*LeafSpec")
    main()
