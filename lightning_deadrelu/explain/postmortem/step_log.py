"""A run's vital signs at every step, kept on the device: loss, learning rate, size of gradients and inputs."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_deadrelu.explain.postmortem.subsample import Cut, coprime, cut_of, entries_of, is_dense

# PyTorch parts work on 32,768 entries or more among the threads of a CPU, which costs more than the work
_ENTRIES, _READ = 256, 4_096  # of one gradient and of all: to read 10 million takes 4 % of a step on a CPU
_PARAMETERS = 32
_RUN, _RUNS = 4, 256  # entries side by side, of an input
_WAITING = 64  # steps
_INPUTS = 3
_COLUMNS = ("gradient", "bias_gradient", "loss", *(f"input_{number}" for number in range(_INPUTS)))
_PLANS = 8


class Rows(NamedTuple):
    """What was noted of the last steps, on the host, the latest last.

    Args:
        steps: The training batch of each row, as loggers count.
        rates: The largest learning rate among all groups; NaN where it lives on the device.
        signs: Shape ``(rows, 6)``, float32; the columns: norm of the gradients, an estimate; norm of the rectifiers'
            bias gradients; loss; largest absolute value in each of the first three float tensors of the batch. NaN
            where there was none.
    """

    steps: tuple[int, ...]
    rates: tuple[float, ...]
    signs: Tensor

    @classmethod
    def empty(cls) -> Rows:
        """Start without any."""
        return cls((), (), torch.empty(0, len(_COLUMNS)))

    def column(self, name: str) -> Tensor:
        """Return one column: ``"gradient"``, ``"bias_gradient"``, ``"loss"``, ``"input_0"``, ... or ``"rate"``."""
        if name == "rate":
            return torch.tensor(self.rates, dtype=torch.float32)
        return self.signs[:, _COLUMNS.index(name)]


class _Plan(NamedTuple):
    """Which entries of which gradients are read.

    Args:
        places: Which of the optimizer's parameters.
        cuts: For each, the stride between entries and the layout for which it holds; None where all are read.
        weights: How many entries each one read stands for; and the same for the rectifiers' biases, for all others
            0. Shape ``(2, entries)``.
    """

    places: tuple[int, ...]
    cuts: tuple[Cut | None, ...]
    weights: Tensor


class _Noted:
    """What was noted of a step, just as it was read: to reduce many steps at once takes a fraction of the time.

    Args:
        rate: The largest learning rate; NaN where none was seen.
        gradients: The entries read, by plan.
        loss: The loss.
        inputs: Entries of each input.
    """

    __slots__ = ("gradients", "inputs", "loss", "rate")

    def __init__(self) -> None:
        self.rate = math.nan
        self.gradients: dict[int, tuple[_Plan, Tensor]] = {}
        self.loss: Tensor | None = None
        self.inputs: list[Tensor] = []


class StepLog:
    """Note at each step, without waiting for the device, what tells later why units died.

    A row is an optimizer step of the loop: a training batch, or several that accumulate. Of a parameter with more than
    256 entries only 256 evenly strided ones are read, each standing for its neighbours, and of more than 32 parameters
    an even choice; so the norm of the gradients is an estimate. It is taken before any clipping. Under FSDP it is of
    the local shard. Where an optimizer unscales the gradients of mixed precision itself (a fused one), it is of scaled
    gradients, and ratios alone count.

    Args:
        rows: How many steps to keep.

    Example:
        >>> layer = torch.nn.Linear(3, 2)
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        >>> layer(torch.ones(1, 3)).sum().backward()
        >>> vitals = StepLog(rows=8)
        >>> vitals.note_gradients(optimizer)
        >>> vitals.note_batch(torch.tensor(0.5), torch.ones(1, 3))
        >>> vitals.close(step=7)
        >>> rows = vitals.read(vitals.ring)
        >>> rows.steps, rows.rates, rows.column("gradient")
        ((7,), (0.1,), tensor([2.8284]))
    """

    def __init__(self, rows: int = 1024) -> None:
        self._size = rows
        self._ring: Tensor | None = None
        self._written = 0
        self._host: deque[tuple[int, float]] = deque(maxlen=rows)
        self.travelled = 0.0
        """Sum of the learning rates of all steps so far, the times that decay has acted, as it were."""
        self._plans: dict[tuple[int, tuple[int, ...]], _Plan] = {}
        self._biases: frozenset[int] = frozenset()
        self._now = _Noted()
        self._waiting: list[_Noted] = []

    @property
    def ring(self) -> Tensor:
        """All rows as they lie on the device, shape ``(rows, 6)``; to be handed to :meth:`read`, from the host."""
        self._reduce()
        return torch.empty(0, len(_COLUMNS)) if self._ring is None else self._ring

    @property
    def biases(self) -> AbstractSet[int]:
        """The ``id`` of each bias that feeds a rectifier."""
        return self._biases

    @biases.setter
    def biases(self, ids: AbstractSet[int]) -> None:
        if ids != self._biases:
            self._biases = frozenset(ids)
            self._plans.clear()

    @torch.no_grad()
    def note_gradients(self, optimizer: Optimizer) -> None:
        """Read the gradients, before a step and before they are clipped.

        Args:
            optimizer: Which is about to step; several in one batch add up, of steps of the same one the last counts.
        """
        held = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in held]
        with torch._C.DisableTorchFunction():  # a forward may be watched, which this is no part of
            key = id(optimizer), tuple([_size(gradient) for gradient in gradients])
            plan = self._plans.get(key) or self._planned(key, held, gradients)
            if plan.places:
                parts = [entries_of(_local(gradients[at]), cut) for at, cut in zip(plan.places, plan.cuts, strict=True)]
                self._now.gradients[id(optimizer)] = plan, torch.cat(parts)
        rates = [group.get("lr") for group in optimizer.param_groups]
        known = [rate for rate in rates if isinstance(rate, (int, float))]
        self._now.rate = max([self._now.rate, *known], key=_or_lowest)

    def _planned(self, key: Any, held: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> _Plan:
        if len(self._plans) >= _PLANS:
            self._plans.clear()
        plan = self._plans[key] = _planned(held, gradients, self._biases)
        return plan

    @torch.no_grad()
    def note_batch(self, loss: Any, batch: Any) -> None:
        """Note the loss of a batch and its largest input; of batches that accumulate, the last loss counts.

        Args:
            loss: What the training step returned, if a tensor of one element.
            batch: What it was given.
        """
        with torch._C.DisableTorchFunction():
            if isinstance(loss, Tensor) and loss.numel() == 1:
                self._now.loss = loss.detach().clone()
            inputs = [_sample(x.detach()) for x in _floats(batch)]
            if self._now.inputs:  # of a batch before, with which this one accumulates
                inputs = [
                    torch.cat([old.flatten(), new.flatten()])
                    for old, new in zip(self._now.inputs, inputs, strict=False)
                ]
            self._now.inputs = inputs

    @torch.no_grad()
    def close(self, step: int) -> None:
        """End a row.

        Args:
            step: The training batch, as loggers count.
        """
        noted, self._now = self._now, _Noted()
        if self._host or noted.gradients or noted.loss is not None or noted.inputs:
            self._waiting.append(noted)
            self._host.append((step, noted.rate))
            self.travelled += 0.0 if math.isnan(noted.rate) else noted.rate
        if len(self._waiting) >= min(_WAITING, self._size):
            self._reduce()

    @torch.no_grad()
    def _reduce(self) -> None:
        """Make rows of what waits."""
        if not self._waiting:
            return
        rows = _rows(self._waiting)
        if self._ring is None:
            self._ring = torch.full((self._size, len(_COLUMNS)), math.nan, device=rows.device)
        start = self._written % self._size
        self._ring[start : start + len(rows)] = rows[: self._size - start]
        self._ring[: max(0, start + len(rows) - self._size)] = rows[self._size - start :]
        self._written += len(rows)
        self._waiting.clear()

    def read(self, ring: Tensor) -> Rows:
        """Put rows in order.

        Args:
            ring: :attr:`ring`, copied to the host.
        """
        count = len(self._host)
        signs = ring.roll(-(self._written % self._size), 0)[len(ring) - count :].clone()
        signs[:, :2] = signs[:, :2].sqrt()
        steps, rates = zip(*self._host, strict=True) if count else ((), ())
        return Rows(tuple(steps), tuple(rates), signs)

    # -- to be continued ---------------------------------------------------------------------------------

    def state_dict(self, ring: Tensor) -> dict[str, Any]:
        """Return plain values and tensors.

        Args:
            ring: :attr:`ring`, copied to the host.
        """
        rows = ring.roll(-(self._written % self._size), 0)[len(ring) - len(self._host) :].clone()
        return {"rows": rows, "host": [list(pair) for pair in self._host], "travelled": self.travelled}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Go on from what was saved; of more rows than there is room for, keep the latest."""
        rows = state["rows"][-self._size :]
        self.travelled = state["travelled"]
        self._host = deque(((step, rate) for step, rate in state["host"]), maxlen=self._size)
        self._written = self._reduced = len(rows)
        self._ring = torch.full((self._size, len(_COLUMNS)), math.nan, device=device) if len(rows) else None
        if self._ring is not None:
            self._ring[: len(rows)] = rows.to(device)


def _or_lowest(number: float) -> float:
    return -math.inf if math.isnan(number) else number


def _rows(noted: Sequence[_Noted]) -> Tensor:
    """Reduce what was read to rows of the ring, a kernel at a time for all steps."""
    known = (x for one in noted for x in (*(read for _, read in one.gradients.values()), one.loss, *one.inputs))
    device = next((x.device for x in known if x is not None), torch.device("cpu"))
    missing = torch.full((2,), math.nan, device=device)
    columns = [_squares(noted, missing), _together([one.loss for one in noted], missing[:1])]
    for place in range(_INPUTS):
        inputs = [one.inputs[place] if place < len(one.inputs) else None for one in noted]
        columns.append(_together([None if x is None else x.abs().amax() for x in inputs], missing[:1]))
    return torch.cat(columns, 1)


def _together(cells: Sequence[Tensor | None], missing: Tensor) -> Tensor:
    """Stack cells; what is not there, or on another device, from where a copy could wait, is missing."""
    here = [missing if cell is None or cell.device != missing.device else cell for cell in cells]
    return torch.stack([cell.reshape(-1).to(missing.dtype) for cell in here])


# -- gradients -------------------------------------------------------------------------------------------


def _planned(held: Sequence[Tensor], gradients: Sequence[Tensor | None], biases: AbstractSet[int]) -> _Plan:
    """Choose what is read, of very many parameters an even choice."""
    readable = [place for place, gradient in enumerate(gradients) if gradient is not None and _is_readable(gradient)]
    if not readable:
        return _Plan((), (), torch.empty(2, 0))
    device = _local(gradients[readable[0]]).device
    here = [place for place in readable if _local(gradients[place]).device == device]
    chosen = here[:: -(-len(here) // _PARAMETERS)]
    parts = [_local(gradients[place]) for place in chosen]
    cuts = tuple(cut_of(part, min(_ENTRIES, _READ // len(chosen))) for part in parts)
    shares = [
        part.new_full((len(entries_of(part, cut)),), part.numel(), dtype=torch.float32)
        for part, cut in zip(parts, cuts, strict=True)
    ]
    whole = torch.cat([share / max(len(share), 1) for share in shares])
    mine = torch.cat(
        [torch.full_like(s, float(id(held[place]) in biases)) for s, place in zip(shares, chosen, strict=True)]
    )
    return _Plan(tuple(chosen), cuts, torch.stack([whole, whole * mine]))


def _size(gradient: Tensor | None) -> int:
    """Tell how much there is to read: a layer may be exchanged, and a gradient sparse in some steps alone."""
    return -1 if gradient is None or gradient.layout != torch.strided else gradient.numel()


def _is_readable(gradient: Tensor) -> bool:
    return gradient.layout == torch.strided and gradient.is_floating_point() and _local(gradient).numel() > 0


def _local(gradient: Any) -> Tensor:
    """Return this rank's part of a sharded tensor."""
    sharded = type(gradient) is not Tensor and hasattr(gradient, "to_local")
    return gradient.to_local() if sharded else gradient  # type: ignore[no-any-return]


def _squares(noted: Sequence[_Noted], missing: Tensor) -> Tensor:
    """Estimate sums of squares of all gradients and of the rectifiers' biases', shape ``(steps, 2)``."""
    cells: list[Tensor | None] = [None] * len(noted)
    plans = {id(plan): plan for one in noted for plan, _ in one.gradients.values()}.values()
    for plan in (plan for plan in plans if plan.weights.device == missing.device):
        read = [(row, x) for row, one in enumerate(noted) for of, x in one.gradients.values() if of is plan]
        sums = torch.stack([x for _, x in read]).float().square() @ plan.weights.T
        for (row, _), cell in zip(read, sums.unbind(), strict=True):
            before = cells[row]
            cells[row] = cell if before is None else before + cell
    return _together(cells, missing)


# -- inputs ----------------------------------------------------------------------------------------------


def _floats(batch: Any) -> list[Tensor]:
    """Find the first float tensors of a batch."""
    found: list[Tensor] = []
    for x in [batch] if type(batch) is Tensor else _leaves(batch):
        if len(found) < _INPUTS and type(x) is Tensor and x.is_floating_point() and x.numel():
            found.append(x)
    return [x for x in found if _has_values(x)]


def _has_values(x: Tensor) -> bool:
    """Whether it can be computed with; numbers of 8 bits cannot."""
    return x.layout == torch.strided and not x.is_nested and not x.is_meta and x.element_size() > 1


def _leaves(batch: Any, depth: int = 3) -> Iterator[Any]:
    inside: Iterable[Any] = ()
    if isinstance(batch, Mapping):
        inside = batch.values()
    elif isinstance(batch, (list, tuple)):
        inside = batch
    else:
        yield batch
    if depth:
        for one in list(inside)[:8]:
            yield from _leaves(one, depth - 1)


def _sample(x: Tensor) -> Tensor:
    """Copy entries: all, or of a large tensor those of evenly spread runs, so that each row has some."""
    if x.numel() <= _RUN * _RUNS:
        return x.clone()
    if not is_dense(x):
        return x.reshape(-1)[:: -(-x.numel() // (_RUN * _RUNS))].clone()
    return x.as_strided((_RUNS, _RUN), (coprime((x.numel() - _RUN) // _RUNS, x.numel()), 1)).clone()


@torch.no_grad()
def off_centre(batch: Any) -> Tensor | None:
    """Divide the size of the inputs' mean by that of their deviation from it; None without an input of two rows.

    Args:
        batch: A batch; its first float tensor is the input, with samples along dim 0.

    Example:
        >>> off_centre(torch.tensor([[3.0, -3.0], [5.0, -5.0]]))
        tensor(4.)
    """
    x = next((x for x in _floats(batch) if x.ndim > 1 and len(x) > 1), None)
    if x is None:
        return None
    x = x.float()
    mean = x.mean(0)
    deviation = (x - mean).square().mean(0).sum().sqrt()
    return mean.square().sum().sqrt() / deviation
