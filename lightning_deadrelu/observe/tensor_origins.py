"""Remember which tensors come from which parameters while a forward runs."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_deadrelu.model.parameters import ParameterNames
from lightning_deadrelu.model.torch_calls import Call, TensorTable, makes_zeros, version_of
from lightning_deadrelu.observe.provenance import SHAPING, STEADY, Provenance, follow, parameter
from lightning_deadrelu.observe.torch_function import TorchFunction
from lightning_deadrelu.warn import warn

_PLAIN_VALUES = frozenset({int, float, bool, str, type(None), torch.dtype, torch.device, torch.memory_format})
_MOST_DERIVED = 100_000  # of a model whose shapes differ from batch to batch


class TensorOrigins:
    """What is known of the tensors of a forward: their provenance, and which of them hold nothing but zeros.

    Args:
        model: Whose parameters provenance starts at.
    """

    def __init__(self, model: nn.Module) -> None:
        there = (buffer for buffer in model.buffers() if not nn.parameter.is_lazy(buffer))
        zeros = (buffer for buffer in there if buffer.numel() == 1 and not buffer.any())
        self._zero_buffers = [(buffer, version_of(buffer)) for buffer in zeros]
        self._derived: dict[tuple[Any, ...], Provenance | None] = {}
        self._known: dict[int, tuple[weakref.ref[Tensor], Provenance]] = {}
        self._list_parameters(ParameterNames(model))
        self._zeros: TensorTable[bool] = TensorTable()
        self._told = False  # that there was one
        self.error: Exception | None = None
        """The first call that could not be followed: its site is counted, but goes by its place in the forward."""

    def _list_parameters(self, names: ParameterNames) -> None:
        self._names = names
        self._parameters = {id(one): (weakref.ref(one), parameter(name)) for one, name in names}

    def look_at(self, model: nn.Module) -> None:
        """List the parameters as they are named now."""
        before = self._names
        self._list_parameters(ParameterNames(model))
        if not self._names.same_as(before) or len(self._derived) > _MOST_DERIVED:
            self._derived.clear()
        self.forget()

    def forget(self) -> None:
        """Drop all tensors that are no parameters."""
        self._known = self._parameters.copy()
        self._zeros.clear()

    def stand_in(self, tensor: Tensor, other: Tensor) -> None:
        """Take ``other`` for a tensor of the model, where that is a parameter or known to be zero."""
        if (name := self.name(tensor)) is not None:
            self._names.stand_in(other, name)
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

    def remember(self, tensor: Tensor, provenance: Provenance | None) -> None:
        """Keep a tensor's provenance as long as the tensor is there; a parameter that is written to keeps its own.

        Another network's parameter has none: it holds copied numbers, as a target network's does.
        """
        if provenance is not None and id(tensor) not in self._parameters and type(tensor) is not nn.Parameter:
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

    def follow(self, call: Call, known: list[Provenance | None]) -> Provenance | None:
        """Follow a call; layers, and functions of each element, once for all calls alike.

        Args:
            call: What was called.
            known: The provenance of its operands, in order.
        """
        if not any(known):
            return None
        if call.output.is_nested or not _is_steady(call, known):
            return self._followed(call, known)
        key = (call.name, call.output.shape, call.output.dtype, *known)
        if key not in self._derived:
            self._derived[key] = self._followed(call, known)
        return self._derived[key]

    def repeat(self, function: TorchFunction, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> bool:
        """Follow a call like one that was followed before, with nothing made for it but a key; False if there was none.

        Most calls of a model go this way, so that it makes no call of its own that it can do without.

        Args:
            function: What was called.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
            output: All it returned.
        """
        if not function.repeats or type(output) is not Tensor or output.is_nested or id(output) in self._parameters:
            return False
        shape, known, follows = output.shape, self._known, False
        key: list[Any] = [function.plain, shape, output.dtype]
        for arg in (*args, *kwargs.values()) if kwargs else args:
            entry = known.get(id(arg))
            if entry is not None and entry[0]() is arg:
                own = entry[1]
                if not own.weight:
                    if not function.steady and arg.shape != shape:  # type: ignore[union-attr]  # is what the entry is of
                        return False
                    follows = True
                key.append(own)
            elif type(arg) not in _PLAIN_VALUES and not _is_of_plain_values(arg):
                return False
        if not follows or (found := self._derived.get(tuple(key))) is None:
            return False
        known[id(output)] = weakref.ref(output), found
        return True

    def _followed(self, call: Call, known: list[Provenance | None]) -> Provenance | None:
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


def _is_of_plain_values(arg: Any) -> bool:
    """Tell whether this is a list of numbers, such as sizes; an empty one holds no tensor either."""
    return isinstance(arg, (list, tuple)) and _PLAIN_VALUES.issuperset(map(type, arg))


def _is_steady(call: Call, known: list[Provenance | None]) -> bool:
    """Tell whether what is known of the operands, and the output's shape, settle what is known of the output."""
    if call.name in STEADY:
        return True
    if call.name in SHAPING:
        return False
    shape = call.output.shape
    alike = [x.shape == shape for x, own in zip(call.operands, known, strict=True) if own and not own.weight]
    return bool(alike and shape) and all(alike)
