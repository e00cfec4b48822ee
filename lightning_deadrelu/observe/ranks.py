"""Bring what the processes of a training run know together; the only module of ours that communicates."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_deadrelu.guarded import RankFailure
from lightning_deadrelu.model.sites import Site
from lightning_deadrelu.observe.watch import Watch
from lightning_deadrelu.statistics import Totals
from lightning_deadrelu.statistics.confirmation import SilenceSample

T = TypeVar("T")


def is_joint(world_size: int) -> bool:
    """Tell whether there are other ranks to talk to.

    A process group may exist for other ends: each of its processes can run a Trainer of its own.

    Args:
        world_size: How many processes the Trainer spans.
    """
    return world_size > 1 and _has_group()


def place_in_group() -> tuple[int, int]:
    """Return the number of this process, and how many the process group has; 0 and 1 without a group."""
    return (dist.get_rank(), dist.get_world_size()) if _has_group() else (0, 1)


def _has_group() -> bool:
    return dist.is_available() and dist.is_initialized()


class Ranks:
    """The processes that train one model together, or a process that trains alone.

    Alone, every exchange returns what was given. Otherwise every exchange starts with a flag that says whether a rank
    has failed: then all ranks raise, and no rank waits for another. What can fail before an exchange is handed over as
    a function, so that the flag tells of its failure.

    Args:
        device: Where the backend communicates.
        is_joint: Tells whether other ranks come to the same exchanges now.
        has_failed: Tells whether this rank has failed; the next exchange tells the others.

    Example:
        >>> Ranks().gather(lambda: "what this rank knows")
        ['what this rank knows']
    """

    def __init__(
        self,
        device: torch.device = torch.device("cpu"),
        is_joint: Callable[[], bool] = lambda: False,
        has_failed: Callable[[], bool] = lambda: False,
    ) -> None:
        self._device, self._is_joint, self._has_failed = device, is_joint, has_failed

    @property
    def joint(self) -> bool:
        """Whether other ranks come to the same exchanges now."""
        return self._is_joint()

    @property
    def size(self) -> int:
        """How many there are."""
        return dist.get_world_size() if self.joint else 1

    @property
    def holds_merged(self) -> bool:
        """Whether this rank keeps what was merged, and the others start again from nothing."""
        return not self.joint or dist.get_rank() == 0

    def attempt(self, compute: Callable[[], T]) -> T:
        """Call a function that may fail, and go on only if it succeeded on all ranks. One collective of fixed size.

        Raises:
            RankFailure: On all ranks, if it failed on one, or one had failed before.
        """
        if not self.joint:
            return compute()
        result, error = self._attempted(compute)
        self._meet(error)
        assert result is not None
        return result[0]

    def _attempted(self, compute: Callable[[], T]) -> tuple[tuple[T] | None, Exception | None]:
        """Call a function, unless this rank has failed; return its result or its error."""
        try:
            return (None if self._has_failed() else (compute(),)), None
        except Exception as error:
            return None, error

    def gather(self, compute: Callable[[], T]) -> list[T]:
        """Return what a function returns on each rank, for small and rare things.

        Raises:
            RankFailure: On all ranks, if it failed on one, or one had failed before.
        """
        own = self.attempt(compute)
        values: list[Any] = [own] * self.size
        if self.joint:
            dist.all_gather_object(values, own)
        return values

    def union(self, names: Iterable[str]) -> list[str]:
        """Return the names that some rank has, in one order; to be called on all ranks, also on one that has failed."""
        found: list[Any] = [sorted(names)] * self.size
        if self.joint:
            dist.all_gather_object(found, found[0])
        return sorted({name for one in found for name in one})

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Give all ranks the values that rank 0 has; to be called on all of them, with as many tensors."""
        for tensor in tensors if self.joint else ():
            values = tensor.detach().contiguous()
            dist.broadcast(values, src=0)
            tensor.detach().copy_(values)

    def settle(self) -> None:
        """Make sure that no rank has failed. One collective of fixed size.

        Raises:
            RankFailure: On all ranks, if one has.
        """
        self.attempt(lambda: None)

    def merge(self, watch: Watch | None, losses: Tensor) -> tuple[Totals, Tensor]:
        """Return the counts and losses of all ranks; three collectives, and two more after a rank has met a new site.

        From then on :attr:`holds_merged` tells which rank holds the counts, and the others have none. So what that rank
        saves is complete, and a run goes on from there exactly as one that loads it.

        Args:
            watch: What this rank watches with; None if it has none, as after a failure.
            losses: Sums over the losses of this rank, float64.

        Raises:
            RankFailure: On all ranks, if one has failed.
        """
        if not self.joint:
            assert watch is not None
            return watch.liveness.totals(), losses
        watch, own, sums, maxima = self._laid_out(watch, losses.to(self._device))
        dist.all_reduce(sums, dist.ReduceOp.SUM)
        dist.all_reduce(maxima, dist.ReduceOp.MAX)
        totals = own.merged(sums[: -len(losses)], maxima)
        if self.holds_merged:
            watch.liveness.load(totals)
        else:
            watch.liveness.reset()
        return totals, sums[-len(losses) :]

    def _laid_out(
        self, watch: Watch | None, losses: Tensor, layouts: Sequence[Sequence[Site]] = ()
    ) -> tuple[Watch, Totals, Tensor, Tensor]:
        """Have one layout of sites on all ranks, and what is to be reduced laid out by it."""

        def prepare() -> tuple[Watch, Totals, Tensor, Tensor]:
            if watch is None:
                raise RuntimeError("this rank does not watch")
            if layouts:
                watch.adopt(dict.fromkeys(site for layout in layouts for site in layout))
            own = watch.liveness.totals()
            return watch, own, torch.cat([own.sums(), losses]), own.maxima.clone()

        prepared, error = self._attempted(prepare)
        mark = _fingerprint(watch.sites if watch else ())
        highest, lowest = self._meet(error, mark, -mark)
        assert prepared is not None
        assert watch is not None
        if highest == -lowest:
            return prepared[0]
        layouts = [[] for _ in range(self.size)]
        dist.all_gather_object(layouts, watch.sites)
        return self._laid_out(watch, losses, layouts)

    def merge_sample(self, compute: Callable[[], SilenceSample]) -> SilenceSample:
        """Return what all ranks saw of the units asked about, on the CPU. Three collectives.

        Raises:
            RankFailure: On all ranks, if one has failed.
        """
        sample = self.attempt(compute)
        if self.joint:
            sums = torch.cat([sample.sums, sample.calls[None]])
            dist.all_reduce(sample.fired, dist.ReduceOp.MAX)
            dist.all_reduce(sums, dist.ReduceOp.SUM)
            sample = SilenceSample(sample.fired, sums[:-1], sums[-1])
        return sample.to_host()

    def _meet(self, error: Exception | None, *values: float) -> list[float]:
        """Return the largest of each value over all ranks."""
        header = [float(self._has_failed() or error is not None), *values]
        shared = torch.tensor(header, dtype=torch.float64, device=self._device)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        failed, *largest = shared.tolist()
        if failed:
            raise RankFailure("the monitor failed on a rank") from error
        return largest


def _fingerprint(sites: Sequence[Site]) -> float:
    return float(int.from_bytes(hashlib.sha256(repr(sites).encode()).digest()[:6], "big"))
