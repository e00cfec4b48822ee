"""Know which modules' forwards are running."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.autograd.function import FunctionCtx

from lightning_deadrelu.model.rectifiers import is_rectifier_module
from lightning_deadrelu.observe.provenance import Provenance


class ModuleCall:
    """One running forward: the module's path, and how often each untraced rectifier was called in it."""

    __slots__ = ("calls", "module", "path", "paths")

    def __init__(self, path: str, module: nn.Module) -> None:
        self.path = path
        self.module = module
        self.paths: tuple[str, ...] = ()  # of all that run around it and its own, once somebody asked
        self.calls: dict[str, int] | None = None

    def owned(self, producers: frozenset[str]) -> tuple[str, ...]:
        """List the producers that are parameters of this module or of one inside it."""
        prefix = f"{self.path}." if self.path else ""
        return tuple(sorted(name for name in producers if name.startswith(prefix)))

    def has_weights(self) -> bool:
        """Whether this is a layer or a block of layers, and no mere activation."""
        return not is_rectifier_module(self.module) and next(self.module.parameters(), None) is not None

    def is_passed_by(self, lineage: Provenance) -> bool:
        """Whether a stream comes in from several layers outside: which ones, differs where layers are skipped."""
        return lineage.joined and bool(self.path) and not self.owned(lineage.producers)

    def number(self, owner: str) -> str:
        """Number the calls of one owner, for want of better."""
        self.calls = self.calls or {}
        self.calls[owner] = self.calls.get(owner, -1) + 1
        return f"#{self.calls[owner]}"


class CallStack(list[ModuleCall]):
    """The forwards that are running, the innermost last."""

    @property
    def path(self) -> str:
        """Path of the innermost module; empty outside of all."""
        return self[-1].path if self else ""

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of all modules, the outermost first."""
        if not self:
            return ()
        innermost = self[-1]
        if not innermost.paths:
            innermost.paths = tuple([call.path for call in self])
        return innermost.paths

    def back_to(self, module: nn.Module) -> ModuleCall | None:
        """Drop the forwards inside a module's, which an error left behind; None if the module's own is not running."""
        if self and self[-1].module is module:
            return self[-1]
        place = next((n for n in reversed(range(len(self))) if self[n].module is module), None)
        if place is None:
            return None
        del self[place + 1 :]
        return self[place]

    def leave(self, module: nn.Module) -> ModuleCall | None:
        """Drop a module's forward; None if it is not running."""
        return self.pop() if self.back_to(module) else None


@lru_cache(maxsize=64)
def _code_of(function: Callable[..., Any]) -> Any:
    return getattr(inspect.unwrap(function), "__code__", None)


def in_forward(model: nn.Module) -> bool:
    """Whether the model's own forward is running: a hinge in ``training_step`` is a loss, not a layer."""
    code, frame = _code_of(type(model).forward), inspect.currentframe()
    while frame is not None:
        if frame.f_code is code:
            return True
        frame = frame.f_back
    return False


def in_autograd_function() -> bool:
    """Whether the forward of a function of autograd is running, which torch calls without gradients (checkpoints)."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "forward" and isinstance(frame.f_locals.get("ctx"), FunctionCtx):
            return True
        frame = frame.f_back
    return False


def may_be_fused(module: nn.Module) -> bool:
    """Whether PyTorch runs a module as one kernel where nothing looks."""
    fusible = isinstance(module, (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention))
    return fusible and not module.training and not torch.is_grad_enabled()
