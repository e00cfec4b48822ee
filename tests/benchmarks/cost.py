"""What watching costs, beside other trackers, in one run and one table.

    python tests/benchmarks/cost.py [--rounds 10] [--threads 2] [--models MLP] [--device cuda]

An MLP, a ResNet-18 and four OPT blocks are trained by a real Trainer, in which the callbacks take turns of ten
steps. Two measures: the time inside a callback as a share of the time of its own steps, verdicts and logging included,
with the cheapest and the dearest round; and how much longer its steps are than those without a callback in the same
round, with a 95 % interval. Then the cost of one observation against the bytes of the activations it reads, at batch
sizes x1, x2 and x4, with a least-squares line. ``--unobserved`` tells what a batch costs that is not observed. With
``--device cuda`` the table of ``cost_gpu.py`` follows; ``--gpu-models small`` runs its code on a CPU.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
import trackers
from cost_gpu import print_gpu
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from trackers import TRACKERS
from transformers import OPTConfig, OPTModel, ResNetConfig, ResNetModel
from turns import ALONE, Build, compare, share_inside, slowdown

from lightning_deadrelu import DeadReLUMonitor
from lightning_deadrelu.observe.watch import Watch

DEFAULTS, EVERY_STEP, EVIDENCE = "ours, defaults", "ours, every step", "ours, defaults, and gradient evidence"
LIMITS = {DEFAULTS: 0.005, EVERY_STEP: 0.03, EVIDENCE: 0.008}


def mlp(scale: int = 1) -> tuple[nn.Module, Tensor]:
    sizes = (784, 2048, 2048, 2048)
    layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(2048, 10)), torch.randn(256 * scale, 784)


def resnet18(scale: int = 1) -> tuple[nn.Module, Tensor]:
    config = ResNetConfig(embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic")
    return ResNetModel(config), torch.randn(32 * scale, 3, 64, 64)


def opt_blocks(scale: int = 1) -> tuple[nn.Module, Tensor]:
    sizes = {"hidden_size": 512, "word_embed_proj_dim": 512, "ffn_dim": 2048, "num_hidden_layers": 4}
    config = OPTConfig(vocab_size=1000, num_attention_heads=8, activation_function="relu", dropout=0.0, **sizes)
    return OPTModel(config), torch.randint(0, 1000, (8 * scale, 128))


MODELS: dict[str, Callable[..., tuple[nn.Module, Tensor]]] = {
    "MLP 784-2048-2048-2048-10, batch 256": mlp,
    "ResNet-18 on 3x64x64, batch 32": resnet18,
    "4 OPT blocks, d 512, FFN 2048, 8x128 tokens": opt_blocks,
}


def contestants() -> dict[str, Callback | None]:
    """Make one of each; gradient evidence where this version has it."""
    found: dict[str, Callback | None] = {ALONE: None, DEFAULTS: DeadReLUMonitor(name="defaults")}
    found[EVERY_STEP] = DeadReLUMonitor(name="every_step", every_n_steps=1)
    with suppress(MisconfigurationException):
        found[EVIDENCE] = DeadReLUMonitor(name="evidence", gradient_evidence=True)
    return found | {name: tracker() for name, tracker in TRACKERS.items()}


def rows(build: Build, rounds: int, device: str = "cpu") -> list[list[str]]:
    """Compare all callbacks on one model: name, ms per step, share inside, limit, how much longer steps are."""
    blocks = compare(build, contestants(), rounds, device=device)
    table = []
    for name, own in blocks.items():
        middle, low, high = slowdown(own, blocks[ALONE])
        each = sorted(block.inside / block.step for block in own) if device == "cpu" else [0.0]
        inside = share_inside(own) if device == "cpu" else 0.0
        limit = f"{LIMITS[name]:.1%}" if name in LIMITS else ""
        table.append([name, f"{statistics.median(block.step for block in own) * 1e3:.1f}"])
        shares = f"{inside:.2%} ({each[0]:.2%} to {each[-1]:.2%})"
        table[-1] += ["", "", ""] if name == ALONE else [shares, limit, f"{middle:+.1%} [{low:+.1%}, {high:+.1%}]"]
    return table


def unobserved(layers: int, rounds: int) -> list[float]:
    """Return the microseconds inside a monitor per batch that it does not observe, from the cheapest turn on."""
    monitor = DeadReLUMonitor(every_n_steps=10**9)  # but for the first, which is in the warm-up
    blocks = compare(partial(narrow, layers), {ALONE: None, "unobserved": monitor}, rounds)
    return sorted(block.inside * 1e6 for block in blocks["unobserved"])


def narrow(layers: int) -> tuple[nn.Module, Tensor]:
    return nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.ReLU()) for _ in range(layers))), torch.randn(256, 32)


class Cost(NamedTuple):
    """The activations that one observation reads, in MiB, and what it takes, in ms."""

    size: float
    took: float


def observation(build: Build, repeats: int, *, rates: bool) -> Cost:
    """Time the counting of one observation, without the forward that it watches: the median of some.

    Args:
        build: Makes the model and a batch.
        repeats: How many to time.
        rates: Whether it is one of the two of each window that read more than peaks.
    """
    torch.manual_seed(0)
    model, batch = build()
    watch, inside, size = Watch(model, window=repeats + 4), 0.0, 0
    take = watch.probe.router.sink

    def timed(*call: object) -> None:
        nonlocal inside, size
        start = trackers.clock()
        take(*call)
        inside += trackers.clock() - start
        size += call[2].nbytes  # type: ignore[attr-defined]

    watch.probe.router.sink, taken = timed, []
    for number in range(1, repeats + 3):
        watch.liveness.observation = 0 if rates else number
        inside, size = 0.0, 0
        with watch.probe, torch.no_grad():
            model(batch)
        start = trackers.clock()
        watch.liveness.flush()
        taken.append(inside + trackers.clock() - start)
    return Cost(size / 2**20, statistics.median(taken[2:]) * 1e3)


def line(costs: list[Cost]) -> tuple[float, float, float]:
    """Fit cost = a + b * size by least squares: slope in ms per MiB, intercept in ms, and R^2.

    Example:
        >>> line([Cost(1.0, 3.0), Cost(2.0, 5.0), Cost(4.0, 9.0)])
        (2.0, 1.0, 1.0)
    """
    sizes, took = zip(*costs, strict=True)
    fit = statistics.linear_regression(sizes, took)
    return fit.slope, fit.intercept, statistics.correlation(sizes, took) ** 2


def print_linear(models: dict[str, Callable[..., tuple[nn.Module, Tensor]]], repeats: int, console: Console) -> None:
    table = Table("model", "reads", "MiB", "ms per observation", "ms per MiB", "fixed, ms", "R^2")
    for name, build in models.items():
        for rates in (False, True):
            costs = [observation(partial(build, scale), repeats, rates=rates) for scale in (1, 2, 4)]
            slope, fixed, fit = line(costs)
            size, took = (" / ".join(f"{value:.1f}" for value in values) for values in zip(*costs, strict=True))
            reads = "rates" if rates else "peaks"
            table.add_row(name, reads, size, took, f"{slope:.3f}", f"{fixed:.2f}", f"{fit:.3f}")
    console.print("One observation: counting what it reads, and adding it up; batch x1, x2, x4", table, sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="turns of ten steps; the tenth has the verdict")
    parser.add_argument("--repeats", type=int, default=20, help="observations per size")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--models", default="", help="part of a table's title")
    parser.add_argument("--cpu-time", action="store_true", help="for busy machines, with one thread")
    parser.add_argument("--unobserved", action="store_true", help="only what a batch costs that is not observed")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--gpu-models", choices=["small", "large"], help="also without a GPU; large on one")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    trackers.clock = time.process_time if options.cpu_time else time.perf_counter
    console = Console(width=120)
    if options.unobserved:
        for layers in (3, 30, 300):
            took = unobserved(layers, options.rounds)
            console.print(f"{layers} layers: {took[0]:.0f} us, median {statistics.median(took):.0f}")
        return
    models = {name: build for name, build in MODELS.items() if options.models in name}
    if options.device == "cpu" and not options.gpu_models:
        for name, build in models.items():
            table = Table("callback", "ms per step", "inside it", "limit", "steps longer by", title=name)
            for row in rows(build, options.rounds):
                table.add_row(*row)
            console.print(table)
        print_linear(models, options.repeats, console)
    else:
        print_gpu(options.device, options.gpu_models or "large", options.rounds, contestants, console, options.models)


if __name__ == "__main__":
    main()
