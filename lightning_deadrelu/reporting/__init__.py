"""Reports to loggers; the only package that knows loggers.

``reporter`` says when and to whom, ``trackers`` how each logger takes pictures and tables, ``media`` what is
shown, ``pictures`` draws it.
"""

from lightning_deadrelu.metrics import metrics_of
from lightning_deadrelu.reporting.reporter import Reporter

__all__ = ["Reporter", "metrics_of"]
