"""Bring what all ranks have counted to the host, and have all ranks stop together."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_deadrelu.explain.postmortem.recorder import FlightRecorder, Readings
from lightning_deadrelu.guarded import Guard, unless_failed
from lightning_deadrelu.monitor.host import Host
from lightning_deadrelu.observe import ranks
from lightning_deadrelu.observe.gradient_evidence import GradientEvidence
from lightning_deadrelu.observe.watch import Watch
from lightning_deadrelu.repair.repair import Repair
from lightning_deadrelu.statistics import Totals


class Counted(NamedTuple):
    """What a window comes to over all ranks, on the host.

    Args:
        totals: The counts.
        losses: Number, sum and sum of squares of the losses.
        readings: What the flight recorder asked for.
    """

    totals: Totals
    losses: Tensor
    readings: Readings


class Merger:
    """Merge counts over all ranks.

    Args:
        host: The loop.
        watch: Counts.
        repair: Adds up losses.
        recorder: Has readings on the device.
        evidence: Has proofs on the device; None if gradients are not asked.
        guard: Knows whether this rank has failed.
    """

    def __init__(
        self,
        host: Host,
        watch: Watch,
        repair: Repair,
        recorder: FlightRecorder,
        evidence: GradientEvidence | None,
        guard: Guard,
    ) -> None:
        self._host, self._watch, self._repair, self._recorder = host, watch, repair, recorder
        self._evidence, self.guard = evidence, guard
        self.ended = False
        """Whether all ranks know that one has failed."""

    def merged(self, joint: bool) -> Counted | None:
        """Merge what is counted over all ranks, and bring it to the host; None once any rank has failed.

        Every rank comes here at the same batches, unless it was interrupted. It takes three collectives
        whatever the number of sites; the layouts are exchanged only after one has changed.

        Args:
            joint: Whether there are other ranks that come here.
        """
        if self.ended:
            return None
        self._flush()
        losses = self._repair.losses
        if not joint:
            return None if self.guard.failure else self._on_host(self._watch.liveness.totals(), losses)
        if not ranks.agree(self._watch, self.guard.failure is not None, self._host.device):
            self._end()
            return None
        totals, losses = ranks.merge(self._watch, losses.to(self._host.device))
        self._repair.losses = losses if self._host.is_first_rank else torch.zeros_like(losses)
        return self._on_host(totals, losses)

    @unless_failed
    def _flush(self) -> None:
        if self._evidence:
            self._evidence.flush(self._watch)

    def _on_host(self, totals: Totals, losses: Tensor) -> Counted:
        """Bring all that a verdict needs to the host, in one transfer."""
        readings = self._recorder.read(self._watch.layout, self._host.model, losses.device)
        totals, (losses, *rest) = totals.to_host_with(losses, *readings)
        return Counted(totals, losses, Readings(*rest))

    def all_are_well(self, joint: bool) -> bool:
        """Make sure that all ranks want the same edits: they do unless one has failed since the counts were merged."""
        if joint and not self.ended and ranks.any_failed(self.guard.failure is not None, self._host.device):
            self._end()
        return self.guard.failure is None

    def _end(self) -> None:
        self.ended = True
        self.guard.failure = self.guard.failure or RuntimeError("the monitor failed on another rank")
