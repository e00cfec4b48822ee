"""Free units of a layer that leaves samples out: fold each into the one that it resembles. Pure."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_deadrelu.remedies.base import SiteView, Write

_ALIKE = 1e-6  # of a unit's squared output: what a multiple of another leaves over
_RESEMBLES = 0.3  # of a unit's squared output: the most that may be lost
_VARIES = 1e-3  # of the variance of the layer's input


def foldable(view: SiteView) -> bool:
    """Tell whether one linear layer feeds a ReLU, and nothing but linear layers reads it."""
    readers, known = view.attribution.outgoing, view.inputs is not None and not view.attribution.no_outgoing
    plain = all(one.dims == (1,) and not one.shape and view.values[one.name].ndim == 2 for one in readers)
    return bool(readers) and known and plain and view.report.kind == "relu" and not view.attribution.multiplied


def to_free(view: SiteView, blind: float) -> Tensor:
    """Choose the units that a layer can spare, boolean, shape ``(units,)``; none where it leaves no samples out.

    Multiples of other units are spared, all but the first. Without any, where all units are silent on more than a share
    of the samples although the layer's input varies there, one unit is, if there is one that resembles another: the one
    without which, once it is folded into the other, the layers behind miss least.

    Args:
        view: A site of which :func:`foldable` is true; its units are those that may be chosen.
        blind: The share of the samples.
    """
    out, live = _outputs(view), view.units
    chosen = live & view.report.duplicate
    if int(live.sum()) - int(chosen.sum()) < 1:
        return torch.zeros_like(live)
    if chosen.any():
        chosen[chosen.clone()] = _fit(out, chosen, live & ~chosen).left <= _ALIKE * out[:, chosen].square().sum(0)
    if not chosen.any() and int(live.sum()) > 1 and _is_blind(view, out, blind):
        alone = torch.eye(len(live), dtype=torch.bool)[live]
        left = torch.cat([_fit(out, one, live & ~one).left for one in alone])
        missed = left.sqrt() * torch.stack([_read_by(view, one) for one in alone])
        missed[left > _RESEMBLES * out[:, live].square().sum(0)] = torch.inf
        if missed.isfinite().any():
            chosen = alone[int(missed.argmin())]
    return chosen


def folded(view: SiteView, units: Tensor) -> list[Write]:
    """Have some units read as multiples of those that resemble them most.

    Args:
        view: A site of which :func:`foldable` is true.
        units: Which units, boolean, shape ``(units,)``; their own readers are to become 0.
    """
    fit = _fit(_outputs(view), units, ~(view.report.silent | view.report.frozen | units))
    twins = torch.zeros_like(units).index_fill(0, fit.twins, True)
    writes = []
    for one in view.attribution.outgoing:
        weight = view.values[one.name]
        of_units = one.of(units)
        own = torch.zeros(len(units), len(weight), dtype=torch.float64)
        own[of_units.units] = of_units.read(weight).cpu().double()
        more = torch.zeros_like(own).index_add_(0, fit.twins, fit.shares[:, None] * own[units])
        rows = one.of(twins)
        writes.append(Write(rows, rows.read(weight).cpu().double() + more[rows.units]))
    return writes


def _outputs(view: SiteView) -> Tensor:
    """Compute what all units put out for the kept rows with the weights as they are, shape ``(rows, units)``."""
    assert view.inputs is not None
    weight, *bias = (one.read(view.values[one.name]).cpu().double() for one in view.attribution.incoming)
    return (view.inputs.double() @ weight.T + (bias[0] if bias else 0.0)).clamp(min=0)


def _is_blind(view: SiteView, out: Tensor, blind: float) -> bool:
    assert view.inputs is not None
    silent = (out == 0).all(1)
    if not silent.double().mean() > blind:
        return False
    whole, there = (rows.double().var(0, correction=0).sum() for rows in (view.inputs, view.inputs[silent]))
    return bool(there > _VARIES * whole)


def _read_by(view: SiteView, units: Tensor) -> Tensor:
    """Tell the norm of all that reads some units."""
    read = (one.of(units).read(view.values[one.name]).cpu().double() for one in view.attribution.outgoing)
    return torch.stack([weights.square().sum() for weights in read]).sum().sqrt()


class _Fit(NamedTuple):
    """Which other unit each of some resembles most, as which multiple, and the sum of squares that is left over."""

    twins: Tensor
    shares: Tensor
    left: Tensor


def _fit(out: Tensor, units: Tensor, others: Tensor) -> _Fit:
    own, theirs = out[:, units], out[:, others]
    products = own.T @ theirs
    shares = products / theirs.square().sum(0).clamp(min=1e-300)
    left, best = (own.square().sum(0)[:, None] - products * shares).clamp(min=0).min(1)
    return _Fit(others.nonzero().flatten()[best], shares.gather(1, best[:, None])[:, 0], left)
