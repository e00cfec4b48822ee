"""Warn at a line of the user's, where filters and editors look for it."""

from __future__ import annotations

import sys
import warnings

from lightning_deadrelu.progress import beside_bars

_BETWEEN = frozenset(
    {"lightning_deadrelu", "lightning", "pytorch_lightning", "lightning_utilities", "torch", "contextlib"}
)


def warn(text: str) -> None:
    """Warn at the innermost line that is neither ours nor of Lightning and torch: that of ``trainer.fit``, say.

    Example:
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     warn("no logger")
        >>> caught[0].message
        UserWarning('no logger')
    """
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _BETWEEN:
        frame, level = frame.f_back, level + 1
    with beside_bars():
        warnings.warn(text, stacklevel=level)
