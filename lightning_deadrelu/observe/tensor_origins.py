"""Remember which tensors come from which parameters while a forward runs."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_deadrelu.model.parameters import ParameterNames
from lightning_deadrelu.model.torch_calls import Call, TensorTable, makes_zeros, version_of
from lightning_deadrelu.observe.provenance import Provenance, follow, parameter
from lightning_deadrelu.observe.torch_function import TorchFunction
from lightning_deadrelu.warn import warn

_PLAIN_VALUES = frozenset({int, float, bool, str, type(None), torch.dtype, torch.device, torch.memory_format})
_SEQUENCES = frozenset({list, tuple, torch.Size})
_MOST_DERIVED = 100_000  # of a model whose shapes differ from batch to batch


Key = tuple[str, torch.Size, torch.dtype, tuple[Provenance | None, ...], tuple[Any, ...]]
"""What settles the provenance of a call's output: calls with equal keys have the same.

The function's plain name; the output's shape and type; the provenance of each tensor among the arguments; and where
that matters, their shapes, and all else among the arguments.
"""
_UNSEEN: Any = object()


class TensorOrigins:
    """What is known of the tensors of a forward: their provenance, and which of them hold nothing but zeros.

    Args:
        model: Whose parameters provenance starts at.
    """

    def __init__(self, model: nn.Module) -> None:
        there = (buffer for buffer in model.buffers() if not is_lazy(buffer))
        zeros = (buffer for buffer in there if buffer.numel() == 1 and not buffer.any())
        self._zero_buffers = [(buffer, version_of(buffer)) for buffer in zeros]
        self._derived: dict[Key, Provenance | None] = {}
        self._known: dict[int, tuple[weakref.ref[Tensor], Provenance | None]] = {}  # None: it is known to have none
        self._list(model)
        self._zeros: TensorTable[bool] = TensorTable()
        self._told = False  # that there was one
        self.error: Exception | None = None
        """The first call that could not be followed: its site is counted, but goes by its place in the forward."""

    def _list(self, model: nn.Module) -> None:
        self._names = ParameterNames(model)
        self._parameters = {id(one): (weakref.ref(one), parameter(name)) for one, name in self._names}
        entries = {**{id(one): (weakref.ref(one), None) for one in model.buffers()}, **self._parameters}
        lazy = {id(one) for one in (*model.parameters(), *model.buffers()) if is_lazy(one)}  # they have no shape yet
        self._from_start = {number: entry for number, entry in entries.items() if number not in lazy}

    def look_at(self, model: nn.Module) -> None:
        """List the parameters as they are named now; what is known of other tensors stays."""
        before = self._names
        self._list(model)
        if not self._names.same_as(before) or len(self._derived) > _MOST_DERIVED:
            self._derived.clear()
        self._known |= self._from_start

    def forget(self) -> None:
        """Drop all tensors that are no parameters."""
        self._known = self._from_start.copy()
        self._zeros.clear()

    def stand_in(self, tensor: Tensor, other: Tensor) -> None:
        """Take ``other`` for a tensor of the model, where that is a parameter or known to be zero."""
        if (name := self.name(tensor)) is not None:
            self._names.stand_in(other, name)
            self._known.pop(id(other), None)
        if self.is_zero(tensor):
            self._zeros.put(other, True)

    def name(self, tensor: Any) -> str | None:
        """Name a parameter; None for any other value."""
        return self._names.find(tensor)

    def of(self, tensor: Tensor) -> Provenance | None:
        """Tell where a tensor comes from, as far as known."""
        entry = self._known.get(id(tensor))
        if entry is not None and entry[0]() is tensor:
            return entry[1]
        if (name := self._names.find(tensor)) is not None:
            return parameter(name)
        if not self._names.is_gathered(tensor):
            return None
        self._names.look()
        name = self._names.find(tensor)
        return None if name is None else parameter(name)

    def is_of(self, tensor: Tensor) -> bool:
        """Tell whether a tensor's provenance is known without a closer look."""
        entry = self._known.get(id(tensor))
        return entry is not None and entry[1] is not None and entry[0]() is tensor

    def remember(self, tensor: Tensor, provenance: Provenance | None) -> None:
        """Keep a tensor's provenance, or that it has none, while it is there; a parameter written to keeps its own.

        Another network's parameter has none: it holds copied numbers, as a target network's does.
        """
        if id(tensor) not in self._parameters and type(tensor) is not nn.Parameter:
            self._known[id(tensor)] = weakref.ref(tensor), provenance

    def note_zeros(self, call: Call) -> None:
        """Remember what a function made as zeros."""
        if makes_zeros(call.name, call.args):
            self._zeros.put(call.output, True)

    def is_zero(self, value: Any) -> bool:
        """Whether a value is known to hold nothing but zeros."""
        return isinstance(value, Tensor) and self.was_zero(value, writes=0)

    def was_zero(self, value: Tensor, writes: int) -> bool:
        """Whether a tensor is known to have held nothing but zeros before it was last written to so many times."""
        if self._zeros.get(value):
            return self._zeros.writes_to(value) == writes
        return any(value is zeros and version_of(value) == version for zeros, version in self._zero_buffers)

    def follow(self, call: Call, known: Sequence[Provenance | None], key: Key | None = None) -> Provenance | None:
        """Follow a call, once for all calls that have its key.

        Args:
            call: What was called.
            known: The provenance of its operands, in order.
            key: What :meth:`key` tells of it.
        """
        if not any(known):
            return None
        found = self._followed(call, known)
        if key is not None and key[3] == tuple(known):  # or the module that runs told more of an operand
            self._derived[key] = found
        return found

    def key(self, function: TorchFunction, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> Key | None:
        """Gather what settles the provenance of a call's output; None where it is more than is told at little cost.

        Args:
            function: What was called.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
            output: All it returned.
        """
        if not function.repeats or type(output) is not Tensor or output.is_nested or id(output) in self._parameters:
            return None
        if args and type(args[0]) in _SEQUENCES:
            args = (*args[0], len(args[0]), *args[1:])
        shape, steady, alike, follows = output.shape, function.steady, not function.shapes, False
        known: list[Provenance | None] = []
        form: list[Any] = [*kwargs] if kwargs else []
        for arg in (*args, *kwargs.values()) if kwargs else args:
            entry = self._known.get(id(arg))
            if entry is not None and entry[0]() is arg:
                own = entry[1]
                known.append(own)
                if steady:
                    follows = follows or (own is not None and not own.weight)
                    continue
                size: torch.Size = arg.shape  # type: ignore[union-attr]  # is what the entry is of
                form.append(size)
                if own is not None and not own.weight:
                    alike, follows = alike and size == shape, follows or bool(size)
            elif type(arg) in _PLAIN_VALUES:
                form.append(arg)
            elif type(arg) in _SEQUENCES and _PLAIN_VALUES.issuperset(map(type, arg)):
                form.append(tuple(arg))
            else:
                return None
        if not follows:  # of weights alone, which lie in memory as they do; or of what the module that runs may tell
            return None
        return function.plain, shape, output.dtype, tuple(known), () if steady or alike else tuple(form)

    def repeat(self, function: TorchFunction, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> bool:
        """Follow a call like one that was followed before, as most are; False if there was none. Arguments as above."""
        key = self.key(function, args, kwargs, output)
        if key is None:
            return False
        found = self._derived.get(key, _UNSEEN)
        if found is _UNSEEN:
            return False
        self._known[id(output)] = weakref.ref(output), found
        return True

    def _followed(self, call: Call, known: Sequence[Provenance | None]) -> Provenance | None:
        pairs = [(tensor, own) for tensor, own in zip(call.operands, known, strict=True) if own is not None]
        try:
            return follow(call, pairs)
        except Exception as error:
            self.error = self.error or error
            return None

    def tell_unfollowed(self) -> None:
        """Say once that a call could not be followed, which costs the sites behind it their names and nothing else."""
        if self.error is not None and not self._told:
            self._told = True
            warn(
                f"Where a tensor comes from could not be followed ({type(self.error).__name__}: {self.error}): sites"
                " behind it are counted all the same, but go by their place in the forward, and cannot be repaired."
            )
