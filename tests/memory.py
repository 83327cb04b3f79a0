"""A file system in memory that fails where it is told to, and forgets at a power cut what was not synced.

The strictest model of a disk: a power cut keeps exactly what a sync has promised, nothing else; a failed sync drops
what it should have written, leaves it readable, and says so once. And a state store that lives in memory beside it.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Collection, Mapping, Sequence

import walbatch as wb
from walbatch.errors import StorageError
from walbatch.ports import File, FileSystem, StateStore
from walbatch.types import Checkpoint, DeadLetter, KeyUse, LaneMemory

Fail = Callable[[str, str], None]
"""fail(call, path): may raise the error with which a call ends."""


class Content:
    """What a file holds: as anybody reads it, and as a power cut would leave it."""

    def __init__(self, data: bytes = b"") -> None:
        self.data = bytearray(data)
        self.durable = bytearray(data)
        self.pending: list[tuple[int, bytes]] = []


class MemoryFile(File):
    """An open file of a `MemoryFileSystem`."""

    def __init__(self, fs: MemoryFileSystem, content: Content, path: str) -> None:
        self._fs = fs
        self._content = content
        self._path = path
        self._open = True
        fs.open_files += 1

    def _call(self, call: str) -> Content:
        if not self._open:
            raise OSError(errno.EBADF, "the file is closed", self._path)
        self._fs.call(call, self._path)
        return self._content

    def write(self, buffers: Sequence[bytes], offset: int) -> None:
        """Failing, it leaves the first half of the bytes behind."""
        data = b"".join(buffers)
        try:
            content = self._call("write")
        except OSError:
            self._put(self._content, data[: len(data) // 2], offset)
            raise
        self._put(content, data, offset)

    def _put(self, content: Content, data: bytes, offset: int) -> None:
        with self._fs.guard:
            content.data.extend(bytes(max(0, offset + len(data) - len(content.data))))
            content.data[offset : offset + len(data)] = data
            content.pending.append((offset, data))

    def read(self, size: int, offset: int) -> bytes:
        return bytes(self._call("read").data[offset : offset + size])

    def datasync(self) -> None:
        try:
            content = self._call("datasync")
        except OSError:
            self._content.pending.clear()
            raise
        with self._fs.guard:
            size = len(content.data)
            del content.durable[size:]
            content.durable.extend(bytes(size - len(content.durable)))
            for offset, data in content.pending:
                kept = data[: max(0, size - offset)]
                content.durable[offset : offset + len(kept)] = kept
            content.pending.clear()

    def preallocate(self, size: int) -> None:
        self.truncate(max(size, len(self._call("preallocate").data)))

    def truncate(self, size: int) -> None:
        content = self._call("truncate")
        with self._fs.guard:
            del content.data[size:]
            content.data.extend(bytes(size - len(content.data)))

    def size(self) -> int:
        return len(self._call("size").data)

    def close(self) -> None:
        if self._open:
            self._open = False
            self._fs.open_files -= 1


class MemoryLock:
    """A held lock."""

    def __init__(self, fs: MemoryFileSystem, path: str) -> None:
        self._fs = fs
        self._path = path
        self.held = True

    def release(self) -> None:
        self.held = False
        self._fs.locks.discard(self._path)


class MemoryFileSystem(FileSystem):
    """Directories and files in memory. `fail` is asked before each call; `calls` counts them."""

    def __init__(
        self, files: Mapping[str, Content] | None = None, directories: Mapping[str, set[str]] | None = None
    ) -> None:
        self.files = dict(files or {})
        self.directories = {path: set(names) for path, names in (directories or {"/": set()}).items()}
        self.durable_names = {path: self._entries(path) for path in self.directories}
        self.locks: set[str] = set()
        self.open_files = 0
        self.calls: list[tuple[str, str]] = []
        self.fail: Fail | None = None
        self.guard = threading.RLock()
        self.checkpoints: dict[int, Checkpoint] = {}
        self.lanes: dict[str, LaneMemory] = {}
        self.letters: dict[int, DeadLetter] = {}
        self.given_up: set[int] = set()
        self.key_uses: list[KeyUse] = []
        self.keys_lsn = 0
        self.controllers: dict[tuple[str, int], bytes] = {}

    @classmethod
    def of(cls, root: str, files: Mapping[str, bytes]) -> MemoryFileSystem:
        """A store under `root` with these files (names relative to it), all durable."""
        fs = cls()
        for directory in ("", "/wal", "/state", "/quarantine"):
            fs._name(root + directory)
            fs.directories[root + directory] = set()
        for name, data in files.items():
            fs._name(f"{root}/{name}")
            fs.files[f"{root}/{name}"] = Content(data)
        fs.durable_names = {path: fs._entries(path) for path in fs.directories}
        return fs

    def after_power_cut(self) -> MemoryFileSystem:
        """What a disk still has if power fails now and everything that was not synced is gone."""
        fs = MemoryFileSystem()
        pending = ["/"]
        while pending:
            path = pending.pop()
            fs.directories.setdefault(path, set())
            for name, content in self.durable_names.get(path, {}).items():
                fs.directories[path].add(name)
                full = f"{path.rstrip('/')}/{name}"
                if content is None:
                    pending.append(full)
                else:
                    fs.files[full] = Content(bytes(content.durable))
        fs.durable_names = {path: fs._entries(path) for path in fs.directories}
        with self.guard:
            self._copy_state(fs)
        return fs

    def _copy_state(self, fs: MemoryFileSystem) -> None:
        fs.checkpoints, fs.lanes = dict(self.checkpoints), dict(self.lanes)
        fs.letters, fs.given_up = dict(self.letters), set(self.given_up)
        fs.key_uses, fs.keys_lsn, fs.controllers = list(self.key_uses), self.keys_lsn, dict(self.controllers)

    def call(self, call: str, path: str) -> None:
        self.calls.append((call, path))
        if self.fail is not None:
            self.fail(call, path)

    def _entries(self, path: str) -> dict[str, Content | None]:
        """The names in a directory; None for a directory."""
        base = path.rstrip("/")
        return {name: self.files.get(f"{base}/{name}") for name in self.directories[path]}

    def _name(self, path: str) -> None:
        directory, _, name = path.rpartition("/")
        if (directory or "/") not in self.directories:
            raise FileNotFoundError(errno.ENOENT, "no such directory", directory)
        self.directories[directory or "/"].add(name)

    def make_directory(self, path: str) -> None:
        self.call("make_directory", path)
        with self.guard:
            if path not in self.directories:
                self._name(path)
                self.directories[path] = set()

    def list_directory(self, path: str) -> list[str]:
        self.call("list_directory", path)
        with self.guard:
            if path not in self.directories:
                raise FileNotFoundError(errno.ENOENT, "no such directory", path)
            return sorted(self.directories[path])

    def is_directory(self, path: str) -> bool:
        return path in self.directories

    def exists(self, path: str) -> bool:
        return path in self.directories or path in self.files

    def create(self, path: str) -> File:
        self.call("create", path)
        with self.guard:
            if path in self.files:
                raise FileExistsError(errno.EEXIST, "it exists", path)
            self._name(path)
            self.files[path] = Content()
            return MemoryFile(self, self.files[path], path)

    def open_read(self, path: str) -> File:
        self.call("open_read", path)
        with self.guard:
            if path not in self.files:
                raise FileNotFoundError(errno.ENOENT, "no such file", path)
            return MemoryFile(self, self.files[path], path)

    def truncate(self, path: str, size: int) -> None:
        self.call("truncate", path)
        with self.guard:
            del self.files[path].data[size:]

    def rename(self, source: str, target: str) -> None:
        self.call("rename", target)
        with self.guard:
            self._name(target)
            self.files[target] = self.files.pop(source)
            directory, _, name = source.rpartition("/")
            self.directories[directory].discard(name)

    def unlink(self, path: str) -> None:
        self.call("unlink", path)
        with self.guard:
            if path not in self.files:
                raise FileNotFoundError(errno.ENOENT, "no such file", path)
            del self.files[path]
            directory, _, name = path.rpartition("/")
            self.directories[directory].discard(name)

    def sync_directory(self, path: str) -> None:
        self.call("sync_directory", path)
        with self.guard:
            self.durable_names[path] = self._entries(path)

    def lock(self, path: str, note: bytes) -> MemoryLock | bytes:
        self.call("lock", path)
        if path in self.locks:
            return bytes(self.files[path].data)
        self.locks.add(path)
        self._name(path)
        self.files.setdefault(path, Content()).data[:] = note
        return MemoryLock(self, path)


class MemoryState(StateStore):
    """The state of a `MemoryFileSystem`: every save is durable. As the port asks, safe from any thread."""

    def __init__(self, fs: MemoryFileSystem) -> None:
        self._fs = fs

    def _call(self, call: str) -> None:
        try:
            self._fs.call(call, "state")
        except OSError as error:
            raise StorageError(str(error), path="state", errno=error.errno) from error

    def load_checkpoint(self) -> tuple[Checkpoint | None, list[str]]:
        with self._fs.guard:
            newest = max(self._fs.checkpoints.values(), key=lambda c: c.generation, default=None)
            return newest, []

    def save_checkpoint(self, checkpoint: Checkpoint) -> None:
        self._call("save_checkpoint")
        with self._fs.guard:
            self._fs.checkpoints[checkpoint.generation % 2] = checkpoint

    def load_lanes(self) -> tuple[dict[str, LaneMemory], list[str]]:
        with self._fs.guard:
            return dict(self._fs.lanes), []

    def save_lanes(self, lanes: Mapping[str, LaneMemory]) -> None:
        self._call("save_lanes")
        with self._fs.guard:
            self._fs.lanes.update(lanes)

    def load_letters(self) -> tuple[list[DeadLetter], list[str]]:
        with self._fs.guard:
            return [self._fs.letters[lsn] for lsn in sorted(self._fs.letters)], []

    def bury(self, letters: Sequence[DeadLetter]) -> None:
        self._call("bury")
        with self._fs.guard:
            self._fs.letters.update({letter.lsn: letter for letter in letters})
            self._fs.given_up.update(letter.lsn for letter in letters)

    def unbury(self, lsns: Collection[int]) -> None:
        self._call("unbury")
        with self._fs.guard:
            for lsn in lsns:
                self._fs.letters.pop(lsn, None)

    def load_given_up(self) -> tuple[frozenset[int], list[str]]:
        with self._fs.guard:
            return frozenset(self._fs.given_up), []

    def cancel(self, lsns: Collection[int]) -> None:
        self._call("cancel")
        with self._fs.guard:
            self._fs.given_up.update(lsns)

    def forget_given_up(self, lsn: int) -> None:
        with self._fs.guard:
            self._fs.given_up = {one for one in self._fs.given_up if one > lsn or one in self._fs.letters}

    def load_keys(self) -> tuple[list[KeyUse], int, list[str]]:
        with self._fs.guard:
            return list(self._fs.key_uses), self._fs.keys_lsn, []

    def save_keys(self, uses: Sequence[KeyUse], *, up_to_lsn: int, oldest_wall_ns: int) -> None:
        self._call("save_keys")
        with self._fs.guard:
            self._fs.key_uses = [
                use for use in (*self._fs.key_uses, *uses) if use.used_wall_ns >= oldest_wall_ns
            ]
            self._fs.keys_lsn = up_to_lsn

    def load_controllers(self) -> tuple[dict[tuple[str, int], bytes], list[str]]:
        with self._fs.guard:
            return dict(self._fs.controllers), []

    def save_controllers(self, snapshots: Mapping[tuple[str, int], bytes]) -> None:
        self._call("save_controllers")
        with self._fs.guard:
            self._fs.controllers.update(snapshots)

    def close(self) -> None:
        pass


def environment(fs: MemoryFileSystem) -> wb.Environment:
    """The ports of an engine that runs in memory."""
    return wb.Environment(fs=fs, open_state=lambda path, store, quarantine: MemoryState(fs))


def fail_at(number: int, code: int, *, for_ever: bool) -> Fail:
    """Fail the call of this number (from 1), once or from then on."""
    seen = 0
    guard = threading.Lock()

    def fail(call: str, path: str) -> None:
        nonlocal seen
        with guard:
            seen += 1
            due = seen >= number if for_ever else seen == number
        if due:
            raise OSError(code, os.strerror(code), path)

    return fail
