"""The pages that people read: each one file that asks for nothing."""

from sparing.study.pages.document import page_environment, write_page
from sparing.study.pages.study_page import render_study, write_study_report

__all__ = ["page_environment", "render_study", "write_page", "write_study_report"]
