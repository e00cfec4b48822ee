"""Keep a failure of ours from becoming a failure of the user's training run."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


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


class RankFailure(RuntimeError):
    """Some rank has failed; raised on all ranks together, on that one from its own error."""


class Guard:
    """Takes failures, and says the first, on the rank that it is of.

    Args:
        clean_up: Called after each failure.
        say: Called with the first.
        reunite: Called once on all ranks, when they learn that one has failed.
        but: Kinds that are raised all the same.

    Example:
        >>> guard = Guard(lambda: None, print)
        >>> with guard():
        ...     raise ValueError("a bug")
        a bug
        >>> guard.failure
        ValueError('a bug')
    """

    def __init__(
        self,
        clean_up: Callable[[], None],
        say: Callable[[Exception], None],
        reunite: Callable[[], None] = lambda: None,
        but: tuple[type[Exception], ...] = (),
    ) -> None:
        self._clean_up, self._say, self._reunite = clean_up, say, reunite
        self.but = but
        """Kinds that are raised all the same."""
        self.failure: Exception | None = None
        """The first failure; None while all is well."""
        self.ended = False
        """Whether all ranks know that one has failed."""

    def __call__(self) -> AbstractContextManager[None]:
        """Guard a block."""
        return guarded(self.fail, but=self.but)

    def fail(self, error: Exception) -> None:
        """Take a failure."""
        with guarded(lambda again: None):  # it may be what has failed
            self._clean_up()
        joint = isinstance(error, RankFailure)
        if joint and not self.ended:
            self.ended = True
            self._reunite()
        if self.failure is None:
            self.failure = error
            own = error.__cause__ if joint else error
            if isinstance(own, Exception):
                self._say(own)


class HasGuard(Protocol):
    """What :func:`unless_failed` asks of an object."""

    guard: Guard


S = TypeVar("S", bound=HasGuard)


def unless_failed(method: Callable[Concatenate[S, P], T]) -> Callable[Concatenate[S, P], T | None]:
    """Have a method do nothing once there was a failure, and guard it until then; None stands for no result."""

    @wraps(method)
    def attempt(self: S, /, *args: P.args, **kwargs: P.kwargs) -> T | None:
        guard = self.guard
        if guard.failure is None:
            try:  # not `with guard()`: several of these run at each batch, and it takes longer
                return method(self, *args, **kwargs)
            except guard.but:
                raise
            except Exception as error:
                guard.fail(error)
        return None

    return attempt


def why_it_ends(error: Exception) -> str:
    """Say that a monitor has failed, and where.

    Example:
        >>> print(why_it_ends(ValueError("a bug")))
        the monitor failed and watches no longer; training goes on.
        ValueError('a bug')
    """
    where = "".join(traceback.format_tb(error.__traceback__)[-2:])
    return f"the monitor failed and watches no longer; training goes on.\n{where}{error!r}"
