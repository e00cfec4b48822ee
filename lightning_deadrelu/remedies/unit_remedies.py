"""Remedies that touch dead units only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_deadrelu.model.slices import Slice
from lightning_deadrelu.remedies.base import Edits, InitDistribution, Remedy, SiteView, Write
from lightning_deadrelu.remedies.folding import foldable, folded, to_free
from lightning_deadrelu.remedies.redraw import choose
from lightning_deadrelu.validation import Argument, checked

_NEUTRAL = {"scale": 1.0, "shift": 0.0, "mean": 0.0, "variance": 1.0}
"""What a norm's affine and its running statistics are at the start."""


@dataclass(frozen=True, kw_only=True)
class Reset(Remedy):
    """Replace dead units by new ones: redraw what feeds them, and let nothing read them yet.

    Weights and biases are drawn from the laws they had when training began; where the weights began as a constant, from
    the default of ``torch.nn.Linear`` instead (uniform within ``1 / sqrt(fan_in)``), since equal units would stay
    equal. A norm on the way gets scale 1, shift 0 and running statistics 0 and 1. The weights that read a dead unit
    become 0, and with them what the new unit adds: the network's output changes by exactly nothing on every input for
    which the unit is silent, as long as the new unit's output is finite. The readers learn from the first step on, the
    new unit from the second.

    Where a linear layer alone feeds the site, each new unit is the best of ``tries`` draws: it gets a bias with which
    it fires on a share of the confirming batch, drawn from 0.1 to 0.9, and the draw is kept that fires on most of the
    inputs on which the whole layer is silent. A plain redraw is silent again half of the time in a narrow layer, or
    fires where another unit does; see :func:`~lightning_deadrelu.remedies.redraw.choose`.

    Source: ReDo (Sokar et al. 2023, arXiv 2302.12902) with tau = 0; running statistics as in continual backpropagation
    (Dohare et al. 2024, Nature 632:768).

    Args:
        tries: Draws for each unit; 1 for a plain redraw, with a bias from its own law.
        bias: What biases become, and shifts of norms; None for the above, and 0 for shifts.
        frozen: Whether frozen units, which fire but put out one value whatever the input, are redrawn too. Their
            readers are kept, and the output changes. Most of them recover by themselves once the dead layer before them
            has.
        blind: If given, also repair a layer whose units are all silent on more than this share of the samples: there
            the network is constant, although no unit is dead. Of the units that resemble another, the one that is
            missed least is folded into it (the other's readers take over its part) and redrawn to fire where the layer
            is silent. Exact multiples of another unit are folded and redrawn too, which leaves the output as it is.
            Only where one linear layer feeds a ReLU and linear layers read it; then the layer is left alone for 600
            training batches.

    Example:
        >>> Reset(patience=2).bias is None
        True
    """

    tries: int = checked(8, lambda it: it.check_count(8))
    bias: float | None = checked(None, lambda it: it.check_number(0.1, optional=True))
    frozen: bool = checked(False, Argument.check_flag)
    blind: float | None = checked(None, lambda it: it.check_number(0.05, 0, 1, optional=True))

    needs: ClassVar[frozenset[str]] = frozenset({"incoming", "outgoing"})

    @property
    def treats_blind(self) -> float | None:
        """The share of samples from which on a layer that is silent on them is repaired."""
        return self.blind

    def to_free(self, view: SiteView) -> Tensor:
        """Choose units that are multiples of others, or the one that is missed least."""
        known = self.blind is not None and foldable(view)
        return to_free(view, self.blind or 0.0) if known else super().to_free(view)

    @property
    def treats_frozen(self) -> bool:
        """Whether frozen units are repaired too."""
        return self.frozen

    @property
    def is_exact(self) -> bool:
        """Whether the output changes by nothing when the edit is made; it does where frozen units are redrawn."""
        return not self.frozen

    def propose(self, view: SiteView, generator: torch.Generator) -> Edits:
        """Clear the readers of dead units, then redraw what feeds the treated ones."""
        silent = view.units & ~view.report.frozen
        units = view.units if self.frozen else silent
        live = view.units & ~view.report.silent & ~view.report.frozen
        clear = [Write(one, 0.0) for one in _rows(view.attribution.outgoing, silent)]
        clear += folded(view, live) if live.any() else []
        if view.inputs is not None and self.bias is None and self.tries > 1:
            fresh = self._chosen(view, view.inputs, units, generator)
        else:
            fresh = [Write(one, self._fresh(one, view, generator)) for one in _rows(view.attribution.incoming, units)]
        return Edits(writes=(*clear, *fresh))

    def _chosen(self, view: SiteView, inputs: Tensor, units: Tensor, generator: torch.Generator) -> list[Write]:
        layer = {one.role: one for one in view.attribution.incoming}
        old = {role: one.read(view.values[one.name]) for role, one in layer.items()}
        law = _law_of(layer["weight"], old["weight"], view)
        weights, biases = choose(inputs, old["weight"], old.get("bias"), units, law, self.tries, generator, view.hinge)
        new = {"weight": weights, "bias": biases}
        return [Write(one.of(units), new[role]) for role, one in layer.items()]

    def _fresh(self, entries: Slice, view: SiteView, generator: torch.Generator) -> Tensor | float:
        if self.bias is not None and entries.role in ("bias", "shift"):
            return self.bias
        if entries.role in _NEUTRAL:
            return _NEUTRAL[entries.role]
        old = entries.read(view.values[entries.name])
        return _law_of(entries, old, view).draw(old, generator)


@dataclass(frozen=True, kw_only=True)
class ThermalKick(Remedy):
    """Add noise to dead units, so that some of them fire again; most of what they have learnt is kept.

    Two things decide whether a kick can revive a unit. Against the unit's own weights, noise has to be large enough to
    turn them: its standard deviation is ``strength`` times their root mean square, or the standard deviation of the
    layer's initial law where that is larger. And against the depth at which the unit lies, noise has to bridge the
    distance from its peak to the hinge: the entry that is added last (a norm's shift, else the bias) is lifted by the
    absolute value of normal noise with ``depth`` times that distance as its standard deviation (plus ``strength`` times
    the law's), always upwards. With ``depth=1`` a third of the units comes above the hinge by this alone, whatever
    their scale: P(abs(N) > 1) = 0.32. A site without a bias has to bridge the distance by its weights: there their
    noise grows in proportion to the distance over the spread of the unit's inputs. A norm's scale is shaken by
    ``strength``. Running statistics and readers stay, so that revived units are read at once: the output changes.

    Args:
        strength: Noise on weights, relative to their own size and that of the initial law.
        depth: Noise on the bias, relative to how deep the unit's peak lies below the hinge.

    Example:
        >>> ThermalKick(strength=0.5).depth
        1.0
    """

    strength: float = checked(0.1, lambda it: it.check_number(0.1, 0))
    depth: float = checked(1.0, lambda it: it.check_number(1.0, 0))

    def propose(self, view: SiteView, generator: torch.Generator) -> Edits:
        """Add noise to what feeds the treated units."""
        writes = []
        for one in _rows(view.attribution.incoming, view.units & ~view.report.frozen):
            noise = self._noise(one, view, generator)
            if noise is not None:
                writes.append(Write(one, one.read(view.values[one.name]).cpu() + noise))
        return Edits(writes=tuple(writes))

    def _noise(self, entries: Slice, view: SiteView, generator: torch.Generator) -> Tensor | None:
        old = entries.read(view.values[entries.name]).cpu()
        noise = torch.randn(old.shape, generator=generator)
        if entries.role == "weight":
            return noise * self._weight_scale(entries, old, view)
        if entries.role == "scale":
            return noise * self.strength
        bias = view.attribution.bias
        if bias is not None and (bias.name, bias.role) == (entries.name, entries.role):
            return noise.abs() * self._lift(entries, view)
        return None  # a bias before a norm does nothing, of several one is enough, and statistics follow by themselves

    def _weight_scale(self, entries: Slice, old: Tensor, view: SiteView) -> Tensor:
        own = old.float().flatten(1).square().mean(1).sqrt()
        strength = torch.full_like(own, self.strength)
        if view.attribution.bias is None:
            reach = self.depth * view.depth / view.spread
            strength = strength.maximum(reach.nan_to_num(0.0, posinf=0.0)[entries.units].float())
        scale = strength * own.clamp(min=_law_of(entries, old, view).std)
        return scale.reshape(-1, *[1] * (old.ndim - 1))

    def _lift(self, entries: Slice, view: SiteView) -> Tensor:
        stds = [law.std for one in view.attribution.incoming if (law := view.laws.get(one.name))]
        floor = self.strength * max(stds, default=0.0)
        return (self.depth * view.depth + floor)[entries.units].float()


def _rows(slices: tuple[Slice, ...], units: Tensor) -> list[Slice]:
    return [rows for one in slices if len((rows := one.of(units)).index)]


def _law_of(entries: Slice, old: Tensor, view: SiteView) -> InitDistribution:
    """Look up the law; weights that began as a constant get the one of ``torch.nn.Linear`` and ``torch.nn.Conv2d``."""
    law = view.laws.get(entries.name, InitDistribution(0.0, 0.0, False))
    if entries.role != "weight" or law.std > 0:
        return law
    fan_in = max(old[0].numel(), 1)
    return InitDistribution(0.0, 1 / math.sqrt(3 * fan_in), True)
