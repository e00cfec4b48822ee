"""Reports as tables and pictures; the only package that draws with matplotlib and rich, imported when used."""

from lightning_deadrelu.report.figures import plot, plot_run
from lightning_deadrelu.report.run_report import RunReport
from lightning_deadrelu.report.tables import attribution_table, headline, html_table, summary, table

__all__ = ["RunReport", "attribution_table", "headline", "html_table", "plot", "plot_run", "summary", "table"]
