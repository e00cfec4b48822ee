"""Which of the parameters that feed a dead unit are raised, and by how much. Pure."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_deadrelu.model.slices import Slice
from lightning_deadrelu.remedies.base import NotApplicable, SiteView, Write


def raised(view: SiteView, height: Tensor) -> tuple[Write, ...]:
    """Say what to add to the parameters that feed some units, so that their inputs rise by a given height.

    What is low is raised. Where a norm stands before the rectifier, that is its shift: on average its other inputs are
    zero. Where a linear layer alone feeds the site, bias and weights share the height in proportion to how far each of
    them lies below the median live unit's; the weights are raised along the layer's mean input, which is the direction
    in which a bad batch pushes them down. Elsewhere it is the bias.

    Args:
        view: The site.
        height: Of each unit, shape ``(units,)``, in units of the rectifier's input; 0 for units that are left alone.

    Returns:
        What is added to which entries.

    Raises:
        NotApplicable: Nothing that feeds the site can raise its units.

    Example:
        >>> from lightning_deadrelu.attribution.result import Attribution
        >>> bias = Slice("fc.bias", "bias", torch.arange(2), torch.arange(2)[:, None], (0,))
        >>> report, nan = None, torch.full((11, 2), torch.nan)
        >>> view = SiteView(report, torch.ones(2) > 0, Attribution((bias,)), {"fc.bias": torch.zeros(2)}, {}, nan)
        >>> raised(view, torch.tensor([0.0, 3.0]))[0].values
        tensor([3.], dtype=torch.float64)
    """
    units, height = height > 0, height.double()
    bias = _last_added(view)
    share = torch.zeros_like(height) if view.inputs is None else _share_of_weights(view, view.inputs, bias)
    writes = []
    if bias is not None:
        rows = bias.of(units)
        writes.append(Write(rows, _shaped(((1 - share) * height)[rows.units], rows.read(view.values[rows.name]))))
    if view.inputs is not None and bool((share[units] > 0).any()):
        mean = view.inputs.double().mean(0)
        rows = _weight(view).of(units & (share > 0))
        writes.append(Write(rows, torch.outer((share * height)[rows.units], mean / mean.square().sum())))
    if not any(len(write.slice.index) for write in writes):
        raise NotApplicable(
            "neither a bias nor a norm's shift is added to its inputs, nor does a linear layer alone feed it;"
            " `WakeUp()` needs none of these"
        )
    return tuple(write for write in writes if len(write.slice.index))


def _last_added(view: SiteView) -> Slice | None:
    """Find the bias or shift that is added last; a norm without a shift takes off again what is added before it."""
    roles = [one.role for one in view.attribution.incoming]
    bias = view.attribution.bias
    if bias is None or ("mean" in roles[len(roles) - roles[::-1].index(bias.role) :] and bias.role == "bias"):
        return None
    return bias


def _share_of_weights(view: SiteView, inputs: Tensor, bias: Slice | None) -> Tensor:
    """Tell the share of the height that the weights are to bring, shape ``(units,)``, from 0 (all is the bias's)."""
    mean = inputs.double().mean(0)
    units = len(view.units)
    if not mean.any():
        return torch.zeros(units, dtype=torch.float64)
    if bias is None:
        return torch.ones(units, dtype=torch.float64)
    live = ~view.report.silent & ~view.report.frozen
    weight = _weight(view)
    by_weights = _below_live(weight.read(view.values[weight.name]).cpu().double() @ mean, live)
    by_bias = _below_live(bias.read(view.values[bias.name]).cpu().double(), live)
    total = by_weights + by_bias
    return torch.where(total > 0, by_weights / total, 1.0)


def _below_live(values: Tensor, live: Tensor) -> Tensor:
    """Tell how far each unit's value lies below the median live unit's, or below 0 where no unit is alive."""
    typical = values[live].median() if bool(live.any()) else values.new_zeros(())
    return (typical - values).clamp(min=0)


def _weight(view: SiteView) -> Slice:
    return next(one for one in view.attribution.incoming if one.role == "weight")


def _shaped(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.ndim - 1)).expand(like.shape)
