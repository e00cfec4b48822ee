"""What edits do to the loss at once: on the same rows, right before and right after each of them.

    python tests/benchmarks/jump.py [--seeds 5] [--first 100] [--remedy reset]    about 10 s per run

The narrow net of cure.py and its bad batch. Right before is at the end of a batch, before the monitor acts; right
after, at the start of the next, when what a remedy puts into training forwards is there. Edits that are made while an
earlier one is still under way are left out: its next part would be counted along. The loss is that on the 32 rows of
the batch behind which the edit was made, and on all 1400 training rows: on some of these a unit may fire that was
silent on the samples that were observed.
"""

from __future__ import annotations

import argparse
import logging
import statistics
from typing import Any

import torch
import torch.nn.functional as F
from bare_trainer import bare_trainer
from cure import STEPS, TASKS, Batches, Learner
from expected import ignore_expected
from lightning.pytorch import Trainer
from rich.console import Console
from rich.table import Table
from shock import ROWS, Digits
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_deadrelu import DeadReLUMonitor
from lightning_deadrelu.remedies import BiasWarming

REMEDIES: dict[str, Any] = {one: one for one in ("reset", "bias_warming", "wake_up", "leaky", "thermal_kick")}
REMEDIES["bias_warming, at once"] = BiasWarming(at_once=True)


class Monitor(DeadReLUMonitor):
    """Measures the losses at the end of each batch, before it acts."""

    batch: tuple[Tensor, Tensor]
    losses: tuple[float, float]

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.batch, self.losses = batch, pl_module.losses(batch)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


class Jumps(Learner):
    """Measures the loss at the start of each batch before which the monitor edited something."""

    def __init__(self, seed: int, data: Digits, monitor: Monitor) -> None:
        super().__init__(seed, TASKS["narrow"], data, True, "")
        self._monitor = monitor
        self._seen = 0
        self._under_way: set[str] = set()
        self.jumps: list[tuple[float, float]] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        new = list(self._monitor.events)[self._seen :]
        self._seen += len(new)
        edited = {event.site for event in new if event.action == "edited"}
        self._under_way -= {event.site for event in new} - edited
        if edited and not self._under_way:
            now = self.losses(self._monitor.batch)
            self.jumps.append((now[0] - self._monitor.losses[0], now[1] - self._monitor.losses[1]))
        self._under_way |= edited
        return super().training_step(batch, batch_idx)

    @torch.no_grad()
    def losses(self, batch: tuple[Tensor, Tensor]) -> tuple[float, float]:
        """Measure the loss on a batch, and on all training rows."""
        x, y = self.data.x[:ROWS], self.data.y[:ROWS]
        return float(F.cross_entropy(self.net(batch[0]), batch[1])), float(F.cross_entropy(self.net(x), y))


def jumps(seed: int, remedy: Any) -> list[tuple[float, float]]:
    data, monitor = Digits(seed, False), Monitor(threshold=0, remedy=remedy)
    model = Jumps(seed, data, monitor)
    trainer = bare_trainer(monitor, max_steps=STEPS)
    trainer.fit(model, DataLoader(Batches(data, seed, True), batch_size=None))
    return model.jumps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=100)
    parser.add_argument("--remedy", choices=list(REMEDIES), action="append", help="may be given several times")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    ignore_expected()
    seeds = range(arguments.first, arguments.first + arguments.seeds)
    print(f"seeds {seeds[0]} to {seeds[-1]}; DeadReLUMonitor(threshold=0, remedy=...), all else as it comes")
    columns = ("batch: median", "largest change", "all rows: median", "largest change")
    table = Table("rise of the loss", "edits", *columns)
    for name in arguments.remedy or REMEDIES:
        found = [jump for seed in seeds for jump in jumps(seed, REMEDIES[name])]
        sides = [(statistics.median(side), max(map(abs, side))) for side in zip(*found, strict=True)]
        table.add_row(name, str(len(found)), *(f"{number:.2g}" for side in sides for number in side))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
