"""Remedies that bring dead units back with what they had learnt."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lightning_deadrelu.model.rectifiers import COMPETITIONS, SELECTIONS
from lightning_deadrelu.remedies.base import (
    Activation,
    Edits,
    Lift,
    NotApplicable,
    Push,
    Remedy,
    SiteView,
    Warmth,
)
from lightning_deadrelu.remedies.lifting import raised
from lightning_deadrelu.validation import Argument, checked

_NORMAL_SPREAD = 2.56
"""Standard deviations between the quantiles 0.1 and 0.9 of a normal variable."""


@dataclass(frozen=True, kw_only=True)
class BiasWarming(Remedy):
    """Raise dead units step by step until they fire on a share of the inputs; what they had learnt is kept.

    After each optimizer step the parameters that feed a unit are raised by an equal part of the distance by which its
    inputs lie too low: the shift of a norm, else bias and weights, see
    :func:`~lightning_deadrelu.remedies.lifting.raised`. After ``steps`` of them the unit fires on ``firing_rate`` of
    the confirming batch, as far as the layers before have stayed what they were; if it is dead again, it is lifted
    again. Nothing else is written, and no gradient is needed: learning rate, optimizer, weight decay and the depth at
    which the unit lies do not decide whether it comes back. The output changes slowly, and not at all at first. Only
    what feeds the unit has to be known, not what reads it.

    With ``at_once`` the units fire from the next batch on: a term in training forwards, which no optimizer, average or
    checkpoint of the weights sees, brings the whole distance, and falls to zero as the parameters rise. The output
    then changes at once, since the readers are kept.

    Source: bias warming takes its term from quantiles of a frozen batch. Annealed alone, it left most units dead
    (2 of 281 came back in the shock benchmark); handed over to the parameters, or without it, all come back. Half of
    the inputs in 50 steps, since what the loss takes off meanwhile is less: lifted to a fifth in 200, units sank again,
    and where tasks change a tenth of them was dead (benchmarks/continual.py).

    Args:
        firing_rate: Share of the confirming batch on which a unit is to fire; None for just above its peak. Where units
            are selected (``topk``, ``batch_topk``, ``jumprelu``) at most as often as the median live one.
        steps: Optimizer steps until then.
        at_once: Whether a term makes the unit fire in training meanwhile.
        cap: Largest distance, relative to that from the unit's peak to the hinge plus the spread of its inputs (the
            middle 80 %); None for no limit.
        margin: What comes on top, relative to the same measure of a typical unit, so that the unit fires at the
            quantile itself.
        attempts: As for all remedies; no limit by default, since another lift costs nothing.

    Example:
        >>> BiasWarming(firing_rate=None, steps=500).steps
        500
    """

    firing_rate: float | None = checked(0.5, lambda it: it.check_number(0.5, 0, 1, optional=True))
    steps: int = checked(50, lambda it: it.check_count(50))
    at_once: bool = checked(False, Argument.check_flag)
    cap: float | None = checked(None, lambda it: it.check_number(1.0, 0, optional=True))
    margin: float = checked(0.01, lambda it: it.check_number(0.01, 0))
    attempts: int | None = None

    @property
    def is_exact(self) -> bool:
        """Whether the output changes by nothing when the edit is made."""
        return not self.at_once

    def propose(self, view: SiteView, generator: torch.Generator) -> Edits:
        """Take the distance from the quantiles of the confirming batch."""
        height = self._height(view)
        if not height.any():
            return Edits()
        rises = raised(view, height)
        warmth = Warmth(height.float(), self.steps) if self.at_once else None
        return Edits(lift=Lift(rises, self.steps), warmth=warmth)

    def _height(self, view: SiteView) -> Tensor:
        """Tell how far each unit's inputs are to rise, shape ``(units,)``; 0 for units that are left alone."""
        known = view.units & ~view.report.frozen & view.quantiles.isfinite().all(0)
        if not known.any():
            return torch.zeros(len(known), dtype=torch.float64)
        size = view.depth + view.spread
        typical = float(size[known].median()) or 1.0  # all inputs are 0: there is no scale to go by
        target = view.quantile(1 - _attainable(self.firing_rate or 0.0, view))
        height = -target if self.cap is None else (-target).minimum(self.cap * size)
        return torch.where(known, height.clamp(min=0) + self.margin * typical, 0.0)


@dataclass(frozen=True, kw_only=True)
class WakeUp(Remedy):
    """Push dead units upward in the backward pass, until they fire on a share of each batch; no forward changes.

    The gradient of a dead unit's inputs is zero. Here a constant is subtracted from it, so that whatever feeds the unit
    is trained upward, as by a loss that wants the unit to fire; how hard, is told in
    :func:`~lightning_deadrelu.repair.wake_up.push_`. In a batch in which the unit fires on ``target_rate`` of the
    inputs it is not pushed. Nothing has to be known of the site but its rectifier's calls: functions, shared modules
    and computed weights are as good as any, and nothing is left in the model but what training did. Compiled code runs
    eagerly meanwhile.

    The push works through the optimizer, at its learning rate: Adam moves a unit by about the rate times its number of
    inputs a step. So units far below zero, small rates and norms (where the shift moves alone) may take longer than
    ``max_steps``. The gradient also trains the layers before. Prefer :class:`BiasWarming` wherever the parameters that
    feed the site are known.

    Refused where units compete (``topk``, ``batch_topk``): pushed latents of a sparse autoencoder were selected on all
    inputs alike, and its error rose (``examples/08_sparse_autoencoder.py``).

    Args:
        target_rate: Share of a batch on which a unit is to fire; see ``firing_rate`` of :class:`BiasWarming`.
        push: Size of the gradient, relative to that of a typical unit.
        max_steps: Training batches until it ends, if the units do not fire before.
        attempts: As for all remedies; no limit by default.

    Example:
        >>> WakeUp(max_steps=2000).target_rate
        0.2
    """

    target_rate: float = checked(0.2, lambda it: it.check_number(0.2, 0, 1))
    push: float = checked(1.0, lambda it: it.check_number(1.0, 0))
    max_steps: int = checked(1000, lambda it: it.check_count(1000))
    attempts: int | None = None

    needs: ClassVar[frozenset[str]] = frozenset()

    @property
    def is_exact(self) -> bool:
        """Whether the output changes by nothing when the edit is made."""
        return True

    def propose(self, view: SiteView, generator: torch.Generator) -> Edits:
        """Push the dead units."""
        if view.report.kind in COMPETITIONS:
            raise NotApplicable("units that compete would be pushed to be selected on all inputs alike")
        units = view.units & ~view.report.frozen
        rate = _attainable(self.target_rate, view)
        return Edits(push=Push(units, rate, self.push, self.max_steps)) if units.any() else Edits()


@dataclass(frozen=True, kw_only=True)
class LeakySlope(Remedy):
    """Give dead units a small slope below the hinge while they are brought back.

    A slope alone revives few units: what comes through it is as small as the slope, and has no reason to point upward
    (1 of 95 came back in the shock benchmark). So it is combined with :class:`BiasWarming` where what feeds the site is
    known, and with :class:`WakeUp` elsewhere. The slope rises and falls back to 0 over ``ramp_steps``; in the end the
    model is a plain rectifier again. It is smaller for units that lie deep, such that a unit puts out no more than
    ``slope`` times the spread of its inputs. Where the rectifier is no module of its own, the slope is left out.

    With ``ramp_steps=None`` the slope stays for good, without a lift, and the model needs it from then on. It cannot be
    given twice, and units come back only as fast as their weights move, so use ``attempts=1, cooldown=10``.

    Source: leaky rectifiers (Maas et al. 2013); larger slopes, up to 1 / 5.5, did better in Xu et al. 2015
    (arXiv 1505.00853).

    Args:
        slope: Output per input below the hinge, at most.
        per_unit: Only dead units get it; False for all units of the site.
        ramp_steps: Training batches for the way up and down; None for a slope that stays.
        attempts: As for all remedies; no limit by default.

    Example:
        >>> LeakySlope(ramp_steps=300).slope
        0.1
    """

    slope: float = checked(0.1, lambda it: it.check_number(0.1, 0, 1))
    per_unit: bool = checked(True, Argument.check_flag)
    ramp_steps: int | None = checked(50, lambda it: it.check_count(300, 2, optional=True))
    attempts: int | None = None

    needs: ClassVar[frozenset[str]] = frozenset()

    def propose(self, view: SiteView, generator: torch.Generator) -> Edits:
        """Give a slope to the dead units, or to all, and lift or push the dead ones."""
        units = view.units & ~view.report.frozen  # those fire
        if not units.any():
            return Edits()
        chosen = units if self.per_unit else torch.ones_like(units)
        if self.ramp_steps is None:
            if view.no_module:
                raise NotApplicable(view.no_module)
            return Edits(activation=Activation("leaky_relu", torch.where(chosen, self.slope, 0.0)))
        upward = self._upward(view, generator, self.ramp_steps)
        slopes = torch.where(chosen, self._by_depth(view), 0.0)
        return (
            upward if view.no_module else replace(upward, activation=Activation("leaky_relu", slopes, self.ramp_steps))
        )

    def _by_depth(self, view: SiteView) -> Tensor:
        """Tell the slope with which each unit puts out no more than ``slope`` times the spread of its inputs."""
        below = -view.quantile(0.5) / (view.spread / _NORMAL_SPREAD)
        return torch.where(below > 1, self.slope / below, self.slope).float()  # also where nothing is known

    def _upward(self, view: SiteView, generator: torch.Generator, steps: int) -> Edits:
        try:
            if view.attribution.incoming and not view.attribution.no_incoming:
                return BiasWarming(steps=steps).propose(view, generator)
        except NotApplicable:
            pass  # what feeds the site is known, and cannot raise it
        return WakeUp().propose(view, generator)


def _attainable(rate: float, view: SiteView) -> float:
    """Cut the share of inputs to fire on to what is usual, where units are selected and take one another's places."""
    live = ~view.report.silent
    if view.report.kind not in SELECTIONS or not bool(live.any()):
        return rate
    return min(rate, float(view.report.firing_rate[live].median()))
