"""Log loss, learning rate and the size of gradients and inputs at every step, on the device."""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_deadrelu.explain.postmortem.batch_sample import INPUTS, BatchSample, reduced, sample_batch
from lightning_deadrelu.explain.postmortem.gradient_sample import GradientSample
from lightning_deadrelu.observe.torch_modes import WithoutGradients, unseen_by_modes

_WAITING = 64  # batches
_COLUMNS = ("gradient", "loss", *(f"input_{number}" for number in range(INPUTS)))

T = TypeVar("T")


class Rows(NamedTuple):
    """What was logged of the last steps, on the host, the latest last.

    Args:
        steps: The training batch of each row, as loggers count.
        rates: The largest learning rate among all groups; NaN where it lives on the device.
        values: Shape ``(rows, 5)``, float32; the columns: norm of the gradients, an estimate; loss; largest absolute
            value in each of the first three float tensors of the batch. NaN where there was none.
    """

    steps: tuple[int, ...]
    rates: tuple[float, ...]
    values: Tensor

    @classmethod
    def empty(cls) -> Rows:
        """Start without any."""
        return cls((), (), torch.empty(0, len(_COLUMNS)))

    @property
    def numbers(self) -> Tensor:
        """The steps, shape ``(rows,)``, int64."""
        return torch.tensor(self.steps, dtype=torch.int64)

    def column(self, name: str) -> Tensor:
        """Return one column: ``"gradient"``, ``"loss"``, ``"input_0"``, ... or ``"rate"``."""
        if name == "rate":
            return torch.tensor(self.rates, dtype=torch.float32)
        return self.values[:, _COLUMNS.index(name)]


@dataclass
class StepLogState:
    """What a checkpoint holds of a :class:`StepLog`.

    Args:
        values: As in :class:`Rows`, but with squares of the gradients' norm, on the device.
        steps: As in :class:`Rows`.
        rates: As in :class:`Rows`.
        travelled: See :attr:`StepLog.travelled`.
    """

    values: Tensor = field(default_factory=lambda: torch.empty(0, len(_COLUMNS)))
    steps: list[int] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    travelled: float = 0.0


class _Step:
    """What was read at a step and waits to be reduced, many steps at once.

    Args:
        rate: The largest learning rate; NaN where none was seen.
        gradients: By optimizer: how many entries each one that was read stands for, and the entries.
        batches: Loss and inputs, of each batch that accumulates.
    """

    __slots__ = ("batches", "gradients", "rate")

    def __init__(self) -> None:
        self.rate = math.nan
        self.gradients: dict[int, tuple[Tensor, Tensor]] = {}
        self.batches: list[BatchSample] = []


class StepLog:
    """Log at each step, without waiting for the device, what tells later why units died.

    A row is an optimizer step of the loop: a training batch, or several that accumulate. It takes two kernels: a copy
    of some entries of the gradients, and one of the loss and some entries of the inputs; 64 steps are reduced at once.
    The norm of the gradients is an estimate, see :class:`GradientSample`, and taken before any clipping. Where an
    optimizer unscales the gradients of mixed precision itself (a fused one), it is of scaled gradients, and ratios
    alone count.

    Example:
        >>> layer = torch.nn.Linear(3, 2)
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        >>> layer(torch.ones(1, 3)).sum().backward()
        >>> log = StepLog(rows=8)
        >>> log.note_gradients(optimizer)
        >>> log.note_batch(torch.tensor(0.5), torch.ones(1, 3))
        >>> log.close_step(7)
        >>> rows = log.read(log.ring)
        >>> rows.steps, rows.rates, rows.column("gradient")
        ((7,), (0.1,), tensor([2.8284]))
    """

    def __init__(self, rows: int = 1024) -> None:
        self._size = rows
        self._ring = torch.empty(0, len(_COLUMNS))
        self._written = 0
        self._steps: deque[int] = deque(maxlen=rows)
        self._rates: deque[float] = deque(maxlen=rows)
        self.travelled = 0.0
        """Sum of the learning rates of all steps so far, the times that decay has acted, as it were."""
        self._samples: dict[int, tuple[weakref.ref[Optimizer], GradientSample]] = {}  # by the optimizer's id
        self._now = _Step()
        self._waiting: list[_Step] = []
        self._held = 0  # batches of which something waits

    def __getstate__(self) -> dict[str, Any]:  # a copy is of another model
        return vars(self) | {"_samples": {}}

    @property
    def ring(self) -> Tensor:
        """All rows as they lie on the device, shape ``(rows, 5)``; to be handed to :meth:`read`, from the host."""
        self._reduce()
        return self._ring

    def note_gradients(self, optimizer: Optimizer) -> None:
        """Read the gradients, before a step and before they are clipped.

        Args:
            optimizer: Which is about to step; several in one batch add up, of steps of the same one the last counts.
        """
        with unseen_by_modes(), WithoutGradients():  # a forward may be watched, which this is no part of
            sample = self._sample_of(optimizer)
            if (entries := sample.read(optimizer)) is not None:
                self._now.gradients[id(optimizer)] = sample.weights, entries
        for group in optimizer.param_groups:
            rate = group.get("lr")
            if isinstance(rate, (int, float)) and not rate <= self._now.rate:  # which is NaN at first
                self._now.rate = rate

    def _sample_of(self, optimizer: Optimizer) -> GradientSample:
        key = id(optimizer)
        if key not in self._samples:  # parameters are held no longer than their optimizer
            samples = self._samples
            samples[key] = weakref.ref(optimizer, lambda _: samples.pop(key, None)), GradientSample()
        return self._samples[key][1]

    def note_batch(self, loss: Any, batch: Any) -> None:
        """Note the loss of a batch and its largest input; of batches that accumulate, the last loss counts."""
        with unseen_by_modes():
            sample = sample_batch(loss, batch)
        if sample is not None:
            self._now.batches.append(sample)

    def close_step(self, step: int) -> None:
        """End a row."""
        done, self._now = self._now, _Step()
        if self._steps or done.gradients or done.batches:
            self._waiting.append(done)
            self._steps.append(step)
            self._rates.append(done.rate)
            self.travelled += 0.0 if math.isnan(done.rate) else done.rate
            self._held += max(len(done.batches), 1)
        if self._held >= min(_WAITING, self._size):
            self._reduce()

    @torch.no_grad()
    def _reduce(self) -> None:
        """Make rows of what waits."""
        if not self._waiting:
            return
        rows = _rows(self._waiting)
        if not len(self._ring):
            self._ring = torch.full((self._size, len(_COLUMNS)), math.nan)
        self._ring = self._ring.to(rows.device)
        start = self._written % self._size
        split = self._size - start
        self._ring[start : start + len(rows)] = rows[:split]
        self._ring[: max(0, len(rows) - split)] = rows[split:]
        self._written += len(rows)
        self._waiting.clear()
        self._held = 0

    def read(self, ring: Tensor) -> Rows:
        """Put rows in order."""
        values = self._in_order(ring)
        values[:, 0] = values[:, 0].sqrt()
        return Rows(tuple(self._steps), tuple(self._rates), values)

    def _in_order(self, ring: Tensor) -> Tensor:
        return ring.roll(-(self._written % self._size), 0)[len(ring) - len(self._steps) :].clone()

    @property
    def state(self) -> StepLogState:
        """What a checkpoint has to hold."""
        return StepLogState(self._in_order(self.ring), list(self._steps), list(self._rates), self.travelled)

    def restore(self, state: StepLogState) -> None:
        """Go on from a saved state; of more rows than there is room for, keep the latest."""
        values = state.values[-self._size :]
        self.travelled = state.travelled
        self._steps, self._rates = deque(state.steps, self._size), deque(state.rates, self._size)
        self._written = len(values)
        self._ring = torch.full((self._size if len(values) else 0, len(_COLUMNS)), math.nan, device=values.device)
        self._ring[: len(values)] = values


def _rows(steps: Sequence[_Step]) -> Tensor:
    """Reduce what was read to rows of the ring, a kernel at a time for all steps."""
    read = (x for one in steps for x in (*(x for _, x in one.gradients.values()), *(b.values for b in one.batches)))
    device = next((x.device for x in read), torch.device("cpu"))
    missing = torch.full((1,), math.nan, device=device)
    gradients = _summed(steps, missing)
    batches = _joined(steps, missing)
    return torch.cat([torch.stack(gradients), torch.stack(batches)], 1)


def _summed(steps: Sequence[_Step], missing: Tensor) -> list[Tensor]:
    """Estimate the sum of squares of all gradients at each step."""
    read = [(row, *pair) for row, one in enumerate(steps) for pair in one.gradients.values()]
    here = [one for one in read if one[2].device == missing.device]
    sums = _by_groups(here, lambda one: id(one[1]), _sums_of_squares)
    cells: list[list[Tensor]] = [[] for _ in steps]
    for (row, _, _), cell in zip(here, sums, strict=True):
        cells[row].append(cell)
    return [reduce(torch.add, cell).reshape(1) if cell else missing for cell in cells]


def _sums_of_squares(alike: Sequence[tuple[int, Tensor, Tensor]]) -> Sequence[Tensor]:
    entries = torch.stack([entries for _, _, entries in alike])
    # no `@`, which rounds a row by how many there are: a resumed run would hold other bits
    return (entries.float().square() * alike[0][1]).sum(1).unbind()


def _joined(steps: Sequence[_Step], missing: Tensor) -> list[Tensor]:
    """Return the loss and the largest inputs at each step; of batches that accumulate, the last loss counts."""
    read = [(row, batch) for row, one in enumerate(steps) for batch in one.batches]
    here = [one for one in read if one[1].values.device == missing.device]
    values = _by_groups([batch for _, batch in here], lambda batch: batch.sizes, reduced)
    cells: list[list[Tensor]] = [[] for _ in steps]
    for (row, _), cell in zip(here, values, strict=True):
        cells[row].append(cell)
    return [_last(cell) if cell else missing.expand(1 + INPUTS) for cell in cells]


def _last(cells: Sequence[Tensor]) -> Tensor:
    if len(cells) == 1:
        return cells[0]
    return torch.cat([cells[-1][:1], reduce(torch.fmax, cells)[1:]])


def _by_groups(
    items: Sequence[T], key: Callable[[T], Hashable], function: Callable[[list[T]], Sequence[Tensor]]
) -> list[Tensor]:
    """Map items to tensors, all with the same key at once."""
    groups: dict[Hashable, list[int]] = {}
    for place, item in enumerate(items):
        groups.setdefault(key(item), []).append(place)
    found: dict[int, Tensor] = {}
    for places in groups.values():
        found |= zip(places, function([items[place] for place in places]), strict=True)
    return [found[place] for place in range(len(items))]
