"""Measure how far inputs are from centred, and whether they are indicators (one-hot features). Pure."""

from __future__ import annotations

from torch import Tensor

INDICATORS = 0.5
"""From this share of indicators on, centring is no standard practice, and dividing by deviations does harm."""


def mean_over_deviation(rows: Tensor) -> Tensor:
    """Divide the size of the mean by that of the deviation from it, shape ``()``.

    Args:
        rows: Shape ``(rows, ...)``.

    Example:
        >>> import torch
        >>> mean_over_deviation(torch.tensor([[3.0, -3.0], [5.0, -5.0]]))
        tensor(4.)
    """
    mean = rows.mean(0)
    deviation = (rows - mean).square().mean(0).sum().sqrt()
    return mean.square().sum().sqrt() / deviation


def indicator_share(rows: Tensor) -> Tensor:
    """Return the share of indicators, which are 0 or 1, among the features that vary, shape ``()``; no host sync.

    Args:
        rows: Shape ``(rows, ...)``.

    Example:
        >>> import torch
        >>> indicator_share(torch.tensor([[0.0, 1.0, 0.5, 7.0], [1.0, 0.0, 0.1, 7.0]]))
        tensor(0.6667)
    """
    varies = (rows != rows[:1]).any(0)
    indicates = ((rows == 0) | (rows == 1)).all(0)
    return (varies & indicates).sum() / varies.sum().clamp(min=1)
