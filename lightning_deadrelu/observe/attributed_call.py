"""Call a function on behalf of the line that asked for it, so that its warnings go by that line and not by ours."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any

from torch.overrides import handle_torch_function

_Call = Callable[[Callable[..., Any], Sequence[Any], Mapping[str, Any]], Any]
_MOST_LINES = 10_000  # more than a program has that calls torch, unless it writes itself

_call: Any = lambda func, args, kwargs: func(*args, **kwargs)  # noqa: E731 - on one line, which stands for another
_calls: dict[tuple[int, str, int], _Call] = {}


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
    if frame.f_code is handle_torch_function.__code__:  # called by the function itself, whose frame is to be left out
        frame = frame.f_back.f_back
    where = id(frame.f_globals), frame.f_code.co_filename, frame.f_lineno
    call = _calls.get(where)
    if call is None:
        if len(_calls) >= _MOST_LINES:
            _calls.clear()
        code = _call.__code__.replace(co_filename=where[1], co_firstlineno=where[2], co_name=frame.f_code.co_name)
        call = _calls[where] = FunctionType(code, frame.f_globals)  # which keeps the globals, and so their number
    return call(func, args, kwargs)
