"""The page of a schedule: one HTML file that needs no network, made of what may be a stranger's data."""

from hgc_learn.report.page import write_page

__all__ = ["write_page"]
