"""Explain why units died, from what was recorded before."""

from lightning_deadrelu.explain.postmortem.death_events import DeathEvent, described, still_true

__all__ = ["DeathEvent", "described", "still_true"]
