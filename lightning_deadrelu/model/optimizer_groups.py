"""How optimizers train parameters, read from their groups. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer

_ADAM = frozenset({"Adam", "AdamW", "NAdam", "RAdam", "Adamax"})
_ADAPTIVE = frozenset({"betas", "alpha", "lr_decay", "rho", "beta2_decay"})  # options of what divides by past gradients
_DECOUPLED = frozenset({"Adafactor", "Lion", "Muon"})  # besides those whose names end in W


class ParameterGroup(NamedTuple):
    """How a parameter is trained.

    Args:
        optimizer: The optimizer's class, by name.
        kind: ``"adam"``, ``"sgd"``, or empty for others.
        lr: The learning rate; 0 where it is not known.
        peak: The learning rate before any schedule.
        momentum: Of an optimizer that has one.
        weight_decay: As given.
        decoupled: Whether the decay is apart from the gradient.
        adaptive: Whether steps are divided by the size of past gradients.
        number: Which of several optimizers it is.
    """

    optimizer: str = ""
    kind: str = ""
    lr: float = 0.0
    peak: float = 0.0
    momentum: float = 0.0
    weight_decay: float = 0.0
    decoupled: bool = False
    adaptive: bool = False
    number: int = 0

    @classmethod
    def of(cls, optimizer: Optimizer, group: Mapping[str, Any], number: int = 0) -> ParameterGroup:
        """Read an optimizer's group.

        Example:
            >>> import torch
            >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1, momentum=0.9)
            >>> ParameterGroup.of(optimizer, optimizer.param_groups[0]).momentum
            0.9
        """
        kinds = {kind.__name__ for kind in type(optimizer).__mro__}
        lr, first, momentum, decay = (
            _number(group.get(key)) for key in ("lr", "initial_lr", "momentum", "weight_decay")
        )
        apart = any(name.endswith("W") or name in _DECOUPLED for name in kinds)
        return cls(
            type(optimizer).__name__,
            "adam" if kinds & _ADAM else "sgd" if "SGD" in kinds else "",
            lr,
            max(lr, first),
            momentum,
            decay,
            bool(group.get("decoupled_weight_decay", apart)),
            bool(_ADAPTIVE & group.keys()),
            number,
        )

    @property
    def memory(self) -> float:
        """Steps for which a gradient is felt, 1 / (1 - momentum); at most 1,000, as for a momentum of 1."""
        return 1 / (1 - min(self.momentum, 0.999))

    @property
    def shrinking(self) -> float:
        """The part of a parameter that decay takes in a step, per learning rate."""
        # momentum repeats what is a part of the gradient
        return self.weight_decay * (1 if self.decoupled else self.memory)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float, Tensor)) else 0.0


def parameters_of(*optimizers: Optimizer) -> Iterator[Tensor]:
    """List what optimizers train."""
    return (p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"])


def holder_of(optimizers: Iterable[Optimizer], parameter: Tensor) -> tuple[Optimizer, dict[str, Any]] | None:
    """Find the optimizer that trains a parameter, and the group that holds it; None if there is none."""
    groups = ((optimizer, group) for optimizer in optimizers for group in optimizer.param_groups)
    return next((pair for pair in groups if any(p is parameter for p in pair[1]["params"])), None)
