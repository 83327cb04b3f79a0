"""A file system in memory that can lose everything it is allowed to lose.

Implements `ports.FileSystem`. What is not here: the content of a file (`disk`), the images that a crash may leave
(`images`), and which calls fail (`faults`).

The idea needed to read it: a directory is a durable table of names and a list of changes that no sync has made
durable yet. A power cut keeps a prefix of each directory's list (by default), or any subset that makes sense (strict).
Directories are independent of one another; a file's content hangs on its node, not on its name.
"""

from __future__ import annotations

import enum
import errno
import os
from collections.abc import Callable, Sequence

from walbatch.testing.simulation.directory import (
    Directory,
    NameChange,
    NameOp,
    clone_directory,
    fingerprint,
)
from walbatch.testing.simulation.disk import PAGE_BYTES, PIECE_BYTES, FailedSync, Inode, garbage_piece
from walbatch.testing.simulation.faults import NO_FAULTS, FaultPlan, injected

GRAVEYARD_PIECES_MAX = 64
"""Pieces of deleted files that may show up again in new room."""

OnCall = Callable[[str, str], None]
"""on_call(call, path), before anything of the call happens: the place where threads are switched and processes end."""


def _nothing(call: str, path: str) -> None:
    """No scheduler, no crash."""


class Room(enum.StrEnum):
    """What preallocated room holds before anything is written there."""

    ZEROS = "zeros"
    GARBAGE = "garbage"
    STALE = "stale"
    """Blocks of deleted files, as far as there are any."""


class SimulatedFile:
    """An open file. Implements `ports.File`."""

    def __init__(self, fs: SimulatedFileSystem, inode: Inode, path: str, *, writable: bool) -> None:
        self._fs = fs
        self._inode = inode
        self._path = path
        self._writable = writable
        self._open = True

    def __repr__(self) -> str:
        return f"<SimulatedFile {self._path} {self._inode!r}>"

    def write(self, buffers: Sequence[bytes], offset: int) -> None:
        """Write page by page: between two pages a kill may come."""
        fault = self._call("write")
        data = b"".join(buffers)
        failure: OSError | None = None
        if fault is not None:
            short = fault in {errno.ENOSPC, errno.EDQUOT}
            data, failure = data[: len(data) // 2 if short else 0], injected(fault, self._path)
        elif (room := self._fs.room_bytes()) is not None and offset + len(data) - self._inode.size > room:
            keep = max(0, self._inode.size + room - offset)
            data, failure = data[:keep], injected(errno.ENOSPC, self._path)
        at = 0
        while at < len(data):
            if at:
                self._fs.on_call("write page", self._path)
            end = min(len(data), at + PAGE_BYTES - (offset + at) % PAGE_BYTES)
            self._inode.write(data[at:end], offset + at)
            self._fs.changed()
            at = end
        if failure is not None:
            raise failure

    def read(self, size: int, offset: int) -> bytes:
        """What a reader sees, which need not be on the disk."""
        fault = self._call("read")
        if fault is not None:
            raise injected(fault, self._path)
        return self._inode.read(size, offset)

    def datasync(self) -> None:
        """Make content and size durable, or fail as `failed_sync` of the file system says."""
        fault = self._call("datasync")
        if fault is not None:
            self._inode.fail_sync(self._fs.failed_sync)
            self._fs.changed()
            if self._fs.failed_sync is not FailedSync.LATE:
                raise injected(fault, self._path)
        elif self._inode.error_is_late:
            self._inode.fail_sync(FailedSync.DROP)
            self._fs.changed()
            raise injected(errno.EIO, self._path)
        elif self._inode.is_dirty:
            self._inode.sync()
            self._fs.changed()

    def preallocate(self, size: int) -> None:
        """Grow; the new room holds what `room` of the file system says."""
        fault = self._call("preallocate")
        room = self._fs.room_bytes()
        if fault is None and room is not None and size - self._inode.size > room:
            fault = errno.ENOSPC
        if fault is not None:
            raise injected(fault, self._path)
        before = self._inode.size
        if size > before:
            self._inode.truncate(size)
            for index in range(-(-before // PIECE_BYTES), -(-size // PIECE_BYTES)):
                content = self._fs.unwritten(index)
                if content is not None:
                    self._inode.put(index, content)
            self._fs.changed()

    def truncate(self, size: int) -> None:
        """Cut or grow."""
        fault = self._call("truncate")
        if fault is not None:
            raise injected(fault, self._path)
        self._inode.truncate(size)
        self._fs.changed()

    def size(self) -> int:
        """The present size."""
        fault = self._call("size")
        if fault is not None:
            raise injected(fault, self._path)
        return self._inode.size

    def close(self) -> None:
        """Release it. Syncs nothing."""
        if self._open:
            self._open = False
            self._fs.open_files -= 1

    def _call(self, call: str) -> int | None:
        self._fs.on_call(call, self._path)
        if not self._open:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF), self._path)
        if not self._writable and call in {"write", "truncate", "preallocate"}:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF), self._path)
        fault = self._fs.faults.due(call, self._path)
        return fault.error if fault else None


class SimulatedLock:
    """A held lock. It ends with `release`, or with the process."""

    def __init__(self, fs: SimulatedFileSystem, inode: Inode) -> None:
        self._fs = fs
        self._inode = inode

    @property
    def held(self) -> bool:
        """Whether it is."""
        return self._fs.locks.get(self._inode) is self

    def release(self) -> None:
        """Give it up."""
        if self.held:
            del self._fs.locks[self._inode]


class SimulatedFileSystem:
    """Names and files in memory. Not thread-safe by itself: the scheduler runs one thread at a time.

    Knobs: `failed_sync`, `failed_sync_drops_names` (no later sync of the directory makes them durable; by default the next one
    that succeeds does), `room` (what preallocated space holds), `capacity_bytes` (None: no bound), `files_max` (open
    ones; EMFILE beyond), `faults`. A rename from one directory into another is refused with EXDEV. The note in a lock file is
    durable at once: nobody trusts it, and it would double the images.
    """

    def __init__(self) -> None:
        self.root = Directory()
        self.on_call: OnCall = _nothing
        self.faults: FaultPlan = NO_FAULTS
        self.failed_sync = FailedSync.DROP
        self.failed_sync_drops_names = False
        self.room = Room.ZEROS
        self.capacity_bytes: int | None = None
        self.files_max: int | None = None
        self.open_files = 0
        self.version = 0
        """Grows with every change: two moments of the same version leave the same images."""
        self.locks: dict[Inode, SimulatedLock] = {}
        self.graveyard: list[bytes] = []
        self._inode_number = 0

    def __repr__(self) -> str:
        return f"<SimulatedFileSystem version {self.version}, {self.open_files} files open>"

    # --- what files ask ---

    def changed(self) -> None:
        """Something is different from now on."""
        self.version += 1

    def room_bytes(self) -> int | None:
        """Bytes that are left; None without a bound."""
        if self.capacity_bytes is None:
            return None
        return max(0, self.capacity_bytes - sum(inode.size for inode in self.inodes(self.root)))

    def unwritten(self, index: int) -> bytes | None:
        """What an unwritten piece of preallocated room holds; None for zeros."""
        match self.room:
            case Room.ZEROS:
                return None
            case Room.GARBAGE:
                return garbage_piece(("room", index))
            case Room.STALE:
                return self.graveyard[index % len(self.graveyard)] if self.graveyard else None

    def inodes(self, directory: Directory) -> list[Inode]:
        """All files that have a name below `directory`."""
        found: list[Inode] = []
        for node in directory.view.values():
            found += [node] if isinstance(node, Inode) else self.inodes(node)
        return found

    # --- names ---

    def make_directory(self, path: str) -> None:
        """Create one directory; an existing one is left alone."""
        self._call("make_directory", path)
        parent, name = self._parent(path)
        node = parent.view.get(name)
        if node is None:
            self._change(parent, NameOp(change=NameChange.CREATE, name=name, node=Directory()))
        elif isinstance(node, Inode):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)

    def list_directory(self, path: str) -> list[str]:
        """Names, sorted."""
        self._call("list_directory", path)
        return sorted(self._directory(path).view)

    def is_directory(self, path: str) -> bool:
        """Whether it is one. Makes no step: nothing depends on the moment at which it looks."""
        self._check_fault("is_directory", path)
        return isinstance(self._find(path), Directory)

    def exists(self, path: str) -> bool:
        """Whether `path` names anything. Makes no step either."""
        self._check_fault("exists", path)
        return self.holds(path)

    def holds(self, path: str) -> bool:
        """The same, asked from outside of any process: it never fails."""
        return self._find(path) is not None

    def create(self, path: str) -> SimulatedFile:
        """Create a new file."""
        self._call("create", path)
        parent, name = self._parent(path)
        if name in parent.view:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
        inode = self._new_inode()
        self._change(parent, NameOp(change=NameChange.CREATE, name=name, node=inode))
        return self._opened(inode, path, writable=True)

    def open_read(self, path: str) -> SimulatedFile:
        """Open for reading."""
        self._call("open_read", path)
        return self._opened(self._inode(path), path, writable=False)

    def truncate(self, path: str, size: int) -> None:
        """Cut a file by its name."""
        self._call("truncate", path)
        self._inode(path).truncate(size)
        self.changed()

    def rename(self, source: str, target: str) -> None:
        """Replace `target` by `source`."""
        self._call("rename", target)
        parent, name = self._parent(source)
        other, new_name = self._parent(target)
        if parent is not other:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), target)
        node = parent.view.get(name)
        if node is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), source)
        self._change(parent, NameOp(change=NameChange.RENAME, name=name, target=new_name, node=node))

    def unlink(self, path: str) -> None:
        """Remove a name. Its blocks may show up again in new files."""
        self._call("unlink", path)
        inode = self._inode(path)
        parent, name = self._parent(path)
        self.graveyard = [*self.graveyard, *inode.view.values()][-GRAVEYARD_PIECES_MAX:]
        self._change(parent, NameOp(change=NameChange.UNLINK, name=name, node=inode))

    def sync_directory(self, path: str) -> None:
        """Make the names in `path` durable."""
        self.on_call("sync_directory", path)
        directory = self._directory(path)
        fault = self.faults.due("sync_directory", path)
        if fault is not None:
            if self.failed_sync_drops_names:
                directory.fail_sync()
                self.changed()
            raise injected(fault.error, path)
        if directory.ops:
            directory.sync()
            self.changed()

    def lock(self, path: str, note: bytes) -> SimulatedLock | bytes:
        """Take the lock, or return the holder's note."""
        self._call("lock", path)
        found = self._find(path)
        if found is None:
            if not note:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
            parent, name = self._parent(path)
            found = self._new_inode()
            self._change(parent, NameOp(change=NameChange.CREATE, name=name, node=found))
        if isinstance(found, Directory):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        if found in self.locks:
            return found.read(found.size, 0)
        if note:
            found.truncate(0)
            found.write(note, 0)
            found.sync()
        self.locks[found] = lock = SimulatedLock(self, found)
        return lock

    # --- inside ---

    def _call(self, call: str, path: str) -> None:
        self.on_call(call, path)
        self._check_fault(call, path)

    def _check_fault(self, call: str, path: str) -> None:
        fault = self.faults.due(call, path)
        if fault is not None:
            raise injected(fault.error, path)

    def _change(self, directory: Directory, op: NameOp) -> None:
        directory.apply(op)
        self.changed()

    def _new_inode(self) -> Inode:
        self._inode_number += 1
        return Inode(self._inode_number)

    def _opened(self, inode: Inode, path: str, *, writable: bool) -> SimulatedFile:
        if self.files_max is not None and self.open_files >= self.files_max:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), path)
        self.open_files += 1
        return SimulatedFile(self, inode, path, writable=writable)

    def _find(self, path: str) -> Inode | Directory | None:
        node: Inode | Directory | None = self.root
        for name in path.split("/"):
            if not name:
                continue
            if not isinstance(node, Directory):
                return None
            node = node.view.get(name)
        return node

    def _directory(self, path: str) -> Directory:
        node = self._find(path)
        if node is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        if isinstance(node, Inode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
        return node

    def _parent(self, path: str) -> tuple[Directory, str]:
        parent, _, name = path.rstrip("/").rpartition("/")
        return self._directory(parent), name

    def _inode(self, path: str) -> Inode:
        node = self._find(path)
        if node is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        if isinstance(node, Directory):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        return node

    # --- copies ---

    def twin(self, root: Directory) -> SimulatedFileSystem:
        """A file system with the same knobs on another tree: no process has it open, and no call fails yet."""
        other = SimulatedFileSystem()
        other.root = root
        other.failed_sync, other.room = self.failed_sync, self.room
        other.failed_sync_drops_names = self.failed_sync_drops_names
        other.capacity_bytes, other.files_max = self.capacity_bytes, self.files_max
        other.graveyard = self.graveyard
        other._inode_number = self._inode_number
        return other

    def clone(self) -> SimulatedFileSystem:
        """A copy of everything on it, what is pending included; locks and open files end with the process."""
        nodes: dict[int, Inode | Directory] = {}
        return self.twin(clone_directory(self.root, nodes))

    def fingerprint(self) -> object:
        """A value that is equal for file systems that hold the same and may lose the same."""
        return fingerprint(self.root)
