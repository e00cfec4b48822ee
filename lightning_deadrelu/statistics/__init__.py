"""From activations to counts, from counts to verdicts. Pure functions under :class:`UnitLiveness`."""

from lightning_deadrelu.statistics.counts import Counts, UnitLiveness, count
from lightning_deadrelu.statistics.judge import (
    LivenessReport,
    Rules,
    SiteReport,
    Totals,
    UnitHistory,
    dormancy_of,
    judge,
)

__all__ = [
    "Counts",
    "LivenessReport",
    "Rules",
    "SiteReport",
    "Totals",
    "UnitHistory",
    "UnitLiveness",
    "count",
    "dormancy_of",
    "judge",
]
