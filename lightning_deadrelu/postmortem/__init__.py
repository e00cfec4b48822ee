"""Why units died: from what was noted before to a sentence and a cause. Pure."""

from lightning_deadrelu.postmortem.explaining import explain
from lightning_deadrelu.postmortem.victims import Feed, Victims
from lightning_deadrelu.postmortem.waves import Wave, joined, most_telling, told

__all__ = ["Feed", "Victims", "Wave", "explain", "joined", "most_telling", "told"]
