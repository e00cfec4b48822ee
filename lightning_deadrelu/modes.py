"""Step in and out of torch's global states without a trace."""

from __future__ import annotations

import re
import sys
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode

_GLOBAL_HOOKS = re.compile(r"Using `torch\.compile\(module\)` when there are global hooks")


class EagerCompiler:
    """Run compiled code eagerly between :meth:`pause` and :meth:`resume`; each may be called again.

    Several may be paused at a time, in any order; the last to resume goes back to what was before the first.
    """

    _stance: ClassVar[AbstractContextManager[None] | None] = None
    _paused: ClassVar[set[int]] = set()

    def __init__(self) -> None:
        self._silence: Any = None

    def pause(self) -> None:
        """Run eagerly what is compiled."""
        if "torch._dynamo" not in sys.modules or id(self) in self._paused:
            return
        if not self._paused:
            EagerCompiler._stance = torch.compiler.set_stance("force_eager")
        self._paused.add(id(self))
        # that our hooks see `OptimizedModule` too does no harm: it is not among the model's modules
        # put in by hand, because the official way would let every warning of the program show once more
        self._silence = ("ignore", _GLOBAL_HOOKS, Warning, None, 0)
        warnings.filters.insert(0, self._silence)

    def resume(self) -> None:
        """Go back to what was before."""
        if id(self) not in self._paused:
            return
        self._paused.discard(id(self))
        if not self._paused and self._stance is not None:
            self._stance.__exit__(None, None, None)
            EagerCompiler._stance = None
        if self._silence in warnings.filters:
            warnings.filters.remove(self._silence)


def no_caching_modes() -> AbstractContextManager[Any]:
    """Hide from selective checkpointing, which replays in backward just the operations it saw in forward."""
    if torch._C._len_torch_dispatch_stack() == 0:
        return nullcontext()
    from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

    caching = any("Cach" in type(mode).__name__ for mode in _get_current_dispatch_mode_stack())
    return _disable_current_modes() if caching else nullcontext()


def remove_mode(mode: TorchFunctionMode) -> None:
    """Take a mode off the stack, wherever others were entered meanwhile."""
    above = []
    while mode in _get_current_function_mode_stack():
        if (top := _pop_mode()) is not mode:
            above.append(top)
    for other in reversed(above):
        _push_mode(other)
