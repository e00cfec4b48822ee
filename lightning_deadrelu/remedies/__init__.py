"""Ways to bring dead units back, and when to use them."""

from lightning_deadrelu.remedies.base import (
    Activation,
    Edits,
    InitDistribution,
    Lift,
    NotApplicable,
    Push,
    Remedy,
    SiteView,
    Warmth,
    Write,
)
from lightning_deadrelu.remedies.flags import ladder_of, remedy_of
from lightning_deadrelu.remedies.reviving import BiasWarming, LeakySlope, WakeUp
from lightning_deadrelu.remedies.site_remedies import SwapActivation
from lightning_deadrelu.remedies.unit_remedies import Reset, ThermalKick
from lightning_deadrelu.statistics.confirmation import LEVELS

Law = InitDistribution
"""The former name of :class:`InitDistribution`."""

__all__ = [
    "LEVELS",
    "Activation",
    "BiasWarming",
    "Edits",
    "InitDistribution",
    "Law",
    "LeakySlope",
    "Lift",
    "NotApplicable",
    "Push",
    "Remedy",
    "Reset",
    "SiteView",
    "SwapActivation",
    "ThermalKick",
    "WakeUp",
    "Warmth",
    "Write",
    "ladder_of",
    "remedy_of",
]
