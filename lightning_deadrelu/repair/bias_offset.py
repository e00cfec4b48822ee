"""A constant added to units' inputs for a time, as a forward hook: in no weight, no copy and no average."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_deadrelu.repair.scheduled_edit import ForwardEdit


def offset_left(step: int, steps: int) -> float:
    """Tell the share of a term that is left: it falls linearly to 0.

    Example:
        >>> [offset_left(step, 4) for step in range(5)]
        [1.0, 0.75, 0.5, 0.25, 0.0]
    """
    return max(0.0, 1.0 - step / steps)


@dataclass(kw_only=True, eq=False)
class BiasOffset(ForwardEdit):
    """A constant added to the units' inputs, that falls linearly to 0: bias warming.

    Args:
        channels: The place of each unit in the module's output, shape ``(units,)``.
        dim: The dimension of these places, counted from the end.
    """

    channels: Tensor
    dim: int
    _hook: _AddOffset = field(init=False, repr=False)
    _handle: RemovableHandle | None = field(default=None, init=False, repr=False)

    @override
    def attach(self, model: nn.Module) -> None:
        super().attach(model)
        self._hook = _AddOffset(self.channels.to(self._full.device), self.dim)
        self.update()

    @property
    def value(self) -> Tensor:
        """What is added to each unit's input now, shape ``(units,)``."""
        return self._hook.value

    def before(self, x: Tensor) -> Tensor | None:
        """Give what a sum with the constant was made of; None where the tensor is another one."""
        return self._hook.before(x)

    @override
    def update(self) -> None:
        self._hook.value = self._full * offset_left(self.step, self.steps)

    @override
    def enter(self) -> None:
        if self._handle is None:
            self._handle = self._module.register_forward_hook(self._hook)

    @override
    def leave(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


class _AddOffset:
    """A forward hook that adds a constant to some channels. A copy of it, or what is pickled of it, does nothing."""

    value: Tensor

    def __init__(self, channels: Tensor, dim: int) -> None:
        self._channels, self._dim = channels, dim
        self._made: tuple[weakref.ref[Tensor], Tensor] | None = None  # the last sum, and what it was made of

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Tensor | None:
        if not isinstance(output, Tensor):
            return None
        value = self.value.to(output.device, output.dtype)  # autocast would widen the output
        offset = value.new_zeros(output.shape[self._dim]).index_copy(0, self._channels.to(output.device), value)
        total = output + offset.view(-1, *[1] * (-1 - self._dim))
        self._made = weakref.ref(total, self._forget), output.detach()
        return total

    def _forget(self, total: weakref.ref[Tensor]) -> None:
        """Let go of what a sum was made of, once the model has let go of the sum."""
        if self._made is not None and self._made[0] is total:
            self._made = None

    def before(self, x: Tensor) -> Tensor | None:
        """See :meth:`BiasOffset.before`."""
        total = self._made[0]() if self._made else None
        is_it = total is not None and x.shape == total.shape and x.data_ptr() == total.data_ptr()
        return self._made[1] if self._made and is_it else None

    def __deepcopy__(self, memo: Any) -> Callable[..., None]:
        return _no_hook

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled_hook, ()


def _no_hook(module: nn.Module, args: Any, output: Any) -> None:
    """Leave a forward as it is."""


def _unpickled_hook() -> Callable[..., None]:
    return _no_hook
