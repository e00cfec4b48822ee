"""Digits whose pixels are permuted anew in each task, with L2: units die task by task, and remedies keep them.

    python tests/benchmarks/continual.py [--seeds 5] [--only "reset, every step"]    10 to 40 s per run

Scikit-learn's digits divided by 16, 1400 rows to train on and 397 held out, a 64-128-128-10 network with He's
initialisation and no bias at the start, SGD at 0.3 with batches of 32, L2 of 1e-3 on weights alone, 40 tasks of 5
epochs. At the end of each task: the share of units that fire on none of the 1400 rows of that task, taken from the
network itself and not from the monitor, and the accuracy on the held-out rows. Online accuracy is that of each
training batch before it is learnt from. All are means over the last 10 tasks; the intervals are Student's over seeds.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Iterator
from typing import Any

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

ROWS, BATCH, EPOCHS, LATE, LR, L2 = 1400, 32, 5, 10, 0.3, 1e-3
Options = dict[str, Any]
SETTINGS: dict[str, Options | None] = {
    "none": None,
    "reset": {"threshold": 0, "remedy": "reset"},
    "auto": {"threshold": 0, "remedy": "auto"},
    "bias warming": {"threshold": 0, "remedy": "bias_warming"},
    "wake-up": {"threshold": 0, "remedy": "wake_up"},
    "leaky": {"threshold": 0, "remedy": "leaky"},
    "clipping": {"gradient_clip_val": 1.0},
    "reset, every step": {"threshold": 0, "every_n_steps": 1, "remedy": "reset"},
    "reset, every step, little evidence": {
        "threshold": 0,
        "every_n_steps": 1,
        "min_samples": 30,
        "remedy": "reset",
    },
}


class Tasks(IterableDataset[tuple[Tensor, Tensor]]):
    """Batches of the present task; each pass is an epoch."""

    def __init__(self, seed: int) -> None:
        pixels, labels = load_digits(return_X_y=True)
        order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
        self._x = torch.tensor(pixels, dtype=torch.float32)[order] / 16
        self._y = torch.tensor(labels).long()[order]
        self._generator = torch.Generator().manual_seed(seed)
        self.epoch = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.epoch % EPOCHS == 0:
            permutation = torch.randperm(self._x.shape[1], generator=self._generator)
            self.x = self._x[:, permutation]
        self.epoch += 1
        order = torch.randperm(ROWS, generator=self._generator)
        return ((self.x[rows], self._y[rows]) for rows in order.split(BATCH))

    @property
    def train(self) -> Tensor:
        return self.x[:ROWS]

    def accuracy(self, net: nn.Module) -> float:
        """Measure on the rows held out."""
        return float((net(self.x[ROWS:]).argmax(1) == self._y[ROWS:]).float().mean())


class Learner(LightningModule):
    """Learns one task after the other, and notes how it does."""

    def __init__(self, seed: int, tasks: Tasks) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.tasks = tasks
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
        for layer in self.net[::2]:
            nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.dead: list[float] = []
        self.held_out: list[float] = []
        self.online: list[float] = []
        self._right = torch.zeros(())

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        output = self.net(batch[0])
        self._right += (output.detach().argmax(1) == batch[1]).sum()
        loss: Tensor = nn.functional.cross_entropy(output, batch[1])
        return loss

    def on_train_epoch_end(self) -> None:
        if self.tasks.epoch % EPOCHS:
            return
        with torch.no_grad():
            self.dead.append(dead_share(self.net, self.tasks.train))
            self.held_out.append(self.tasks.accuracy(self.net))
        self.online.append(float(self._right) / (EPOCHS * ROWS))
        self._right.zero_()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        weights = [one for one in self.parameters() if one.ndim > 1]
        biases = [one for one in self.parameters() if one.ndim == 1]
        return torch.optim.SGD([{"params": weights, "weight_decay": L2}, {"params": biases}], LR)


def dead_share(net: nn.Sequential, x: Tensor) -> float:
    """Average over layers the share of units that fire on no row."""
    shares = []
    for layer in net:
        x = layer(x)
        if isinstance(layer, nn.ReLU):
            shares.append(float((x <= 0).all(0).float().mean()))
    return sum(shares) / len(shares)


def run(seed: int, tasks: int, options: Options | None) -> tuple[float, float, float, int, int]:
    """Train through all tasks; return dead share, accuracies held out and online, edits, and sites given up."""
    data = Tasks(seed)
    options = dict(options or {})
    clip = options.pop("gradient_clip_val", None)
    model, monitor = Learner(seed, data), DeadReLUMonitor(**options)
    trainer = bare_trainer(*([monitor] if options else []), max_epochs=tasks * EPOCHS, gradient_clip_val=clip)
    trainer.fit(model, DataLoader(data, batch_size=None))
    dead, held_out, online = (sum(v[-LATE:]) / len(v[-LATE:]) for v in (model.dead, model.held_out, model.online))
    actions = [event.action for event in monitor.events]
    return dead, held_out, online, actions.count("edited"), actions.count("given up")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--tasks", type=int, default=40)
    parser.add_argument("--only", choices=list(SETTINGS), action="append", help="may be given several times")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    seeds = range(arguments.first, arguments.first + arguments.seeds)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    ignore_expected()
    print(f"seeds {seeds[0]} to {seeds[-1]}, {arguments.tasks} tasks, means over the last {LATE}")
    table = Table("setting", "dead units", "accuracy at task end", "accuracy online", "edits", "given up", "s per run")
    for name in arguments.only or SETTINGS:
        print(f"{name}: DeadReLUMonitor({', '.join(f'{k}={v!r}' for k, v in (SETTINGS[name] or {}).items())})")
        start = time.perf_counter()
        runs = [run(seed, arguments.tasks, SETTINGS[name]) for seed in seeds]
        *shares, edits, given_up = zip(*runs, strict=True)
        seconds = (time.perf_counter() - start) / arguments.seeds
        numbers = [f"{sum(count) / len(count):.1f}" for count in (edits, given_up)]
        table.add_row(name, *map(mean, shares), *numbers, f"{seconds:.0f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
