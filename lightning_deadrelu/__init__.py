"""Watch a network's rectifiers for units that died, from a Lightning callback or without a Trainer."""

from lightning_deadrelu.audit import find_dead_units
from lightning_deadrelu.callback import DeadReLUMonitor
from lightning_deadrelu.statistics import LivenessReport, SiteReport, UnitLiveness

__all__ = ["DeadReLUMonitor", "LivenessReport", "SiteReport", "UnitLiveness", "find_dead_units"]
