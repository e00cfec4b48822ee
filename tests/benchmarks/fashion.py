"""A residual net learns Fashion-MNIST, and half of its units are killed: what remedies bring back.

    python tests/benchmarks/fashion.py /usr/share/datasets/fashion-mnist [--device cuda] [--seeds 3]

The folder holds the four idx files of Fashion-MNIST (Debian: ``apt install dataset-fashion-mnist``). A stem of 16
channels, blocks of 16, 32 and 64, average pooling; SGD with momentum 0.9 at 0.05 that falls along a cosine, L2 of
5e-4, batches of 256, 1000 steps. At step 250, in the net without norms one bad batch comes: pixels ten times too large,
wrong labels. Behind BatchNorm such a batch kills nobody; there the shifts of seven twelfths of the channels of each
norm are lowered by 6. Remedies act with `threshold=0`, all else by default.

Dead is who fires on no place of 5000 training pictures, in evaluation mode: 20 steps after (struck, without those that
were silent before), and at the end; told from the network itself, and not from the monitor. Accuracy is that on the
10,000 test pictures. Intervals are Student's over seeds.
"""

from __future__ import annotations

import argparse
import gzip
import logging
import math
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from bare_trainer import bare_trainer
from expected import ignore_expected
from intervals import mean
from lightning.pytorch import LightningModule
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_deadrelu import DeadReLUMonitor

LR, MOMENTUM, L2, OUTLIER = 0.05, 0.9, 5e-4, 10.0
LINGERS = 20  # steps in which momentum carries the bad batch on
LOOKED_AT, AT_ONCE = 5000, 1000  # training pictures on which a unit may fire, and how many go through the net at a time
DEPTH, STRUCK = 6.0, 7 / 12
REMEDIES = ("auto", "reset", "bias_warming")
CASES = ("unharmed", "none", "clipping", *REMEDIES)


def read_idx(path: Path) -> Tensor:
    """Read a compressed file of unsigned bytes: a magic number, the sizes of its dimensions, then the values."""
    content = gzip.decompress(path.read_bytes())
    dims = content[3]
    sizes = np.frombuffer(content, ">u4", dims, 4).tolist()
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=4 + 4 * dims).copy()).reshape(sizes)


class Pictures(NamedTuple):
    """Pictures with mean 0 and standard deviation 1, and their labels, on the device that trains."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor

    @classmethod
    def read(cls, folder: Path, device: str, most: int) -> Pictures:
        x, test_x = (read_idx(folder / f"{part}-images-idx3-ubyte.gz").float()[:, None] for part in ("train", "t10k"))
        y, test_y = (read_idx(folder / f"{part}-labels-idx1-ubyte.gz").long() for part in ("train", "t10k"))
        center, spread = x.mean(), x.std()
        parts = (x - center) / spread, y, (test_x - center) / spread, test_y
        return cls(*(part[:most].to(device) for part in parts))


class Batches(IterableDataset[tuple[Tensor, Tensor]]):
    """Batches drawn at random, one of them bad."""

    def __init__(self, pictures: Pictures, seed: int, steps: int, batch: int, bad: int | None) -> None:
        self._pictures, self._seed, self._steps, self._batch, self._bad = pictures, seed, steps, batch, bad

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self._seed)
        for step in range(self._steps):
            rows = torch.randint(len(self._pictures.y), (self._batch,), generator=generator).to(self._pictures.y.device)
            x, y = self._pictures.x[rows], self._pictures.y[rows]
            yield (x * OUTLIER, (y + 1) % 10) if step == self._bad else (x, y)


# -- the net -----------------------------------------------------------------------------------------------------------


def convolution(inputs: int, outputs: int, size: int, stride: int, norm: bool) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=not norm)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs)) if norm else nn.Sequential(conv)


class Residual(nn.Module):
    """A basic block of a ResNet; without norms its branch begins at zero."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: bool) -> None:
        super().__init__()
        self.first, self.inner = convolution(inputs, outputs, 3, stride, norm), nn.ReLU()
        self.second, self.outer = convolution(outputs, outputs, 3, 1, norm), nn.ReLU()
        self.short = convolution(inputs, outputs, 1, stride, norm) if inputs != outputs else nn.Identity()
        if not norm:
            nn.init.zeros_(self.second[0].weight)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.outer(self.second(self.inner(self.first(x))) + self.short(x))
        return out


def residual_net(norm: bool, width: int) -> nn.Sequential:
    inputs = (width, width, 2 * width, 4 * width)
    blocks = [Residual(*pair, stride, norm) for pair, stride in zip(pairwise(inputs), (1, 2, 2), strict=True)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs[-1], 10)]
    return nn.Sequential(convolution(1, width, 3, 1, norm), nn.ReLU(), *blocks, *head)


TASKS = {"one bad batch": False, "BatchNorm, -6": True}  # and whether its net has norms


class Size(NamedTuple):
    """How much is trained, on what."""

    steps: int = 1000
    batch: int = 256
    width: int = 16
    pictures: int = 60_000


SMALL = Size(steps=600, batch=32, width=4, pictures=1000)  # to see that it runs


# -- a run -------------------------------------------------------------------------------------------------------------


class Learner(LightningModule):
    def __init__(self, seed: int, norm: bool, pictures: Pictures, size: Size, harm: bool) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net, self.pictures, self.steps = residual_net(norm, size.width), pictures, size.steps
        self.strike = size.steps // 4 if harm else -1
        self.norm = norm
        self.struck = torch.zeros(0, dtype=torch.bool)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.strike:
            self._silent_before = self.silent()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.strike and self.norm:
            self._lower_shifts()
        if self.strike >= 0 and batch_idx == self.strike + LINGERS:
            self.struck = self.silent() & ~self._silent_before

    @torch.no_grad()
    def _lower_shifts(self) -> None:
        for module in self.net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.bias[: round(STRUCK * module.num_features)] -= DEPTH

    @torch.no_grad()
    def silent(self) -> Tensor:
        """Tell which units fire nowhere, layer by layer."""
        peaks: dict[nn.Module, Tensor] = {}

        def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            peak = args[0].amax((0, 2, 3))
            peaks[module] = peak.maximum(peaks[module]) if module in peaks else peak

        rectifiers = [module for module in self.net.modules() if isinstance(module, nn.ReLU)]
        handles = [module.register_forward_pre_hook(look) for module in rectifiers]
        self._outputs(self.pictures.x[:LOOKED_AT])
        for handle in handles:
            handle.remove()
        return torch.cat([peaks[module] <= 0 for module in rectifiers]).cpu()

    @torch.no_grad()
    def accuracy(self) -> float:
        return float((self._outputs(self.pictures.test_x).argmax(1) == self.pictures.test_y).float().mean())

    def _outputs(self, x: Tensor) -> Tensor:
        training = self.net.training
        self.net.eval()
        outputs = torch.cat([self.net(part) for part in x.split(AT_ONCE)])
        self.net.train(training)
        return outputs

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), LR, MOMENTUM, weight_decay=L2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Run(NamedTuple):
    struck: float
    dead: float
    back: float
    accuracy: float
    given_up: int


def run(seed: int, norm: bool, case: str, pictures: Pictures, size: Size, device: str) -> Run:
    model = Learner(seed, norm, pictures, size, case != "unharmed").to(device)
    monitor = DeadReLUMonitor(threshold=0, remedy=case if case in REMEDIES else None)
    bad = None if case == "unharmed" or model.norm else model.strike
    trainer = bare_trainer(
        *([monitor] if case in REMEDIES else []),
        max_steps=size.steps,
        accelerator="cpu" if device == "cpu" else "gpu",
        devices=1,
        gradient_clip_val=1.0 if case == "clipping" else None,
    )
    trainer.fit(model, DataLoader(Batches(pictures, seed, size.steps, size.batch, bad), batch_size=None))
    model.to(device)
    silent, struck = model.silent(), model.struck
    back = float((~silent)[struck].float().mean()) if struck.any() else math.nan
    given_up = sum(event.action == "given up" for event in monitor.events)
    return Run(float(struck.float().mean()), float(silent.float().mean()), back, model.accuracy(), given_up)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the idx files")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first", type=int, default=100)
    parser.add_argument("--small", action="store_true", help="a net of no importance, to see that it runs")
    parser.add_argument("--task", choices=list(TASKS), action="append", help="may be given several times")
    parser.add_argument("--remedy", choices=CASES, action="append", help="may be given several times")
    arguments = parser.parse_args()
    torch.set_num_threads(1 if arguments.device == "cpu" else torch.get_num_threads())
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    ignore_expected()
    size = SMALL if arguments.small else Size()
    pictures = Pictures.read(arguments.folder, arguments.device, size.pictures)
    seeds = range(arguments.first, arguments.first + arguments.seeds)
    where = torch.cuda.get_device_name() if arguments.device == "cuda" else "CPU"
    print(f"{where}, seeds {seeds[0]} to {seeds[-1]}; DeadReLUMonitor(threshold=0, remedy=...), all else as it comes")
    for task in arguments.task or TASKS:
        table = Table(task, "struck", "dead at the end", "struck that fire", "accuracy", "given up", "seconds")
        for case in arguments.remedy or CASES:
            start = time.perf_counter()
            runs = [run(seed, TASKS[task], case, pictures, size, arguments.device) for seed in seeds]
            *shares, given_up = zip(*runs, strict=True)
            numbers = f"{sum(given_up) / len(seeds):.1f}", f"{time.perf_counter() - start:.0f}"
            table.add_row(case, *map(mean, shares), *numbers)
            print(task, case, runs, flush=True)
        Console(width=130).print(table)


if __name__ == "__main__":
    main()
