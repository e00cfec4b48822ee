"""The |x| regression of Lu et al. (2019, arXiv 1903.06733): how many networks die, and how many a remedy saves.

    python tests/benchmarks/absolute.py                    300 networks at once, 2 to 4 minutes for each setting
    python tests/benchmarks/absolute.py --trainer --nets 20    one after the other through the Trainer, as long

Nine hidden layers of width 2, He's initialisation and no bias at the start, x uniform on [-sqrt 3, sqrt 3], Adam at
1e-3, batches of 100, 5000 steps. A network is constant if its range over 1000 points is below 1e-3, and good if its
mean squared error there is below 0.01. Both ways train the same networks on the same batches: network ``s`` and its
data are drawn from seed ``s``, and the remedy's seed is ``s`` too.

In the batched study the networks are independent slices of one tensor. Training is batched, and so is counting, by
the monitor's own metric; each verdict is cut into the networks'. All that follows is the monitor's own code, for each
network alone: whom to treat, one more look at the next batch through its probe, the proposal, the write and the
repair of Adam's state. ``tests/test_benchmarks.py`` holds it against the Trainer.
"""

from __future__ import annotations

import argparse
import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from bare_trainer import bare_trainer
from expected import ignore_expected
from intervals import share
from lightning.pytorch import LightningModule
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.data import DataLoader, IterableDataset

from lightning_deadrelu import DeadReLUMonitor, LivenessReport, SiteReport
from lightning_deadrelu.model.trainable import Gradients
from lightning_deadrelu.observe.ranks import Ranks
from lightning_deadrelu.observe.watch import Watch
from lightning_deadrelu.remedies import Reset, ladder_of
from lightning_deadrelu.repair.repair import Repair
from lightning_deadrelu.repair.training_context import TrainingContext
from lightning_deadrelu.statistics import Rules, UnitHistory, UnitLiveness, count, judge

HIDDEN, WIDTH, BATCH, LR, EDGE = 9, 2, 100, 1e-3, math.sqrt(3)
GRID = torch.linspace(-EDGE, EDGE, 1000)[:, None]
SETTING: dict[str, Any] = {"every_n_steps": 1, "window": 10, "min_samples": 100, "threshold": 0.0}
REMEDY = Reset(evidence=1000, cooldown=1, attempts=None)


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    sizes = [1, *[WIDTH] * HIDDEN]
    hidden = [one for a, b in pairwise(sizes) for one in (nn.Linear(a, b), nn.ReLU())]
    net = nn.Sequential(*hidden, nn.Linear(WIDTH, 1))
    for layer in net[::2]:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        nn.init.zeros_(layer.bias)
    return net


def batches(seed: int, number: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(number):
        yield (torch.rand(BATCH, 1, generator=generator) * 2 - 1) * EDGE


@dataclass(frozen=True)
class Outcome:
    """How one network ended."""

    range: float
    error: float
    edits: int = 0

    @classmethod
    def of(cls, output: Tensor, edits: int) -> Outcome:
        spread, error = output.max() - output.min(), (output - GRID.abs()).square().mean()
        return cls(float(spread), float(error), edits)


# -- through the Trainer ---------------------------------------------------------------------------------


class Regression(LightningModule):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.net = network(seed)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.net(batch) - batch.abs()).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), LR)


class Batches(IterableDataset[Tensor]):
    def __init__(self, seed: int, number: int) -> None:
        self.seed, self.number = seed, number

    def __iter__(self) -> Iterator[Tensor]:
        return batches(self.seed, self.number)


def train(seed: int, steps: int, monitor: DeadReLUMonitor) -> nn.Sequential:
    model = Regression(seed)
    trainer = bare_trainer(monitor, max_steps=steps)
    trainer.fit(model, DataLoader(Batches(seed, steps), batch_size=None))
    return model.net


def through_trainer(seeds: Sequence[int], steps: int, remedy: Reset | None, **setting: Any) -> list[Outcome]:
    outcomes = []
    for seed in seeds:
        monitor = DeadReLUMonitor(remedy=remedy and replace(remedy, seed=seed), **setting)
        output = train(seed, steps, monitor)(GRID).detach()
        outcomes.append(Outcome.of(output, _edited_units(monitor.events)))
    return outcomes


def _edited_units(events: Sequence[Any]) -> int:
    return sum(len(event.units) for event in events if event.action == "edited")


# -- many at once ----------------------------------------------------------------------------------------


class One:
    """What the monitor holds of one network: a copy to look at and to edit, its optimizer, and its repair."""

    def __init__(self, seed: int, remedy: Reset | None, threshold: float, rules: Rules) -> None:
        self.net = nn.ModuleDict({"net": network(seed)})  # so that sites and parameters are called as in the Trainer
        self.adam = torch.optim.Adam(self.net.parameters(), LR)
        remedies = ladder_of(remedy and replace(remedy, seed=seed))
        self.repair = Repair(remedies, threshold, rules.min_samples, lambda event: None)
        self.watch = Watch(self.net, rules=rules)
        self.repair.attach(TrainingContext(self.watch, self.net, [self.adam], self.net, Gradients(), Ranks()))

    @property
    def is_pending(self) -> bool:
        """Whether edits wait to be confirmed."""
        return self.repair.is_pending

    def judge(self, sites: Sequence[SiteReport], losses: Tensor, blind: Tensor, s: int, step: int) -> None:
        """Pass a verdict on, cut down to network ``s``; or an empty one, where there is nothing to say."""
        silent = any(bool(site.silent[s * WIDTH : (s + 1) * WIDTH].any()) for site in sites)
        tried = any(progress.trial for progress in self.repair.policy.state.sites.values())
        most = min((remedy.treats_blind or 1.0 for remedy in self.repair.remedies), default=1.0)
        says = silent or tried or bool((blind > most).any())
        parts = tuple(map(partial(_part, s=s), sites, blind.tolist())) if says else ()
        self.repair.decide(LivenessReport(parts, step), losses)

    def look(self, x: Tensor) -> None:
        """Run the network under the probe, as an observed batch does."""
        self.repair.begin(observed=True)
        with self.watch.probe:
            self.net["net"](x)

    def take(self, weights: Tensor, moments: dict[str, Tensor]) -> None:
        """Copy this network's slice of the batch."""
        vector_to_parameters(weights, self.net.parameters())
        start = 0
        for one in self.net.parameters():
            place = slice(start, start := start + one.numel())
            self.adam.state[one] = {key: value[place].view_as(one).clone() for key, value in moments.items()}

    def give(self, weights: Tensor, moments: dict[str, Tensor]) -> None:
        """Copy it back."""
        weights.copy_(parameters_to_vector(self.net.parameters()).detach())
        for key, value in moments.items():
            value.copy_(torch.cat([state[key].flatten() for state in self.adam.state.values()]))


class Batched:
    """Train all networks at once."""

    def __init__(self, seeds: Sequence[int], steps: int, remedy: Reset | None, **setting: Any) -> None:
        self.window, rules = setting["window"], Rules(setting["min_samples"])
        self.ones = [One(seed, remedy, setting["threshold"], rules) for seed in seeds]
        self.weights = torch.stack([parameters_to_vector(one.net.parameters()).detach() for one in self.ones])
        self.weights.requires_grad_()
        self.adam = torch.optim.Adam([self.weights], LR)
        self.data = zip(*(batches(seed, steps) for seed in seeds), strict=True)
        names = [f"net.{2 * number + 1}" for number in range(HIDDEN)]
        self.liveness = UnitLiveness({name: len(seeds) * WIDTH for name in names}, window=self.window, rules=rules)
        self.history = UnitHistory.empty()
        self.losses = torch.zeros(len(seeds), 3, dtype=torch.float64)  # number, sum and sum of squares in the window
        self.blind = torch.zeros(HIDDEN, len(seeds))  # rows of the observations with rates on which all are silent

    def forward(self, a: Tensor, counting: bool = False) -> Tensor:
        """Send inputs of shape ``(networks, rows, 1)`` through all networks."""
        start = 0
        for number, inputs in enumerate([1, *[WIDTH] * HIDDEN]):
            outputs = WIDTH if number < HIDDEN else 1
            weight = self.weights[:, start : start + outputs * inputs].view(-1, outputs, inputs)
            bias = self.weights[:, (start := start + outputs * inputs) : (start := start + outputs)]
            a = z = torch.baddbmm(bias[:, None], a, weight.mT)
            if number < HIDDEN:
                a = z.relu()
                if counting:
                    rates = self.liveness.wants_rates(number)
                    self.liveness.add(number, count(_columns(z), _columns(a), rates=rates))
                    self.blind[number] += (a <= 0).all(2).sum(1) if rates else 0
        return a

    def step(self, step: int) -> None:
        """Do what a training batch does, observed by the monitor."""
        x = torch.stack(next(self.data))
        looked = [s for s, one in enumerate(self.ones) if step == 0 or one.is_pending]
        for s in looked:
            self.ones[s].take(self.weights[s].detach(), {})
            self.ones[s].look(x[s])
        losses = (self.forward(x, counting=True) - x.abs()).square().mean((1, 2))
        self.adam.zero_grad()
        losses.sum().backward()
        self.adam.step()
        self._after(step, looked, losses.detach().double())

    def _after(self, step: int, looked: Sequence[int], losses: Tensor) -> None:
        self.losses += torch.stack([torch.ones_like(losses), losses, losses.square()], dim=1)
        self.liveness.observation += 1
        for s in looked:
            self._edit(s, step)
        if self.liveness.observation == self.window:
            self._judge(step)

    def _edit(self, s: int, step: int) -> None:
        one, state = self.ones[s], self.adam.state[self.weights]
        moments = {key: state[key][s] for key in ("exp_avg", "exp_avg_sq")}
        one.take(self.weights[s].detach(), moments)
        one.repair.confirm(step, step)
        one.give(self.weights[s].detach(), moments)

    def _judge(self, step: int) -> None:
        report, self.history = judge(
            self.liveness.totals(), self.history, self.liveness.layout, self.liveness.rules, step=step
        )
        self.liveness.reset()
        rows = BATCH * min(self.window, 2)
        for s, one in enumerate(self.ones):
            one.judge(report.sites, self.losses[s].clone(), self.blind[:, s] / rows, s, step)
        self.losses.zero_()
        self.blind.zero_()

    def outcomes(self) -> list[Outcome]:
        """Measure each network on the grid."""
        outputs = self.forward(GRID.expand(len(self.ones), -1, 1)).detach()
        edits = [_edited_units(one.repair.events) for one in self.ones]
        return [Outcome.of(output, number) for output, number in zip(outputs, edits, strict=True)]


def _columns(values: Tensor) -> Tensor:
    """Put the units of all networks side by side, shape ``(rows, networks * units)``."""
    return values.detach().transpose(0, 1).flatten(1)


def _part(site: SiteReport, blind: float, s: int) -> SiteReport:
    """Cut one network's units out; their dormancy is relative to all networks, and no remedy here asks for it."""
    place = slice(s * WIDTH, (s + 1) * WIDTH)
    parts = {f.name: value[place] for f in fields(site) if isinstance(value := getattr(site, f.name), Tensor)}
    return replace(site, units=WIDTH, blind_fraction=blind, **parts)


def batched(seeds: Sequence[int], steps: int, remedy: Reset | None, **setting: Any) -> list[Outcome]:
    study = Batched(seeds, steps, remedy, **setting)
    for step in range(steps):  # counted as loggers do
        study.step(step)
    return study.outcomes()


# -- the table -------------------------------------------------------------------------------------------


def row(outcomes: Sequence[Outcome]) -> list[str]:
    constant, good = (sum(one.range < 1e-3 for one in outcomes), sum(one.error < 0.01 for one in outcomes))
    edits = sum(one.edits for one in outcomes) / len(outcomes)
    return [share(constant, len(outcomes)), share(good, len(outcomes)), f"{edits:.1f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", type=int, default=300)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--trainer", action="store_true", help="one after the other, through the Trainer")
    parser.add_argument("--window", type=int, default=SETTING["window"])
    parser.add_argument("--evidence", type=int, default=REMEDY.evidence)
    parser.add_argument("--tries", type=int, default=REMEDY.tries)
    parser.add_argument("--blind", type=float, default=None, help="as of Reset, for instance 0.05")
    parser.add_argument("--only-remedy", action="store_true", help="leave out the untreated networks")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    ignore_expected()
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.nets)
    remedy = replace(REMEDY, evidence=arguments.evidence, tries=arguments.tries, blind=arguments.blind)
    setting, study = SETTING | {"window": arguments.window}, through_trainer if arguments.trainer else batched
    print(f"seeds {seeds[0]} to {seeds[-1]}, {arguments.steps} steps, {study.__name__}")
    print(f"DeadReLUMonitor({', '.join(f'{key}={value}' for key, value in setting.items())}, remedy={remedy})")
    table = Table("remedy", "constant [95 %]", "MSE < 0.01 [95 %]", "units edited per net", "seconds")
    for one in [remedy] if arguments.only_remedy else [None, remedy]:
        start = time.perf_counter()
        cells = row(study(seeds, arguments.steps, one, **setting))
        table.add_row(type(one).__name__ if one else "none", *cells, f"{time.perf_counter() - start:.0f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
