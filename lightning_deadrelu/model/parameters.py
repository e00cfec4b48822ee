"""Find the parameters and buffers of a model by name, and their values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

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


class ParameterNames:
    """The names of a model's parameters, also of those that sharding gathers for a forward.

    Args:
        model: Whose parameters to name. One that goes by several names has the first.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> ParameterNames(model).find(model.weight)
        'weight'
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._named: dict[int, tuple[Tensor, str]] = {}
        self.look()
        self.sharded = any(is_sharded(tensor) for tensor, _ in self._named.values())
        """Whether any parameter is split over ranks."""

    def look(self) -> list[tuple[str, Tensor]]:
        """Note the parameters that the model has now, and list them with all their names."""
        found: list[tuple[str, Tensor]] = [
            (clean(name), tensor) for name, tensor in self._model.named_parameters(remove_duplicate=False)
        ]
        for name, tensor in found:
            self._named.setdefault(id(tensor), (tensor, name))
        return found

    def __iter__(self) -> Iterator[tuple[Tensor, str]]:
        return iter(self._named.values())

    def same_as(self, other: ParameterNames) -> bool:
        """Tell whether the same tensors go by the same names."""
        return len(self._named) == len(other._named) and all(self.find(tensor) == name for tensor, name in other)

    def find(self, tensor: Any) -> str | None:
        """Return a parameter's name; None for any other value."""
        entry = self._named.get(id(tensor))
        return entry[1] if entry is not None and entry[0] is tensor else None  # whatever was done to it in place

    def forget(self) -> None:
        """Let go of all parameters until the next look."""
        self._named.clear()

    def is_gathered(self, tensor: Any) -> bool:
        """Tell whether an unknown tensor may have become a parameter only now, so that another look is due."""
        return self.sharded and isinstance(tensor, nn.Parameter)

    def stand_in(self, tensor: Tensor, name: str) -> None:
        """Take another tensor for the parameter of a name."""
        self._named[id(tensor)] = tensor, name
