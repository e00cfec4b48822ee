"""Call operators that take functions (``torch.cond``, ``scan``, ``flex_attention``) as they are called unwatched.

Torch compiles each such call, because only a compiler sees what the functions use from around them: run eagerly, these
tensors get no gradient.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from torch._ops import HigherOrderOperator  # the official name is for exporters alone

from lightning_deadrelu.observe.torch_modes import EagerCompiler, innermost_backend

_FRONT_ENDS = ("_higher_order_ops", "flex_attention.py")
_NOT_LAYERS = frozenset({"flex_attention"})
"""Operators whose functions score pairs, and rectify no unit."""
_ARGUMENTS = {"flex_attention": 7}
"""Operators that add arguments to those of their front end, which the compiler refuses; and how many these are."""


def is_operator(func: Callable[..., Any]) -> bool:
    """Tell whether a function is an operator that takes functions."""
    return isinstance(func, HigherOrderOperator)


def backends_around(func: Callable[..., Any]) -> list[Any]:
    """List whom a call would be compiled by, the innermost first; empty if it is none of an operator's front end.

    Args:
        func: What is called.
    """
    if not is_operator(func):
        return []
    regions = list(_regions(sys._getframe(1)))
    return [backend for _, backend in regions] if regions and regions[0][0] else []


def _regions(frame: FrameType | None) -> Iterator[tuple[bool, Any]]:
    """Find the calls of compiled functions that are running: whether torch itself compiles, and with what."""
    from torch._dynamo import eval_frame

    while frame is not None:
        if frame.f_code.co_name == "compile_wrapper" and frame.f_code.co_filename == eval_frame.__file__:
            caller = frame.f_back.f_code.co_filename if frame.f_back else ""
            yield any(name in caller for name in _FRONT_ENDS), innermost_backend(frame.f_locals["callback"])
        frame = frame.f_back


def call_compiled(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], backend: Any) -> Any:
    """Call an operator compiled, while compiled code runs eagerly."""

    def call_operator(*args: Any, **kwargs: Any) -> Any:  # the compiler asks for plain code
        return func(*args, **kwargs)

    with EagerCompiler.as_before():
        own = args[: _ARGUMENTS.get(func.__name__)]
        return torch.compile(call_operator, backend=backend, fullgraph=True)(*own, **kwargs)


def why_unwatched(name: str) -> str:
    """Say why rectifiers in an operator's functions are not watched; empty if there are none."""
    return "" if name in _NOT_LAYERS else f"`{name.removesuffix('_impl')}` runs what it is given compiled, out of sight"
