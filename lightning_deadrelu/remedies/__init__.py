"""Ways to bring dead units back, and when to use them."""

from lightning_deadrelu.remedies.base import (
    Activation,
    Edits,
    InitDistribution,
    Lift,
    Remedy,
    SiteView,
    Warmth,
    Write,
)
from lightning_deadrelu.remedies.flags import ladder_of, remedy_of
from lightning_deadrelu.remedies.site_remedies import LeakySlope, SwapActivation
from lightning_deadrelu.remedies.unit_remedies import BiasWarming, Reset, ThermalKick
from lightning_deadrelu.statistics.confirmation import LEVELS

__all__ = [
    "LEVELS",
    "Activation",
    "BiasWarming",
    "Edits",
    "InitDistribution",
    "LeakySlope",
    "Lift",
    "Remedy",
    "Reset",
    "SiteView",
    "SwapActivation",
    "ThermalKick",
    "Warmth",
    "Write",
    "ladder_of",
    "remedy_of",
]
