"""Draw new units that fire, and that fire where their layer is silent. Pure."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_deadrelu.remedies.base import Law

_LEAST_SHARE, _MOST_SHARE = 0.1, 0.9
_FEW = 0.02  # of the samples; a layer that leaves no more uncovered has no gap to fill
_MARGIN = 1e-3  # of the spread, by which the quantile itself fires


def choose(
    inputs: Tensor, weight: Tensor, bias: Tensor | None, units: Tensor, law: Law, tries: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw incoming weights and biases of some units of a linear layer, looking at its inputs.

    Each new unit is the best of ``tries`` draws: weights from ``law``, and a bias with which it fires on a share of
    the inputs drawn from 0.1 to 0.9. The best fires on most of the inputs for which the layer's other units are all
    silent; where there are hardly any, the first draw is as good as all others.

    Args:
        inputs: Of the layer, shape ``(rows, features)``.
        weight: The layer's present weight, shape ``(units, features)``.
        bias: Its bias, shape ``(units,)``; None where it has none, and none is chosen.
        units: Which units to draw, boolean, shape ``(units,)``.
        law: What weights are drawn from.
        tries: Draws for each unit.
        generator: A CPU generator.

    Returns:
        The new weights, shape ``(drawn, features)``, and biases, shape ``(drawn,)``, in the order of the units.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> inputs = torch.tensor([[1.0], [-1.0]])
        >>> fires_on_one_side = torch.tensor([[1.0], [0.0]])
        >>> second, law = torch.tensor([False, True]), Law(0, 1, False)
        >>> new, _ = choose(inputs, fires_on_one_side, None, second, law, 8, generator)
        >>> bool(new < 0)
        True
    """
    inputs = inputs.detach().cpu().double()
    fires = inputs @ weight.detach().cpu().double().T + (0 if bias is None else bias.detach().cpu().double()) > 0
    fires[:, units] = False
    weights, biases = [], []
    for unit in units.nonzero().flatten().tolist():
        drawn = law.draw(inputs.new_empty(tries, inputs.shape[1]), generator).double()
        shares = _LEAST_SHARE + (_MOST_SHARE - _LEAST_SHARE) * torch.rand(tries, generator=generator).double()
        z = inputs @ drawn.T
        shift = torch.zeros(tries).double() if bias is None else _shift(z, shares)
        best = int(_score(z + shift > 0, fires).argmax())
        fires[:, unit] = z[:, best] + shift[best] > 0
        weights.append(drawn[best])
        biases.append(shift[best])
    return torch.stack(weights), torch.stack(biases)


def _shift(z: Tensor, shares: Tensor) -> Tensor:
    """Lift each column so that its share of the rows is above 0."""
    places = ((1 - shares) * (len(z) - 1)).long()
    spread = z.std(0, correction=0)
    return _MARGIN * torch.where(spread > 0, spread, 1.0) - z.sort(0).values.gather(0, places[None])[0]


def _score(candidates: Tensor, fires: Tensor) -> Tensor:
    """Score each candidate by what it covers of the rows on which the layer is silent."""
    gap = ~fires.any(1)
    share = candidates.double().mean(0)
    if gap.double().mean() > _FEW:
        return candidates[gap].double().mean(0)
    return ((share >= _LEAST_SHARE) & (share <= _MOST_SHARE)).double()
