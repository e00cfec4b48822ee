"""What an argument may be, and the error of three parts that follows: what was written, why it cannot work, a mend."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import field, fields, is_dataclass
from typing import Any, NamedTuple, NoReturn


class Argument(NamedTuple):
    """One argument of a call, as a user wrote it.

    Args:
        call: The name of the class or function.
        name: The name of the argument.
        value: What was given.

    Example:
        >>> Argument("DeadReLUMonitor", "window", 0).check_count(example=10)
        Traceback (most recent call last):
        ValueError: `DeadReLUMonitor(window=0)`: it has to be a whole number of at least 1. Try `window=10`.
    """

    call: str
    name: str
    value: Any

    def refuse(self, why: str, example: str) -> NoReturn:
        """Refuse the value.

        Args:
            why: Why it cannot work.
            example: The smallest edit that mends it, as ``"window=10"``.

        Raises:
            ValueError: Always.
        """
        raise ValueError(f"`{self.call}({self.name}={self.value!r})`: {why}. Try `{example}`.")

    def check(self, fits: bool, why: str, example: str) -> None:
        """Refuse the value unless it fits."""
        if not fits:
            self.refuse(why, example)

    def check_count(self, example: int, least: int = 1, optional: bool = False) -> None:
        """Refuse all but a whole number from ``least`` on, or None where it is optional."""
        fits = isinstance(self.value, int) and not isinstance(self.value, bool) and self.value >= least
        alternative = ", or None" if optional else ""
        why = f"it has to be a whole number of at least {least}{alternative}"
        self.check(fits or (optional and self.value is None), why, f"{self.name}={example}")

    def check_number(
        self, example: float, above: float = -math.inf, below: float = math.inf, optional: bool = False
    ) -> None:
        """Refuse all but a finite number between two limits, which are not allowed themselves, or None."""
        if optional and self.value is None:
            return
        limits = [f"above {above:g}"] * math.isfinite(above) + [f"below {below:g}"] * math.isfinite(below)
        why = f"it has to be a number {' and '.join(limits)}" if limits else "it has to be a finite number"
        self.check(self._is_number() and above < self.value < below, why, f"{self.name}={example}")

    def check_share(self, example: float) -> None:
        """Refuse all but a number from 0 to 1."""
        fits = self._is_number() and 0 <= self.value <= 1
        self.check(fits, "it is a share, from 0 to 1", f"{self.name}={example}")

    def check_flag(self) -> None:
        """Refuse all but True and False."""
        self.check(isinstance(self.value, bool), "it is a switch", f"{self.name}=True")

    def check_patterns(self) -> None:
        """Refuse all but a sequence of strings; a string alone is taken for a forgotten pair of brackets."""
        listed = isinstance(self.value, Sequence) and not isinstance(self.value, str)
        fits = listed and all(isinstance(pattern, str) for pattern in self.value)
        example = [self.value] if isinstance(self.value, str) else ["encoder.*"]
        self.check(fits, "it takes a list of patterns", f"{self.name}={example}")

    def _is_number(self) -> bool:
        return isinstance(self.value, (int, float)) and not isinstance(self.value, bool)


def checked(default: Any, check: Callable[[Argument], None]) -> Any:
    """Make a dataclass's field of a default, and of what :func:`check_fields` does to a value that is given instead."""
    return field(default=default, metadata={"check": check})


def check_fields(given: Any, call: str) -> None:
    """Check the fields of a dataclass that came with a check, in it or in a class that it is derived from.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass
        ... class Window:
        ...     steps: int = checked(10, lambda it: it.check_count(10))
        >>> check_fields(Window(0), "watch")
        Traceback (most recent call last):
        ValueError: `watch(steps=0)`: it has to be a whole number of at least 1. Try `steps=10`.
    """
    kinds = filter(is_dataclass, reversed(type(given).__mro__))
    checks = {one.name: one.metadata["check"] for kind in kinds for one in fields(kind) if "check" in one.metadata}
    for name, check in checks.items():
        check(Argument(call, name, getattr(given, name)))
