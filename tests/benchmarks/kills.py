"""Whether a run that was killed or interrupted goes on as if nothing had been, with every remedy on.

    python tests/benchmarks/kills.py [--kills 100] [--interrupts 50] [--steps 60] [--seed 0]

Each point is a process that trains and is sent SIGKILL, or SIGINT, at a random time within a random batch, or before
the first. Another one goes on from the latest checkpoint. A checkpoint is saved after each batch, and after SIGINT once
more, wherever that came. Where it came between the optimizer's step and the batch's end, weights and progress do not
fit together whatever watches, and the run goes on from the checkpoint before; such points are counted as "in halves".
In the end weights, optimizer, events and the last verdict have to be those of the run that nothing stopped, to the last
bit.

On 27 November 2026, torch 2.13 on a CPU: 100 of 100 killed and 50 of 50 interrupted runs were equal, 9 of the latter
"in halves", and nothing was left behind.
"""

import argparse
import logging
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from expected import ignore_expected
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from rich.console import Console
from rich.table import Table

sys.path.append(str(Path(__file__).parents[1]))
from toys import Net, Verdicts, bare, mlp, watchers

from lightning_deadrelu.remedies import BiasWarming, LeakySlope

REMEDIES = ["reset", BiasWarming(at_once=True, steps=7), LeakySlope(ramp_steps=5), "thermal_kick", "wake_up", "gelu"]
SETTINGS = {"every_n_steps": 1, "window": 3, "min_samples": 10, "threshold": 0.0, "remedy": REMEDIES}
LAST, INTERRUPTED, OUTCOME = "last.pt", "on_exception.ckpt", "outcome.pt"


class Batches(Callback):
    """The batches, from the first that is not done; kills some units now and then, for remedies to do something."""

    def __init__(self, steps: int) -> None:
        self.items = list(torch.randn(steps, 5, 4, generator=torch.Generator().manual_seed(5)))
        self.done = 0

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Any:
        for number in range(self.done, len(self.items)):
            yield self.items[number]

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % 20 == 12:
            with torch.no_grad():
                pl_module.net[2].bias[:2] = -50.0

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.done = batch_idx + 1

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.done = state_dict["done"]


def train(folder: Path, steps: int, start: Path | None = None) -> dict[str, Any]:
    """Train to the end, and return all that is left."""
    torch.manual_seed(7)
    batches, monitor, model = Batches(steps), Verdicts(**SETTINGS), Net(mlp(), lr=0.05)
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    callbacks = [batches, monitor, saver, OnExceptionCheckpoint(folder, INTERRUPTED.removesuffix(".ckpt"))]
    trainer = Trainer(**bare(callbacks=callbacks, enable_checkpointing=True))
    trainer.fit(model, batches, ckpt_path=start)
    return {
        "weights": model.state_dict(),
        "optimizer": trainer.optimizers[0].state_dict(),
        "actions": [event.action for event in monitor.events],
        "events": [str(event._replace(step=0)) for event in monitor.events],
        "report": [site | {"last_fired": 0} for site in monitor.report.to_dict()["sites"]] if monitor.report else [],
        "failure": repr(monitor.failure),
    }


def in_a_process(work: Callable[[], Any]) -> int:
    """Start a process that works and ends."""
    if child := os.fork():
        return child
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what a run says at its end
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell ignores in what it runs in the background
    try:
        work()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def trained(folder: Path, steps: int, start: Path | None = None) -> Callable[[], None]:
    """Say what a process does that nothing stops."""
    return lambda: torch.save(train(folder, steps, start), folder / OUTCOME)


def interrupted(folder: Path, steps: int) -> Callable[[], None]:
    """Say what a process does that is interrupted: it notes what of ours is left in it."""

    def work() -> None:
        try:
            train(folder, steps)
        except SystemExit:
            torch.save(len(watchers()), folder / "left.pt")

    return work


def done_in(checkpoint: Path | None) -> int:
    """How many batches are done."""
    if checkpoint is None:
        return 0
    states = torch.load(checkpoint, weights_only=True)["callbacks"].values()
    return next(int(state["done"]) for state in states if "done" in state)


def fits(checkpoint: Path, whole: Path) -> bool:
    """Whether the weights of a checkpoint are those that the whole run had behind the batches that are done."""
    saved = torch.load(checkpoint, weights_only=True)
    if not (done := done_in(checkpoint)):
        return bool(saved["global_step"] == 0)
    expected = torch.load(whole / f"step={done}.ckpt", weights_only=True)
    return same(saved["state_dict"], expected["state_dict"])


def wait(folder: Path, until: float, child: int, pace: float) -> None:
    """Wait until a child has done as many batches, with a fraction of one behind them; or until it ends."""
    done = folder / f"step={int(until)}.ckpt"
    while until >= 1 and not done.exists() and not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        time.sleep(pace / 100)
    time.sleep(pace * (until % 1))


def latest(folder: Path) -> Path | None:
    """Find the checkpoint of the last batch that was saved."""
    found = sorted(folder.glob("step=*.ckpt"), key=lambda path: int(path.stem.partition("=")[2]))
    return found[-1] if found else None


def same(one: Any, other: Any) -> bool:
    """Compare to the last bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and same(list(one.values()), list(other.values()))
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other) or (one != one and other != other)


@dataclass
class Whole:
    """The run that nothing stops: its checkpoints and outcome, and how long a batch takes, in seconds."""

    folder: Path
    steps: int
    pace: float = 0.0
    outcome: dict[str, Any] = field(default_factory=dict)

    def run(self) -> None:
        begun = time.monotonic()
        os.waitpid(in_a_process(trained(self.folder, self.steps)), 0)
        self.pace = (time.monotonic() - begun) / self.steps
        self.outcome = torch.load(self.folder / OUTCOME, weights_only=False)
        assert "edited" in self.outcome["actions"], "no remedy did anything"


@dataclass
class Tally:
    """What came of all points of one kind."""

    points: int = 0
    equal: int = 0
    halves: int = 0
    over: int = 0
    left: int = 0
    wrong: list[str] = field(default_factory=list)


def point(how: signal.Signals, until: float, whole: Whole, tally: Tally) -> None:
    """Stop a run within a batch, and go on."""
    steps = whole.steps
    with TemporaryDirectory() as name:
        folder = Path(name)
        interrupts = how is signal.SIGINT
        child = in_a_process(interrupted(folder, steps) if interrupts else trained(folder, steps))
        wait(folder, until, child, whole.pace)
        os.kill(child, how)
        os.waitpid(child, 0)
        tally.left += torch.load(folder / "left.pt") if (folder / "left.pt").exists() else 0
        start = latest(folder)
        if interrupts and (folder / INTERRUPTED).exists():
            in_order = fits(folder / INTERRUPTED, whole.folder)
            tally.halves += not in_order
            start = folder / INTERRUPTED if in_order else start
        if done_in(start) == steps:
            tally.over += 1
            return
        tally.points += 1
        os.waitpid(in_a_process(trained(folder, steps, start)), 0)
        outcome = torch.load(folder / OUTCOME, weights_only=False) if (folder / OUTCOME).exists() else {}
        wrong = [key for key, value in whole.outcome.items() if not same(outcome.get(key), value)]
        tally.equal += not wrong
        if wrong:
            tally.wrong.append(
                f"{how.name} after {until:.2f} batches, from {start and start.name}: {', '.join(wrong)} differ"
            )


def run(kills: int, interrupts: int, steps: int, seed: int) -> dict[str, Tally]:
    """Stop as many runs, each at a random time."""
    draw, tallies = random.Random(seed), {}
    with TemporaryDirectory() as name:
        whole = Whole(Path(name), steps)
        whole.run()
        for how, points in ((signal.SIGKILL, kills), (signal.SIGINT, interrupts)):
            tally = tallies[how.name] = Tally()
            while tally.points < points:
                point(how, draw.uniform(0, steps), whole, tally)
                print(tally, file=sys.stderr)
    return tallies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--interrupts", type=int, default=50)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    logging.disable(logging.INFO)
    ignore_expected()
    torch.set_num_threads(1)  # processes are forked, and threads would not survive that
    table = Table("", "points", "equal to the last bit", "in halves", "came too late", "hooks and modes left")
    for name, tally in run(given.kills, given.interrupts, given.steps, given.seed).items():
        table.add_row(name, *map(str, (tally.points, tally.equal, tally.halves, tally.over, tally.left)))
        print(*tally.wrong, sep="\n")
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
