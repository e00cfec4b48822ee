"""Time inside the monitor, as a share of the step time of the same run.

    python tests/benchmarks/cost.py [--steps 100] [--threads 2] [--device cpu]

Three models are trained by a real Trainer: an MLP, a ResNet-18 and four OPT blocks. Every entry of the
monitor is timed: its hooks, the probe's share of each torch call, and the verdicts with their merge and
logging. The first steps are warm-up. Limits: 1 % with default settings, 4 % when every step is observed.
"""

import argparse
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import OPTConfig, OPTModel, ResNetConfig, ResNetModel

from lightning_deadrelu import DeadReLUMonitor
from lightning_deadrelu.probe import Probe

WARM_UP = 12
SETTINGS = {"defaults": ({}, 0.01), "every step": ({"every_n_steps": 1}, 0.04)}
HOOKS = ("on_train_batch_start", "on_before_backward", "on_train_batch_end")
PROBE = ("_enter_module", "_leave_module", "_find", "_note")


def mlp() -> tuple[nn.Module, Tensor]:
    sizes = (784, 2048, 2048, 2048)
    layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(2048, 10)), torch.randn(256, 784)


def resnet18() -> tuple[nn.Module, Tensor]:
    config = ResNetConfig(embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic")
    return ResNetModel(config), torch.randn(32, 3, 64, 64)


def opt_blocks() -> tuple[nn.Module, Tensor]:
    sizes = {"hidden_size": 512, "word_embed_proj_dim": 512, "ffn_dim": 2048, "num_hidden_layers": 4}
    config = OPTConfig(vocab_size=1000, num_attention_heads=8, activation_function="relu", dropout=0.0, **sizes)
    return OPTModel(config), torch.randint(0, 1000, (8, 128))


MODELS = {"MLP 784-2048-2048-2048-10, batch 256": mlp, "ResNet-18 on 3x64x64, batch 32": resnet18}
MODELS["4 OPT blocks, d 512, FFN 2048, 8x128 tokens"] = opt_blocks


class Net(LightningModule):
    """Any model, trained on one batch again and again."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        output = self.model(batch)
        return (output if isinstance(output, Tensor) else output[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-4)


class Stopwatch:
    """Add up the time spent in functions that do not call each other."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            self.seconds += time.perf_counter() - start
            return result

        return timed


class Steps(Callback):
    """Take the times between steps, and forget the warm-up."""

    def __init__(self, inside: Stopwatch) -> None:
        self._inside = inside
        self.start = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == WARM_UP:
            _wait(pl_module.device)
            self._inside.seconds, self.start = 0.0, time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _wait(pl_module.device)
        self.seconds = time.perf_counter() - self.start
        self.share = self._inside.seconds / self.seconds  # without the table at the end, which comes once in a run


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def instrumented(inside: Stopwatch) -> Iterator[None]:
    """Time every entry into the monitor."""
    originals = [
        (owner, name, getattr(owner, name))
        for owner, names in ((DeadReLUMonitor, HOOKS), (Probe, PROBE))
        for name in names
    ]
    for owner, name, function in originals:
        setattr(owner, name, inside.around(function))
    try:
        yield
    finally:
        for owner, name, function in originals:
            setattr(owner, name, function)


def measure(
    build: Callable[[], tuple[nn.Module, Tensor]], steps: int, device: str, **settings: Any
) -> tuple[float, float]:
    """Return the seconds per step, and the share of them spent inside the monitor."""
    torch.manual_seed(0)
    model, batch = build()
    inside = Stopwatch()
    clock, monitor = Steps(inside), DeadReLUMonitor(**settings)
    with instrumented(inside):
        trainer = Trainer(
            accelerator=device,
            devices=1,
            max_steps=steps,
            callbacks=[clock, monitor],
            logger=DummyLogger(),  # takes scalars: pictures come a few times in a run, and have a table of their own
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Net(model), DataLoader([batch] * steps, batch_size=None))
    assert monitor.report is not None
    return clock.seconds / (steps - WARM_UP), clock.share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=112)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    table = Table("model", "setting", "ms per step", "inside the monitor", "limit")
    for name, build in MODELS.items():
        for setting, (options, limit) in SETTINGS.items():
            seconds, share = measure(build, arguments.steps, arguments.device, **options)
            table.add_row(name, setting, f"{seconds * 1e3:.1f}", f"{share:.2%}", f"{limit:.0%}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
