"""From activations to counts, from counts to verdicts. Pure functions under :class:`UnitLiveness`."""

from lightning_deadrelu.statistics.counts import Counts, UnitLiveness, count
from lightning_deadrelu.statistics.judge import (
    History,
    LivenessReport,
    Rules,
    SiteReport,
    Totals,
    dormancy_of,
    judge,
)

__all__ = [
    "Counts",
    "History",
    "LivenessReport",
    "Rules",
    "SiteReport",
    "Totals",
    "UnitLiveness",
    "count",
    "dormancy_of",
    "judge",
]
