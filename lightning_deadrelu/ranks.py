"""Bring the counts of all ranks together; the only module that communicates."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from lightning_deadrelu.sites import Site
from lightning_deadrelu.statistics import Totals
from lightning_deadrelu.watch import Watch


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
    sites = watch.sites if watch else []
    mark = _fingerprint(sites)
    header = torch.tensor([mark, -mark, float(failed or watch is None)], dtype=torch.float64, device=device)
    dist.all_reduce(header, dist.ReduceOp.MAX)
    highest, lowest, any_failed = header.tolist()
    if any_failed or watch is None:
        return False
    if highest != -lowest:
        layouts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(layouts, sites)
        watch.adopt(dict.fromkeys(site for layout in layouts for site in layout))
    return True


def merge(watch: Watch) -> Totals:
    """Return the counts of all ranks; two collectives. From then on rank 0 holds them, and the others none.

    So what rank 0 saves is complete, and a run goes on from there exactly as one that loads it.

    Args:
        watch: What this rank watches with; :func:`agree` has to come first.
    """
    own = watch.liveness.totals()
    sums, maxima = own.sums(), own.maxima.clone()
    dist.all_reduce(sums, dist.ReduceOp.SUM)
    dist.all_reduce(maxima, dist.ReduceOp.MAX)
    totals = own.merged(sums, maxima)
    watch.liveness.reset()
    if dist.get_rank() == 0:
        watch.liveness.load(totals)
    return totals


def _fingerprint(sites: Sequence[Site]) -> float:
    return float(int.from_bytes(hashlib.sha256(repr(sites).encode()).digest()[:6], "big"))
