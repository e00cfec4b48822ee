"""Raise parameters little by little, after each optimizer step, until what was asked for has been added."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_deadrelu.model.sharding import whole
from lightning_deadrelu.remedies import Write
from lightning_deadrelu.repair.scheduled_edit import ScheduledEdit


@dataclass(kw_only=True, eq=False)
class ScheduledLift(ScheduledEdit):
    """Parameters that are being raised.

    What is added follows from what was decided when the lift began, and from nothing since: no forward has to be seen
    between two verdicts, and ranks that began with equal parameters stay equal to the last bit. The optimizer and its
    state are left alone: through them a lift would be bound by the learning rate, and pass under Adam for a gradient.

    Args:
        rises: What is added in all.
        rest: For each of these, what rounding kept from being added so far; empty before the first step.

    Example:
        >>> from lightning_deadrelu.model.slices import Slice
        >>> bias = torch.zeros(2)
        >>> row = Slice("bias", "bias", torch.tensor([1]), torch.tensor([[1]]), (0,))
        >>> lift = ScheduledLift(site="act", steps=2, rises=(Write(row, torch.tensor([3.0])),))
        >>> lift.advance({"bias": bias})
        >>> bias, lift.is_over
        (tensor([0.0000, 1.5000]), False)
        >>> lift.advance({"bias": bias})
        >>> bias, lift.is_over
        (tensor([0., 3.]), True)
    """

    rises: tuple[Write, ...]
    rest: list[Tensor] = field(default_factory=list)

    undone: ClassVar[str] = "its lift was stopped"

    @property
    def names(self) -> set[str]:
        """Of the parameters that are raised."""
        return {rise.slice.name for rise in self.rises}

    @override
    def advance(self, tensors: Mapping[str, Tensor]) -> None:
        super().advance(tensors)
        self.rest = self.rest or [torch.zeros(()) for _ in self.rises]
        for number, rise in enumerate(self.rises):
            with whole(tensors[rise.slice.name]) as full:
                self.rest[number] = add_(full, rise, self.rest[number], self.steps)


def add_(tensor: Tensor, rise: Write, rest: Tensor, steps: int) -> Tensor:
    """Add one of ``steps`` equal parts of a rise to the entries of a tensor, whatever its precision.

    Args:
        tensor: Changed in place.
        rise: The entries, and what is added to them in all.
        rest: What rounding kept from being added before; without it, parts below half a unit of the last place of a
            half-precision number would be lost, and with them the whole lift.
        steps: The number of parts.

    Returns:
        What rounding kept from being added so far.
    """
    precision = torch.promote_types(tensor.dtype, torch.float32)
    old = rise.slice.read(tensor).to(precision)
    wanted = old + torch.as_tensor(rise.values).to(old) / steps + rest.to(old)
    rise.slice.write_(tensor, wanted)
    return wanted - rise.slice.read(tensor).to(precision)
