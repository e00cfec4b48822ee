"""What the end of a window costs with many units: time by part, and bytes.

    python tests/benchmarks/layouts.py [--windows 20] [--sites 64 --units 36864] [--alone]

A real Trainer trains a layer for each site; the parts of each window's end are timed: of one process the time that
one core works on them, and between two gloo ranks on loopback, that share the machine, the time that passes. The
first windows are warm-up: the forecast needs eight. Limit: 50 ms for 2.4 million units on one core, 80 ms where in
each window another tenth of them dies, and 100 bytes of counts for each unit.
"""

import argparse
import io
import logging
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from expected import ignore_expected
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader

sys.path.append(str(Path(__file__).parents[1]))
from toys import bare, inner
from two_ranks import ddp_trainer, on_two_ranks

from lightning_deadrelu import DeadReLUMonitor
from lightning_deadrelu.explain.postmortem.recorder import FlightRecorder
from lightning_deadrelu.monitor import merge, verdicts, window_end
from lightning_deadrelu.monitor.announcer import Announcer
from lightning_deadrelu.monitor.monitor import Monitor
from lightning_deadrelu.observe.ranks import Ranks
from lightning_deadrelu.report.history import RunHistory
from lightning_deadrelu.report.loggers import Reporter
from lightning_deadrelu.statistics import Totals, UnitLiveness

LAYOUTS = ((17, 512), (64, 9216), (64, 36_864))
WARM_UP, WINDOW, ROWS, INPUTS = 9, 2, 8, 4
PARTS = {
    "agree on a layout": (Ranks, "_laid_out"),
    "lay sums end to end": (Totals, "sums"),
    "merge": (Ranks, "merge"),
    "to the host, with notes for a post-mortem": (merge, "_on_host"),
    "verdict": (verdicts, "judge"),
    "post-mortem": (FlightRecorder, "explain"),
    "history and forecast": (RunHistory, "close"),
    "scalars to a logger": (Reporter, "log"),
    "threshold": (Announcer, "tell_crossed"),
    "reset": (UnitLiveness, "reset"),
    "in all": (window_end, "close"),
}


class Wide(LightningModule):
    """Many layers side by side; one unit in ten is dead, or if they take turns another tenth in each window."""

    def __init__(self, sites: int, units: int, turns: bool = False) -> None:
        super().__init__()
        self.turns = turns
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(INPUTS, units), nn.ReLU()) for _ in range(sites))
        with torch.no_grad():
            for layer in self.layers:
                layer[0].bias[::10] = -100.0

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        window, observation = divmod(batch_idx, WINDOW)
        if self.turns and not observation:
            for layer in self.layers:
                layer[0].bias.data.zero_()[window % 10 :: 10] = -100.0

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return torch.stack([layer(batch).mean() for layer in self.layers]).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-4)


@contextmanager
def timed(seconds: dict[str, list[float]], clock: Callable[[], float]) -> Iterator[None]:
    """Take the time of each part; a part inside another counts in both."""

    def around(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def clocked(*args: Any, **kwargs: Any) -> Any:
            start = clock()
            result = function(*args, **kwargs)
            seconds.setdefault(part, []).append(clock() - start)
            return result

        return clocked

    originals = {part: getattr(*place) for part, place in PARTS.items()}
    for part, (owner, name) in PARTS.items():
        setattr(owner, name, around(part, originals[part]))
    try:
        yield
    finally:
        for part, (owner, name) in PARTS.items():
            setattr(owner, name, originals[part])


def tensors_in(value: Any) -> list[Tensor]:
    """Find all tensors that something holds."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return tensors_in(list(value.values()))
    if is_dataclass(value) and not isinstance(value, type):
        return [tensor for f in fields(value) for tensor in tensors_in(getattr(value, f.name))]
    if isinstance(value, (list, tuple)):
        return [tensor for one in value for tensor in tensors_in(one)]
    return []


def size(*values: Any) -> int:
    """Count bytes of memory, each storage once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors_in(values)}
    return sum(storage.nbytes() for storage in storages.values())


def measure(
    sites: int,
    units: int,
    windows: int,
    trainer: Callable[..., Trainer],
    clock: Callable[[], float] = time.thread_time,
    turns: bool = False,
) -> dict[str, float]:
    """Return the median milliseconds of each part, and sizes in bytes."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    seconds: dict[str, list[float]] = {}
    evidence = {"min_samples": WINDOW * ROWS} if turns else {}  # a window is enough
    monitor, sizes = Sized(every_n_steps=1, window=WINDOW, report_dir=None, **evidence), {}
    batches = DataLoader(torch.randn((WARM_UP + windows) * WINDOW, ROWS, INPUTS), batch_size=None)
    with timed(seconds, clock):
        trainer(callbacks=[monitor], logger=DummyLogger()).fit(Wide(sites, units, turns), batches)
    sizes = {f"bytes: {key}": value for key, value in monitor.sizes.items()}
    times = {part: every[WARM_UP:] for part, every in seconds.items() if len(every) > WARM_UP}
    return {part: statistics.median(every) * 1e3 for part, every in times.items()} | sizes


class Sized(DeadReLUMonitor):
    """Takes the sizes after the last observation."""

    sizes: dict[str, int]

    def summary(self) -> str:
        """Say nothing: a table of units is not what is measured here."""
        return ""

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        monitor, last = inner(self), trainer.is_last_batch
        pending = dict(monitor.watch.liveness._pending) if last else {}
        super().on_train_batch_end(trainer, *args)
        if last:
            self.sizes = self._sizes(monitor, pending, joint=trainer.world_size > 1)

    def _sizes(self, monitor: Monitor, pending: Any, *, joint: bool) -> dict[str, int]:
        liveness, verdicts, saved = monitor.watch.liveness, monitor.verdicts, io.BytesIO()
        totals = liveness.totals()
        if not joint:
            torch.save(self.state_dict(), saved)
        return {
            "counts on the device": size(list(vars(liveness).values()), pending),
            "history on the host": size(verdicts.units),
            "forecast on the host": size(dict(verdicts.history.peaks)),
            "biases on the device": size(list(vars(verdicts.recorder._incoming.state).values())),
            "raster on the host": size([track.columns for track in verdicts.history.raster._tracks.values()]),
            "report on the host": size(self.report),
            "checkpoint": len(saved.getvalue()),
            "SUM per rank": size(totals.sums()),
            "MAX per rank": size(totals.maxima),
        }


def alone(**options: Any) -> Trainer:
    return Trainer(**bare(**options))


def joint(rank: int, sites: int, units: int, windows: int) -> dict[str, float]:
    return measure(sites, units, windows, ddp_trainer, time.perf_counter)


def tables(layouts: list[tuple[int, int]], figures: list[dict[str, float]]) -> list[Table]:
    """Lay the figures out: milliseconds, then bytes."""
    keys = list(dict.fromkeys(key for column in figures for key in column))
    times = Table("milliseconds", *(f"{sites} x {units:,}" for sites, units in layouts))
    sizes = Table("bytes", *(f"{sites} x {units:,}" for sites, units in layouts))
    every = [sites * units for sites, units in layouts]
    for key in (key for key in keys if key.startswith("bytes: ")):
        cells = [f"{one[key]:,} ({one[key] / units:.1f} a unit)" for one, units in zip(figures, every, strict=True)]
        sizes.add_row(key.removeprefix("bytes: "), *cells)
    for key in (key for key in PARTS if key in keys):
        times.add_row(key, *(f"{one[key]:.2f}" for one in figures))
    return [times, sizes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=15)
    parser.add_argument("--sites", type=int)
    parser.add_argument("--units", type=int)
    parser.add_argument("--alone", action="store_true", help="leave the two ranks out")
    given = parser.parse_args()
    layouts = [(given.sites, given.units)] if given.sites else list(LAYOUTS)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    ignore_expected()
    console = Console(width=130)
    if not given.alone:  # first: processes are forked, and threads would not survive that
        two = [on_two_ranks(joint, *layout, given.windows)[0] for layout in layouts]
    one = [measure(*layout, given.windows, alone) for layout in layouts]
    dying = [measure(*layout, given.windows, alone, turns=True) for layout in layouts]
    console.print("One process, one core", *tables(layouts, one))
    console.print("The same, where in each window another tenth of all units dies", tables(layouts, dying)[0])
    if not given.alone:
        console.print("Rank 0 of two on loopback, one core each", *tables(layouts, two))


if __name__ == "__main__":
    main()
