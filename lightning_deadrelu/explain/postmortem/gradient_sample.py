"""Estimate the size of an optimizer's gradients at each step from a fixed few of their entries."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_deadrelu.explain.postmortem.subsample import Stride, entries_of, stride_of

# PyTorch parts work on 32,768 entries or more among the threads of a CPU, which costs more than the work
_ENTRIES, _READ = 256, 4_096  # of one gradient and of all: to read 10 million takes 4 % of a step on a CPU
_PARAMETERS = 16  # each takes about 2 microseconds of Python at every step
_LOOK = 64  # steps, after which it is looked again which parameters have gradients; and at the 1st, 2nd, 4th, ...


class GradientSample:
    """Read the same entries of an optimizer's gradients at each step, whatever the number of its parameters.

    Which parameters are read is settled at the first steps, and looked into again at every 64th: an even choice of at
    most 16 of those that ever had a gradient. Of each, at most 256 evenly strided entries are read; each stands for
    its neighbours. A gradient that is missing at a step, or sparse, counts as zero. Under FSDP it is the local shard's.

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
        """Choose what is read, of very many parameters an even choice; all on one device."""
        here = [p for p in seen if p.device == seen[0].device]
        self._chosen = here[:: -(-len(here) // _PARAMETERS) or 1]
        parts = [_local(p) for p in self._chosen]
        self._strides = [stride_of(tuple(part.shape), min(_ENTRIES, _READ // len(parts))) for part in parts]
        pairs = list(zip(parts, self._strides, strict=True))
        self._absent = [part.new_zeros(stride.entries) for part, stride in pairs]
        shares = [part.new_full((s.entries,), s.size / s.entries, dtype=torch.float32) for part, s in pairs]
        self.weights = torch.cat(shares) if shares else torch.empty(0)


def _entries_or(gradient: Tensor | None, stride: Stride, absent: Tensor) -> Tensor:
    """Read a gradient; zeros where it is missing, sparse, or of another form than its parameter."""
    if gradient is None or gradient.layout != torch.strided:
        return absent
    part = _local(gradient)
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
