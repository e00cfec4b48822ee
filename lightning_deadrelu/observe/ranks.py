"""Bring the counts of all ranks together; the only module that communicates."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_deadrelu.model.sites import Site
from lightning_deadrelu.observe.watch import Watch
from lightning_deadrelu.statistics import Totals
from lightning_deadrelu.statistics.confirmation import SilenceSample


def is_joint(world_size: int) -> bool:
    """Tell whether there are other ranks to talk to.

    A process group may exist for other ends: each of its processes can run a Trainer of its own.

    Args:
        world_size: How many processes the Trainer spans.
    """
    return world_size > 1 and dist.is_available() and dist.is_initialized()


def agree(watch: Watch | None, failed: bool, device: torch.device) -> bool:
    """Settle on one layout of sites; False if any rank has failed. Every rank has to call it.

    One collective of fixed size, and one more only after some rank has met a new site.

    Args:
        watch: What this rank watches with; None if it has none.
        failed: Whether this rank has failed.
        device: Where the backend communicates.
    """
    sites = watch.sites if watch else ()
    mark = _fingerprint(sites)
    header = torch.tensor([mark, -mark, float(failed or watch is None)], dtype=torch.float64, device=device)
    dist.all_reduce(header, dist.ReduceOp.MAX)
    highest, lowest, any_failed = header.tolist()
    if any_failed or watch is None:
        return False
    if highest != -lowest:
        watch.adopt(dict.fromkeys(site for layout in gather(sites) for site in layout))
    return True


def merge(watch: Watch, losses: Tensor) -> tuple[Totals, Tensor]:
    """Return the counts and losses of all ranks; two collectives.

    From then on rank 0 holds the counts, and the others none. So what rank 0 saves is complete, and a run goes on from
    there exactly as one that loads it.

    Args:
        watch: What this rank watches with; :func:`agree` has to come first.
        losses: Sums over the losses of this rank, float64.
    """
    own, keeps = watch.liveness.totals(), dist.get_rank() == 0
    sums, maxima = torch.cat([own.sums(), losses]), own.maxima if keeps else own.maxima.clone()
    dist.all_reduce(sums, dist.ReduceOp.SUM)
    dist.all_reduce(maxima, dist.ReduceOp.MAX)
    totals = own.merged(sums[: -len(losses)], maxima)
    if keeps:
        watch.liveness.load(totals)
    else:
        watch.liveness.reset()
    return totals, sums[-len(losses) :]


def any_failed(failed: bool, device: torch.device) -> bool:
    """Tell whether any rank has failed. One collective of fixed size.

    Args:
        failed: Whether this one has.
        device: Where the backend communicates.
    """
    flag = torch.tensor(float(failed), device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def confirm(evidence: SilenceSample, failed: bool) -> SilenceSample | None:
    """Merge what all ranks saw of the units asked about; None if any has failed. Two collectives.

    Args:
        evidence: What this rank saw.
        failed: Whether this rank has failed.
    """
    maxima = torch.cat([evidence.fired, evidence.fired.new_full((1,), float(failed))])
    sums = torch.cat([evidence.sums, evidence.calls[None]])
    dist.all_reduce(maxima, dist.ReduceOp.MAX)
    dist.all_reduce(sums, dist.ReduceOp.SUM)
    return None if maxima[-1] else SilenceSample(maxima[:-1], sums[:-1], sums[-1])


def share(rows: Tensor | None, features: int, most: int, device: torch.device) -> Tensor | None:
    """Put some rows of each rank's together, the same on all; None if none has any. One collective.

    Args:
        rows: This rank's, shape ``(rows, features)``, or None.
        features: How many.
        most: Rows in all.
        device: Where the backend communicates.
    """
    each = max(1, most // dist.get_world_size())
    slots = torch.zeros(dist.get_world_size(), each, features + 1, dtype=torch.float64, device=device)
    if rows is not None:
        mine = rows[:: -(-len(rows) // each)]
        slots[dist.get_rank(), : len(mine)] = torch.cat([mine, mine.new_ones(len(mine), 1)], 1)
    dist.all_reduce(slots, dist.ReduceOp.SUM)
    flat = slots.flatten(0, 1)
    kept = flat[flat[:, -1] > 0, :-1]
    return kept if len(kept) else None


def gather(value: Any) -> list[Any]:
    """Return what each rank holds; for small and rare things."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def rank() -> int:
    """Return this rank's number."""
    return dist.get_rank()


def _fingerprint(sites: Sequence[Site]) -> float:
    return float(int.from_bytes(hashlib.sha256(repr(sites).encode()).digest()[:6], "big"))
