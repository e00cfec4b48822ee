"""Which entries of which named parameters feed each unit of a site, and which read it."""

from lightning_deadrelu.attribution.connectivity import merged
from lightning_deadrelu.attribution.over_ranks import joined_over_ranks, plain
from lightning_deadrelu.attribution.result import Attribution, Attributions, Outlet
from lightning_deadrelu.attribution.tracer import Tracer

__all__ = ["Attribution", "Attributions", "Outlet", "Tracer", "joined_over_ranks", "merged", "plain"]
