"""Compare callbacks side by side: one training run, in which they take turns for a few steps each."""

from __future__ import annotations

import io
import logging
import math
import random
import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any, NamedTuple

import torch
import trackers
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader
from trackers import Tracker

from lightning_deadrelu.observe.call_router import CallRouter
from lightning_deadrelu.observe.module_hooks import ModuleHooks
from lightning_deadrelu.observe.site_resolver import SiteResolver
from lightning_deadrelu.observe.tensor_origins import TensorOrigins

ALONE = "no callback"
HOOKS = ("on_train_batch_start", "on_before_backward", "on_after_backward", "on_before_zero_grad")
HOOKS += ("on_before_optimizer_step", "on_train_batch_end")
PROBE = ((ModuleHooks, "_enter"), (ModuleHooks, "_leave"), (CallRouter, "take_rectified"))
PROBE += ((SiteResolver, "find"), (SiteResolver, "follow"), (TensorOrigins, "repeat"))

Build = Callable[[], tuple[nn.Module, Tensor]]


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


class Block(NamedTuple):
    """A few steps in a row under one callback: seconds per step, and those of them spent inside the callback."""

    step: float
    inside: float


class Turns(Callback):
    """Let one callback at a time see the steps, for ``block`` steps; in each round all, in random order.

    Args:
        callbacks: By name; None for no callback.
        rounds: How often each has its turn; a round of warm-up comes before.
        block: Steps of a turn.
    """

    def __init__(self, callbacks: Mapping[str, Callback | None], rounds: int, block: int) -> None:
        self._callbacks, self._block = dict(callbacks), block
        shuffled = random.Random(0)
        self._order = [name for _ in range(rounds + 1) for name in shuffled.sample([*callbacks], len(callbacks))]
        self.steps = len(self._order) * block
        self.now = ""
        self.inside, self._is_inside = 0.0, False
        self._start: Any = None
        self._taken: list[tuple[str, Any, Any, float]] = []
        for name, callback in self._callbacks.items():
            for hook in HOOKS if callback else ():
                setattr(callback, hook, self._gate(name, getattr(callback, hook)))

    def _gate(self, name: str, hook: Callable[..., Any]) -> Callable[..., Any]:
        """Call a hook in the callback's own turns alone."""
        timed = self.around(hook)
        return lambda *args: timed(*args) if self.now == name else None

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Add up the time spent in functions, once where one calls another."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._is_inside:
                return function(*args, **kwargs)
            self._is_inside, start = True, trackers.clock()
            try:
                return function(*args, **kwargs)
            finally:
                self.inside += trackers.clock() - start
                self._is_inside = False

        return timed

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(0, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        turn, place = divmod(batch_idx + 1, self._block)
        if not place:
            self._end(_stamp(pl_module.device))
            self._begin(turn, pl_module)

    def _begin(self, turn: int, pl_module: LightningModule) -> None:
        if turn == len(self._order):
            self.now = ""
            return
        self.now = self._order[turn]
        if isinstance(callback := self._callbacks[self.now], Tracker):
            callback.attach(pl_module)
            callback.seconds = 0.0
        self.inside, self._start = 0.0, _stamp(pl_module.device)

    def _end(self, stamp: Any) -> None:
        inside = self.inside
        if isinstance(callback := self._callbacks[self.now], Tracker):
            callback.detach()
            inside += callback.seconds
        self._taken.append((self.now, self._start, stamp, inside))

    def blocks(self) -> dict[str, list[Block]]:
        """Return the turns of each callback, in order, without the warm-up."""
        found: dict[str, list[Block]] = {name: [] for name in self._callbacks}
        for name, start, end, inside in self._taken[len(self._callbacks) :]:
            found[name].append(Block(_seconds(start, end) / self._block, inside / self._block))
        return found


def _stamp(device: torch.device) -> Any:
    """Take the time on the device's own clock."""
    if device.type != "cuda":
        return trackers.clock()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(start: Any, end: Any) -> float:
    if isinstance(start, float):
        return float(end - start)
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


@contextmanager
def _instrumented(turns: Turns) -> Iterator[None]:
    """Time the probe's share of each torch call and module; the rest of the monitor is in its hooks."""
    originals = {(owner, name): getattr(owner, name) for owner, name in PROBE}
    for (owner, name), function in originals.items():
        setattr(owner, name, turns.around(function))
    try:
        yield
    finally:
        for (owner, name), function in originals.items():
            setattr(owner, name, function)


def compare(
    build: Build, callbacks: Mapping[str, Callback | None], rounds: int, block: int = 10, device: str = "cpu"
) -> dict[str, list[Block]]:
    """Train a model under all callbacks in turn; the blocks of one place in the lists belong to one round."""
    torch.manual_seed(0)
    model, batch = build()
    if device == "cuda":
        batch = batch.pin_memory()  # else each copy of it waits for the device, and no step could be ahead of it
    turns = Turns(callbacks, rounds, block)
    with _instrumented(turns), quiet():
        trainer = Trainer(
            accelerator=device,
            devices=1,
            max_steps=turns.steps,
            callbacks=[*(callback for callback in callbacks.values() if callback), turns],
            logger=DummyLogger(),  # takes scalars: pictures come a few times in a run, and have a table of their own
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Net(model), DataLoader([batch] * turns.steps, batch_size=None))
    return turns.blocks()


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Lightning's advice and the monitors' last words out of the table."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def share_inside(blocks: Sequence[Block]) -> float:
    """Return the share of all step time that was spent inside the callback."""
    return sum(block.inside for block in blocks) / sum(block.step for block in blocks)


def slowdown(blocks: Sequence[Block], alone: Sequence[Block]) -> tuple[float, float, float]:
    """Return by how much steps are longer than the same round's without a callback: median, and its bounds.

    The bounds are order statistics, which hold the median at 95 % or more whatever the law of the noise
    (https://en.wikipedia.org/wiki/Median#Confidence_intervals); with fewer than six rounds, the extremes.

    Example:
        >>> blocks = [Block(step, 0.0) for step in (1.0, 1.1, 1.2)]
        >>> [round(value, 2) for value in slowdown(blocks, [Block(1.0, 0.0)] * 3)]
        [0.1, 0.0, 0.2]
    """
    ratios = sorted(one.step / other.step - 1 for one, other in zip(blocks, alone, strict=True))
    number, place, tail = len(ratios), 0, 2 / 2 ** len(ratios)
    while (tail := tail + 2 * math.comb(number, place + 1) / 2**number) <= 0.05:
        place += 1
    return statistics.median(ratios), ratios[place], ratios[-1 - place]
