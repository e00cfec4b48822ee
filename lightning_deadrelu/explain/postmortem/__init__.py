"""Why units died: from what was noted before to a sentence and a cause. Pure."""

from lightning_deadrelu.explain.postmortem.death_events import DeathEvent, joined, most_telling, told
from lightning_deadrelu.explain.postmortem.dying_units import DyingUnits, WeightStats
from lightning_deadrelu.explain.postmortem.explain import explain

__all__ = ["DeathEvent", "DyingUnits", "WeightStats", "explain", "joined", "most_telling", "told"]
