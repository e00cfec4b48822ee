"""Write what remedies propose into parameters, buffers and the optimizers' state."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_deadrelu.model.parameters import tensors_of
from lightning_deadrelu.model.sharding import gathered, is_sharded, whole
from lightning_deadrelu.model.sites import clean
from lightning_deadrelu.model.slices import Slice
from lightning_deadrelu.remedies import InitDistribution, Write
from lightning_deadrelu.repair.optimizer_state import repair_, repaired_state, unknown_state


def init_distributions(model: nn.Module) -> dict[str, InitDistribution]:
    """Tell what parameters were drawn from, to be called when training begins.

    Example:
        >>> init_distributions(nn.BatchNorm1d(2))["bias"]
        InitDistribution(mean=0.0, std=0.0, uniform=False)
    """
    drawn = {clean(name): one for name, one in model.named_parameters(remove_duplicate=False)}
    return {
        name: InitDistribution.of(gathered(one))
        for name, one in drawn.items()
        if one.is_floating_point() and not _why_absent(name, one)
    }


def why_not(
    model: nn.Module, optimizers: Sequence[Optimizer], names: Iterable[str], trained: Container[int] | None = None
) -> str:
    """Say why some parameters or buffers cannot be edited; empty if they can.

    Args:
        model: Whose they are.
        optimizers: All that train it.
        names: As :func:`tensors_of` has them.
        trained: The ``id`` of each parameter that is trained; None not to ask.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> why_not(net, [torch.optim.SGD(net.parameters())], ["weight"])
        ''
        >>> why_not(net, [], ["weigth"])
        '`weigth` is no parameter or buffer of the model'
    """
    tensors, listed = tensors_of(model), list(names)
    for name in listed:
        if name not in tensors:
            return f"`{name}` is no parameter or buffer of the model"
        if why := _why_absent(name, tensors[name]):
            return why
        if trained is not None and isinstance(tensors[name], nn.Parameter) and id(tensors[name]) not in trained:
            return f"`{name}` is not trained, so what is written there would stay for good"
    return unknown_state(optimizers, tensors, listed)


def check_writes(writes: Iterable[Write], model: nn.Module, optimizers: Sequence[Optimizer]) -> str:
    """Say why some writes cannot be carried out; empty if they can.

    Example:
        >>> net = nn.Linear(2, 3)
        >>> row = Slice("weight", "weight", torch.tensor([1]), torch.tensor([[1]]), (0,))
        >>> check_writes([Write(row, torch.zeros(1, 2))], net, [])
        ''
        >>> check_writes([Write(row, torch.zeros(5))], net, [])[:48]
        '`Write` to `weight`: its values have shape (5,),'
    """
    pending, tensors = _pending(writes), tensors_of(model)
    why = why_not(model, optimizers, dict.fromkeys(write.slice.name for write in pending))
    return why or next(filter(None, (_why_unfit(write, tensors[write.slice.name]) for write in pending)), "")


def write_(
    writes: Iterable[Write], model: nn.Module, optimizers: Sequence[Optimizer], live: Sequence[Slice] = ()
) -> Overwritten:
    """Write new values in place, and repair the optimizers' state for exactly these entries.

    Everything is checked before anything is written, and undone should writing fail all the same. To be called behind
    an optimizer step, never between forward and backward. Ranks stay equal if they write equal values; they communicate
    only to gather what is sharded, and all have to come here then.

    Args:
        writes: What is to become what, in this order.
        model: Whose parameters and buffers they are.
        optimizers: All that train it; what none of them holds is just written.
        live: The entries of live units, from which second moments are taken; all that are not written otherwise.

    Returns:
        What was there before.

    Raises:
        ValueError: A name, a shape or a value cannot be written.

    Example:
        >>> net = nn.Linear(2, 3)
        >>> row = Slice("weight", "weight", torch.tensor([1]), torch.tensor([[1]]), (0,))
        >>> before, old = net.weight.clone(), write_([Write(row, 0.0)], net, [torch.optim.SGD(net.parameters())])
        >>> net.weight[1].tolist()
        [0.0, 0.0]
        >>> old.put_back()
        >>> bool((net.weight == before).all())
        True
    """
    pending, tensors = _pending(writes), tensors_of(model)
    if why := check_writes(pending, model, optimizers):
        raise ValueError(f"{why}. Nothing was written; leave the site out with `exclude`, or only watch it.")
    overwritten = Overwritten(pending, tensors, optimizers)
    try:
        _write_all(pending, tensors, optimizers, live)
    except Exception:
        overwritten.put_back()
        raise
    return overwritten


class Overwritten:
    """Entries of parameters, buffers and optimizers' state as they were, to be put back if an edit fails halfway."""

    def __init__(self, writes: Iterable[Write], tensors: Mapping[str, Tensor], optimizers: Sequence[Optimizer]) -> None:
        pairs = [(tensors[write.slice.name], write.slice) for write in writes]
        changed = [(one, entries) for tensor, entries in pairs for one in (tensor, *repaired_state(optimizers, tensor))]
        self._entries = [(one, entries, entries.read(gathered(one)).clone()) for one, entries in changed]

    def put_back(self) -> None:
        """Write it all back."""
        for tensor, entries, values in reversed(self._entries):
            with whole(tensor) as full:
                entries.write_(full, values)


def _write_all(
    pending: Sequence[Write], tensors: Mapping[str, Tensor], optimizers: Sequence[Optimizer], live: Sequence[Slice]
) -> None:
    for entries, values in pending:
        with whole(tensors[entries.name]) as full:
            entries.write_(full, values)
    for entries, _ in pending:  # once all values are there, since averages of them are copied
        repair_(optimizers, tensors[entries.name], entries, _live_for(entries, live))


def _pending(writes: Iterable[Write]) -> list[Write]:
    return [write for write in writes if len(write.slice.index)]


def _why_unfit(write: Write, tensor: Tensor) -> str:
    entries, values = write
    try:
        old, new = entries.read(_shaped_like(tensor)), torch.as_tensor(values, dtype=tensor.dtype)
    except (IndexError, TypeError, ValueError, RuntimeError) as error:
        return f"`Write` to `{entries.name}`: {error}"
    if new.ndim and new.shape != old.shape:
        why = f"its values have shape {tuple(new.shape)}, and `slice.read` returns {tuple(old.shape)}"
        return f"`Write` to `{entries.name}`: {why}; give one number, or that shape"
    if new.is_floating_point() and not bool(new.isfinite().all()):
        why = f"its values are not all finite as {tensor.dtype}"
        return f"`Write` to `{entries.name}`: {why}; leave out units whose new values are not known"
    return ""


def _shaped_like(tensor: Tensor) -> Tensor:
    """Have the shape of what is sharded without gathering it."""
    return torch.empty((), dtype=tensor.dtype).expand(tensor.shape) if is_sharded(tensor) else tensor


def _live_for(entries: Slice, live: Sequence[Slice]) -> Slice | None:
    """Find the live units' rows of the same tensor, along the same dimensions."""
    alike = (one for one in live if (one.name, one.dims, one.shape) == (entries.name, entries.dims, entries.shape))
    return next((one for one in alike if len(one.index)), None)


def _why_absent(name: str, tensor: Tensor) -> str:
    """Tell whether a tensor's entries are not to be had."""
    if nn.parameter.is_lazy(tensor):
        return f"`{name}` has no values yet"
    if not tensor.numel():
        return f"`{name}` is empty between steps, its values are split over ranks"
    return ""
