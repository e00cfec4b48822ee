"""A slope below the hinge that comes and goes, in a module that takes the rectifier's place in training batches."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from lightning_deadrelu.model.rectifiers import Rectifier
from lightning_deadrelu.repair.activation_swap import places_of, take_over
from lightning_deadrelu.repair.scheduled_edit import ForwardEdit
from lightning_deadrelu.repair.substitute_modules import LeakyUnits, Original, original_of


def slope_share(step: int, steps: int) -> float:
    """Tell the share of a slope that is there: it rises linearly in the first half, and falls in the second.

    Example:
        >>> [slope_share(step, 4) for step in range(5)]
        [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    return max(0, min(step + 1, steps - step)) / math.ceil(steps / 2)


@dataclass(kw_only=True, eq=False)
class SlopeRamp(ForwardEdit):
    """A slope below the hinge that rises to its value and falls back to 0.

    Args:
        dims: The dimensions of its input that hold the units, counted from the end.
    """

    dims: tuple[int, ...]

    @override
    def attach(self, model: nn.Module) -> None:
        super().attach(model)
        original = original_of(self._module)
        if original is None:
            raise ValueError(
                f"A slope of `{self.site}` goes to one of torch's rectifiers, and `{self.path}` is a"
                f" `{type(self._module).__name__}`. Put an `nn.ReLU` there."
            )
        self._places = places_of(model, self._module)
        self._substitute = _TemporaryLeakyUnits(self._module, self._full, self.dims, original)
        self.update()

    @property
    def rectifier(self) -> Rectifier:
        """What the module in the rectifier's place has to be judged as."""
        return self._substitute.original.rectifier

    @property
    def is_in_place(self) -> bool:
        """Whether the rectifier is there still; others may put another module there."""
        return any(parent._modules.get(name) in (self._module, self._substitute) for parent, name in self._places)

    @override
    def update(self) -> None:
        # in place: compiled code looks at the tensor's values, not at what it is
        self._substitute.slope.copy_(self._full * slope_share(self.step, self.steps))

    @override
    def enter(self) -> None:
        self._replace(self._module, self._substitute)

    @override
    def leave(self) -> None:
        self._replace(self._substitute, self._module)

    def _replace(self, old: nn.Module, new: nn.Module) -> None:
        held = [(parent, name) for parent, name in self._places if parent._modules.get(name) is old]
        if held:
            take_over(old, new)
        for parent, name in held:
            setattr(parent, name, new)


def _identity(module: nn.Module) -> nn.Module:
    return module


class _TemporaryLeakyUnits(LeakyUnits):
    """A leaky rectifier for a time. A copy of it, or what is pickled of it, is the module that it stands for."""

    def __init__(self, module: nn.Module, slope: Tensor, dims: Sequence[int], original: Original) -> None:
        super().__init__(slope, dims, original)
        self.stands_for = (module,)  # in a tuple, so that it is no submodule

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        return copy.deepcopy(self.stands_for[0], memo)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _identity, self.stands_for
