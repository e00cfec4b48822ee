"""What is named where a cause of death was planted, and where none was: a confusion table.

    python tests/benchmarks/causes.py [--seeds 10] [--only high_learning_rate] [--healthy 3]    about 1 s per run

Each row plants one cause in a small network on scikit-learn's digits, most of them by a script of ``examples/causes``,
and trains it for 300 to 480 steps with ``DeadReLUMonitor(checkup=True, every_n_steps=1)``. Width, depth and learning
rate vary with the seed: widths of 48, 64 and 96, two or three hidden layers, and learning rates up to a quarter lower
or higher, such that units die in every run. What was named first is the surest of ``monitor.findings`` and of the
findings of ``monitor.deaths``, those of the check-up first where equally sure; "upstream_death" and "born_dead" say
where and when, not why, and are passed over. The GAN and the attention die of their rectifiers at this learning rate,
and a lower one is a cure as well: either name is right. Decay of a norm's scale counts as decay of biases. Then
healthy set-ups (``healthy.py``), of which nothing should be said; what was, is listed with its confidence.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

sys.path.append(str(Path(__file__).parents[2] / "examples" / "causes"))

import adam_spike
import attention_scores
import bad_initialisation
import batchnorm_decay
import bias_decay
import continual_learning
import gan_generator
import healthy
import high_learning_rate
import low_precision
import muon_rows
import outlier_spike
import sparse_autoencoder
import torch
import uncentred_data
from common import Learner, Recorder, Setup, adam, digits, mlp, rows, sgd, train
from rich.console import Console
from rich.table import Table
from torch import nn

from lightning_deadrelu.explain.finding import Finding, ranked

NOT_CAUSES = ("upstream_death", "born_dead")
STEPS = 300


class Shape(NamedTuple):
    """What varies with the seed."""

    seed: int
    width: int
    depth: int
    factor: float

    @classmethod
    def of(cls, seed: int) -> Shape:
        one = random.Random(seed)
        return cls(seed, one.choice((48, 64, 96)), one.choice((2, 3)), one.uniform(0.8, 1.25))

    @property
    def network(self) -> nn.Sequential:
        torch.manual_seed(self.seed)
        return mlp(64, *[self.width] * self.depth, 10)

    def setup(self, net: nn.Module, optimizer, **options) -> Setup:
        return Setup(Learner(net, optimizer, **options), rows(*digits(), steps=STEPS, seed=self.seed))


# -- causes that no script shows -------------------------------------------------------------------------


def gradient_spike(shape: Shape) -> Setup:
    """Weigh the loss of one batch a thousand times; its inputs are as ever."""
    losses = iter(1_000.0 if step == STEPS // 2 else 1.0 for step in range(STEPS))

    def loss(output, labels):
        return nn.functional.cross_entropy(output, labels) * next(losses)

    return shape.setup(shape.network, sgd(0.02 * shape.factor), loss=loss)


def learning_rate_spike(shape: Shape) -> Setup:
    """Multiply the learning rate by 100 for three steps, as a wrong restart does."""
    setup = shape.setup(shape.network, sgd(0.02 * shape.factor))

    class Restarting(Learner):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            spike = range(STEPS // 2, STEPS // 2 + 3)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 100.0 if step in spike else 1.0)
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    return setup._replace(model=Restarting(setup.model.net, setup.model.optimizer))


def bad_init(shape: Shape) -> Setup:
    """Draw weights from N(0, 1), as ``torch.randn`` does; the first steps are as large as the signal."""
    net = shape.network
    for layer in net:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight)
    return shape.setup(net, sgd(0.01 * shape.factor))


def narrow_and_deep(shape: Shape) -> Setup:
    """Stack 12 layers of 3 or 4 units."""
    torch.manual_seed(shape.seed)
    net = mlp(64, *[3 + shape.seed % 2] * 12, 10)
    for layer in net:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    return shape.setup(net, adam(1e-3 * shape.factor))


def relu_output(shape: Shape) -> Setup:
    """Rectify the output of a regression whose targets, ten pixels of the image, are centred: half are out of reach."""
    torch.manual_seed(shape.seed)
    net = mlp(64, *[shape.width] * shape.depth, 10)
    net.add_module("last", nn.ReLU())
    images, _ = digits()
    model = Learner(net, adam(1e-3 * shape.factor), nn.functional.mse_loss)
    return Setup(model, rows(images, images[:, 20:30] - 1, steps=STEPS, seed=shape.seed))


_WIDER = {sparse_autoencoder: 4, low_precision: 2, muon_rows: 0.5}


def scripted(module: ModuleType) -> Callable[[Shape], Setup]:
    """Take the set-up of a script, at its own learning rate times the factor."""
    usual = module.build.__kwdefaults__["lr"]

    def build(shape: Shape) -> Setup:
        depth = {"depth": shape.depth} if "depth" in module.build.__kwdefaults__ else {}
        width = {} if module in (batchnorm_decay, attention_scores) else {"width": shape.width}
        if module in _WIDER:
            width = {"width": int(_WIDER[module] * shape.width)}
        return module.build(False, seed=shape.seed, lr=usual * shape.factor, **depth, **width)

    return build


class Row(NamedTuple):
    """How a cause is planted, and what it may be called."""

    build: Callable[[Shape], Setup]
    causes: tuple[str, ...]


PLANTED: Mapping[str, Row] = {
    "high learning rate": Row(scripted(high_learning_rate), ("high_learning_rate",)),
    "outlier batch": Row(scripted(outlier_spike), ("outlier_batch",)),
    "gradient spike": Row(gradient_spike, ("gradient_spike",)),
    "learning-rate spike": Row(learning_rate_spike, ("learning_rate_spike",)),
    "weights too large": Row(bad_init, ("bad_init",)),
    "negative biases": Row(scripted(bad_initialisation), ("negative_bias",)),
    "narrow and deep": Row(narrow_and_deep, ("narrow_and_deep",)),
    "uncentred inputs": Row(scripted(uncentred_data), ("uncentred_inputs",)),
    "uncentred, autoencoder": Row(scripted(sparse_autoencoder), ("uncentred_inputs",)),
    "bias decay": Row(scripted(bias_decay), ("bias_decay",)),
    "GAN's generator": Row(scripted(gan_generator), ("generator_relu", "high_learning_rate")),
    "rectified output": Row(relu_output, ("relu_output",)),
    "rectified attention": Row(scripted(attention_scores), ("attention_relu", "high_learning_rate")),
    "gamma decay": Row(scripted(batchnorm_decay), ("bias_decay",)),
    "continual learning": Row(scripted(continual_learning), ("distribution_shift",)),
    "Adam's spike": Row(scripted(adam_spike), ("adam_spike",)),
    "Muon's rows": Row(scripted(muon_rows), ("muon_rows",)),
    "loss in bfloat16": Row(scripted(low_precision), ("low_precision",)),
}


class Outcome(NamedTuple):
    dead: float
    findings: tuple[Finding, ...]
    seconds: float

    @property
    def first(self) -> str:
        """What was named first; "nothing" if nothing was."""
        return self.findings[0].cause if self.findings else "nothing"


def outcome(setup: Setup, every: int = 1) -> Outcome:
    start = time.perf_counter()
    monitor = train(setup, checkup=True, every_n_steps=every)
    dead = max((site.dead_fraction for site in monitor.report.sites), default=0.0)
    return Outcome(dead, named(monitor), time.perf_counter() - start)


def named(monitor: Recorder) -> tuple[Finding, ...]:
    """Gather what the check-up and the post-mortem say, the surest first."""
    found = [*monitor.findings, *(wave.finding for wave in monitor.deaths if wave.finding)]
    return ranked([finding for finding in found if finding.cause not in NOT_CAUSES])


def confusion(seeds: range, every: int, only: list[str] | None, details: bool) -> Table:
    table = Table(
        "planted", "named first", "also named", "right", "dead, worst layer", "seconds", title="planted causes"
    )
    right = of = 0
    for name in only or PLANTED:
        row, outcomes = PLANTED[name], []
        for seed in seeds:
            outcomes.append(outcome(row.build(Shape.of(seed)), every))
            if details:
                print(name, seed, Shape.of(seed), f"dead {outcomes[-1].dead:.0%}", *outcomes[-1].findings, sep="\n  ")
        hits = sum(one.first in row.causes for one in outcomes)
        right, of = right + hits, of + len(seeds)
        table.add_row(name, *_cells(outcomes), f"{hits} of {len(seeds)}", *_means(outcomes))
    table.caption = f"{right} of {of} named right at first"
    return table


def _cells(outcomes: list[Outcome]) -> tuple[str, str]:
    first = Counter(one.first for one in outcomes)
    also = Counter(cause for one in outcomes for cause in {f.cause for f in one.findings[1:]} - {one.first})
    return tuple(", ".join(f"{cause} {number}" for cause, number in c.most_common()) for c in (first, also))


def _means(outcomes: list[Outcome]) -> tuple[str, str]:
    number = len(outcomes)
    return f"{sum(o.dead for o in outcomes) / number:.0%}", f"{sum(o.seconds for o in outcomes) / number:.1f}"


def alarms(seeds: range, every: int, details: bool) -> Table:
    table = Table("healthy", "runs", "named", "dead, worst layer", "seconds", title="healthy set-ups")
    silent = of = 0
    for name, build in healthy.SETUPS.items():
        outcomes = [outcome(build(seed), every) for seed in seeds]
        said = Counter(f"{f.cause} ({f.confidence})" for one in outcomes for f in one.findings)
        silent, of = silent + sum(not one.findings for one in outcomes), of + len(seeds)
        table.add_row(name, str(len(seeds)), ", ".join(f"{k} {v}" for k, v in said.items()) or "-", *_means(outcomes))
        if details:
            print(name, *(finding for one in outcomes for finding in one.findings), sep="\n  ")
    table.caption = f"{silent} of {of} runs without a finding"
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--healthy", type=int, default=3, help="seeds of each healthy set-up")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--every", type=int, default=1, help="every_n_steps of the monitor; 10 is its default")
    parser.add_argument("--only", choices=list(PLANTED), action="append", help="may be given several times")
    parser.add_argument("--details", action="store_true", help="print every finding")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=150)
    seeds, others = (range(arguments.first, arguments.first + n) for n in (arguments.seeds, arguments.healthy))
    if seeds:
        console.print(confusion(seeds, arguments.every, arguments.only, arguments.details))
    if others and not arguments.only:
        console.print(alarms(others, arguments.every, arguments.details))


if __name__ == "__main__":
    main()
