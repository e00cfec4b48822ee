"""What the scripts of this folder share: digits, networks, a watched training, and how before and after are shown."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import textwrap
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from lightning_deadrelu import DeadReLUMonitor, LivenessReport

for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
    logging.getLogger(name).setLevel(logging.ERROR)

SHORT = 150  # training batches of a short run
DRAWN: list[Figure] = []  # for the gallery of the documentation
Batches = list[tuple[Tensor, ...]]
Curve = list[tuple[int, float]]
MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]


class Learner(LightningModule):
    """A network, its loss and its optimizer."""

    def __init__(
        self,
        net: nn.Module,
        optimizer: MakeOptimizer,
        loss: Callable[..., Tensor] = nn.functional.cross_entropy,
    ) -> None:
        super().__init__()
        self.net, self.optimizer, self.loss = net, optimizer, loss

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)  # type: ignore[no-any-return]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self.loss(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Optimizer | list[Optimizer]:
        return self.optimizer(self.parameters())


def dead(report: LivenessReport) -> float:
    return report.dead_fraction


class Setup(NamedTuple):
    """A training run: model, batches, arguments of the Trainer and of the monitor, and what of a report is drawn."""

    model: LightningModule
    batches: Batches
    trainer: Mapping[str, Any] = {}
    monitor: Mapping[str, Any] = {}
    share: Callable[[LivenessReport], float] = dead
    label: str = "dead units"


class Recorder(DeadReLUMonitor):
    """The monitor, with a memory."""

    def __init__(self, share: Callable[[LivenessReport], float] = dead, **options: Any) -> None:
        super().__init__(**options)
        self.share = share
        self.curve: Curve = []

    def on_verdict(self, trainer: Trainer, pl_module: LightningModule, report: LivenessReport) -> None:
        self.curve.append((report.step + 1, self.share(report)))


def digits(raw: bool = False) -> tuple[Tensor, Tensor]:
    """Load 1,797 images of 64 pixels, centred and of variance 1, or raw between 0 and 1; and their labels."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images / 16, dtype=torch.float32)
    return x if raw else (x - x.mean(0)) / x.std(), torch.tensor(labels).long()


class Listed(Dataset[tuple[Tensor, ...]]):
    """Batches that are there already."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __getitem__(self, number: int) -> tuple[Tensor, ...]:
        return self.batches[number]

    def __len__(self) -> int:
        return len(self.batches)


def rows(*data: Tensor, steps: int, seed: int, size: int = 64) -> Batches:
    """Pick batches of rows at random, the same ones for a seed."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(data[0]), (steps, size), generator=generator)
    return [tuple(one[numbers] for one in data) for numbers in chosen]


def mlp(*sizes: int, activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    """Build linear layers with a rectifier between each two."""
    net = nn.Sequential()
    for number, (inputs, outputs) in enumerate(pairwise(sizes), 1):
        net.add_module(f"linear{number}", nn.Linear(inputs, outputs))
        if number < len(sizes) - 1:
            net.add_module(f"act{number}", activation())
    return net


def sgd(lr: float, **options: Any) -> MakeOptimizer:
    return lambda parameters: torch.optim.SGD(parameters, lr, **({"momentum": 0.9} | options))


def adam(lr: float, **options: Any) -> MakeOptimizer:
    return lambda parameters: torch.optim.Adam(parameters, lr, **options)


def train(setup: Setup, **options: Any) -> Recorder:
    """Train once, and quietly, under a monitor that observes every step."""
    monitor = Recorder(setup.share, **({"every_n_steps": 1} | dict(setup.monitor) | options))
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        trainer = Trainer(
            max_epochs=1,
            accelerator="cpu",
            callbacks=[monitor],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **setup.trainer,
        )
        trainer.fit(setup.model, DataLoader(Listed(setup.batches), batch_size=None))
    return monitor


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """Draw shares between 0 and 1 as a line of blocks, the largest of each piece where there are too many."""
    pieces = [values[i * len(values) // width : (i + 1) * len(values) // width] for i in range(width)]
    shown = [max(piece) for piece in pieces if piece] if len(values) > width else values
    return "".join("▁▂▃▄▅▆▇█"[min(int(value * 8), 7)] for value in shown)


def show(title: str, label: str, before: Curve, after: Curve, picture: Path | None = None) -> None:
    """Print both curves, and draw them where a picture is asked for."""
    print(f"{title}\n\n{label}, from {before[0][0]} to {before[-1][0]} training batches")
    for name, curve in (("before", before), ("after", after)):
        print(f"{name:6}  {curve[0][1]:4.0%} {sparkline([share for _, share in curve])} {curve[-1][1]:4.0%}")
    DRAWN.append(draw(title, label, before, after))
    if picture:
        DRAWN[-1].savefig(picture, dpi=100)


def draw(title: str, label: str, before: Curve, after: Curve) -> Figure:
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    for name, curve, color, style in (("before", before, "#d55e00", "-"), ("after the cure", after, "#0072b2", "--")):
        axes.plot(*zip(*curve, strict=True), style, color=color, linewidth=2, label=name)
    axes.set_title(textwrap.fill(title, 64), fontsize=11)
    axes.set(xlabel="training batches", ylabel=label, ylim=(-0.03, 1.03), xlim=(0, None))
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def run(build: Callable[..., Setup], doc: str | None, arguments: Sequence[str] | None = None) -> tuple[float, float]:
    """Train with the cause and with its cure, show both, and return the last shares of both."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="fewer steps")
    parser.add_argument("--picture", type=Path, help="a PNG file with both curves")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)  # for layers as small as these, threads only wait for one another
    fewer = {"steps": SHORT} if args.short else {}
    setups = [build(cured, seed=args.seed, **fewer) for cured in (False, True)]
    before, after = (train(setup).curve for setup in setups)
    show((doc or "").partition("\n")[0].rstrip("."), setups[0].label, before, after, args.picture)
    return before[-1][1], after[-1][1]
