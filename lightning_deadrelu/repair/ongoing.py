"""Edits that take many batches: constants added to units' inputs, and slopes that come and go."""

from __future__ import annotations

import copy
import math
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_deadrelu.repair.activation_swap import find_module, places_of, take_over
from lightning_deadrelu.repair.substitute_modules import LeakyUnits, original_of


def offset_left(step: int, steps: int) -> float:
    """Tell the share of a term that is left: it falls linearly to 0.

    Args:
        step: Training batches since it began.
        steps: Training batches in which it is there.

    Example:
        >>> [offset_left(step, 4) for step in range(5)]
        [1.0, 0.75, 0.5, 0.25, 0.0]
    """
    return max(0.0, 1.0 - step / steps)


def slope_share(step: int, steps: int) -> float:
    """Tell the share of a slope that is there: it rises linearly in the first half, and falls in the second.

    Args:
        step: Training batches since it began.
        steps: Training batches in which it is there.

    Example:
        >>> [slope_share(step, 4) for step in range(5)]
        [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    return max(0, min(step + 1, steps - step)) / math.ceil(steps / 2)


@dataclass
class OffsetState:
    """A constant on units' inputs, and how far it has come.

    Args:
        site: The site's name.
        path: Of the module to whose output it is added.
        values: For each unit at the start, shape ``(units,)``.
        steps: Training batches until it is gone.
        channels: The place of each unit in the module's output, shape ``(units,)``.
        dim: The dimension of these places, counted from the end.
        step: Training batches done.
    """

    site: str
    path: str
    values: Tensor
    steps: int
    channels: Tensor
    dim: int
    step: int = 0


@dataclass
class RampState:
    """A slope below the hinge that rises and falls, and how far it has come.

    Args:
        site: The site's name.
        path: Of the rectifier module.
        values: The highest slope of each unit, shape ``(units,)``.
        steps: Training batches until the rectifier is as it was.
        dims: The dimensions of its input that hold the units, counted from the end.
        step: Training batches done.
    """

    site: str
    path: str
    values: Tensor
    steps: int
    dims: tuple[int, ...]
    step: int = 0


class OngoingEdit(ABC):
    """An edit that takes many batches: what it does in a training forward, and behind an optimizer step.

    Args:
        state: All that a resumed run needs to go on with it: a dataclass with ``site``, ``path``, ``step``, ``steps``.
        model: The model.

    Raises:
        ValueError: If the model has no module of that path.
    """

    def __init__(self, state: OffsetState | RampState, model: nn.Module) -> None:
        self.state = state
        module = find_module(model, state.path)
        if module is None:
            raise ValueError(
                f"A term of `{state.site}` goes to the module `{state.path}`, which this model does not have. Give"
                " the model that was trained, or drop the checkpoint's callback states."
            )
        self.module = module
        first = next(model.parameters(), torch.empty(0))
        self._device = next(module.parameters(), first).device
        dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
        self._full = state.values.to(self._device, dtype)

    @property
    def is_over(self) -> bool:
        """Whether it has done its work; then it is dropped."""
        return self.state.step >= self.state.steps

    @abstractmethod
    def enter(self) -> None:
        """Change the forward, before each training batch."""

    @abstractmethod
    def leave(self) -> None:
        """Take the change out, after each training batch; harmless when it is out."""

    @abstractmethod
    def advance(self) -> None:
        """Go on by one training batch, behind the optimizer step."""


class BiasOffset(OngoingEdit):
    """A constant added to the units' inputs, that falls linearly to 0: bias warming."""

    def __init__(self, state: OffsetState, model: nn.Module) -> None:
        super().__init__(state, model)
        self._hook = _AddOffset(state.channels.to(self._device), state.dim, self._full)
        self._handle: RemovableHandle | None = None
        self._update()

    @property
    def value(self) -> Tensor:
        """What is added to each unit's input now, shape ``(units,)``."""
        return self._hook.value

    def before(self, x: Tensor) -> Tensor | None:
        """Give what a sum with the constant was made of; None where the tensor is another one."""
        return self._hook.before(x)

    def _update(self) -> None:
        self._hook.value = self._full * offset_left(self.state.step, self.state.steps)

    def advance(self) -> None:
        """Shrink."""
        self.state.step += 1
        self._update()

    def enter(self) -> None:
        """Hook the module in front of the site."""
        if self._handle is None:
            self._handle = self.module.register_forward_hook(self._hook)

    def leave(self) -> None:
        """Take the hook off."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


class SlopeRamp(OngoingEdit):
    """A slope below the hinge that rises and falls back to 0, in a module that takes the rectifier's place."""

    def __init__(self, state: RampState, model: nn.Module) -> None:
        super().__init__(state, model)
        if original_of(self.module) is None:
            raise ValueError(
                f"A slope of `{state.site}` goes to one of torch's rectifiers, and `{state.path}` is a"
                f" `{type(self.module).__name__}`. Put an `nn.ReLU` there."
            )
        self._places = places_of(model, self.module)
        self.substitute = _TemporaryLeakyUnits(self.module, self._full, state.dims)
        self._update()

    def _update(self) -> None:
        # in place: compiled code looks at the tensor's values, not at what it is
        self.substitute.slope.copy_(self._full * slope_share(self.state.step, self.state.steps))

    def advance(self) -> None:
        """Rise, or fall."""
        self.state.step += 1
        self._update()

    def enter(self) -> None:
        """Put the substitute in the rectifier's place."""
        self._replace_module(self.module, self.substitute)

    def leave(self) -> None:
        """Put the rectifier back."""
        self._replace_module(self.substitute, self.module)

    def _replace_module(self, old: nn.Module, new: nn.Module) -> None:
        held = [(parent, name) for parent, name in self._places if parent._modules.get(name) is old]
        if held:
            take_over(old, new)
        for parent, name in held:
            setattr(parent, name, new)


def _no_hook(module: nn.Module, args: Any, output: Any) -> None:
    """Leave a forward as it is."""


def _unpickled_hook() -> Callable[..., None]:
    return _no_hook


class _AddOffset:
    """A forward hook that adds a constant to some channels. A copy of it, or what is pickled of it, does nothing."""

    def __init__(self, channels: Tensor, dim: int, value: Tensor) -> None:
        self._channels, self._dim = channels, dim
        self.value = value
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


def _identity(module: nn.Module) -> nn.Module:
    return module


class _TemporaryLeakyUnits(LeakyUnits):
    """A leaky rectifier for a time. A copy of it, or what is pickled of it, is the module that it stands for."""

    def __init__(self, module: nn.Module, slope: Tensor, dims: Sequence[int]) -> None:
        original = original_of(module)
        assert original is not None
        super().__init__(slope, dims, original)
        self.stands_for = (module,)  # in a tuple, so that it is no submodule

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        return copy.deepcopy(self.stands_for[0], memo)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _identity, self.stands_for
