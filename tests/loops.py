"""A plain loop, and what a monitor says to it."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_deadrelu import LivenessReport, watch
from lightning_deadrelu.monitor.host import Misuse
from lightning_deadrelu.monitor.monitor import Monitor
from lightning_deadrelu.monitor.settings import Settings
from lightning_deadrelu.report.run_report import RunReport


@dataclass
class Loop:
    """A loop without a Trainer; see :class:`lightning_deadrelu.monitor.host.Host`."""

    model: nn.Module
    optimizers: Sequence[Optimizer]
    averages: str = ""
    run_name: str = ""
    unrepairable: str = ""
    is_joint: bool = False
    is_first_rank: bool = True
    steps_once: bool = True
    in_step: bool = True
    clips: bool = False
    schedules: bool = False
    said: list[str] = field(default_factory=list)
    published: list[dict[str, Any]] = field(default_factory=list)
    concluded: list[RunReport] = field(default_factory=list)
    score: float | None = None

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def called(self) -> nn.Module:
        return self.model

    def refusal(self, text: str) -> Misuse:
        return Misuse(text)

    def warn(self, text: str) -> None:
        self.said.append(text)

    info = warn

    def show_score(self, dead_fraction: float) -> None:
        self.score = dead_fraction

    def publish(self, run: RunReport, **figures: Any) -> None:
        self.published.append({"report": run.report, **figures})

    def conclude(self, run: RunReport) -> None:
        self.concluded.append(run)

    say_at_end = warn


def net(dead: int = 3, units: int = 8) -> nn.Sequential:
    """A rectifier, ``act``, of whose units the first ``dead`` are dead."""
    torch.manual_seed(7)
    model = nn.Sequential()
    for part, module in {"up": nn.Linear(4, units), "act": nn.ReLU(), "down": nn.Linear(units, 1)}.items():
        model.add_module(part, module)
    with torch.no_grad():
        model[0].bias[:dead] = -100.0
        model[0].bias[dead:] = 5.0
    return model


def looped(model: nn.Module, **settings: Any) -> tuple[Monitor, Loop]:
    """A monitor of one observation a batch that has started, and its loop."""
    loop = Loop(model, [torch.optim.SGD(model.parameters(), 1e-3)])
    monitor = Monitor(Settings(**{"every_n_steps": 1, "window": 4, "min_samples": 1, **settings}), loop)
    return monitor, loop


def train(monitor: Monitor, loop: Loop, batches: Sequence[torch.Tensor]) -> list[LivenessReport]:
    """Train on some batches; return the verdicts."""
    (optimizer,) = loop.optimizers
    reports = []
    for batch in batches:
        monitor.begin_batch()
        monitor.note_batch(batch)
        loss = loop.model(batch).square().mean()
        optimizer.zero_grad()
        monitor.before_backward()
        loss.backward()
        monitor.before_step(optimizer)
        optimizer.step()
        reports.append(monitor.end_batch(loss.detach(), batch, monitor.progress.batches))
    return [report for report in reports if report is not None]


def resumed_and_whole(
    model: nn.Module, batches: Sequence[torch.Tensor], **settings: Any
) -> tuple[LivenessReport, LivenessReport]:
    """Train a copy in two halves, the second from the saved state, and the model in one go; return both verdicts."""
    other, half = copy.deepcopy(model), len(batches) // 2
    whole, _ = _watched(model, batches, settings)
    _, state = _watched(other, batches[:half], settings)
    later, _ = _watched(other, batches[half:], settings, state)
    return later, whole


def _watched(
    model: nn.Module, batches: Sequence[torch.Tensor], settings: dict[str, Any], state: dict[str, Any] | None = None
) -> tuple[LivenessReport, dict[str, Any]]:
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    monitor = watch(model, optimizer, **settings)
    if state:
        monitor.load_state_dict(state)
    with monitor:
        for batch in batches:
            model(batch).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            monitor.step()
        state = monitor.state_dict()
    return monitor.report, state
