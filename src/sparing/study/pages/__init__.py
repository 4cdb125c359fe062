"""The pages that people read: each one file that asks for nothing."""

from sparing.study.pages.document import page_environment, write_page

__all__ = ["page_environment", "write_page"]
