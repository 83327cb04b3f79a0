"""How much memory this process uses and may use, read from what Linux says under /proc and /sys.

Not here: what is done when it runs short (`core.pressure`).

The idea needed to read it: what counts is memory that the kernel cannot take back. Pages of files (the log just written, an LMDB
map of any size) are dropped under pressure, so they are left out on both ways of counting: of the process, anonymous and shared
pages; of a control group, its charge without its file cache. A group limits all processes in it, so where one has a limit, the
group's own count is compared with it; of several nested ones that with the least room counts.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Final

_READ_BYTES_MAX: Final = 64 * 1024
_GROUPS_MAX: Final = 32
"""Levels of control groups that are looked at: deeper nesting exists in nobody's machine."""
_NO_LIMIT: Final = 2**60
"""Version 1 says "no limit" with a number near 2^63."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """The files of one control group."""

    limit: str
    usage: str
    stat: str
    cache: tuple[bytes, ...]
    """What of `stat` can be dropped."""

    def limit_bytes(self) -> int | None:
        """None where it has no limit, or is gone."""
        text = _read(self.limit).strip()
        limit = int(text) if text.isdigit() else None  # "max" is none
        return limit if limit is not None and limit < _NO_LIMIT else None

    def used_bytes(self) -> int | None:
        """What its processes use and cannot be dropped; None where it cannot be told."""
        usage = _read(self.usage).strip()
        if not usage.isdigit():
            return None
        counts = _fields(_read(self.stat))
        return max(0, int(usage) - sum(counts.get(name, 0) for name in self.cache))


class RealMemory:
    """The memory of this machine. Safe from any thread; a look takes some 100 us.

    `root` is where `proc` and `sys` are: "/" unless a test has made its own.
    """

    def __init__(self, *, root: str = "/") -> None:
        self._status = os.path.join(root, "proc/self/status")
        self._groups = tuple(_groups(root))
        self._total_bytes = _fields(_read(os.path.join(root, "proc/meminfo"))).get(b"MemTotal:", 0) * 1024

    def __repr__(self) -> str:
        used, limit = self.look()
        return f"<RealMemory {used:,} of {limit:,} bytes>"

    def look(self) -> tuple[int, int]:
        """Bytes in use and bytes there are, both 0 where the system does not say."""
        used, limit = self._process_bytes(), self._total_bytes
        least = limit - used if limit else None
        for group in self._groups:
            group_limit = group.limit_bytes()
            group_used = None if group_limit is None else group.used_bytes()
            if group_limit is None or group_used is None:
                continue
            room = group_limit - group_used
            if least is None or room < least:
                used, limit, least = group_used, group_limit, room
        return used, limit

    def _process_bytes(self) -> int:
        counts = _fields(_read(self._status))
        if b"RssAnon:" in counts:
            return (counts[b"RssAnon:"] + counts.get(b"RssShmem:", 0)) * 1024
        return counts.get(b"VmRSS:", 0) * 1024


def _groups(root: str) -> list[_Group]:
    """The control groups of this process that account for memory, the innermost first."""
    found: list[_Group] = []
    for line in _read(os.path.join(root, "proc/self/cgroup")).splitlines():
        number, _, rest = line.partition(b":")
        controllers, _, raw = rest.partition(b":")
        path = os.fsdecode(raw)
        if b"memory" in controllers.split(b","):
            mount, files = os.path.join(root, "sys/fs/cgroup/memory"), _VERSION_1
        elif number == b"0" and not controllers:
            mount, files = os.path.join(root, "sys/fs/cgroup"), _VERSION_2
        else:
            continue
        limit, usage, cache = files
        found += [
            _Group(
                limit=os.path.join(folder, limit), usage=os.path.join(folder, usage),
                stat=os.path.join(folder, "memory.stat"), cache=cache,
            )
            for folder in _upwards(mount, path) if os.path.exists(os.path.join(folder, limit))
        ]  # fmt: skip
    return found


_VERSION_1: Final = (
    "memory.limit_in_bytes", "memory.usage_in_bytes", (b"total_inactive_file", b"total_active_file"),
)  # fmt: skip
_VERSION_2: Final = ("memory.max", "memory.current", (b"inactive_file", b"active_file"))


def _upwards(mount: str, path: str) -> list[str]:
    """The folders from a group's to the mount. In a container the path may be one that only its host can see."""
    parts = [part for part in path.split("/") if part not in {"", ".", ".."}][: _GROUPS_MAX - 1]
    return [os.path.join(mount, *parts[:depth]) for depth in range(len(parts), -1, -1)]


def _fields(text: bytes) -> dict[bytes, int]:
    """Lines of "name number" as a dictionary; other lines are left out."""
    found: dict[bytes, int] = {}
    for line in text.splitlines():
        words = line.split()
        if len(words) > 1 and words[1].isdigit():
            found[words[0]] = int(words[1])
    return found


def _read(path: str) -> bytes:
    """The beginning of a file; nothing where there is none."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        return os.read(descriptor, _READ_BYTES_MAX)
    except OSError:
        return b""
    finally:
        os.close(descriptor)
