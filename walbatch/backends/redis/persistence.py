"""What a Redis promises of what it has acknowledged, as its own settings say it, and whether they are in force yet.

What is not here: how they are asked for, and what follows where nobody may ask.

The idea needed to read it: data and marks stand in the same file, and a batch is one transaction of it. So whatever Redis
loses, it loses both, from some batch on. Each batch takes effect once or not at all; but the engine has forgotten what was
acknowledged, so what is lost then is lost for good. Only a Redis that syncs before it answers loses nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

SETTINGS: Final = (
    "appendonly", "appendfsync", "no-appendfsync-on-rewrite", "maxmemory", "maxmemory-policy",
)  # fmt: skip

QUESTIONS: Final = (*(("CONFIG", "GET", name) for name in SETTINGS), ("INFO", "all"))
"""What a server is asked. One INFO says what is written, and how often settings were changed before: both at one moment."""

REWRITTEN: Final = (
    "its append-only file is written anew, and perhaps for the first time: it is not in force yet"
)


def why_not_in_force(persisted: Mapping[str, str]) -> str:
    """Why the file of a Redis that has the right settings may not hold what it acknowledges; '' where it does.

    Switched on while Redis works, the file counts only once all data has been written to it. Until then a crash loses everything.
    INFO does not tell that from an ordinary rewrite, in which the file before it counts: see `changes`.
    """
    if persisted.get("aof_enabled") != "1":
        return "its append-only file is not in force yet"
    if persisted.get("aof_last_write_status") != "ok":
        return (
            "its append-only file could not be written, and is not in force: look at the disk of the server"
        )
    if persisted.get("aof_rewrite_in_progress") != "0" or persisted.get("aof_rewrite_scheduled") != "0":
        return REWRITTEN
    return ""


def changes(statistics: Mapping[str, str]) -> tuple[str, ...]:
    """How often a server's settings may have been changed since its start: nothing where they never were.

    As long as that stays the same, a file that was in force still is.
    """
    if "cmdstat_config|get" not in statistics:  # before Redis 7, all CONFIG commands are counted as one
        return ("unknown", statistics.get("cmdstat_config", ""))
    names = ("cmdstat_config|set", "cmdstat_config|resetstat")
    return tuple(statistics[name].partition(",")[0] for name in names if name in statistics)


def shortcomings(settings: Mapping[str, str]) -> list[str]:
    """Why a Redis with these settings may lose what it has acknowledged: a sentence each; nothing where it may not."""
    found = []
    if settings.get("appendonly") != "yes":
        found.append("appendonly is not 'yes': what came since the last snapshot is lost with the process")
    elif settings.get("appendfsync") != "always":
        found.append(
            f"appendfsync is {settings.get('appendfsync')!r}, not 'always': a crash loses what was acknowledged last"
        )
    elif settings.get("no-appendfsync-on-rewrite") != "no":
        found.append("no-appendfsync-on-rewrite is not 'no': nothing is synced while Redis rewrites its file")
    if settings.get("maxmemory", "0") != "0" and settings.get("maxmemory-policy", "").startswith("allkeys"):
        found.append(
            f"maxmemory-policy is {settings['maxmemory-policy']!r}: Redis may drop marks and data when memory is short"
        )
    return found
