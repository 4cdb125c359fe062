"""Reports of what was measured, as pages that stand alone."""

from sparing.study.report import render, write_report

__all__ = ["render", "write_report"]
