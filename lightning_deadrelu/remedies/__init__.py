"""Ways to bring dead units back, and when to use them."""

from lightning_deadrelu.remedies.base import (
    LEVELS,
    Activation,
    Edits,
    Law,
    Remedy,
    SiteView,
    Warmth,
    Write,
)
from lightning_deadrelu.remedies.flags import ladder_of, remedy_of
from lightning_deadrelu.remedies.sites import LeakySlope, SwapActivation
from lightning_deadrelu.remedies.units import BiasWarming, Reset, ThermalKick

__all__ = [
    "LEVELS",
    "Activation",
    "BiasWarming",
    "Edits",
    "Law",
    "LeakySlope",
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
