"""Bring what all ranks have counted to the host, and have all ranks stop together."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lightning_deadrelu.explain.postmortem.recorder import Readings
from lightning_deadrelu.guarded import unless_failed
from lightning_deadrelu.statistics import Totals

if TYPE_CHECKING:
    from lightning_deadrelu.monitor.monitor import Monitor


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


def merged(monitor: Monitor) -> Counted | None:
    """Merge what is counted over all ranks, and bring it to the host; None once any rank has failed.

    Every rank comes here at the same batches, unless it was interrupted. It takes three collectives
    whatever the number of sites; the layouts are exchanged only after one has changed.

    Raises:
        RankFailure: On all ranks, if one has failed.
    """
    guard, ranks, repair = monitor.guard, monitor.ranks, monitor.repair
    if guard.ended or (guard.failure and not ranks.joint):
        return None
    _flush(monitor)
    totals, losses = ranks.merge(monitor.watch, repair.sums.values)
    if ranks.joint:
        repair.sums.values = losses if ranks.holds_merged else torch.zeros_like(losses)
    return _on_host(monitor, totals, losses)


@unless_failed
def _flush(monitor: Monitor) -> None:
    if monitor.evidence:
        monitor.evidence.flush(monitor.watch)


def _on_host(monitor: Monitor, totals: Totals, losses: Tensor) -> Counted:
    """Bring all that a verdict needs to the host, in one transfer."""
    readings = monitor.verdicts.recorder.read(losses.device)
    totals, (losses, *rest) = totals.to_host_with(losses, *readings)
    return Counted(totals, losses, Readings(*rest))
