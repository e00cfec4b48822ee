"""Read the loss of a batch and some entries of its inputs, in one copy; tell whether inputs are centred."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_deadrelu.explain.centring import INDICATORS, indicator_share, mean_over_deviation
from lightning_deadrelu.explain.postmortem.subsample import subsample
from lightning_deadrelu.observe.torch_modes import WithoutGradients

INPUTS = 3
"""The first so many float tensors of a batch are looked at."""
_ENTRIES = 1024  # of an input


class BatchSample(NamedTuple):
    """What was read of a batch, just as it was read: to reduce many batches at once takes a fraction of the time.

    Args:
        values: The loss, if there is one, then entries of each input, shape ``(entries,)``.
        sizes: How many of them are the loss's (0 or 1) and each input's.
    """

    values: Tensor
    sizes: tuple[int, ...]


def sample_batch(loss: Any, batch: Any) -> BatchSample | None:
    """Copy the loss and some entries of each input, with one kernel.

    Args:
        loss: What the training step returned, if a tensor of one element.
        batch: What it was given. An input on another device than the loss is left out.

    Returns:
        The sample; None if there is nothing to read.

    Example:
        >>> sample_batch(torch.tensor(0.5), [torch.ones(8, 2), torch.tensor([7])]).sizes
        (1, 16)
    """
    with WithoutGradients():
        known = type(loss) is Tensor and loss.numel() == 1 and not loss.is_complex() and not loss.is_meta
        parts = [loss.reshape(1)] if known else []
        for x in floats_of(batch):
            if not parts or x.device == parts[0].device:
                parts.append(subsample(x, _ENTRIES))
        sizes = [part.shape[0] for part in parts]
        return BatchSample(torch.cat(parts), (*sizes,) if known else (0, *sizes)) if parts else None


@torch.no_grad()
def reduced(samples: Sequence[BatchSample]) -> list[Tensor]:
    """Return the loss and the largest absolute value of each input, for samples of the same sizes.

    Returns:
        For each sample a tensor of shape ``(1 + INPUTS,)``, float32; NaN where there is none.
    """
    values = torch.stack([sample.values for sample in samples]).float()
    loss, *inputs = values.split(samples[0].sizes, 1)
    missing = values.new_full((len(values), 1), torch.nan)
    columns = [loss if loss.shape[1] else missing, *(x.abs().amax(1, keepdim=True) for x in inputs)]
    return list(torch.cat([*columns, *[missing] * (INPUTS - len(inputs))], 1).unbind())


def floats_of(batch: Any) -> list[Tensor]:
    """Find the first float tensors of a batch."""
    if type(batch) is Tensor:
        return [batch] if _has_values(batch) else []
    return list(islice(filter(_has_values, _leaves(batch)), INPUTS))


def _has_values(x: Any) -> bool:
    """Whether this is a float tensor that can be computed with; numbers of 8 bits cannot."""
    if type(x) is not Tensor or not x.is_floating_point() or x.layout is not torch.strided or x.is_nested:
        return False
    return not x.is_meta and x.element_size() > 1 and x.numel() > 0


def _leaves(batch: Any, depth: int = 3) -> Iterator[Any]:
    inside: Iterable[Any] = ()
    if isinstance(batch, Mapping):
        inside = batch.values()
    elif isinstance(batch, (list, tuple)):
        inside = batch
    else:
        yield batch
    if depth:
        for one in islice(inside, 8):
            yield from _leaves(one, depth - 1)


@torch.no_grad()
def off_centre(batch: Any) -> Tensor | None:
    """Divide the size of the inputs' mean by that of their deviation from it.

    Args:
        batch: A batch; its first float tensor is the input, with samples along dim 0.

    Returns:
        Shape ``()``; NaN for indicators (one-hot features), and None without an input of two rows.

    Example:
        >>> off_centre(torch.tensor([[3.0, -3.0], [5.0, -5.0]]))
        tensor(4.)
    """
    x = next((x for x in floats_of(batch) if x.ndim > 1 and len(x) > 1), None)
    if x is None:
        return None
    rows = x.float()
    ratio = mean_over_deviation(rows)
    return torch.where(indicator_share(rows) < INDICATORS, ratio, torch.nan)
