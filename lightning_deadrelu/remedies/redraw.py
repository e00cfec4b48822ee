"""Draw new units that fire, and that fire where their layer is silent. Pure."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_deadrelu.remedies.base import InitDistribution

_MOST_NUMBERS = 2**22  # that are drawn, or looked at, at a time
_LEAST_SHARE, _MOST_SHARE = 0.1, 0.9
_FEW = 0.02  # of the samples; a layer that leaves no more uncovered has no gap to fill
_MARGIN = 1e-3  # of the spread, by which the quantile itself fires


def choose(
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    units: Tensor,
    law: InitDistribution,
    tries: int,
    generator: torch.Generator,
    hinge: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Draw incoming weights and biases of some units of a linear layer, looking at its inputs.

    Each new unit is the best of ``tries`` draws: weights from ``law``, and a bias with which it fires on a share of
    the inputs drawn from 0.1 to 0.9. The best fires on most of the inputs for which the layer's other units are all
    silent. Where there are hardly any, the first draw is as good as all others, and no others are made; a layer without
    bias takes the first that fires on such a share.

    Args:
        inputs: Of the layer, shape ``(rows, features)``.
        weight: The layer's present weight, shape ``(units, features)``.
        bias: Its bias, shape ``(units,)``; None where it has none, and none is chosen.
        units: Which units to draw, boolean, shape ``(units,)``.
        law: What weights are drawn from.
        tries: Draws for each unit.
        generator: A CPU generator.
        hinge: What a unit's input has to exceed to fire.

    Returns:
        The new weights, shape ``(drawn, features)``, and biases, shape ``(drawn,)``, in the order of the units, in
        single precision.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> inputs = torch.tensor([[1.0], [-1.0]])
        >>> fires_on_one_side = torch.tensor([[1.0], [0.0]])
        >>> second, law = torch.tensor([False, True]), InitDistribution(0, 1, False)
        >>> new, _ = choose(inputs, fires_on_one_side, None, second, law, 8, generator)
        >>> bool(new < 0)
        True
    """
    inputs = inputs.detach().cpu().float()
    gap = _gap(inputs, weight, bias, ~units.cpu(), hinge)
    total, done = int(units.sum()), 0
    weights, biases = inputs.new_empty(total, inputs.shape[1]), inputs.new_zeros(total)
    while done < total:
        draws = 1 if bias is not None and _is_closed(gap) else tries
        block = slice(done, done := min(total, done + _fitting(draws * max(inputs.shape))))
        drawn = law.draw(inputs.new_empty(block.stop - block.start, draws, inputs.shape[1]), generator).float()
        z = drawn @ inputs.T
        shift = z.new_zeros(z.shape[:2]) if bias is None else _shift(z, generator, hinge)
        best = _best(z + shift[..., None] > hinge, gap)
        weights[block], biases[block] = drawn[best], shift[best]
    return weights, biases


def _fitting(numbers: int) -> int:
    """Tell for how many units at a time there is room."""
    return max(1, _MOST_NUMBERS // max(1, numbers))


def _gap(inputs: Tensor, weight: Tensor, bias: Tensor | None, others: Tensor, hinge: float) -> Tensor:
    """Tell on which rows a layer's other units are all silent; looks at no more of them than it takes."""
    gap = torch.ones(len(inputs), dtype=torch.bool)
    for places in others.nonzero().flatten().split(_fitting(max(inputs.shape))):
        if _is_closed(gap):
            break
        rows = places.to(weight.device)
        shift = 0.0 if bias is None else bias.detach()[rows].cpu().float()
        z = inputs[gap] @ weight.detach()[rows].cpu().float().T + shift
        gap[gap.clone()] = ~(z > hinge).any(1)
    return gap


def _is_closed(gap: Tensor) -> bool:
    return bool(gap.double().mean() <= _FEW)


def _shift(z: Tensor, generator: torch.Generator, hinge: float) -> Tensor:
    """Lift each draw so that it is above the hinge on a share of the rows."""
    shares = _LEAST_SHARE + (_MOST_SHARE - _LEAST_SHARE) * torch.rand(z.shape[:2], generator=generator).to(z)
    places = ((1 - shares) * (z.shape[2] - 1)).long()
    spread = z.std(2, correction=0)
    margin = _MARGIN * torch.where(spread > 0, spread, 1.0)
    return hinge + margin - z.sort(2).values.gather(2, places[..., None])[..., 0]


def _best(fires: Tensor, gap: Tensor) -> tuple[Tensor, Tensor]:
    """Find the best draw of each unit, one unit after the other, and take from the gap what it covers.

    Args:
        fires: Which draws fire where, shape ``(units, draws, rows)``.
        gap: Rows on which the layer is silent, changed in place until it is as good as closed.

    Returns:
        The index of the best draws in the first two dimensions.
    """
    share = fires.double().mean(2)
    best = ((share >= _LEAST_SHARE) & (share <= _MOST_SHARE)).int().argmax(1)
    for unit, draws in enumerate(fires):
        if _is_closed(gap):
            break
        best[unit] = draws[:, gap].sum(1).argmax()
        gap &= ~draws[best[unit]]
    return torch.arange(len(fires)), best
