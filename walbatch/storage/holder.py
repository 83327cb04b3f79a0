"""Whether somebody holds a store's lock, told without touching it.

What is not here: taking the lock (`filesystem`).

The idea needed to read it: the only way to ask flock(2) is to take the lock, and an engine that starts in that moment
would be refused. So the question goes to the kernel's list, /proc/locks, which names locks by device and inode.
"""

from __future__ import annotations

import enum
import json
import os
import socket
from typing import Final

from walbatch.storage.filesystem import LOCK_NOTE_BYTES_MAX

_LOCKS: Final = "/proc/locks"
_MOUNTS: Final = "/proc/self/mountinfo"


class Holder(enum.StrEnum):
    """Who holds a lock."""

    NOBODY = "nobody"
    SOMEBODY = "somebody"
    UNKNOWN = "unknown"
    """The list shows nobody, but it does not show other machines and containers, and the last holder was on one."""


def holder_of(path: str) -> Holder:
    """Who holds the flock on the file `path`. Writes nothing and takes nothing. Raises OSError."""
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        fd = os.open(path, flags)
    except FileNotFoundError:
        return Holder.NOBODY
    try:
        inode = os.fstat(fd).st_ino
        device = _device(fd)
        note = os.pread(fd, LOCK_NOTE_BYTES_MAX, 0)
    finally:
        os.close(fd)
    try:
        with open(_LOCKS, encoding="ascii", errors="replace") as locks:
            held = any(_names(line, device, inode) for line in locks)
    except OSError:
        return Holder.UNKNOWN
    if held:
        return Holder.SOMEBODY
    return Holder.NOBODY if _is_from_here(note) else Holder.UNKNOWN


def _names(line: str, device: tuple[int, int], inode: int) -> bool:
    """Whether a line of /proc/locks, as `1: FLOCK  ADVISORY  WRITE 708 08:01:393221 0 EOF`, is of this file."""
    fields = line.split()
    if len(fields) < 6 or fields[1] != "FLOCK":  # noqa: PLR2004 - up to the file
        return False
    major, _, rest = fields[5].partition(":")
    minor, _, number = rest.partition(":")
    try:
        return (int(major, 16), int(minor, 16), int(number)) == (*device, inode)
    except ValueError:
        return False


def _device(fd: int) -> tuple[int, int]:
    """Major and minor of the file's device as the kernel's lists name it.

    What stat(2) says is another one on file systems with subvolumes; the mount's own line has the right one.
    """
    device = os.fstat(fd).st_dev
    fallback = os.major(device), os.minor(device)
    try:
        with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as lines:
            mount = next((line.split()[1] for line in lines if line.startswith("mnt_id:")), "")
        with open(_MOUNTS, encoding="utf-8", errors="replace") as mounts:
            found = next((line.split()[2] for line in mounts if line.split()[0] == mount), "")
        major, _, minor = found.partition(":")
        return int(major), int(minor)
    except (OSError, ValueError, IndexError):
        return fallback


def _is_from_here(note: bytes) -> bool:
    """Whether the note in a lock file was left by a process of this machine, or by nobody."""
    if not note:
        return True
    try:
        return bool(json.loads(note).get("host") == socket.gethostname())
    except (ValueError, AttributeError, RecursionError):
        return False
