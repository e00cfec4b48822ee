"""Where a padding mask comes from, and how it is laid over a rectifier's input; what is counted leaves padding out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_deadrelu.observe.torch_modes import unseen_by_modes

_EXAMPLE = 'Return booleans, True for data: `mask=lambda batch: batch["attention_mask"].bool()`.'


def mask_of(batch: Any, mask: Callable[[Any], Tensor | None], *, first: bool = True) -> Tensor | None:
    """Tell data from padding: True for data, shape ``(batch, time)``; None where all is data.

    Args:
        batch: The batch.
        mask: The user's function.
        first: Whether to look at values too, for which a device has to be waited for.

    Raises:
        TypeError: If ``mask`` returns something else.
    """
    with unseen_by_modes():
        valid = mask(batch)
        if valid is None:
            return None
        if not isinstance(valid, Tensor) or valid.ndim != 2:
            got = f"shape {tuple(valid.shape)}" if isinstance(valid, Tensor) else type(valid).__name__
            raise TypeError(f"it returned {got}, where only a value for each (batch, time) tells data. {_EXAMPLE}")
        if first and valid.dtype != torch.bool and not ((valid == 0) | (valid == 1)).all():
            why = f"it returned {valid.dtype} values other than 0 and 1, which do not tell data from padding"
            raise TypeError(f"{why} (0 and -inf are scores to be added). {_EXAMPLE}")
        return valid.bool()


def over_rows(valid: Tensor, x: Tensor, dims: tuple[int, ...]) -> Tensor | None:
    """Give a padding mask the shape of the rows of a rectifier's input; None where it does not speak of them.

    Args:
        valid: The mask, shape ``(batch, time)``.
        x: The input.
        dims: The dimensions that hold the units, counted from the end.

    Example:
        >>> over_rows(torch.ones(2, 3), torch.zeros(6, 5), (-1,)).shape
        torch.Size([6])
    """
    if dims != (-1,):
        return None
    if x.shape[:-1] == valid.shape:
        return valid
    return valid.flatten() if x.shape[:-1] == (valid.numel(),) else None
