"""What a monitor saves, as one tree of dataclasses; see :mod:`~lightning_deadrelu.checkpoint`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lightning_deadrelu.attribution.connectivity import Connectivity
from lightning_deadrelu.checkpoint import FORMAT
from lightning_deadrelu.explain.finding import Finding
from lightning_deadrelu.explain.postmortem.recorder import RecorderState
from lightning_deadrelu.model.sites import Site
from lightning_deadrelu.monitor.announcer import Announced
from lightning_deadrelu.observe.gradient_evidence import GradientEvidenceState
from lightning_deadrelu.repair.activation_swap import reinstate_
from lightning_deadrelu.repair.repair import RepairState
from lightning_deadrelu.repair.restore_activations import restore
from lightning_deadrelu.report.history import RunHistoryState
from lightning_deadrelu.statistics import LivenessReport, Totals, UnitHistory


@dataclass
class Window:
    """The window that is open.

    Args:
        steps: The training batch, as loggers count, of each observation that is done.
        unjudged: Whether there was an observation since the last verdict.
        reported_edits: Units edited in this window that a verdict has reported already.
        reported: Who was dead at the last verdict, if that was in this window.
    """

    steps: list[int] = field(default_factory=list)
    unjudged: bool = False
    reported_edits: int = 0
    reported: UnitHistory | None = None

    def close_observation(self, step: int) -> None:
        """End an observation."""
        self.steps = [*self.steps, step]
        self.unjudged = True

    @property
    def observations(self) -> int:
        """How many are done."""
        return len(self.steps)


@dataclass
class Progress:
    """How far a run has come.

    Args:
        batches: Training batches done, accumulated ones as one.
        observing: Whether the present training batch is being observed.
        step: The last training batch, as loggers count.
        judged: Whether there was a verdict.
        score: The dead fraction at the last verdict; units not yet judged count as not dead.
        window: The open window.
        checked: Whether the check-up is done.
        findings: What it found, the surest first.
    """

    batches: int = 0
    observing: bool = False
    step: int = 0
    judged: bool = False
    score: float = 0.0
    window: Window = field(default_factory=Window)
    checked: bool = False
    findings: tuple[Finding, ...] = ()


@dataclass
class RunState:
    """What a resumed run goes on from.

    Args:
        selection: What decides which sites are watched; see :attr:`Settings.selection`.
        sites: The sites, in the order of the counts.
        totals: The counts of the open window, over all ranks.
        units: What is known of the units from the windows before.
        never_trained: Parameters that optimizers hold and that never got a gradient.
        connectivity: Which parameters were seen to feed and read the sites, where that is traced.
    """

    progress: Progress
    selection: list[Any]
    sites: list[Site]
    totals: Totals
    units: UnitHistory
    never_trained: list[str] | None
    evidence: GradientEvidenceState | None
    repair: RepairState
    history: RunHistoryState
    recorder: RecorderState
    announced: Announced
    report: LivenessReport | None = None
    connectivity: Connectivity | None = None


@dataclass
class MonitorState:
    """What a checkpoint holds of a monitor.

    Args:
        activations: What was substituted in the model, without which its weights mean nothing.
        run: The rest; None if the monitor had failed.
        format: The number of this layout.
    """

    activations: list[dict[str, Any]]
    run: RunState | None = None
    format: int = FORMAT


def exchange_as_in(state: Mapping[str, Any], model: nn.Module) -> None:
    """Have the activations that go with the weights of a checkpoint, and no others."""
    saved = state.get("activations", [])
    restore(model, saved)
    reinstate_(model, keep={record["path"] for record in saved})
