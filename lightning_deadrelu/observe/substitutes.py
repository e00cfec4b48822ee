"""Take the call of a module that stands in a rectifier's place for the rectifier's own call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_deadrelu.model.rectifiers import Rectifier
from lightning_deadrelu.observe.site_resolver import Rectified


class Substitutes:
    """The modules that took a rectifier's place: they are judged by their input, as it was before the call.

    Args:
        rectifiers: By path, what each module stands for.
    """

    def __init__(self, rectifiers: Mapping[str, Rectifier]) -> None:
        self.rectifiers = {name: one._replace(plain=False, smooth=False) for name, one in rectifiers.items()}
        """By path, what each module stands for; whatever its output is, its input says who is silent."""
        self.running: tuple[nn.Module, Rectified] | None = None
        """The one that is running, and its call, so that the functions that it calls are no calls of their own."""

    def enter(self, path: str, module: nn.Module, args: Any) -> str:
        """Start a call, and say why it cannot be judged; empty if it can."""
        if path not in self.rectifiers or self.running is not None:
            return ""
        if not args or not isinstance(args[0], Tensor):
            return "its substitute was not called with a tensor by position"
        with torch.no_grad():
            values = args[0].detach().clone() if getattr(module, "inplace", False) else args[0]
        self.running = module, Rectified(self.rectifiers[path], args[0], values)
        return ""

    def leave(self, module: nn.Module) -> Rectified | None:
        """End the call of a module; None if it is none of these."""
        if self.running is None or self.running[0] is not module:
            return None
        (_, call), self.running = self.running, None
        return call

    def forget(self) -> None:
        """Let go of a call that an error ended."""
        self.running = None
