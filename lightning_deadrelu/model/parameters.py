"""Find the parameters and buffers of a model by name, and their values."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from lightning_deadrelu.model.sharding import gathered, is_sharded
from lightning_deadrelu.model.sites import clean


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """List parameters and buffers under all of their names, without the prefixes of wrappers.

    Args:
        model: Possibly compiled or wrapped.

    Example:
        >>> list(tensors_of(nn.BatchNorm1d(2)))
        ['weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked']
    """
    parameters = model.named_parameters(remove_duplicate=False)
    buffers = model.named_buffers(remove_duplicate=False)
    return {clean(name): tensor for name, tensor in (*parameters, *buffers)}


def values_of(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """List parameters and buffers as plain tensors; of those that are sharded only the named ones, which are gathered.

    Every rank has to come here with the same names.

    Args:
        model: As :func:`tensors_of` takes it.
        names: Of what is to be gathered.

    Example:
        >>> values_of(nn.Linear(2, 2), []).keys() == tensors_of(nn.Linear(2, 2)).keys()
        True
    """
    chosen = set(names)
    tensors = tensors_of(model).items()
    return {name: gathered(one) for name, one in tensors if name in chosen or not is_sharded(one)}
