"""Copying tables between SQLite and PostgreSQL, through an engine: each row exactly once, whatever is killed in between."""

from walbatch.copying.course import copy_tables
from walbatch.copying.report import CopyProgress, CopyReport, TableReport, Verification

__all__ = ["CopyProgress", "CopyReport", "TableReport", "Verification", "copy_tables"]
