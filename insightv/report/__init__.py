"""The page of a run: ``report/index.html``, one file that needs nothing else."""

from insightv.report.page import write_report

__all__ = ["write_report"]
