"""A comparison as a page that people look at, and as Markdown with the same tables."""

from dernkit.compare.report.writing import write_report

__all__ = ["write_report"]
