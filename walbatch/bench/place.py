"""Where the benchmark works: a folder of its own on a disk that is one, gone when it ends."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import walbatch as wb

MEMORY: Final = frozenset({"tmpfs", "ramfs", "devtmpfs"})
"""File systems that have nothing to sync to."""
_BLOCK_BYTES: Final = 2**20


def file_system(path: Path) -> str:
    """The type of the file system that holds `path`."""
    best, kind = "", "unknown"
    real = str(path.resolve())
    for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines():
        _, where, found, *_ = line.split()
        mounted = where.encode("latin-1", "replace").decode("unicode_escape")
        inside = real == mounted or real.startswith(mounted.rstrip("/") + "/")
        if inside and len(mounted) >= len(best):
            best, kind = mounted, found
    return kind


def check_disk(folder: Path, *, anyway: bool) -> None:
    """Raise ConfigError where a sync means nothing, unless that is wanted."""
    kind = file_system(folder)
    if kind in MEMORY and not anyway:
        raise wb.ConfigError(
            f"{folder} is in memory ({kind}), where a sync means nothing: name a folder on a disk with --dir, or give --anyway"
        )


class Place:
    """The work folder, and the folders of single measurements in it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._made = 0

    def new(self) -> Path:
        """An empty folder that stays until the end."""
        self._made += 1
        folder = self.root / f"{self._made:04}"
        folder.mkdir()
        return folder

    @contextlib.contextmanager
    def passing(self) -> Iterator[Path]:
        """An empty folder for one measurement. What its removal leaves to the journal is written before the next one."""
        folder = self.new()
        try:
            yield folder
        finally:
            remove(folder)

    def free_bytes(self) -> int:
        """Of the disk."""
        return shutil.disk_usage(self.root).free

    def warm_page_cache(self, size: int) -> None:
        """Let the page cache have so many bytes of memory, at most a quarter of what the disk has room for, and give them back.

        A virtual machine gets its memory from its host when it is first touched. Whoever is measured at that moment pays ten times
        what a write to the page cache costs otherwise.
        """
        block = bytes(_BLOCK_BYTES)
        with self.passing() as folder, (folder / "warm").open("wb", buffering=0) as file:
            for _ in range(min(size, self.free_bytes() // 4) // len(block)):
                file.write(block)


def remove(folder: Path) -> None:
    """Delete a folder, and have that written."""
    shutil.rmtree(folder, ignore_errors=True)
    parent = os.open(folder.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)


@contextlib.contextmanager
def work_place(parent: Path) -> Iterator[Place]:
    """A new folder in `parent`, deleted at the end, also after Ctrl-C."""
    with tempfile.TemporaryDirectory(
        prefix="walbatch-bench-", dir=parent, ignore_cleanup_errors=True
    ) as folder:
        yield Place(Path(folder))
