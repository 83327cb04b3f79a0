"""Mistakes of the port to the real file system."""

from __future__ import annotations

from typing import Final

from tools.mutants.mutant import Edit, Mutant

FILESYSTEM: Final = "walbatch/storage/filesystem.py"

MUTANTS: Final = (
    Mutant(
        name="what the kernel wrote only in part is taken for written",
        row="short write",
        edits=(
            Edit(
                FILESYSTEM,
                "            offset += written\n            while pending and",
                "            offset += written\n            break\n            while pending and",
            ),
        ),
        hint="conformance:files",
    ),
    Mutant(
        name="the rest of a short write goes to where the first part went",
        row="short write",
        edits=(Edit(FILESYSTEM, "            offset += written\n", ""),),
        hint="conformance:files",
    ),
    Mutant(
        name="a datasync of the real file system does not reach the kernel",
        row="ack before sync",
        edits=(Edit(FILESYSTEM, "        os.fdatasync(self._fd)\n", "        os.fstat(self._fd)\n"),),
        hint="conformance:files",
    ),
    Mutant(
        name="a directory sync of the real file system does not reach the kernel",
        row="no directory sync after create or rename",
        edits=(Edit(FILESYSTEM, "            os.fsync(fd)\n", "            os.fstat(fd)\n"),),
        hint="conformance:files",
    ),
    Mutant(
        name="the real lock lets a second opener of the same process in",
        row="two processes, one process twice, another spelling of the path",
        edits=(Edit(FILESYSTEM, "fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB"),),
        hint="conformance:files",
    ),
    Mutant(
        name="a read that the kernel cut short is taken for the end of the file",
        row="a transient read error repaired",
        edits=(
            Edit(
                FILESYSTEM,
                "        if len(data) == size or not data:\n            return data\n",
                "        if data or not size:\n            return data\n",
            ),
        ),
        hint="conformance:files",
    ),
)
