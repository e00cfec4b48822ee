"""What is known of units that have died."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

SHARE, UNITS = 0.05, 3  # of a site: what dies beside is told without a cause
_DRIFT_WINDOWS = 4
_LEFT = 0.8  # of a bias: where decay has left more, it killed nobody


class DyingUnits(NamedTuple):
    """The newly dead units of one site, and what is known of them; tensors of shape ``(dying,)``.

    Args:
        site: Its name.
        size: Units of the site.
        first: Whether no other rectifier comes before it.
        born: Never fired.
        last_fired: Step of the last observation in which each fired; -1 if none.
        silent_from: Step of the first observation after.
        constant: Whether the input did not vary in the window.
        upstream: The nearest site before that is dead altogether; empty if none.
        peaks: Largest input by window, the latest last, shape ``(windows, dying)``.
        first_bias: The bias, or BatchNorm's beta, of all units of the site at the start, shape ``(size,)``.
        live_bias: Theirs at the start of the window in which they fired last.
        bias: Theirs now.
        first_square: Mean square of the site's incoming weights at the start, of a sample; NaN where it is not known.
        first_mean: Mean of these weights.
        live_square: Their mean square at the start of the window in which each unit fired last.
        units: Which units they are.
        fan_in: Weights per unit; 0 where it is not known.
        decay: Weight decay of the bias.
        left: What decay alone would have left of a bias since the start, 0 to 1.
        adaptive: Whether the optimizer divides by the size of past gradients, as Adam does.
        momentum: Of an optimizer that does not.
        selected: Whether they have to be more than positive to fire, so that what they were drawn from tells little.
        died: Step from which on each had no gradient, by the optimizer's momentum; NaN where that does not tell, or was
            not read, None where it tells of none.
    """

    site: str
    size: int
    first: bool
    units: Tensor
    born: Tensor
    last_fired: Tensor
    silent_from: Tensor
    constant: Tensor
    upstream: str
    peaks: Tensor
    first_bias: Tensor
    live_bias: Tensor
    bias: Tensor
    live_square: Tensor
    first_square: float = math.nan
    first_mean: float = math.nan
    fan_in: int = 0
    decay: float = 0.0
    left: float = 1.0
    adaptive: bool = False
    momentum: float = 0.0
    selected: bool = False
    died: Tensor | None = None

    def of(self, chosen: Tensor) -> DyingUnits:
        """Choose some of the units.

        Args:
            chosen: Boolean, shape ``(dying,)``.
        """
        if chosen.all():
            return self
        names = ("units", "born", "last_fired", "silent_from", "constant", "live_bias", "live_square", "bias")
        kept = chosen.nonzero().flatten()
        cut: dict[str, Any] = {name: getattr(self, name).index_select(0, kept) for name in names}
        cut["died"] = None if self.died is None else self.died[kept]
        return self._replace(**cut, peaks=self.peaks.index_select(1, kept))

    @property
    def interval(self) -> tuple[int, int]:
        """The first step after which one of them did not fire, and that by which half of them were silent."""
        return int(self.last_fired.min()), int(self.silent_from.median())

    @property
    def moved(self) -> float:
        """Median change of the biases since the units were alive; NaN where it is not known."""
        return median(self.bias - self.live_bias)


def drifted(peaks: Tensor) -> Tensor:
    """Tell whose peak had sunk over windows before it met zero: by half, and by more than it fell at the end."""
    windows, units = peaks.shape
    if windows <= _DRIFT_WINDOWS:
        return torch.zeros(units, dtype=torch.bool)
    before, now = peaks.numpy()[:-1], peaks.numpy()[-1]
    end, fired = before[0], np.zeros(units, np.int16)
    for peak in before:  # to the last one that fired
        end = np.where(peak > 0, peak, end)
        fired += peak > 0
    top = before.max(0)
    known = np.isfinite(before).all(0) & np.isfinite(now)
    with np.errstate(invalid="ignore", over="ignore"):
        sunk = (end <= top / 2) & (end - now <= top - end)
    return torch.from_numpy(known & sunk & (fired >= _DRIFT_WINDOWS))


def together(dying: DyingUnits) -> list[DyingUnits]:
    """Split units where one interval of death ends before the next begins."""
    order = dying.last_fired.argsort(stable=True)
    ends = dying.silent_from[order].cummax(0).values  # chained: those who died a little later
    apart = dying.last_fired[order][1:] >= ends[:-1]
    wave = torch.zeros_like(order)
    wave[order[1:]] = apart.cumsum(0)
    return [dying.of(wave == number) for number in range(int(apart.sum()) + 1)] if len(order) else []


def are_many(dying: DyingUnits) -> bool:
    """Whether so many of a site died that chance alone is no explanation."""
    return len(dying.units) >= max(UNITS, SHARE * dying.size)


def decayed(dying: DyingUnits) -> Tensor:
    """Tell who would fire with its first bias, of which decay has taken a good part."""
    if dying.left > _LEFT:
        return torch.zeros_like(dying.born)
    first = dying.first_bias[dying.units]
    lost = first - dying.bias
    sunk = dying.peaks.amax(0) - dying.peaks[-1]
    shrunk = (dying.bias < 0.7 * first) & (dying.bias > -0.1 * lost)
    return shrunk & (dying.peaks[-1] + lost > 0) & (lost >= sunk / 2)


def median(values: Tensor) -> float:
    """Return the median of what is finite; NaN where nothing is."""
    return float(values.where(values.isfinite(), math.nan).nanmedian())
