"""Which entries of which named parameters feed each unit of a site, and which read it."""

from lightning_deadrelu.attribution.ledger import merged
from lightning_deadrelu.attribution.table import Attributions
from lightning_deadrelu.attribution.tracer import Tracer

__all__ = ["Attributions", "Tracer", "merged"]
