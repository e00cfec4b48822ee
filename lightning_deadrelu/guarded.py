"""Keep a failure of ours from becoming a failure of the user's training run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def guarded(on_error: Callable[[Exception], None], *, but: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Hand an exception to a function instead of raising it.

    Args:
        on_error: Called with the exception.
        but: Kinds that are raised all the same.

    Example:
        >>> with guarded(print):
        ...     raise ValueError("a shape does not fit")
        a shape does not fit
    """
    try:
        yield
    except but:
        raise
    except Exception as error:
        on_error(error)
