"""Remedies that change a site's activation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from lightning_deadrelu.remedies.base import Activation, Edits, Remedy, SiteView
from lightning_deadrelu.validation import Argument, checked

KINDS = ("leaky_relu", "rrelu", "elu", "selu", "gelu", "silu")
"""What a site's rectifier can be swapped for."""
PRELU = (
    "PReLU brings parameters, which optimizers, DDP and checkpoints do not know about once training has begun. Call "
    "`swap_activations_(model, nn.PReLU)` in `__init__` or `configure_model` instead"
)


def _check_kind(it: Argument) -> None:
    if it.value == "prelu":
        raise ValueError(f"`SwapActivation(activation='prelu')`: {PRELU}.")
    it.check(it.value in KINDS, f"it has to be one of {', '.join(KINDS)}", 'activation="gelu"')


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

    activation: str = checked("gelu", _check_kind)
    attempts: int | None = 1
    cooldown: int = 10

    needs: ClassVar[frozenset[str]] = frozenset({"module"})

    def propose(self, view: SiteView, generator: torch.Generator) -> Edits:
        """Name the activation."""
        return Edits(activation=Activation(self.activation))
