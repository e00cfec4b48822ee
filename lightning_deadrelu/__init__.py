"""Watch a network's rectifiers for units that died, and bring them back, from a Lightning callback or by hand."""

from lightning_deadrelu.callback import DeadReLUMonitor
from lightning_deadrelu.explain.checkup import checkup
from lightning_deadrelu.explain.finding import Finding
from lightning_deadrelu.observe.audit import find_dead_units
from lightning_deadrelu.prevention import (
    born_dead_bounds,
    decay_groups,
    init_for_relu_,
    randomized_asymmetric_init_,
)
from lightning_deadrelu.remedies import BiasWarming, LeakySlope, Remedy, Reset, SwapActivation, ThermalKick
from lightning_deadrelu.repair.activation_swap import restore_activations, swap_activations_
from lightning_deadrelu.statistics import LivenessReport, SiteReport, UnitLiveness

__all__ = [
    "BiasWarming",
    "DeadReLUMonitor",
    "Finding",
    "LeakySlope",
    "LivenessReport",
    "Remedy",
    "Reset",
    "SiteReport",
    "SwapActivation",
    "ThermalKick",
    "UnitLiveness",
    "born_dead_bounds",
    "checkup",
    "decay_groups",
    "find_dead_units",
    "init_for_relu_",
    "randomized_asymmetric_init_",
    "restore_activations",
    "swap_activations_",
]
