"""Whether what a real power cut left is something that the simulation allows.

What is not here: how the calls were recorded (`recorder`), and what is right for the engine (`judge`).

The idea needed to read it: the calls that a worker told of are done again on a `SimulatedFileSystem`. What it holds as durable
must be on the real disk after the cut; what it holds as pending may be there, in part, or not. A real state outside of
that means that the model, and so every simulated crash, is too kind.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tools.modes.recorder import DATASYNC, SYNC_DIRECTORY
from walbatch.testing.simulation import SimulatedFileSystem
from walbatch.testing.simulation.directory import Directory, change_names
from walbatch.testing.simulation.disk import PIECE_BYTES, ZEROS, Inode
from walbatch.testing.simulation.filesystem import SimulatedFile

UNSEEN: Final = frozenset({"state", "lmdb", "lost+found"})
"""Names whose content does not pass through the port."""

CONTENT_FREE: Final = frozenset({"lock"})
"""Files whose content nobody trusts: the simulation keeps it, a real disk need not."""

FILE_CALLS: Final = frozenset({"write", "preallocate", "resize", DATASYNC})
"""Calls whose first argument is a file; of the others it is a path."""

SUBSET_OPS_MAX: Final = 12

TRAIL_CALLS: Final = 60
"""Calls that a finding tells."""

Names = dict[str, Inode | Directory]


@dataclass(slots=True)
class _Call:
    """A call that has begun."""

    name: str
    arguments: list[Any]
    target: Inode | Directory | None = None
    spoiled: bool = False
    """Something changed its target meanwhile, which its promise may or may not cover: it promises nothing then."""


@dataclass(slots=True, kw_only=True)
class Model:
    """The simulated twin of what stands below the mount point."""

    figures: Counter[str] = field(default_factory=Counter)
    fs: SimulatedFileSystem = field(default_factory=SimulatedFileSystem)
    _files: dict[int, SimulatedFile] = field(default_factory=dict)
    _open: dict[int, _Call] = field(default_factory=dict)
    _trail: deque[str] = field(default_factory=lambda: deque(maxlen=TRAIL_CALLS))

    # --- doing the calls again ---

    def hear(self, fields: list[Any], raw: bytes) -> None:
        """Take in a message of a worker."""
        match fields:
            case ["call", number, name, *arguments]:
                self._begin(number, _Call(name, arguments), raw)
            case ["done", number, succeeded, _]:
                self._finish(self._open.pop(number), succeeded=succeeded)
            case _:
                pass

    def _begin(self, number: int, call: _Call, raw: bytes) -> None:
        """Whatever it does may be on the disk from now on, and need not be."""
        self.figures["calls"] += 1
        self._open[number] = call
        self._trail.append(f"{number} {call.name} {call.arguments} {len(raw) or ''}")
        if call.name in FILE_CALLS:
            self._change_file(call, raw)
        else:
            self._change_names(call)
        call.target = self._target(call)
        for other in self._open.values():
            # A sync promises nothing of what began after it had begun, or had not ended by then.
            both = call, other
            syncs = [one for one in both if one.name in {DATASYNC, SYNC_DIRECTORY}]
            if len(syncs) == 1 and call.target is other.target:
                syncs[0].spoiled = True

    def _change_file(self, call: _Call, raw: bytes) -> None:
        handle, *arguments = call.arguments
        file = self._files[handle]
        match call.name, arguments:
            case "write", [offset]:
                file.write([raw], offset)
            case "preallocate", [size]:
                file.preallocate(size)
            case "resize", [size]:
                file.truncate(size)
            case _:
                assert call.name == DATASYNC, call.name

    def _change_names(self, call: _Call) -> None:
        path, *arguments = call.arguments
        match call.name, arguments:
            case "make_directory", []:
                self.fs.make_directory(path)
            case "create", [handle] if not self.fs.exists(path):
                self._files[handle] = self.fs.create(path)
            case "lock", [] if not self.fs.exists(path):
                self.fs.create(path).close()
            case "truncate", [size]:
                self.fs.truncate(path, size)
            case "rename", [target]:
                self.fs.rename(path, target)
            case "unlink", [] if self.fs.exists(path):
                self.fs.unlink(path)
            case _:
                assert call.name in {"create", "lock", "unlink", SYNC_DIRECTORY}, call.name

    def _finish(self, call: _Call, *, succeeded: bool) -> None:
        self._trail.append(
            f"{call.name} {call.arguments} {'done' if succeeded else 'failed'}{', spoiled' * call.spoiled}"
        )
        if not succeeded or call.spoiled:
            self.figures["syncs that promised nothing"] += call.name in {DATASYNC, SYNC_DIRECTORY}
            return
        if call.name == DATASYNC:
            self._files[call.arguments[0]].datasync()
        elif call.name == SYNC_DIRECTORY:
            self.fs.sync_directory(call.arguments[0])

    def _target(self, call: _Call) -> Inode | Directory | None:
        """The file or directory whose sync would cover it."""
        first = call.arguments[0]
        if call.name in FILE_CALLS:
            return self._files[first]._inode  # noqa: SLF001 - a stand-in of the file
        return self._node(first if call.name == SYNC_DIRECTORY else first.rpartition("/")[0])

    def _node(self, path: str) -> Inode | Directory | None:
        node: Inode | Directory | None = self.fs.root
        for name in path.split("/"):
            if name:
                node = node.view.get(name) if isinstance(node, Directory) else None
        return node

    def killed(self, place: Path) -> None:
        """The process is dead and the disk is not: calls that it was in the middle of were done in part, as one can see."""
        for call in self._open.values():
            if isinstance(call.target, Inode):
                for path in _paths_of(self.fs.root, call.target):
                    _look(call.target, place / path)
            elif isinstance(call.target, Directory) and call.name != SYNC_DIRECTORY:
                _look_at_names(call.target, place, self.fs.root)
        self._open.clear()
        self._files.clear()
        self._trail.append("killed")

    def restart(self, place: Path) -> None:
        """After a cut: what is on the disk is durable, and is all there is."""
        self.fs = SimulatedFileSystem()
        self._open.clear()
        self._files.clear()
        self._trail.clear()
        _load(self.fs.root, place)

    # --- judging what is there ---

    def check(self, place: Path) -> list[str]:
        """What the model forbids of the state below `place`."""
        self.figures["states compared"] += 1
        problems = self._check_directory(self.fs.root, place, "")
        return [f"{problem}; last calls: {'; '.join(self._trail)}" for problem in problems]

    def _check_directory(self, directory: Directory, place: Path, path: str) -> list[str]:
        found = {entry.name for entry in place.iterdir()} - UNSEEN
        best: list[str] | None = None
        for how, names in _names_after(directory):
            if set(names) - UNSEEN != found:
                continue
            problems = []
            for name, node in names.items():
                if name not in UNSEEN:
                    problems += self._check_node(node, place / name, f"{path}/{name}")
            if not problems:
                self.figures[f"directories {how}"] += 1
                return []
            best = problems if best is None else best
        if best is not None:
            return best
        expected = sorted(set(directory.durable) - UNSEEN)
        changes = ", ".join(f"{op.change} {op.name} {op.target}".strip() for op in directory.ops)
        return [
            f"the model forbids the names in {path or '/'}: found {sorted(found)}, durable are {expected}, pending [{changes}]"
        ]

    def _check_node(self, node: Inode | Directory, place: Path, path: str) -> list[str]:
        if isinstance(node, Directory):
            if not place.is_dir():
                return [f"the model forbids {path}: it is no directory"]
            return self._check_directory(node, place, path)
        if not place.is_file():
            return [f"the model forbids {path}: it is no file"]
        return [] if place.name in CONTENT_FREE else self._check_file(node, place.read_bytes(), path)

    def _check_file(self, inode: Inode, data: bytes, path: str) -> list[str]:
        self.figures["files compared"] += 1
        sizes = inode.possible_sizes()
        size = len(data)
        if not inode.may_have(size):
            return [f"the model forbids {path}: it has {size} bytes, and may have {sizes}"]
        self.figures["sizes that were not the newest"] += size != sizes[0]
        unsure = frozenset(inode.unsure_pieces())
        for index in range(-(-size // PIECE_BYTES)):
            piece = data[index * PIECE_BYTES : (index + 1) * PIECE_BYTES]
            if index in unsure:
                outcome = _outcome_of(inode, index, piece)
                if outcome is None:
                    newest = _versions(inode, index)[-1]
                    return [
                        f"the model forbids {path}: piece {index} is {_shown(piece)}, no state on the way to {_shown(newest)}"
                    ]
                self.figures["unsure pieces"] += 1
                self.figures[f"pieces {outcome}"] += 1
                continue
            durable = inode.durable.get(index, ZEROS)[: len(piece)]
            if piece == durable:
                continue
            if index in inode.gap_pieces(size) and index not in inode.durable:
                # Stale blocks: the model has them, too.
                self.figures["pieces never written, not zeros"] += 1
                continue
            return [
                f"the model forbids {path}: piece {index} was durable, and is {_shown(piece)} instead of {_shown(durable)}"
            ]
        return []


def _versions(inode: Inode, index: int) -> list[bytes]:
    """Every content of a piece since it was durable, oldest first."""
    return [
        inode.durable.get(index, ZEROS), *inode.doubtful.get(index, ()), *inode.pending.get(index, ()),
    ]  # fmt: skip


def _outcome_of(inode: Inode, index: int, piece: bytes) -> str | None:
    """Which of the futures of an unsure piece this is; None for none of them.

    The model also has noise as the future of every unsure piece. A file system that leaves noise where something durable stood
    is nothing that was ever seen, and would be a finding about the model: noise passes only where nothing durable stood.
    """
    size = len(piece)
    versions = [version[:size] for version in _versions(inode, index)]
    if piece == versions[-1]:
        return "new"
    if piece == versions[0]:
        return "old"
    if piece in versions:
        return "between"
    if not any(piece):
        return "zero"
    for at, older in enumerate(versions):
        for newer in versions[at + 1 :]:
            if _is_mixture(piece, newer, older) or _is_mixture(piece, newer, ZEROS[:size]):
                return "prefix"
    return None if index in inode.durable else "noise where nothing durable stood"


def _is_mixture(piece: bytes, newer: bytes, older: bytes) -> bool:
    """Whether a piece begins as the newer content and ends as the older one."""
    same = next(
        (at for at, (one, two) in enumerate(zip(piece, newer, strict=True)) if one != two), len(piece)
    )
    return piece[same:] == older[same:]


def _shown(piece: bytes) -> str:
    """Enough of a piece to tell it from another."""
    return f"{piece[:12].hex()}...{piece[-4:].hex()}" if any(piece) else "zeros"


def _names_after(directory: Directory) -> list[tuple[str, Names]]:
    """The tables that a cut may leave: any prefix of the pending changes, then (strict) any subset."""
    ops = directory.ops
    unsure = [index for index, op in enumerate(ops) if not op.sure]
    prefixes = [frozenset(unsure[keep:]) for keep in range(len(unsure), -1, -1)]
    subsets: list[frozenset[int]] = []
    if len(unsure) <= SUBSET_OPS_MAX:
        subsets = [
            frozenset(lost)
            for count in range(len(unsure) + 1)
            for lost in itertools.combinations(unsure, count)
        ]
    tables = []
    for how, losses in (("by prefix", prefixes), ("by subset only", subsets)):
        for lost in losses:
            table = directory.durable.copy()
            for index, op in enumerate(ops):
                if index not in lost:
                    change_names(table, op)
            tables.append((how, table))
    return tables


# --- looking at the real disk -------------------------------------------------------------------------------------------


def _load(directory: Directory, place: Path) -> None:
    """Take over what is there, as durable."""
    for entry in sorted(place.iterdir()):
        node: Inode | Directory
        if entry.is_dir():
            node = Directory()
            if entry.name not in UNSEEN:
                _load(node, entry)
        else:
            node = Inode(entry.stat().st_ino)
            if entry.name not in CONTENT_FREE:
                node.write(entry.read_bytes(), 0)
                node.sync()
        if entry.name not in UNSEEN or entry.name == "state":
            directory.view[entry.name] = directory.durable[entry.name] = node


def _paths_of(directory: Directory, wanted: Inode) -> list[str]:
    paths = []
    for name, node in directory.view.items():
        if node is wanted:
            paths.append(name)
        elif isinstance(node, Directory):
            paths += [f"{name}/{path}" for path in _paths_of(node, wanted)]
    return paths


def _look(inode: Inode, path: Path) -> None:
    """Let the model see what a reader of the real file sees."""
    if not path.is_file():
        return
    data = path.read_bytes()
    if inode.size != len(data):
        inode.truncate(len(data))
    for index in range(-(-len(data) // PIECE_BYTES)):
        piece = data[index * PIECE_BYTES : (index + 1) * PIECE_BYTES].ljust(PIECE_BYTES, b"\0")
        if inode.view.get(index, ZEROS) != piece:
            inode.put(index, piece)


def _look_at_names(directory: Directory, place: Path, root: Directory) -> None:
    """Take back the last changes of names that did not happen."""
    path = _path_of_directory(root, directory)
    if path is None:
        return
    there = place / path
    found = {entry.name for entry in there.iterdir()} if there.is_dir() else set()
    while directory.ops and set(directory.view) - UNSEEN != found - UNSEEN:
        if directory.ops[-1].sure:
            break
        directory.ops.pop()
        view: Names = directory.durable.copy()
        for op in directory.ops:
            change_names(view, op)
        directory.view = view


def _path_of_directory(root: Directory, wanted: Directory) -> str | None:
    if root is wanted:
        return ""
    for name, node in root.view.items():
        if isinstance(node, Directory):
            below = _path_of_directory(node, wanted)
            if below is not None:
                return f"{name}/{below}" if below else name
    return None
