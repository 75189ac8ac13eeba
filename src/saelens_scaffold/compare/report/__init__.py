"""The page that a comparison is looked at on."""

from saelens_scaffold.compare.report.page import page, write_page

__all__ = ["page", "write_page"]
