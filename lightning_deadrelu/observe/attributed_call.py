"""Call a function on behalf of the line that asked for it, so that its warnings go by that line and not by ours."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from types import CodeType, FrameType, FunctionType
from typing import Any

from torch.overrides import handle_torch_function

_MOST_PLACES = 10_000  # more than a program has that call torch, unless it writes itself

_call: Any = lambda func, args, kwargs: func(*args, **kwargs)  # noqa: E731 - on one line, which stands for another
_calls: dict[tuple[int, int], tuple[FunctionType, CodeType]] = {}
_HANDLER = handle_torch_function.__code__


def call_for_caller(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Call a function; to be called by a mode's ``__torch_function__`` alone.

    Python and torch's C++ attribute a warning to a line by the frames below the function, and a user's filters, and
    what was shown already, go by that line's module. So the frame below is one that looks like the caller's. Those
    below it are ours: a warning meant for the caller's caller goes by them.

    Args:
        func: What the mode was handed.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
    """
    frame: Any = sys._getframe(2)
    if frame.f_code is _HANDLER:  # called by the function itself, whose frame is to be left out
        frame = frame.f_back.f_back
    where = id(frame.f_code), frame.f_lasti
    known = _calls.get(where)
    if known is None or known[0].__globals__ is not frame.f_globals:
        known = _calls[where] = _call_of(frame), frame.f_code  # which is kept, and so its number
    return known[0](func, args, kwargs)


def _call_of(frame: FrameType) -> FunctionType:
    """Make a function that looks like the line at which a frame is."""
    if len(_calls) >= _MOST_PLACES:
        _calls.clear()
    code = _call.__code__.replace(
        co_filename=frame.f_code.co_filename, co_firstlineno=frame.f_lineno, co_name=frame.f_code.co_name
    )
    return FunctionType(code, frame.f_globals)
