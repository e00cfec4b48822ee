"""An edit that takes many batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_deadrelu.repair.activation_swap import find_module


@dataclass(kw_only=True, eq=False)
class ScheduledEdit:
    """What is done to a site in each of many batches; the fields that its constructor takes are what is saved of it.

    What it does follows from the number of batches that have passed, so that a forward recomputed in backward sees what
    the first one saw, and a resumed run goes on to the last bit.

    Args:
        site: The site's name.
        steps: Training batches until it is over.
        step: Training batches done.
    """

    site: str
    steps: int
    step: int = 0

    undone: ClassVar[str]
    """What to say when it is taken back."""

    @property
    def is_over(self) -> bool:
        """Whether it has done its work."""
        return self.step >= self.steps

    def attach(self, model: nn.Module) -> None:
        """Find what it changes, when it begins and when a run is resumed.

        Raises:
            ValueError: The model lacks what it changes.
        """

    def enter(self) -> None:
        """Change the forward, before each training batch."""

    def leave(self) -> None:
        """Take the change out, after each training batch; harmless when it is out."""

    def advance(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on by one training batch, behind the optimizer step."""
        self.step += 1


@dataclass(kw_only=True, eq=False)
class ForwardEdit(ScheduledEdit):
    """What changes the output of a module for a time.

    Args:
        path: Of the module.
        values: Of each unit, shape ``(units,)``, of which a share is there that follows from the step.
    """

    path: str
    values: Tensor

    undone: ClassVar[str] = "its term was dropped"

    @override
    def attach(self, model: nn.Module) -> None:
        module = find_module(model, self.path)
        if module is None:
            raise ValueError(
                f"A term of `{self.site}` goes to the module `{self.path}`, which this model does not have. Give"
                " the model that was trained, or drop the checkpoint's callback states."
            )
        self._module = module
        first = next(model.parameters(), torch.empty(0))
        dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
        self._full = self.values.detach().to(next(module.parameters(), first).device, dtype)

    def update(self) -> None:
        """Have the share of the values there that belongs to the step."""

    @override
    def advance(self, tensors: Mapping[str, Tensor]) -> None:
        super().advance(tensors)
        self.update()
