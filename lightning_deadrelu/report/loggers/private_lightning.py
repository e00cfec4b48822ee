"""What Lightning keeps to itself, and has no public name for: read here alone, each with a value for want of it."""

from __future__ import annotations

from typing import TypeVar

T = TypeVar("T")


def read_private(owner: object, name: str, otherwise: T) -> T:
    """Read a private attribute of one of Lightning's objects."""
    found: T = getattr(owner, name, otherwise)
    return found
