"""Find the units whose weights Muon hardly updates. Pure.

Muon makes the update of a matrix orthogonal. Where it has more units than inputs, its rows need not be of equal size: a
unit whose gradients are small gets a small row, and so stays small, while decay goes on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_deadrelu.explain.finding import Finding
from lightning_deadrelu.model.optimizer_groups import holder_of
from lightning_deadrelu.statistics import LivenessReport, SiteReport

STARVED = 0.1  # of the median row
_SHARE = 0.1  # of the units
_COEFFICIENTS = 3.4445, -4.7750, 2.0315  # of all that do not say theirs


def muon_rows(site: SiteReport, sizes: Tensor) -> Finding | None:
    """Blame Muon where many units that fire are hardly updated."""
    starved = (sizes < STARVED) & ~site.silent
    share = float(starved.float().mean())
    if share < _SHARE:
        return None
    measured = (
        f"Muon's updates of {int(starved.sum()):,} of {site.units:,} units ({share:.0%}) are less than a tenth of the"
        f" median one, of others up to {float(sizes.max()):.2g} times it: the matrix has more units than inputs"
    )
    return Finding(
        cause="muon_rows",
        where=site.name,
        measured=measured,
        confidence="likely",
        edit="AdamW for this weight, or Muon with its rows normalised (NorMuon)",
        source="arXiv 2606.27715; NorMuon, arXiv 2510.05491",
    )


def update_sizes(optimizers: Iterable[Optimizer], weight: Tensor) -> Tensor | None:
    """Return the size of Muon's next update of each unit's weights, over the median one.

    Args:
        optimizers: Those that may hold it.
        weight: A matrix of more units than inputs, shape ``(units, inputs)``.

    Returns:
        Shape ``(units,)``, on the CPU; None for other weights, other optimizers and before the first step.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(3, 1))
        >>> muon = torch.optim.Muon([weight])
        >>> weight.grad = torch.tensor([[1.0], [2.0], [0.1]])
        >>> muon.step()
        >>> update_sizes([muon], weight)
        tensor([1.0000, 2.0000, 0.1000])
    """
    if weight.ndim != 2 or weight.shape[0] <= weight.shape[1]:
        return None
    held = holder_of(optimizers, weight)
    if held is None:
        return None
    optimizer, group = held
    momentum = optimizer.state.get(weight, {}).get("momentum_buffer")
    if "ns_steps" not in group or momentum is None:
        return None
    sizes: Tensor = torch.linalg.vector_norm(_orthogonal(momentum.float(), group), dim=1).cpu()
    return sizes / sizes.median().clamp(min=torch.finfo(sizes.dtype).tiny)


@torch.no_grad()
def _orthogonal(momentum: Tensor, group: Mapping[str, Any]) -> Tensor:
    """Make a tall matrix orthogonal as Muon does, by Newton and Schulz's iteration."""
    a, b, c = group.get("ns_coefficients", _COEFFICIENTS)
    x: Tensor = momentum / momentum.norm().clamp(min=group.get("eps", 1e-7))
    for _ in range(group["ns_steps"]):
        gram = x.T @ x
        x = a * x + x @ (b * gram + c * gram @ gram)
    return x


def starving(
    report: LivenessReport, weights: Mapping[str, Tensor | None], optimizers: Sequence[Optimizer]
) -> list[Finding]:
    """Find the layers whose units Muon starves."""
    if not any("ns_steps" in group for optimizer in optimizers for group in optimizer.param_groups):
        return []
    found: list[Finding | None] = []
    for site in report.headline:
        weight = weights.get(site.name)
        sizes = None if weight is None else update_sizes(optimizers, weight)
        found.append(None if sizes is None else muon_rows(site, sizes))
    return [finding for finding in found if finding]
