"""Estimate the size of an optimizer's gradients at each step from a fixed few of their entries."""

from __future__ import annotations

import operator
from bisect import bisect
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_deadrelu.explain.postmortem.subsample import Stride, entries_of, stride_of

# PyTorch parts work on 32,768 entries or more among the threads of a CPU, which costs more than the work
_SMALL, _ALL = 4_096, 16  # entries and number of parameters that are read whole
_READ, _FEW = 1_024, 4  # of others; far apart, each entry is out of all caches, and so is each parameter
_LOOK = 64  # steps, after which it is looked again which parameters have gradients; and at the 1st, 2nd, 4th, ...


class GradientSample:
    """Read the same entries of an optimizer's gradients at each step, whatever the number of its parameters.

    Which parameters are read is settled at the first steps, and looked into again at every 64th: of those that ever had
    a gradient all, if they have no more than 4,096 entries, or else at most four, large ones rather than small ones. Of
    these, 1,024 evenly strided entries are read; each stands for its neighbours. A gradient that is missing at
    a step, or sparse, counts as zero. Under FSDP it is the local shard's.

    Example:
        >>> layer = torch.nn.Linear(3, 2)
        >>> layer(torch.ones(1, 3)).sum().backward()
        >>> sample = GradientSample()
        >>> sample.read(torch.optim.SGD(layer.parameters(), lr=0.1)).square() @ sample.weights
        tensor(8.)
    """

    def __init__(self) -> None:
        self._lists: list[Any] = []  # the groups' lists of parameters, at the last look
        self._steps = 0
        self._seen: dict[int, tuple[Tensor, torch.Size]] = {}  # parameters that have had a gradient, by id
        self._chosen: list[Tensor] = []
        self._strides: list[Stride] = []
        self._absent: list[Tensor] = []  # zeros in place of a gradient that is missing
        self.weights = torch.empty(0)
        """How many entries each one that is read stands for, float32, shape ``(entries,)``."""

    def read(self, optimizer: Optimizer) -> Tensor | None:
        """Return the entries before a step, shape ``(entries,)``; None if there is no gradient that can be read."""
        lists = [group["params"] for group in optimizer.param_groups]
        self._steps += 1
        is_due = self._steps % _LOOK == 0 or not self._steps & (self._steps - 1)
        if is_due or len(lists) != len(self._lists) or not all(map(operator.is_, lists, self._lists)):
            self._look(lists)
        gradients = [parameter.grad for parameter in self._chosen]
        if all(gradient is None for gradient in gradients):
            return None
        return torch.cat(list(map(_entries_or, gradients, self._strides, self._absent)))

    def _look(self, lists: list[Any]) -> None:
        """Find the parameters that have had gradients, and choose anew if they are others than at the last look."""
        held = {id(p): p for one in lists for p in one}
        seen = {k: (p, p.shape) for k, p in held.items() if k in self._seen or _is_readable(p.grad)}
        changed = seen.keys() != self._seen.keys() or any(one[1] != self._seen[k][1] for k, one in seen.items())
        self._lists, self._seen = lists, seen
        if changed:
            self._choose([p for p, _ in seen.values()])

    def _choose(self, seen: Sequence[Tensor]) -> None:
        """Choose what is read; all on one device."""
        here = [p for p in seen if p.device == seen[0].device]
        shares = _shares([_local(p).numel() for p in here])
        self._chosen = [here[place] for place in shares]
        parts = [_local(p) for p in self._chosen]
        most = _SMALL if sum(part.numel() for part in parts) <= _SMALL else _READ // len(parts)
        self._strides = [stride_of(tuple(part.shape), most) for part in parts]
        self._absent = [part.new_zeros(s.entries) for part, s in zip(parts, self._strides, strict=True)]
        stands_for = zip(self._absent, shares.values(), strict=True)
        weights = [torch.full_like(one, share / len(one), dtype=torch.float32) for one, share in stands_for]
        self.weights = torch.cat(weights) if weights else torch.empty(0)


def _shares(sizes: Sequence[int]) -> dict[int, float]:
    """Choose among tensors, by their numbers of entries, and say how many entries each stands for, by its place.

    Example:
        >>> _shares([3, 4]), _shares([10_000, 10, 30_000, 10])
        ({0: 3, 1: 4}, {0: 10005.0, 2: 30015.0})
    """
    if len(sizes) <= _ALL and sum(sizes) <= _SMALL:
        return dict(enumerate(sizes))
    *_, whole = ends = list(accumulate(sizes))
    chosen = Counter(bisect(ends, whole * (place + 0.5) / _FEW) for place in range(_FEW))
    return {place: whole * times / _FEW for place, times in chosen.items()}


def _entries_or(gradient: Tensor | None, stride: Stride, absent: Tensor) -> Tensor:
    """Read a gradient; zeros where it is missing, sparse, or of another form than its parameter."""
    if gradient is None or gradient.layout is not torch.strided:
        return absent
    part = gradient if type(gradient) is Tensor else _local(gradient)
    return entries_of(part, stride) if part.numel() == stride.size and part.device == absent.device else absent


def _is_readable(gradient: Tensor | None) -> bool:
    if gradient is None or gradient.layout != torch.strided or not gradient.is_floating_point():
        return False
    part = _local(gradient)
    return part.numel() > 0 and part.element_size() > 1 and not part.is_meta


def _local(x: Any) -> Tensor:
    """Return this rank's part of a sharded tensor."""
    sharded = type(x) is not Tensor and hasattr(x, "to_local")
    return x.to_local() if sharded else x  # type: ignore[no-any-return]
