"""Pictures of what gates do: one page that opens from a disk."""

from gaternet.report.page import write_report

__all__ = ["write_report"]
