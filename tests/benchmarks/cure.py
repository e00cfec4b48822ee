"""Units are killed once, in nets and with optimizers of many kinds: what each remedy brings back, by flags alone.

    python tests/benchmarks/cure.py [--task narrow] [--remedy auto] [--seeds 15] [--first 100]    about 8 s per run

With `--results FILE` each run is appended to a file of JSON lines, and what stands there already is not run again;
those behind the figures of docs/repair-results.md are in tests/benchmarks/results/cure.jsonl.

Scikit-learn's digits divided by 16, 1400 rows to train on and 397 held out, batches of 32. At step 1000 of 4000 either
one bad batch comes (inputs ten times too large, wrong labels, 1.5 times the learning rate: see shock.py), or, where a
bad batch kills nobody, seven twelfths of the units of each layer are pushed below the hinge by the depth that the
task names. Remedies act with `threshold=0` and all else by default. Beside them: what a user would do instead.

Struck is who fires on none of the 1400 rows right after, and did before; dead, who does at the end. Fires: on more
than 1 % of the rows, of the struck. Useful: the training loss rises by at least a tenth of the median unstruck live
unit's rise where a unit's output is replaced by its mean. All taken from the network itself, and not from the monitor;
intervals are Student's over seeds.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from bare_trainer import bare_trainer
from expected import ignore_expected
from intervals import mean
from lightning.pytorch import LightningModule
from rich.console import Console
from rich.table import Table
from shock import BATCH, FASTER, OUTLIER, ROWS, Digits
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader, IterableDataset

from lightning_deadrelu import DeadReLUMonitor

STEPS, SHOCK, STRUCK = 4000, 1000, 7 / 12
ACTIVATIONS = (F.relu, torch.relu, F.leaky_relu, F.gelu)


# -- nets --------------------------------------------------------------------------------------------------------------


def mlp(*widths: int, norm: bool = False, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width, following in zip((64, *widths), widths, strict=False):
        layers += [nn.Linear(width, following), *([nn.BatchNorm1d(following)] if norm else []), activation()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], 10))


def convolutions(width: int = 12, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    def layer(channels: int) -> list[nn.Module]:
        return [nn.Conv2d(channels, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), activation()]

    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(nn.Unflatten(1, (1, 8, 8)), *layer(1), *layer(width), *pool, nn.Linear(width, 10))


class Functional(nn.Module):
    """One rectifier, called as a function, serves all layers; the first weight is computed anew in each forward."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(64, width), nn.Linear(width, width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.first.weight - self.first.weight.mean(1, keepdim=True)  # standardised, as in Qiao et al. 2019
        for layer in (lambda x: F.linear(x, weight, self.first.bias), self.second):
            x = F.relu(layer(x))
        out: Tensor = self.head(x)
        return out


class Graph(nn.Module):
    """The rows of a batch are the nodes of a ring, and take their neighbours' features in by a scatter."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(64, width), nn.Linear(width, width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        nodes = torch.arange(len(x))
        for layer in (self.first, self.second):
            h = F.relu(layer(x))
            x = h.scatter_add(0, ((nodes + 1) % len(nodes))[:, None].expand_as(h), 0.1 * h)
        out: Tensor = self.head(x)
        return out


class Sparse(nn.Module):
    """A classifier with an autoencoder's code, on which the loss puts a price."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.encoder, self.decoder, self.head = nn.Linear(64, width), nn.Linear(width, 64), nn.Linear(width, 10)
        self.extra = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        code = F.relu(self.encoder(x))
        self.extra = F.mse_loss(self.decoder(code), x) + 1e-3 * code.abs().mean()
        out: Tensor = self.head(code)
        return out


# -- tasks -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """What is trained, and how its units are killed.

    Args:
        net: Makes the network; takes ``activation`` where a user could choose another.
        lr: The learning rate.
        adam: Whether Adam trains it, rather than SGD.
        depth: By how much the last shift of units is lowered; 0 for the bad batch.
        precision: As the Trainer names it.
        fixed: Whether the rectifier is written into the network's code.
    """

    net: Callable[..., nn.Module]
    lr: float = 0.1
    adam: bool = False
    depth: float = 0.0
    precision: Any = "32-true"
    fixed: bool = False


def _narrow(**options: Any) -> nn.Sequential:
    return mlp(12, 12, **options)


def _normed(**options: Any) -> nn.Sequential:
    return mlp(12, 12, norm=True, **options)


TASKS = {
    "wide": Task(lambda **options: mlp(128, 128, **options)),
    "narrow": Task(_narrow),
    "narrow, bf16": Task(_narrow, precision="bf16-mixed"),
    "narrow, Adam, -30": Task(_narrow, 3e-3, True, 30),
    "narrow, BatchNorm, -6": Task(_normed, 0.1, False, 6),
    "narrow, BatchNorm, Adam, -6": Task(_normed, 3e-3, True, 6),
    "convolutions, -15": Task(convolutions, 3e-3, True, 15),
    "deep, -300": Task(_narrow, 3e-3, True, 300),
    "slow, -30": Task(_narrow, 3e-4, True, 30),
    "norm's shift, -60": Task(_normed, 3e-3, True, 60),
    "functional, -3": Task(Functional, 0.1, False, 3, fixed=True),
    "graph, -3": Task(Graph, 0.1, False, 3, fixed=True),
    "sparsity loss, -3": Task(Sparse, 0.1, False, 3, fixed=True),
}
REMEDIES: dict[str, Any] = {one: one for one in ("reset", "bias_warming", "wake_up", "leaky", "auto")}
REMEDIES["reset, warming, wake-up"] = ["reset", "bias_warming", "wake_up"]
REMEDIES["warming, wake-up"] = ["bias_warming", "wake_up"]
OTHERS = ("unharmed", "none", "clipping", "a third of the rate", "LeakyReLU", "GELU", "checkpoint")


class Recorder(TorchFunctionMode):
    """Keep the input of every activation, and replace one unit's output by its mean."""

    def __init__(self, site: int = -1, unit: int = -1) -> None:
        super().__init__()
        self.inputs: list[Tensor] = []
        self._site, self._unit = site, unit

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in ACTIVATIONS:
            self.inputs.append(args[0].movedim(1, -1).flatten(0, -2))
            if len(self.inputs) - 1 == self._site:
                out = out.index_copy(1, torch.tensor([self._unit]), out[:, [self._unit]].mean().expand_as(out[:, :1]))
        return out


class Learner(LightningModule):
    def __init__(self, seed: int, task: Task, data: Digits, harm: bool, remedy: str) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.task, self.data, self.harm, self.remedy = task, data, harm, remedy
        chosen = {"LeakyReLU": nn.LeakyReLU, "GELU": nn.GELU}.get(remedy)
        self.net = task.net(activation=chosen) if chosen else task.net()
        self.lr = task.lr / (3 if remedy == "a third of the rate" else 1)
        self.struck = torch.zeros(0, dtype=torch.bool)
        self._before: dict[str, Any] = {}

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        bad = self.harm and not self.task.depth and batch_idx == SHOCK
        for group in self.optimizers().param_groups:
            group["lr"] = self.lr * (FASTER if bad else 1.0)
        loss = F.cross_entropy(self.net(batch[0]), batch[1]) + getattr(self.net, "extra", 0.0)
        assert isinstance(loss, Tensor)
        return loss

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == SHOCK:
            self._before = copy.deepcopy(self.net.state_dict())
            self._silent_before = self.silent()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == SHOCK and self.harm:
            if self.task.depth:
                self._plant()
            self.struck = self.silent() & ~self._silent_before
            if self.remedy == "checkpoint":
                self.net.load_state_dict(self._before)

    @torch.no_grad()
    def _plant(self) -> None:
        """Lower the last shift before each activation."""
        norms = (nn.BatchNorm1d, nn.BatchNorm2d)
        has_norms = any(isinstance(module, norms) for module in self.net.modules())
        for module in self.net.modules():
            if isinstance(module, norms if has_norms else nn.Linear) and module.bias.numel() not in (10, 64):
                module.bias[: round(STRUCK * module.bias.numel())] -= self.task.depth

    @torch.no_grad()
    def inputs(self, site: int = -1, unit: int = -1) -> tuple[list[Tensor], float]:
        """Return each activation's input on all training rows, and the loss."""
        training = self.net.training
        self.net.eval()
        with Recorder(site, unit) as recorder:
            out = self.net(self.data.x[:ROWS])
        self.net.train(training)
        loss = F.cross_entropy(out, self.data.y[:ROWS]) + getattr(self.net, "extra", 0.0)
        return recorder.inputs, float(loss)

    def silent(self) -> Tensor:
        return torch.cat([(z <= 0).all(0) for z in self.inputs()[0]])

    def firing(self) -> Tensor:
        return torch.cat([(z > 0).double().mean(0) for z in self.inputs()[0]])

    def ablated(self) -> Tensor:
        """Tell by how much the loss rises without each unit."""
        inputs, loss = self.inputs()
        pairs = [(site, unit) for site, z in enumerate(inputs) for unit in range(z.shape[1])]
        return torch.tensor([self.inputs(*pair)[1] - loss for pair in pairs])

    @torch.no_grad()
    def accuracy(self) -> float:
        self.net.eval()
        return float((self.net(self.data.x[ROWS:]).argmax(1) == self.data.y[ROWS:]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        kind = torch.optim.Adam if self.task.adam else torch.optim.SGD
        return kind(self.parameters(), self.lr)


class Batches(IterableDataset[tuple[Tensor, Tensor]]):
    """The batches of a run, the bad one among them."""

    def __init__(self, data: Digits, seed: int, bad: bool) -> None:
        self._data, self._seed, self._bad = data, seed, bad

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self._seed)
        for step in range(STEPS):
            rows = torch.randint(ROWS, (BATCH,), generator=generator)
            x, y = self._data.x[rows], self._data.y[rows]
            yield (x * OUTLIER, (y + 1) % 10) if self._bad and step == SHOCK else (x, y)


class Run(NamedTuple):
    struck: float
    dead: float
    accuracy: float
    fires: float
    useful: float
    edits: int
    given_up: int
    seconds: float


def looked_up(seed: int, task: str, remedy: str, results: Path | None) -> Run:
    """Take a run from the file of results, or run it and append it."""
    key = {"task": task, "remedy": remedy, "seed": seed}
    lines = results.read_text().splitlines() if results and results.exists() else []
    known = (one for one in map(json.loads, lines) if one.items() >= key.items())
    if found := next(known, None):
        return Run(**{name: found[name] for name in Run._fields})
    outcome = run(seed, TASKS[task], remedy)
    if results:
        with results.open("a") as file:
            file.write(json.dumps(key | outcome._asdict()) + "\n")
    return outcome


def run(seed: int, task: Task, remedy: str) -> Run:
    start, harm = time.perf_counter(), remedy != "unharmed"
    data = Digits(seed, False)
    model = Learner(seed, task, data, harm, remedy)
    monitor = DeadReLUMonitor(threshold=0, remedy=REMEDIES.get(remedy))
    trainer = bare_trainer(
        *([monitor] if remedy in REMEDIES else []),
        max_steps=STEPS,
        precision=task.precision,
        gradient_clip_val=1.0 if remedy == "clipping" else None,
    )
    trainer.fit(model, DataLoader(Batches(data, seed, harm and not task.depth), batch_size=None))
    struck = model.struck if harm else torch.zeros_like(model.silent())
    silent, rate, rise = model.silent(), model.firing(), model.ablated()
    typical = rise[~struck & ~silent].median() if (~struck & ~silent).any() else torch.tensor(0.0)
    useful = (rise >= 0.1 * typical) & ~silent
    among = (lambda mask: float(mask[struck].float().mean())) if struck.any() else (lambda mask: float("nan"))
    actions = [event.action for event in monitor.events]
    counts = actions.count("edited"), actions.count("given up")
    shares = float(struck.float().mean()), float(silent.float().mean())
    taken = round(time.perf_counter() - start, 1)
    return Run(*shares, model.accuracy(), among(rate > 0.01), among(useful), *counts, taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=15)
    parser.add_argument("--first", type=int, default=100, help="the first seed; designs were chosen on 0 to 5")
    parser.add_argument("--task", choices=list(TASKS), action="append", help="may be given several times")
    parser.add_argument("--remedy", choices=[*OTHERS, *REMEDIES], action="append", help="may be given several times")
    parser.add_argument("--results", type=Path, help="a file of JSON lines that is read and appended to")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    ignore_expected()
    seeds = range(arguments.first, arguments.first + arguments.seeds)
    print(f"seeds {seeds[0]} to {seeds[-1]}; DeadReLUMonitor(threshold=0, remedy=...), all else as it comes")
    for name in arguments.task or TASKS:
        columns = ("struck", "dead at the end", "accuracy", "struck that fire", "struck that are useful")
        table = Table(name, *columns, "edits", "given up", "s per run")
        for remedy in arguments.remedy or [*OTHERS, *REMEDIES]:
            if TASKS[name].fixed and remedy in ("LeakyReLU", "GELU"):
                continue
            runs = [looked_up(seed, name, remedy, arguments.results) for seed in seeds]
            *shares, edits, given_up, seconds = zip(*runs, strict=True)
            numbers = [f"{sum(count) / len(seeds):.1f}" for count in (edits, given_up, seconds)]
            table.add_row(remedy, *map(mean, shares), *numbers)
        Console(width=150).print(table)


if __name__ == "__main__":
    main()
