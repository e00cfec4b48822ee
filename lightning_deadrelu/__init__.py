"""Watch a network's rectifiers for units that died, and bring them back, from a Lightning callback or by hand.

Words used throughout:

- site: where rectified units live, one layer's activation; calls fed by the same parameters are one site.
- unit: one channel or feature of a site. It fires where the rectifier's input is above the hinge, which is 0 for ReLU.
- observation: one training batch that is measured, its accumulated parts and all ranks together.
- window: so many observations; at its end all ranks merge their counts, and there is a verdict.
- silent, age: never fired in the window; samples observed since the unit last fired.
- dead: silent, and of an age that bounds its firing rate at 95 %. Born dead: dead, and has never fired.
- dormant, frozen, rare, always on: hardly contributes; puts out a constant; fires on less than 1 %; is linear.
- attribution: which entries of which parameters feed a unit, and which read it.
- remedy: an edit of what feeds or reads dead units, or of a site's activation; proposed, confirmed, then written.
- deaths, findings: units that died together, and why; what a check-up expects to kill units.
"""

from lightning_deadrelu.callback import DeadReLUMonitor
from lightning_deadrelu.explain.autopsy import autopsy
from lightning_deadrelu.explain.checkup import checkup
from lightning_deadrelu.explain.finding import Finding
from lightning_deadrelu.loop import watch
from lightning_deadrelu.observe.audit import find_dead_units
from lightning_deadrelu.observe.watchpoint import Watchpoint
from lightning_deadrelu.prevention import (
    born_dead_bounds,
    decay_groups,
    init_for_relu_,
    randomized_asymmetric_init_,
)
from lightning_deadrelu.remedies import BiasWarming, LeakySlope, Remedy, Reset, SwapActivation, ThermalKick, WakeUp
from lightning_deadrelu.repair.activation_swap import swap_activations_
from lightning_deadrelu.repair.restore_activations import restore_activations
from lightning_deadrelu.statistics import LivenessReport, SiteReport, UnitLiveness

__version__ = "0.1.0"

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
    "WakeUp",
    "Watchpoint",
    "autopsy",
    "born_dead_bounds",
    "checkup",
    "decay_groups",
    "find_dead_units",
    "init_for_relu_",
    "randomized_asymmetric_init_",
    "restore_activations",
    "swap_activations_",
    "watch",
]
