"""Step in and out of torch's global states without a trace."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.modules import module
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

set_grad_enabled: Callable[[bool], None] = torch._C._set_grad_enabled
"""What ``torch.no_grad()`` calls, without what it does around it."""
unseen_by_modes: Callable[[], AbstractContextManager[None]] = torch._C.DisableTorchFunction
"""Hides what is done from function modes, which would take it for the model's; the official one is for subclasses."""
_GLOBAL_HOOKS = re.compile(r"Using `torch\.compile\(module\)` when there are global hooks")


class EagerCompiler:
    """Run compiled code eagerly, or with a backend that watches, between :meth:`pause` and :meth:`resume`.

    Each may be called again. Several may be paused at a time, in any order: then all run eagerly. The last to resume
    goes back to what was before the first.
    """

    _before: ClassVar[Any] = None  # what `set_stance` returned to the first
    _paused: ClassVar[dict[EagerCompiler, Callable[[], None]]] = {}

    def __init__(self) -> None:
        self._silence: Any = None

    def pause(self, backend: Callable[..., Any] | None = None, displaced: Callable[[], None] = lambda: None) -> bool:
        """Run eagerly what is compiled, or with a backend, and tell whether it is the backend.

        Args:
            backend: Compiles in place of every region's own, as long as nobody else is paused.
            displaced: Called when somebody else is.
        """
        if "torch._dynamo" not in sys.modules or self in self._paused:
            return False
        alone = not self._paused
        for others in self._paused.values():
            others()
        forced = backend if alone and _compiles() else None
        chosen = {"stance": "force_eager"} if forced is None else {"force_backend": forced}
        change = torch.compiler.set_stance(**chosen)
        if alone:
            EagerCompiler._before = change
        self._paused[self] = displaced
        # that our hooks see `OptimizedModule` too does no harm: it is not among the model's modules
        # put in by hand, because the official way would let every warning of the program show once more; to go once
        # torch no longer warns of global hooks on each call of a compiled module (2.13 still does)
        self._silence = ("ignore", _GLOBAL_HOOKS, Warning, None, 0)
        warnings.filters.insert(0, self._silence)
        return forced is not None

    def resume(self) -> None:
        """Go back to what was before."""
        if self not in self._paused:
            return
        del self._paused[self]
        if not self._paused and self._before is not None:
            self._before.__exit__(None, None, None)
            EagerCompiler._before = None
        if self._silence in warnings.filters:
            warnings.filters.remove(self._silence)

    @classmethod
    @contextmanager
    def as_before(cls) -> Iterator[None]:
        """Compile for a while as before the first was paused."""
        from torch._dynamo.eval_frame import _set_stance  # the official one cannot go back to a stance that it left

        ours = _set_stance(cls._before.prev) if cls._before is not None else None
        try:
            yield
        finally:
            if ours is not None:
                _set_stance(ours)


def _compiles() -> bool:
    """Whether nobody has told the compiler to do anything but compile."""
    from torch._dynamo import eval_frame

    stance = getattr(eval_frame, "_stance", None)
    return getattr(stance, "stance", "") == "default" and getattr(stance, "backend", "") is None


def has_dispatch_modes() -> bool:
    """Tell whether any mode sees the operations that functions are made of."""
    return torch._C._len_torch_dispatch_stack() > 0


def no_caching_modes() -> AbstractContextManager[Any]:
    """Hide from selective checkpointing, which replays in backward just the operations it saw in forward."""
    if not has_dispatch_modes():
        return nullcontext()
    from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

    caching = any("Cach" in type(mode).__name__ for mode in _get_current_dispatch_mode_stack())
    return _disable_current_modes() if caching else nullcontext()


is_transformed: Callable[[Tensor], bool] = torch._C._functorch.is_functorch_wrapped_tensor
"""Tells whether a tensor is one of ``torch.func``'s, whose values stand for a whole batch's; its type is `Tensor`."""
push_mode: Callable[[TorchFunctionMode], None] = torch._C._push_on_torch_function_stack
"""Puts a mode on the stack; a ``with`` statement would take it off in order, and others may be entered meanwhile."""
_pop_mode: Callable[[], TorchFunctionMode] = torch._C._pop_torch_function_stack
backward_number: Callable[[], int] = torch._C._current_graph_task_id
"""Numbers the backward that is running, -1 if none is; autograd tells it to nobody else."""
backward_hooks: Mapping[int, Any] = module._global_backward_hooks
"""Backward hooks that are there for all modules."""
backward_pre_hooks: Mapping[int, Any] = module._global_backward_pre_hooks
"""The same of those that run before a module's backward."""
tracing_state: Callable[[], Any] = torch._C._get_tracing_state
"""Returns the state of ``torch.jit.trace``, to which all that is computed is code; None if that does not run.

The official way takes two calls more.
"""


def recomputes() -> bool:
    """Tell whether this is a forward that is run again within backward."""
    return backward_number() != -1


def shares_memory(tensor: Tensor, other: Tensor) -> bool:
    """Tell whether one tensor is a view of the other; addresses would not tell it of tensors without data."""
    return bool(torch._C._is_alias_of(tensor, other))


def plain_tensor(x: Tensor) -> Tensor | None:
    """Detach a tensor that is what it seems to be; None for nested, sparse and otherwise wrapped ones."""
    if x.is_nested or x.layout is not torch.strided or is_transformed(x):
        return None
    if type(x) is not Tensor and type(x) is not torch.nn.Parameter:
        if type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__:
            return None
        x = x.as_subclass(Tensor)
    return x.detach()


class WithoutGradients:
    """Do without gradients what happens at each step, in a fifth of the calls that ``torch.no_grad()`` makes.

    Example:
        >>> with WithoutGradients():
        ...     torch.is_grad_enabled()
        False
    """

    __slots__ = ("_before",)

    def __enter__(self) -> None:
        self._before = torch.is_grad_enabled()
        set_grad_enabled(False)

    def __exit__(self, *error: object) -> None:
        set_grad_enabled(self._before)


def remove_mode(mode: TorchFunctionMode) -> None:
    """Take a mode off the stack, wherever others were entered meanwhile."""
    above = []
    while mode in _get_current_function_mode_stack():
        if (top := _pop_mode()) is not mode:
            above.append(top)
    for other in reversed(above):
        push_mode(other)


def pop_mode(mode: TorchFunctionMode) -> bool:
    """Take a mode off the stack if it is the last that was pushed, and tell whether it was."""
    size = torch._C._len_torch_function_stack()
    if not size or torch._C._get_function_stack_at(size - 1) is not mode:
        return False
    _pop_mode()
    return True


def holds_another(kind: type[TorchFunctionMode]) -> bool:
    """Tell within a mode whether one of a kind is still to see the call that is being made."""
    if not torch._C._len_torch_function_stack():  # as at almost every call; to list them takes longer
        return False
    return any(isinstance(mode, kind) for mode in _get_current_function_mode_stack())


def innermost_backend(callback: Any) -> Any:
    """Unwrap the backend that a compiled function is called with, which torch 2.9 has no function for."""
    while hasattr(callback, "_torchdynamo_orig_backend"):
        callback = callback._torchdynamo_orig_backend
    return callback
