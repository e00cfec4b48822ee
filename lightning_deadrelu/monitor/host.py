"""What a monitor asks of the loop that it runs in, and what it says to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_deadrelu.report.run_report import RunReport


class Misuse(ValueError):
    """What a user asked for cannot work; the one error of a monitor that ends a run."""


class Host(Protocol):
    """A training loop, as a monitor sees it: what is trained, and where to say what was found."""

    @property
    def model(self) -> nn.Module:
        """What is watched."""

    @property
    def called(self) -> nn.Module:
        """What the loop calls: the model, or what is around it, as a compiled module."""

    @property
    def run_name(self) -> str:
        """What the run is called where it is logged; empty if that is not known."""

    @property
    def optimizers(self) -> Sequence[Optimizer]:
        """What trains the model."""

    @property
    def device(self) -> torch.device:
        """Where the model is, and where ranks communicate."""

    @property
    def is_joint(self) -> bool:
        """Whether other ranks come to the same places now, and can be talked to."""

    @property
    def is_first_rank(self) -> bool:
        """Whether this is rank 0."""

    @property
    def in_step(self) -> bool:
        """Whether the loop's own step is running, and no callback's or hook's code."""

    @property
    def steps_once(self) -> bool:
        """Whether what runs after the first step of a batch is no part of it: a closure may be called again."""

    @property
    def clips(self) -> bool:
        """Whether gradients are clipped, or may be."""

    @property
    def schedules(self) -> bool:
        """Whether the learning rate has a schedule."""

    @property
    def averages(self) -> str:
        """What keeps averaged copies of the weights; empty if nothing does."""

    @property
    def unrepairable(self) -> str:
        """Why no parameter can be edited here; empty if they can."""

    def refusal(self, text: str) -> Misuse:
        """Make the error that a user of this loop expects."""

    def warn(self, text: str) -> None:
        """Say what needs an act; once for all ranks."""

    def info(self, text: str) -> None:
        """Say what is worth knowing; once for all ranks."""

    def show_score(self, dead_fraction: float) -> None:
        """Put the dead fraction where the loop looks for what it tracks."""

    def publish(self, run: RunReport, *, edited: int, at_risk: float, crossed: Sequence[str], closed: bool) -> None:
        """Log a verdict.

        Args:
            run: The run so far, with the verdict.
            edited: Units edited since the verdict before.
            at_risk: Share of the units that sink towards silence.
            crossed: Sites that have crossed the threshold for the first time.
            closed: Whether a window has ended, and not only been looked at.
        """

    def conclude(self, run: RunReport) -> None:
        """Log at the end of training what became of the units; on rank 0 alone."""

    def say_at_end(self, text: str) -> None:
        """Say what came of the run, when nothing else is on the screen; once for all ranks."""
