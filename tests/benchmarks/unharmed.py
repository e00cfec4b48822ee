"""Usual networks with usual settings, in which nothing is wrong: what remedies do there, and whether it harms.

    python tests/benchmarks/unharmed.py [--seeds 4] [--remedy auto]    about 3 s per run

The first five set-ups of examples/causes/healthy.py, 200 steps on digits, each step observed. Edited is how many units
were edited at the monitor's own threshold of 0.1, and at 0, where every dead unit is treated. Accuracy is that on all
rows, most of which were trained on, at threshold 0; the difference is to the same seed without a remedy.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from intervals import mean
from rich.console import Console
from rich.table import Table

sys.path.append(str(Path(__file__).parents[2] / "examples" / "causes"))
from common import Setup, train
from healthy import IMAGES, LABELS, SETUPS

NETS = list(SETUPS)[:5]
REMEDIES = ("auto", "bias_warming", "wake_up", "leaky")


def edited(name: str, seed: int, **options: object) -> tuple[int, float]:
    """Train one network; return how many units were edited, and its accuracy."""
    torch.manual_seed(seed)
    setup: Setup = SETUPS[name](seed)
    monitor = train(setup, **options)
    units = sum(len(event.units) for event in monitor.events if event.action == "edited")
    model = setup.model.eval()
    with torch.no_grad():
        outputs = model(IMAGES.reshape(-1, *setup.batches[0][0].shape[1:]))
    return units, float((outputs.argmax(1) == LABELS).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--first", type=int, default=100)
    parser.add_argument("--remedy", choices=REMEDIES, action="append", help="may be given several times")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    seeds = range(arguments.first, arguments.first + arguments.seeds)
    print(f"seeds {seeds[0]} to {seeds[-1]}; DeadReLUMonitor(every_n_steps=1, remedy=...)")
    table = Table("network", "remedy", "edited at 0.1", "edited at 0", "accuracy", "difference")
    for name in NETS:
        without = [edited(name, seed)[1] for seed in seeds]
        table.add_row(name, "none", "", "", mean(without))
        for remedy in arguments.remedy or REMEDIES:
            few = [edited(name, seed, remedy=remedy)[0] for seed in seeds]
            all_, accuracy = zip(*(edited(name, seed, remedy=remedy, threshold=0.0) for seed in seeds), strict=True)
            rise = mean([one - other for one, other in zip(accuracy, without, strict=True)])
            table.add_row("", remedy, str(sum(few)), str(sum(all_)), mean(accuracy), rise)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
