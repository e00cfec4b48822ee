"""Remedies that change a site's activation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from lightning_deadrelu.remedies.base import Activation, Edits, Remedy, SiteView

KINDS = ("leaky_relu", "rrelu", "elu", "selu", "gelu", "silu")
"""What a site's rectifier can be swapped for."""
PRELU = (
    "PReLU brings parameters, which optimizers, DDP and checkpoints do not know about once training has begun. Call "
    "`swap_activations_(model, nn.PReLU)` in `__init__` or `configure_model` instead"
)


@dataclass(frozen=True, kw_only=True)
class LeakySlope(Remedy):
    """Let gradients through dead units: a small slope below the hinge.

    The output changes by ``slope`` times the units' negative inputs. With ``ramp_steps`` the slope rises and falls
    back to 0, so that the final model is a plain rectifier again; without, it stays, and the model needs it.

    A slope that is there already cannot be given again. So one edit is all by default (``attempts=1``), and it is
    judged late (``cooldown=10``), since units come back only as fast as their weights move.

    Source: leaky rectifiers (Maas et al. 2013); larger slopes, up to 1 / 5.5, did better in Xu et al. 2015
    (arXiv 1505.00853).

    Args:
        slope: Output per input below the hinge.
        per_unit: Only dead units get it; False for all units of the site.
        ramp_steps: Training batches for the way up and down; None for a slope that stays.
        attempts: As for all remedies; one by default.
        cooldown: As for all remedies; long by default.

    Example:
        >>> LeakySlope(ramp_steps=300).slope
        0.01
    """

    slope: float = 0.01
    per_unit: bool = True
    ramp_steps: int | None = None
    attempts: int | None = 1
    cooldown: int = 10

    needs: ClassVar[frozenset[str]] = frozenset({"module"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_number("slope", 0.01, 0, 1)
        self._check_flag("per_unit")
        self._check_count("ramp_steps", 2, True, 300)

    def propose(self, view: SiteView, generator: torch.Generator) -> Edits:
        """Give a slope to the treated units, or to all."""
        units = view.units & ~view.report.frozen  # those fire
        chosen = units if self.per_unit else torch.ones_like(units)
        if not units.any():
            return Edits()
        slopes = torch.where(chosen, self.slope, 0.0)
        return Edits(activation=Activation("leaky_relu", slopes, self.ramp_steps or 0))


@dataclass(frozen=True, kw_only=True)
class SwapActivation(Remedy):
    """Give a whole site another activation, for good; live units change too.

    To do so again would change nothing. So one edit is all by default (``attempts=1``), and it is judged late
    (``cooldown=10``), since units come back only as fast as their weights move.

    Source: Xu et al. 2015 (rrelu, arXiv 1505.00853), Clevert et al. 2016 (elu, arXiv 1511.07289), Klambauer et al. 2017
    (selu, arXiv 1706.02515), Hendrycks and Gimpel 2016 (gelu and silu, arXiv 1606.08415).

    Args:
        activation: ``"leaky_relu"``, ``"rrelu"``, ``"elu"``, ``"selu"``, ``"gelu"`` or ``"silu"``.
        attempts: As for all remedies; one by default.
        cooldown: As for all remedies; long by default.

    Example:
        >>> SwapActivation(activation="silu").activation
        'silu'
    """

    activation: str = "gelu"
    attempts: int | None = 1
    cooldown: int = 10

    needs: ClassVar[frozenset[str]] = frozenset({"module"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activation == "prelu":
            raise ValueError(f"`SwapActivation(activation='prelu')`: {PRELU}.")
        if self.activation not in KINDS:
            self._refuse("activation", f"it has to be one of {', '.join(KINDS)}", 'activation="gelu"')

    def propose(self, view: SiteView, generator: torch.Generator) -> Edits:
        """Name the activation."""
        return Edits(activation=Activation(self.activation))
