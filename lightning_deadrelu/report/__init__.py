"""What people and programs read of a run: sentences, tables, figures, pages, files, and what loggers get."""

from lightning_deadrelu.report.figures import plot_run
from lightning_deadrelu.report.run_report import RunReport
from lightning_deadrelu.report.tables import summary

__all__ = ["RunReport", "plot_run", "summary"]
