"""Which units of a site a remedy may treat. Pure."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_deadrelu.remedies import Remedy
from lightning_deadrelu.statistics import SiteReport


def candidates(site: SiteReport, remedy: Remedy, min_silent_samples: int) -> Tensor:
    """Tell which units are dead beyond doubt, boolean, shape ``(units,)``."""
    enough = site.age >= (min_silent_samples if remedy.evidence is None else remedy.evidence)
    if remedy.significance is None:
        return site.dead & enough
    return site.silent & torch.where(site.fired_ever > 0, improbable(site, remedy.significance), enough)


def improbable(site: SiteReport, significance: float) -> Tensor:
    """Tell whose silence has become improbable under the unit's own history, boolean, shape ``(units,)``.

    While nothing changes, the ``k`` times that a unit has fired lie anywhere among its ``n`` elements until then and
    the ``a`` samples since, with equal chance. All lie among the first ``n`` in ``C(n, k)`` of ``C(n + a, k)`` cases:
    Fisher's exact test. With many firings that is the geometric law, ``(1 - k / n) ** a``; a unit that has fired once
    has to be silent 19 times as long as that took to be improbable at 0.05. Source: Farias and Jozefiak 2024,
    arXiv 2410.20098, for the question.

    Args:
        site: The verdict; its ``fired_ever`` and ``seen`` are the history.
        significance: The probability below which silence is no accident.
    """
    fired, seen, age = site.fired_ever.double(), site.seen.double(), site.age.double()
    silence: Tensor = _log_ways(seen, fired) - _log_ways(seen + age, fired) <= math.log(significance)
    return silence


def _log_ways(among: Tensor, fired: Tensor) -> Tensor:
    """Count the orders in which so many firings can lie among elements, as a logarithm."""
    return torch.lgamma(among + 1) - torch.lgamma(among - fired + 1)


def frozen_units(site: SiteReport, remedy: Remedy) -> Tensor:
    """Tell which frozen units are to be treated along, boolean, shape ``(units,)``."""
    return site.frozen & remedy.treats_frozen
