"""Reports to loggers; the only package that knows loggers.

``reporter`` says when and to whom, ``adapters`` how each logger takes pictures and tables, ``media`` what is shown.
"""

from lightning_deadrelu.report.loggers.reporter import Reporter
from lightning_deadrelu.report.metrics import metrics_of

__all__ = ["Reporter", "metrics_of"]
