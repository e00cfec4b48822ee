"""Put an optimizer's state right for entries of a parameter that were overwritten. Pure but for the state itself.

An optimizer remembers each entry's past gradients. Behind an overwritten entry this memory is of another unit: a stale
first moment moves the new unit by gradients it never had, and a second moment that faded while the unit was dead makes
Adam's next steps up to 6.57 times the learning rate (0.1 / sqrt(0.001) = 3.16 times at once). Clearing the ``step``,
which all entries of a tensor share, would instead change the steps of the live units. So first moments become 0, and
second moments what live units typically have at that place.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from lightning_deadrelu.model.optimizer_groups import holder_of
from lightning_deadrelu.model.sharding import gathered, is_plain_inside, whole
from lightning_deadrelu.model.slices import Slice

# Names are those of torch's own optimizers, which most others have taken over. What is not here is refused.
_ZERO = frozenset({"exp_avg", "momentum_buffer", "grad_avg", "prev"})
"""First moments: memories of a direction, which a new unit does not have."""
_TYPICAL = frozenset(
    {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "exp_inf", "variance", "acc_delta", "step_size"}
)
"""Scales: of gradients, of updates (Adadelta's ``acc_delta``) or of steps (Rprop's ``step_size``)."""
_COPY = frozenset({"ax"})
"""Averages of the parameter itself."""
_SHARED = frozenset({"step", "mu_product", "eta", "mu"})
"""One number for the whole tensor: never touched."""
_FACTORED = frozenset({"row_var", "col_var", "exp_avg_sq_row", "exp_avg_sq_col"})
"""Adafactor's: each number speaks of a whole row or column, whatever its shape."""
_ROWS = 256  # as many live rows as the median is taken over


def repair_(optimizers: Iterable[Optimizer], parameter: Tensor, entries: Slice, live: Slice | None = None) -> None:
    """Put the state of all optimizers right for entries of a parameter that were just overwritten.

    First moments become 0. Second moments become the median over the live units' rows, place by place: along a row of
    a weight, gradients scale with what the row reads, and the median keeps that. Entries without any gradient so far
    do not take part in it. ``step`` and whatever else a tensor shares stay as they are, and so does state that is not
    there yet. Nothing but these entries changes, bit for bit.

    Source: the size of the steps follows from Adam's update (Kingma and Ba 2015, arXiv 1412.6980). The alternative, a
    step count for each entry, takes another optimizer (AdamGnT: Dohare et al. 2024, Nature 632:768).

    Args:
        optimizers: Those that may hold the parameter; none of them has to.
        parameter: With its new values.
        entries: Which of them are new.
        live: Those of live units, to take the median over; None for all others along the same dimensions. Where there
            are none, the median over the new entries' own past is the only scale there is.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(3, 2))
        >>> adam = torch.optim.Adam([weight])
        >>> weight.grad = torch.tensor([[1.0, 10.0], [1.0, 10.0], [0.0, 0.0]])
        >>> adam.step()
        >>> last = Slice("weight", "weight", torch.tensor([2]), torch.tensor([[2]]), (0,))
        >>> repair_([adam], weight, last)
        >>> adam.state[weight]["exp_avg_sq"]
        tensor([[0.0010, 0.1000],
                [0.0010, 0.1000],
                [0.0010, 0.1000]])
    """
    if not len(entries.index):
        return
    for key, value in _known_state(optimizers, parameter):
        with whole(value) as full:
            _repair_entry_(key, full, parameter, entries, live)


def repaired_state(optimizers: Iterable[Optimizer], parameter: Tensor) -> list[Tensor]:
    """List the tensors that :func:`repair_` changes for a parameter."""
    return [value for _, value in _known_state(optimizers, parameter)]


def unknown_state(optimizers: Iterable[Optimizer], tensors: Mapping[str, Tensor], names: Iterable[str]) -> str:
    """Say why the state of some parameters cannot be repaired; empty if it can.

    What is not known is refused only once it is there: most optimizers make their state at the first step.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> unknown_state([torch.optim.Adam([weight])], {"weight": weight}, ["weight"])
        ''
        >>> unknown_state([torch.optim.LBFGS([weight])], {"weight": weight}, ["weight"])
        '`LBFGS` keeps one flat history of all parameters, which cannot be repaired unit by unit'
    """
    everywhere = list(_unwrapped(optimizers))
    reasons = (_why_not(optimizer, name, tensors[name]) for name in names for optimizer in everywhere)
    return next(filter(None, reasons), "")


def left_alone(optimizers: Iterable[Optimizer], tensors: Mapping[str, Tensor], names: Iterable[str]) -> str:
    """Say which state stays as it is although it speaks of edited entries; empty if none does.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(3, 2))
        >>> factored = torch.optim.Adafactor([weight])
        >>> weight.grad = torch.ones(3, 2)
        >>> factored.step()
        >>> left_alone([factored], {"weight": weight}, ["weight"])
        '`Adafactor` keeps `row_var`, `col_var` for many entries at once; these stay as they are'
    """
    kept: dict[str, dict[str, None]] = {}
    listed = list(names)
    for optimizer in _unwrapped(optimizers):
        for name in listed:
            state = optimizer.state.get(tensors[name], {})
            coarse = [key for key, value in state.items() if _is_coarse(key, value, tensors[name])]
            kept.setdefault(type(optimizer).__name__, {}).update(dict.fromkeys(coarse))
    return "; ".join(
        f"`{owner}` keeps {', '.join(f'`{key}`' for key in keys)} for many entries at once; these stay as they are"
        for owner, keys in kept.items()
        if keys
    )


def _repair_entry_(key: str, state: Tensor, parameter: Tensor, entries: Slice, live: Slice | None) -> None:
    if key in _ZERO:
        entries.write_(state, 0.0)
    elif key in _COPY:
        entries.write_(state, entries.read(gathered(parameter)))
    elif key in _TYPICAL:
        typical = _typical(state, entries, live)
        if typical is not None:
            entries.write_(state, typical)


def _typical(state: Tensor, entries: Slice, live: Slice | None) -> Tensor | None:
    others = _others(entries, state)
    for rows in (live, others, entries):
        if rows is not None and len(rows.index):
            median = _median(_thinned(rows).read(state))
            if median is not None:
                return median
    return None


def _median(rows: Tensor) -> Tensor | None:
    """Take the median over rows, place by place, of what ever got a gradient; None where nothing did."""
    values = rows.detach().cpu().double()  # there the median is deterministic on every machine
    values[values == 0] = torch.nan
    overall = values.nanmedian()
    if overall.isnan():
        return None
    median = values.nanmedian(dim=0).values
    return torch.where(median.isnan(), overall, median)


def _others(entries: Slice, tensor: Tensor) -> Slice:
    shape = entries.shape or tuple(tensor.shape)
    free = torch.ones([shape[dim] for dim in entries.dims], dtype=torch.bool)
    free[entries.index.cpu().unbind(1)] = False
    index = free.nonzero()
    return replace(entries, units=torch.full((len(index),), -1), index=index)


def _thinned(rows: Slice) -> Slice:
    count = len(rows.index)
    if count <= _ROWS:
        return rows
    kept = torch.arange(_ROWS) * count // _ROWS  # evenly, and the same on all ranks
    return replace(rows, units=rows.units[kept], index=rows.index[kept])


def _known_state(optimizers: Iterable[Optimizer], parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
    for optimizer in _unwrapped(optimizers):
        # tensors hash by identity, so that no values are compared
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and key in _ZERO | _COPY | _TYPICAL:
                yield key, value


def _unwrapped(optimizers: Iterable[Optimizer]) -> Iterator[Optimizer]:
    for optimizer in optimizers:
        yield optimizer
        inner = getattr(optimizer, "optim", None)  # where ZeroRedundancyOptimizer keeps its rank's state
        if isinstance(inner, Optimizer):
            yield from _unwrapped([inner])


def _why_not(optimizer: Optimizer, name: str, parameter: Tensor) -> str:
    if isinstance(optimizer, LBFGS) and holder_of([optimizer], parameter):
        return "`LBFGS` keeps one flat history of all parameters, which cannot be repaired unit by unit"
    for key, value in optimizer.state.get(parameter, {}).items():
        if why := _why_unknown(key, value, parameter):
            return f"`{type(optimizer).__name__}` keeps `{key}` for `{name}`, {why}"
    return ""


def _why_unknown(key: str, value: object, parameter: Tensor) -> str:
    if not isinstance(value, Tensor):
        return "which is not one tensor" if _has_tensors(value) else ""
    if key in _SHARED | _FACTORED or value.shape != parameter.shape:
        return ""
    if key not in _ZERO | _TYPICAL | _COPY:
        return "of which it is not known what becomes of it when a unit is new"
    if not is_plain_inside(value) or not value.is_floating_point():
        return f"whose entries cannot be written one by one ({type(value).__name__}, {value.dtype})"
    return ""


def _has_tensors(value: object) -> bool:
    if isinstance(value, Mapping):
        return any(isinstance(one, Tensor) or _has_tensors(one) for one in value.values())
    if isinstance(value, (list, tuple)):
        return any(isinstance(one, Tensor) or _has_tensors(one) for one in value)
    return False


def _is_coarse(key: str, value: object, parameter: Tensor) -> bool:
    if not isinstance(value, Tensor) or key in _SHARED:
        return False
    return key in _FACTORED or (value.shape != parameter.shape and value.numel() > 1)
