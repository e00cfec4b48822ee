"""Bring what all ranks have counted to the host, and have all ranks stop together."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_deadrelu.explain.postmortem.recorder import FlightRecorder, Readings
from lightning_deadrelu.guarded import Guard, unless_failed
from lightning_deadrelu.monitor.host import Host
from lightning_deadrelu.observe.gradient_evidence import GradientEvidence
from lightning_deadrelu.observe.ranks import Ranks
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
        ranks: The processes that count.
        guard: Knows whether this rank has failed.
    """

    def __init__(
        self,
        host: Host,
        watch: Watch,
        repair: Repair,
        recorder: FlightRecorder,
        evidence: GradientEvidence | None,
        ranks: Ranks,
        guard: Guard,
    ) -> None:
        self._host, self._watch, self._repair, self._recorder = host, watch, repair, recorder
        self._evidence, self._ranks, self.guard = evidence, ranks, guard

    def merged(self) -> Counted | None:
        """Merge what is counted over all ranks, and bring it to the host; None once any rank has failed.

        Every rank comes here at the same batches, unless it was interrupted. It takes three collectives
        whatever the number of sites; the layouts are exchanged only after one has changed.

        Raises:
            RankFailure: On all ranks, if one has failed.
        """
        if self.guard.ended or (self.guard.failure and not self._ranks.joint):
            return None
        self._flush()
        totals, losses = self._ranks.merge(self._watch, self._repair.sums)
        if self._ranks.joint:
            self._repair.sums = losses if self._ranks.holds_merged else torch.zeros_like(losses)
        return self._on_host(totals, losses)

    @unless_failed
    def _flush(self) -> None:
        if self._evidence:
            self._evidence.flush(self._watch)

    def _on_host(self, totals: Totals, losses: Tensor) -> Counted:
        """Bring all that a verdict needs to the host, in one transfer."""
        readings = self._recorder.read(self._watch.layout, self._host.model, losses.device)
        totals, (losses, *rest) = totals.to_host_with(losses, *readings)
        self._watch.liveness.note_rated(totals)  # the window may go on
        return Counted(totals, losses, Readings(*rest))
