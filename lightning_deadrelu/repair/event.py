"""What was done to a site, and the loss around it. Pure."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

_JUMP_IN_STDS = 5.0
_IN_WORDS = {
    "edited": "repaired",
    "would edit": "would repair",
    "useful": "was useful",
    "useless": "was not useful",
}


class Event(NamedTuple):
    """What was done to a site, or why not.

    Args:
        step: The training batch, as loggers count.
        site: Name of the site; empty where it concerns all of them.
        action: ``"edited"``, ``"would edit"`` (a dry run), ``"revived"``, ``"failed"``, ``"harmed"``, ``"useful"``
            (most of the units that came back matter to the loss a fair time later), ``"useless"`` (most do not),
            ``"refused"``, ``"escalated"``, ``"given up"``, ``"dropped"`` (a term still in flight when training ended)
            or ``"stopped"`` (the loss is not a number, so nothing is edited).
        remedy: Its class.
        units: Numbers of the units concerned.
        reason: In words.
        before: Dead fraction of the site when it was decided.
        after: Dead fraction when the outcome was judged; not a number where there is none yet.
        useful: Numbers of the units that matter to the loss, where that was judged.

    Example:
        >>> print(Event(step=30, site="net.1", action="edited", remedy="Reset", units=(2, 5), reason="20.0% dead"))
        step 30: Reset repaired `net.1` (2 units): 20.0% dead
        >>> print(Event(step=90, site="net.1", action="useful", remedy="Reset", units=(2, 5), reason="2 of 2 matter"))
        step 90: Reset was useful in `net.1` (2 units): 2 of 2 matter
    """

    step: int
    site: str
    action: str
    remedy: str
    units: tuple[int, ...] = ()
    reason: str = ""
    before: float = math.nan
    after: float = math.nan
    useful: tuple[int, ...] = ()

    @property
    def outcome(self) -> str:
        """The action as people read it.

        Example:
            >>> Event(30, "net.1", "edited", "Reset").outcome
            'repaired'
        """
        return _IN_WORDS.get(self.action, self.action)

    def __str__(self) -> str:
        units = f" ({len(self.units)} unit{'s' * (len(self.units) > 1)})" if self.units else ""
        place = " in" if self.action in ("useful", "useless") else ""
        where = f"{place} `{self.site}`" if self.site else ""
        return f"step {self.step}: {self.remedy} {self.outcome}{where}{units}: {self.reason}"


class Loss(NamedTuple):
    """The loss over a window."""

    mean: float
    std: float

    @classmethod
    def of(cls, sums: Tensor) -> Loss | None:
        """Compute it from the number, the sum and the sum of squares of losses; None where there are none.

        Example:
            >>> import torch
            >>> Loss.of(torch.tensor([2.0, 4.0, 10.0]))
            Loss(mean=2.0, std=1.0)
        """
        number, total, squares = sums.tolist()
        if not number:
            return None
        mean = total / number
        return cls(mean, math.sqrt(max(squares / number - mean * mean, 0.0)))

    @property
    def is_finite(self) -> bool:
        """Whether it is a number, and not infinite."""
        return math.isfinite(self.mean)

    def jumped_to(self, after: Loss) -> bool:
        """Whether the loss more than doubled, by far more than it usually varies, or is no number any more.

        Example:
            >>> Loss(1.0, 0.1).jumped_to(Loss(3.0, 0.1)), Loss(1.0, 0.1).jumped_to(Loss(1.4, 0.1))
            (True, False)
        """
        if not self.is_finite:
            return False
        return not after.mean <= self.mean + abs(self.mean) + _JUMP_IN_STDS * self.std
