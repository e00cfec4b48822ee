"""Bounds of the probability that a narrow and deep net is born dead. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence


def born_dead_bounds(widths: Sequence[int], *, inputs: int | None = None, bias: bool = True) -> tuple[float, float]:
    """Bound the probability that a ReLU net is born dead: constant in its inputs, from the first step to the last.

    Both bounds are Lu et al.'s (2020, arXiv 1903.06733), for a plain chain of layers, weights that are independent
    and symmetric about 0 (He, Xavier, PyTorch's own), and biases that are 0 or symmetric too. The upper bound,
    1 - prod(1 - 2^-N) over the widths N, is the exact probability that some hidden layer is silent at one given input.
    The lower bound is proved for nets of one input, without biases, and with hidden layers of one width; it is 0 for
    others. Against 1 % for ``L`` layers: N of at least ``log2(100 * L)``.

    Args:
        widths: The widths of the hidden layers.
        inputs: The number of inputs, if known.
        bias: Whether biases are drawn; False if they are 0, or there are none.

    Returns:
        The lower and the upper bound.

    Raises:
        ValueError: If there is no hidden layer, or one without units.

    Example:
        >>> lower, upper = born_dead_bounds([2] * 9, inputs=1, bias=False)
        >>> round(lower, 4), round(upper, 4)
        (0.8703, 0.9249)
    """
    if not widths or min(widths) < 1:
        raise ValueError(f"`widths={list(widths)}`: every hidden layer has at least 1 unit. Try `widths=[64, 64]`.")
    upper = 1 - math.prod(1 - 2.0**-width for width in widths)
    if inputs != 1 or bias or len(set(widths)) > 1:
        return 0.0, upper
    n, more = widths[0], len(widths) - 1
    silent = 1 - 2.0**-n
    mixed = 1 - 2.0 ** (1 - n) - (n - 1) * 4.0**-n
    share = (1 - 2.0 ** (1 - n)) * silent / (1 + (n - 1) * 2.0**-n)
    return 1 - silent**more + share * (mixed**more - silent**more), upper
