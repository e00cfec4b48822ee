"""Which named tensors lie in the same memory. Looks at addresses, never at values."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


class Stretch(NamedTuple):
    """The bytes of a storage from the first to the last that a tensor names."""

    name: str
    start: int
    stop: int

    def meets(self, other: Stretch) -> bool:
        """Whether two stretches of one storage overlap."""
        return self.start < other.stop and other.start < self.stop


class Memory:
    """Where named tensors lie.

    Disjoint stretches of one storage, as flattened parameters have them, share nothing.

    Example:
        >>> import torch
        >>> flat, memory = torch.zeros(6), Memory()
        >>> for name, part in {"a": flat[:4].view(2, 2), "b": flat[4:], "c": flat[:2]}.items():
        ...     memory.add(name, part)
        >>> memory.sharing()
        {'a': 'c', 'c': 'a'}
    """

    def __init__(self) -> None:
        self._stretches: dict[int, list[Stretch]] = {}
        self._seen: set[int] = set()

    def add(self, name: str, tensor: Tensor) -> None:
        """Note a tensor; another name of the same tensor is no other tensor."""
        place = storage_of(tensor)
        if place == -1 or not tensor.numel() or id(tensor) in self._seen:
            return
        self._seen.add(id(tensor))
        self._stretches.setdefault(place, []).append(_stretch(name, tensor))

    def sharing(self) -> dict[str, str]:
        """Name, for each tensor that shares memory, another one that lies there."""
        found: dict[str, str] = {}
        for known in self._stretches.values():
            first, *rest = sorted(known, key=lambda one: one.start)
            for one in rest:
                if one.meets(first):
                    found.setdefault(first.name, one.name)
                    found.setdefault(one.name, first.name)
                first = max(first, one, key=lambda one: one.stop)
        return found

    def names(self, tensor: Tensor) -> frozenset[str]:
        """Name the tensors that lie where this one does."""
        known = self._stretches.get(storage_of(tensor))
        if not known or not tensor.numel():
            return frozenset()
        own = _stretch("", tensor)
        return frozenset(one.name for one in known if one.meets(own))


def _stretch(name: str, tensor: Tensor) -> Stretch:
    size, start = tensor.element_size(), int(tensor.storage_offset())
    last = start + sum((int(n) - 1) * int(step) for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return Stretch(name, start * size, (last + 1) * size)


def storage_of(tensor: Tensor) -> int:
    """Number the storage of a tensor; -1 if it has none of its own."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError, ValueError):  # sparse, under a transform, or without values yet
        return -1


def lifetime(tensor: Tensor) -> Any:
    """Keep the number of a tensor's storage from being given to another one, without keeping its memory."""
    return None if storage_of(tensor) == -1 else StorageWeakRef(tensor.untyped_storage())
