"""Shares with their uncertainty, as the benchmarks print them."""

from __future__ import annotations

import math
from collections.abc import Sequence

Z = 1.959964  # two-sided 95 %
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145)
T = dict(enumerate(_STUDENT, 2))  # by number of seeds


def wilson(hits: int, number: int) -> tuple[float, float]:
    """Bound a share at 95 % confidence, also where all or none are hits (Wilson 1927).

    Example:
        >>> low, high = wilson(0, 300)
        >>> low, round(high, 4)
        (0.0, 0.0126)
    """
    share, spread = hits / number, Z * Z / number
    half = Z * math.sqrt(share * (1 - share) / number + spread / number / 4)
    low, high = (share + spread / 2 - half) / (1 + spread), (share + spread / 2 + half) / (1 + spread)
    return max(low, 0.0) if hits else 0.0, min(high, 1.0)


def share(hits: int, number: int) -> str:
    """Print a share of independent runs with its interval."""
    low, high = wilson(hits, number)
    return f"{hits / number:.1%} [{low:.1%}, {high:.1%}]"


def mean(values: Sequence[float]) -> str:
    """Print the mean over seeds with its 95 % interval (Student's t); nothing where one of them has no value."""
    if any(map(math.isnan, values)):
        return ""
    average = sum(values) / len(values)
    if len(values) < 2:
        return f"{average:.1%}"
    std = math.sqrt(sum((value - average) ** 2 for value in values) / (len(values) - 1))
    return f"{average:.1%} ±{T.get(len(values), Z) * std / math.sqrt(len(values)):.1%}"
