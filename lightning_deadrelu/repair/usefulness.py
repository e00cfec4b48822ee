"""How much units matter to the loss, to first order, told from the backward that is run anyway."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_deadrelu.model.rectifiers import Rectifier
from lightning_deadrelu.model.sites import Site
from lightning_deadrelu.observe.subscribers import RectifierCallTaker

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


def useful(shares: Tensor, live: Tensor) -> Tensor:
    """Tell which units matter to the loss at least a tenth as much as the median live unit, shape ``(units,)``.

    Example:
        >>> useful(torch.tensor([-3.0, 0.1, 2.0, 0.5]), torch.tensor([True, False, True, False]))
        tensor([ True, False,  True,  True])
    """
    size = shares.abs()
    typical = size[live].median() if bool(live.any()) else size.new_zeros(())
    return (size > 0) & (size >= _LEAST_SHARE * typical)
