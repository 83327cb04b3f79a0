"""Whether pytest finds the plugin by its entry point, as users have it, or must be told where it is."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Final

PLUGIN_OPTIONS: Final = () if entry_points(group="pytest11", name="walbatch") else ("-p", "_walbatch_pytest")
"""For a run of pytest in a test."""
