"""How much units matter to the loss, to first order, told from the backward that is run anyway."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from lightning_deadrelu.model.layout import Layout
from lightning_deadrelu.model.rectifiers import Rectifier
from lightning_deadrelu.model.sites import Site
from lightning_deadrelu.observe.subscribers import RectifierCallTaker
from lightning_deadrelu.repair.event import Loss

_LOSSES = 3  # sums over losses, which come first
_LEAST_SHARE = 0.1  # of the median live unit's


class TaylorShares(RectifierCallTaker):
    """Add up, for each unit of some sites, its output times the gradient of the loss with respect to it.

    To first order that is by how much the loss would fall if the unit were taken out. Source: Molchanov et al. 2017,
    arXiv 1611.06440. It takes the calls of one forward; the sums come about in its backward.

    Args:
        sums: What is added to, shape ``(units,)``, for the units of all sites end to end, float64.
        places: Where the units of each site are.
    """

    def __init__(self, sums: Tensor, places: Mapping[Site, slice]) -> None:
        self._sums, self._places = sums, places

    def take(self, site: Site, rectifier: Rectifier, dims: tuple[int, ...], x: Tensor, output: Tensor) -> None:
        """Hang a hook on the node of the autograd graph that a rectifier's call has made."""
        if site not in self._places or output.grad_fn is None:
            return
        kept, sums = output.detach(), self._sums[self._places[site]]
        others = [dim for dim in range(-output.ndim, 0) if dim not in dims]

        def add(gradients: tuple[Tensor | None, ...]) -> None:
            if gradients[0] is not None:
                shares = (kept * gradients[0]).sum(others, dtype=torch.float64).flatten()
                sums.add_(shares.to(sums.device).nan_to_num(0.0, 0.0, 0.0))  # where a scaled loss overflowed

        output.grad_fn.register_prehook(add)


@dataclass
class WindowSums:
    """What is added up over a window, on the device, for the judgement of remedies.

    Args:
        values: Number, sum and sum of squares of the losses; then the Taylor shares of all units in review, float64.
        units: How many units each site in review has, by name.
    """

    values: Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))
    units: dict[str, int] = field(default_factory=dict)

    @property
    def _places(self) -> dict[str, slice]:
        ends = accumulate(self.units.values(), initial=_LOSSES)
        return {name: slice(*bounds) for name, bounds in zip(self.units, pairwise(ends), strict=True)}

    def note_loss(self, loss: Tensor) -> None:
        """Add a loss, without looking at it."""
        mean = loss.detach().mean().to(self.values.dtype)
        self.values[:_LOSSES] += torch.stack([torch.ones_like(mean), mean, mean * mean])

    def taylor_shares(self, layout: Layout) -> TaylorShares:
        """Make what takes the calls of a batch, and adds the shares of its units."""
        places = {layout.site(name): place for name, place in self._places.items() if name in layout}
        return TaylorShares(self.values, places)

    def read(self, merged: Tensor) -> tuple[Loss | None, dict[str, Tensor]]:
        """Tell the loss over the window, and the shares of each site's units, from the values over all ranks."""
        return Loss.of(merged[:_LOSSES]), {name: merged[place] for name, place in self._places.items()}

    def restart(self, units: Mapping[str, int]) -> None:
        """Begin a window in which the units of some sites are in review."""
        self.units = dict(units)
        self.values = self.values.new_zeros(_LOSSES + sum(units.values()))


def useful(shares: Tensor, live: Tensor) -> Tensor:
    """Tell which units matter to the loss at least a tenth as much as the median live unit, shape ``(units,)``.

    Example:
        >>> useful(torch.tensor([-3.0, 0.1, 2.0, 0.5]), torch.tensor([True, False, True, False]))
        tensor([ True, False,  True,  True])
    """
    size = shares.abs()
    typical = size[live].median() if bool(live.any()) else size.new_zeros(())
    return (size > 0) & (size >= _LEAST_SHARE * typical)
