"""From activations to counts, from counts to verdicts. Pure functions under :class:`UnitLiveness`."""

from lightning_deadrelu.statistics.counts import Counts, count
from lightning_deadrelu.statistics.judge import Rules, judge
from lightning_deadrelu.statistics.metric import UnitLiveness
from lightning_deadrelu.statistics.report import LivenessReport, SiteReport
from lightning_deadrelu.statistics.totals import Totals, UnitHistory

__all__ = [
    "Counts",
    "LivenessReport",
    "Rules",
    "SiteReport",
    "Totals",
    "UnitHistory",
    "UnitLiveness",
    "count",
    "judge",
]
