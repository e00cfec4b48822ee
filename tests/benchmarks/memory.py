"""Whether memory stays flat over a long run with a verdict on each batch and every remedy on.

    python tests/benchmarks/memory.py [--steps 10000]

Units are killed again and again, so that remedies go on acting. What Python holds (tracemalloc), what tensors hold and
what the process holds are read at half the run, when all bounded histories are full, and at its end. Limit: 1 %.
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
from lightning_deadrelu.remedies import BiasWarming, LeakySlope, Reset, ThermalKick, WakeUp

REMEDIES = [
    Reset(attempts=None),
    BiasWarming(at_once=True, steps=3, attempts=1),
    BiasWarming(steps=3, attempts=1),
    LeakySlope(ramp_steps=3, attempts=1),
    ThermalKick(attempts=1),
    WakeUp(max_steps=5),
]


class Meter(Callback):
    """Kills units now and then, in turns such that each remedy comes to act, and reads memory twice."""

    def __init__(self, steps: int) -> None:
        self.steps, self.readings = steps, []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % 25 == 0:
            with torch.no_grad():
                pl_module.net[0].bias[batch_idx // 25 % 4] = -60.0
                pl_module.net[2].bias[batch_idx // 25 % 3] = -60.0
        pl_module.losses.clear()  # its own record

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx + 1 in (self.steps // 2, self.steps):
            self.readings.append(reading())


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


def measure(steps: int) -> tuple[list[dict[str, float]], DeadReLUMonitor]:
    """Train, and return both readings and the monitor."""
    torch.manual_seed(0)
    meter = Meter(steps)
    monitor = DeadReLUMonitor(every_n_steps=1, window=1, min_samples=8, threshold=0.0, remedy=REMEDIES)
    batches = DataLoader(torch.randn(steps * 4, 4), batch_size=4)
    tracemalloc.start()
    try:
        fit(Net(mlp(), lr=1e-3), batches, monitor, meter)
    finally:
        tracemalloc.stop()
    return meter.readings, monitor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    given = parser.parse_args()
    logging.disable(logging.INFO)
    ignore_expected()
    torch.set_num_threads(1)
    (half, end), monitor = measure(given.steps)
    table = Table("bytes", "at half the run", "at its end", "growth")
    for what in half:
        table.add_row(what, f"{half[what]:,}", f"{end[what]:,}", f"{end[what] / half[what] - 1:+.2%}")
    acted = {event.remedy for event in monitor.events if event.action == "edited"}
    Console(width=110).print(
        table, f"Of the last {len(monitor.events)} events, edits are by {', '.join(sorted(acted))}."
    )


if __name__ == "__main__":
    main()
