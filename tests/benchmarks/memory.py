"""Whether memory stays flat over a long run with a verdict on each batch, for each remedy.

    python tests/benchmarks/memory.py [--steps 10000] [--remedy wake_up]

Units are killed again and again, so that a remedy goes on acting: how often it did in each half is told too. What
Python holds (tracemalloc), what tensors hold and what the process holds are read at half the run, when all bounded
histories are full, and at its end, each time the least of 20 batches: what a batch that is traced holds, or a repair
that is under way, goes again. Limit: 1 %. Lightning itself holds more from step to step, so that a run without the
monitor is measured too.
"""

import argparse
import gc
import logging
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import torch
from expected import ignore_expected
from lightning.pytorch import Callback
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader

sys.path.append(str(Path(__file__).parents[1]))
from toys import Net, fit, mlp

from lightning_deadrelu import DeadReLUMonitor
from lightning_deadrelu.remedies import BiasWarming, LeakySlope, Remedy, Reset, ThermalKick, WakeUp

READINGS = 20  # training batches of which the least is taken
EVERY = 10  # training batches between killings: often enough to fill the list of events before the first reading
REMEDIES: dict[str, Remedy | str | None] = {
    "without the monitor": None,
    "reset": Reset(attempts=None),
    "bias_warming": BiasWarming(steps=3, attempts=None),
    "bias_warming, at once": BiasWarming(at_once=True, steps=3, attempts=None),
    "leaky": LeakySlope(ramp_steps=3, attempts=None),
    "thermal_kick": ThermalKick(attempts=None),
    "wake_up": WakeUp(max_steps=5, attempts=None),
    "auto": "auto",
}


class Meter(Callback):
    """Kills units now and then, and reads memory, and how many units were edited so far, twice."""

    def __init__(self, steps: int, monitor: DeadReLUMonitor | None) -> None:
        self.steps, self.monitor, self.readings, self.edits, self.seen = steps, monitor, [], 0, 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % EVERY == 0:
            with torch.no_grad():
                pl_module.net[0].bias[batch_idx // EVERY % 4] = -60.0
                pl_module.net[2].bias[batch_idx // EVERY % 3] = -60.0
        pl_module.losses.clear()  # its own record

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        events = self.monitor.events if self.monitor and batch_idx % EVERY == EVERY - 1 else ()
        self.edits += sum(event.action == "edited" and event.step >= self.seen for event in events)
        self.seen = batch_idx + 1 if events else self.seen
        for end in (self.steps // 2, self.steps):
            if end - READINGS <= batch_idx < end:
                reading()  # makes Python objects of the storages, which stay
                self.readings.append(reading() | {"edits so far": self.edits})


def reading() -> dict[str, float]:
    """Read memory, in bytes."""
    gc.collect()
    tensors = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors_alive()}
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    return {
        "Python objects": tracemalloc.get_traced_memory()[0],
        "tensors": sum(tensors.values()),
        "the process": resident,
    }


def tensors_alive() -> list[Tensor]:
    return [one for one in gc.get_objects() if isinstance(one, Tensor)]


def measure(remedy: Remedy | str | None, steps: int) -> list[dict[str, float]]:
    """Train, and return both readings."""
    torch.manual_seed(0)
    often = {"every_n_steps": 1, "window": 1, "min_samples": 8, "threshold": 0.0}
    monitor = DeadReLUMonitor(**often, remedy=remedy) if remedy else None
    meter = Meter(steps, monitor)
    batches = DataLoader(torch.randn(steps * 4, 4), batch_size=4)
    tracemalloc.start()
    try:
        fit(Net(mlp(), lr=1e-3), batches, *([monitor] if monitor else []), meter)
    finally:
        tracemalloc.stop()
    halves = meter.readings[:READINGS], meter.readings[READINGS:]
    return [{what: min(one[what] for one in half) for what in half[0]} for half in halves]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--remedy", choices=list(REMEDIES), action="append", help="may be given several times")
    given = parser.parse_args()
    logging.disable(logging.INFO)
    ignore_expected()
    torch.set_num_threads(1)
    table = Table("remedy", "bytes", "at half the run", "at its end", "growth")
    for name in given.remedy or REMEDIES:
        half, end = measure(REMEDIES[name], given.steps)
        for what in half:
            table.add_row(name, what, f"{half[what]:,}", f"{end[what]:,}", f"{end[what] / max(half[what], 1) - 1:+.2%}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
