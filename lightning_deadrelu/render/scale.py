"""Where the marks of an axis stand, and what colour a share has."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

UNKNOWN = (140, 140, 140)
_SHARES = (0.0, 1e-9, 0.1, 0.5, 1.0)  # any at all is told from none
_SHADES = ((226, 237, 243), (251, 224, 189), (244, 178, 106), (213, 94, 0), (94, 30, 0))


def round_ticks(low: float, high: float, most: int = 8) -> list[float]:
    """Choose round numbers in a range: multiples of 1, 2 or 5 times a power of ten; whole ones between whole ones.

    Example:
        >>> round_ticks(49, 1999), round_ticks(0, 0.5, 5), round_ticks(7, 7)
        ([500, 1000, 1500], [0.0, 0.2, 0.4], [7])
    """
    if high <= low:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(power * each for each in (1, 2, 5, 10, 20) if (high - low) / (power * each) <= most - 1)
    step = max(step, 1.0) if isinstance(low, int) and isinstance(high, int) else step
    ticks = [step * number for number in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)]
    return [round(tick) if step >= 1 else tick for tick in ticks]


def shades_of(shares: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Turn shares into colours, the larger the darker, and grey where not a number.

    Args:
        shares: Of any shape.

    Returns:
        Red, green and blue behind that shape, uint8.

    Example:
        >>> shades_of(np.array([0.0, 0.5, np.nan])).tolist()
        [[226, 237, 243], [213, 94, 0], [140, 140, 140]]
    """
    known = np.nan_to_num(shares)
    channels = [np.interp(known, _SHARES, [shade[channel] for shade in _SHADES]) for channel in range(3)]
    shades = np.stack(channels, -1).round().astype(np.uint8)
    shades[np.isnan(shares)] = UNKNOWN
    return shades
