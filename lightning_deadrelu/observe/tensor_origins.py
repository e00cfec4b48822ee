"""Remember which tensors come from which parameters while a forward runs."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lightning_deadrelu.model.sharding import is_sharded
from lightning_deadrelu.model.sites import clean
from lightning_deadrelu.observe.provenance import STEADY, Call, Provenance, follow, parameter

_ZEROS = frozenset({"zeros", "zeros_like", "new_zeros"})


class TensorOrigins:
    """What is known of the tensors of a forward: their lineage, and which of them hold nothing but zeros.

    Args:
        model: Whose parameters lineages start at.
    """

    def __init__(self, model: nn.Module) -> None:
        zeros = (buffer for buffer in model.buffers() if buffer.numel() == 1 and not buffer.any())
        self._zero_buffers = [(buffer, _version(buffer)) for buffer in zeros]
        self._model = model
        self._parameters: dict[int, tuple[Tensor, Provenance]] = {}
        self._sharded = False
        self._derived: dict[tuple[Any, ...], Provenance | None] = {}
        self._known: dict[int, tuple[weakref.ref[Tensor], Provenance]] = {}
        self._zeros: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self.error: Exception | None = None
        """The first call whose producers could not be followed, which stopped nothing."""

    def look_at(self, model: nn.Module) -> None:
        """List the parameters as they are named now."""
        self._derived.clear()
        self._parameters.clear()
        self._model = model
        self._name_parameters()
        self._sharded = any(is_sharded(tensor) for tensor, _ in self._parameters.values())

    def _name_parameters(self) -> None:
        for name, tensor in self._model.named_parameters(remove_duplicate=False):
            self._parameters[id(tensor)] = tensor, parameter(clean(name))

    def forget(self) -> None:
        """Drop all tensors that are no parameters."""
        self._known.clear()
        self._zeros.clear()

    def stand_in(self, tensor: Tensor, other: Tensor) -> None:
        """Take ``other`` for a tensor of the model, where that is a parameter or known to be zero."""
        if (given := self._parameter(tensor)) is not None:
            self._parameters[id(other)] = other, given
        if self.is_zero(tensor):
            self._zeros[id(other)] = weakref.ref(other), _version(other)

    def name(self, tensor: Any) -> str | None:
        """Name a parameter; None for any other value."""
        given = self._parameter(tensor)
        return None if given is None else next(iter(given.producers))

    def _parameter(self, tensor: Any) -> Provenance | None:
        given = self._parameters.get(id(tensor))
        return given[1] if given is not None and given[0] is tensor else None  # whatever was done to it in place

    def lineage(self, tensor: Tensor) -> Provenance | None:
        """Tell where a tensor comes from, as far as known."""
        if (given := self._parameter(tensor)) is not None:
            return given
        if (entry := self._known.get(id(tensor))) is not None and entry[0]() is tensor:
            return entry[1]
        if self._sharded and isinstance(tensor, nn.Parameter):
            self._name_parameters()  # it was gathered for this forward
        return self._parameter(tensor)

    def remember(self, tensor: Tensor, lineage: Provenance | None) -> None:
        """Keep a tensor's lineage as long as the tensor is there."""
        if lineage is not None:
            self._known[id(tensor)] = weakref.ref(tensor), lineage

    def note_zeros(self, name: str, args: Sequence[Any], output: Tensor) -> None:
        """Remember what a function made as zeros."""
        if name in _ZEROS or (name == "tensor" and args and isinstance(args[0], (int, float)) and args[0] == 0):
            self._zeros[id(output)] = weakref.ref(output), _version(output)

    def is_zero(self, value: Any) -> bool:
        """Whether a value is known to hold nothing but zeros."""
        if not isinstance(value, Tensor):
            return False
        made = self._zeros.get(id(value))
        known = [(made[0](), made[1])] if made else self._zero_buffers
        return any(value is zeros and _version(value) == version for zeros, version in known)  # and none filled since

    def follow(self, call: Call, lineages: list[Provenance | None]) -> Provenance | None:
        """Follow a call; the layers that make up most of a model once for all calls alike.

        Args:
            call: What was called.
            lineages: Those of its operands, in order.
        """
        if call.name not in STEADY or call.output.is_nested:
            return self._try_to_follow(call, lineages)
        key = (call.name, call.output.shape, *lineages)
        if key not in self._derived:
            self._derived[key] = self._try_to_follow(call, lineages)
        return self._derived[key]

    def _try_to_follow(self, call: Call, lineages: list[Provenance | None]) -> Provenance | None:
        known = [(tensor, own) for tensor, own in zip(call.operands, lineages, strict=True) if own is not None]
        try:
            return follow(call, known) if known else None
        except Exception as error:  # an untraced site is still watched
            self.error = self.error or error
            return None


def _version(tensor: Tensor) -> int:
    """Count the changes made in place; inference tensors do not, and are never taken for zeros later."""
    return -1 if tensor.is_inference() else tensor._version
