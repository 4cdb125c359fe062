"""The pages that people read: each one file that asks for nothing."""

from sparing.study.pages.document import render_page, write_page
from sparing.study.pages.study_page import render_study, write_study_report

__all__ = ["render_page", "render_study", "write_page", "write_study_report"]
