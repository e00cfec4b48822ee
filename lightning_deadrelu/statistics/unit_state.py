"""The one state of each unit that pictures show, and its colour."""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from lightning_deadrelu.statistics.report import SiteReport


class State(IntEnum):
    """What a unit was in a window, in the order of what is worth telling: where windows merge, the later one wins."""

    NOT_JUDGED = 0
    ALIVE = 1
    ALWAYS_ON = 2
    RARE = 3
    DORMANT = 4
    FROZEN = 5
    NOT_FINITE = 6
    DEAD = 7
    REPAIRED = 8

    @property
    def label(self) -> str:
        """The name in words.

        Example:
            >>> State.ALWAYS_ON.label
            'always on'
        """
        return self.name.lower().replace("_", " ")

    @property
    def colour(self) -> str:
        """The colour as ``#rrggbb``, on light and on dark ground, which colour-blind readers can tell apart.

        After M. Okabe and K. Ito's palette (2008).
        """
        return _COLOURS[self]


_COLOURS = {
    State.NOT_JUDGED: "#8C8C8C",
    State.ALIVE: "#BBD6E4",
    State.ALWAYS_ON: "#0072B2",
    State.RARE: "#E69F00",
    State.DORMANT: "#009E73",
    State.FROZEN: "#CC79A7",
    State.NOT_FINITE: "#F0E442",
    State.DEAD: "#D55E00",
    State.REPAIRED: "#000000",
}

_STATES = (("always_on", State.ALWAYS_ON), ("rare", State.RARE), ("frozen", State.FROZEN))
_SMOOTH_STATES = (("dormant", State.DORMANT),)


def states_of(site: SiteReport, rows: Tensor | None = None) -> Tensor:
    """Name the state of each unit, shape ``(units,)``, uint8; a unit is in the most telling state that fits.

    Args:
        site: The verdict.
        rows: Numbers of the units that are asked for; None for all.
    """

    def shown(mask: Tensor) -> np.ndarray[Any, np.dtype[np.bool_]]:
        return mask.numpy() if rows is None else mask.numpy()[rows.numpy()]

    states = np.full(site.units if rows is None else len(rows), State.ALIVE, np.uint8)
    for name, state in _SMOOTH_STATES if site.smooth else _STATES:
        states[shown(getattr(site, name))] = state
    states[not site.samples if site.smooth else ~shown(site.judged)] = State.NOT_JUDGED
    states[shown(site.nonfinite)] = State.NOT_FINITE
    states[shown(site.dead)] = State.DEAD
    return torch.from_numpy(states)


def state_shares(site: SiteReport) -> dict[State, float]:
    """Divide the units of a site by state, 0 to 1; the shares add up to 1."""
    counts = np.bincount(states_of(site).numpy(), minlength=len(State))
    return {state: float(counts[state]) / site.units for state in State}
