"""A healthy run is struck once, and units die: what each remedy brings back, by flags alone.

    python tests/benchmarks/shock.py [--seeds 10] [--remedy reset]    about 5 s per run

Scikit-learn's digits divided by 16, 1400 rows to train on and 397 held out, a 64-128-128-10 network, SGD at 0.1 with
batches of 32. Step 1000 is the shock: one batch with inputs ten times too large and wrong labels, at 1.5 times the
learning rate. Then training goes on for 4000 steps. Dead units are those that fire on none of the 1400 rows, taken from
the network itself and not from the monitor; right after the shock, and at the end. Intervals are Student's over seeds.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from bare_trainer import bare_trainer
from expected import ignore_expected
from intervals import mean
from lightning.pytorch import LightningModule
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_deadrelu import DeadReLUMonitor

ROWS, BATCH, LR, STEPS, SHOCK = 1400, 32, 0.1, 5000, 1000
OUTLIER, FASTER = 10.0, 1.5
REMEDIES: dict[str, Any] = {
    "reset": "reset",
    "thermal_kick": "thermal_kick",
    "bias_warming": "bias_warming",
    "leaky": "leaky",
    "gelu": "gelu",
    "reset, then leaky": ["reset", "leaky"],
    "leaky, then reset": ["leaky", "reset"],
}


class Digits(IterableDataset[tuple[Tensor, Tensor]]):
    """All batches of a run, the shock among them."""

    def __init__(self, seed: int, shock: bool) -> None:
        pixels, labels = load_digits(return_X_y=True)
        order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
        self.x = torch.tensor(pixels, dtype=torch.float32)[order] / 16
        self.y = torch.tensor(labels).long()[order]
        self._seed, self._shock = seed, shock

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self._seed)
        for step in range(STEPS):
            rows = torch.randint(ROWS, (BATCH,), generator=generator)
            x, y = self.x[rows], self.y[rows]
            yield (x * OUTLIER, (y + 1) % 10) if self._shock and step == SHOCK else (x, y)


class Classifier(LightningModule):
    def __init__(self, seed: int, data: Digits, shock: bool) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.data, self.shock = data, shock
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
        self.struck = 0.0

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        for group in self.optimizers().param_groups:
            group["lr"] = LR * (FASTER if self.shock and batch_idx == SHOCK else 1.0)
        loss: Tensor = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == SHOCK:
            self.struck = self.dead()

    @torch.no_grad()
    def dead(self) -> float:
        """Share of all units that fire on no training row."""
        x, dead = self.data.x[:ROWS], []
        for layer in self.net:
            if layer_rectifies(layer):
                dead.append((x <= 0).all(0).float().mean())
            x = layer(x)
        return float(torch.stack(dead).mean())

    @torch.no_grad()
    def accuracy(self) -> float:
        """Measure on the rows held out."""
        return float((self.net(self.data.x[ROWS:]).argmax(1) == self.data.y[ROWS:]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), LR)


def layer_rectifies(layer: nn.Module) -> bool:
    """Whatever took a rectifier's place is judged by its input, as the rectifier was."""
    return not isinstance(layer, nn.Linear)


class Run(NamedTuple):
    struck: float
    dead: float
    accuracy: float
    edited: int
    revived: int
    given_up: int


def run(seed: int, shock: bool, remedy: Any = None) -> Run:
    data = Digits(seed, shock)
    model, monitor = Classifier(seed, data, shock), DeadReLUMonitor(remedy=remedy)
    trainer = bare_trainer(monitor, max_steps=STEPS)
    trainer.fit(model, DataLoader(data, batch_size=None))
    return Run(model.struck, model.dead(), model.accuracy(), *_counts(monitor))


def _counts(monitor: DeadReLUMonitor) -> tuple[int, int, int]:
    edited = sum(len(event.units) for event in monitor.events if event.action == "edited")
    back = sum(int(event.reason.split()[0]) for event in monitor.events if "repaired units fire" in event.reason)
    return edited, back, sum(event.action == "given up" for event in monitor.events)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--remedy", choices=list(REMEDIES), action="append", help="may be given several times")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    ignore_expected()
    print(f"seeds 0 to {arguments.seeds - 1}; DeadReLUMonitor(remedy=...), all else as it comes")
    cases = {"unharmed": (False, None), "none": (True, None)}
    cases |= {name: (True, REMEDIES[name]) for name in arguments.remedy or REMEDIES}
    columns = ("dead after the shock", "dead at the end", "accuracy", "edited", "fire again", "given up")
    table = Table("remedy", *columns, "seconds")
    for name, (shock, remedy) in cases.items():
        start = time.perf_counter()
        runs = [run(seed, shock, remedy) for seed in range(arguments.seeds)]
        struck, dead, accuracy, *counts = zip(*runs, strict=True)
        shares = [mean(struck) if shock else "", mean(dead), mean(accuracy)]
        numbers = [f"{sum(count) / len(count):.1f}" for count in counts]
        table.add_row(name, *shares, *numbers, f"{time.perf_counter() - start:.0f}")
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
