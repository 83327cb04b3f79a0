"""Every state that a crash may leave of a file system, as new file systems.

What is not here: when a crash comes (`explore`), and the machine around the disk (`machine`).

The idea needed to read it: a choice is made for each directory (which pending names it keeps), then for each file that can
still be reached (its size, the content of each unsure piece, what fills a gap). If all combinations together are at most
`bound`, all of them are produced; else the extremes come first, then `samples` drawn with the seed.
"""

from __future__ import annotations

import enum
import functools
import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from walbatch.testing.simulation.directory import Directory, NameOp, change_names
from walbatch.testing.simulation.disk import PIECE_BYTES, TORN_BYTES, ZEROS, Inode, Outcome, garbage_piece
from walbatch.testing.simulation.filesystem import SimulatedFileSystem

BOUND = 64
"""Images of one crash that are tried one by one. Beyond it there are extremes and samples."""
SAMPLES = 24

SUBSET_OPS_MAX = 6
"""Pending names of a directory of which all subsets are tried in strict mode; beyond it prefixes and single losses."""


class Cut(enum.StrEnum):
    """What ended the process."""

    POWER = "power"
    KILL = "kill"


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """One file system that a crash may leave. `label` names it among those of the same crash."""

    label: str
    fs: SimulatedFileSystem
    exhaustive: bool
    """Whether all images of this crash are produced."""


_Names = dict[Directory, dict[str, Inode | Directory]]
_Choice = tuple[int, Sequence[tuple[int, bytes]], Sequence[bytes]]
"""Size, contents of the unsure pieces, what fills the gap."""


def crash_images(
    fs: SimulatedFileSystem, cut: Cut, *, bound: int = BOUND, samples: int = SAMPLES, seed: int = 0, strict: bool = False
) -> Iterator[Image]:  # fmt: skip
    """The images after `cut`, the same ones in the same order for the same arguments. `fs` is not changed.

    A kill keeps the cache and everything pending: one image. `strict` lets a power cut keep any subset of the pending
    names of a directory instead of a prefix.
    """
    if cut is Cut.KILL:
        yield Image(label="kill/0", fs=fs.clone(), exhaustive=True)
        return
    trees = list(itertools.islice(_trees(fs, strict=strict), bound))
    total = sum(math.prod(_count(fs, inode) for inode in _reachable(names, fs.root)) for names in trees)
    exhaustive = total <= bound and len(trees) < bound
    made = _all(fs, trees) if exhaustive else _some(fs, trees, random.Random(f"images {seed}"), samples)
    for number, other in enumerate(made):
        yield Image(label=f"power/{number}", fs=other, exhaustive=exhaustive)


# --- names ---


def _directories(directory: Directory) -> Iterator[Directory]:
    """All directories that any choice may keep, parents first."""
    yield directory
    nodes = [*directory.durable.values(), *(op.node for op in directory.ops)]
    for node in dict.fromkeys(nodes):
        if isinstance(node, Directory):
            yield from _directories(node)


def _kept_ops(ops: Sequence[NameOp], *, strict: bool) -> list[tuple[NameOp, ...]]:
    """The lists of changes that a power cut may keep, the whole list first."""
    unsure = [index for index, op in enumerate(ops) if not op.sure]
    if not strict:
        lost = [set(unsure[keep:]) for keep in range(len(unsure), -1, -1)]
    elif len(unsure) <= SUBSET_OPS_MAX:
        lost = [
            set(subset) for size in range(len(unsure) + 1) for subset in itertools.combinations(unsure, size)
        ]
    else:
        lost = [set(unsure[keep:]) for keep in range(len(unsure), -1, -1)] + [{index} for index in unsure]
    return [tuple(op for index, op in enumerate(ops) if index not in gone) for gone in lost]


def _trees(fs: SimulatedFileSystem, *, strict: bool) -> Iterator[_Names]:
    """Every combination of names, without repeats."""
    directories = list(dict.fromkeys(_directories(fs.root)))
    seen: set[object] = set()
    for kept in itertools.product(*(_kept_ops(directory.ops, strict=strict) for directory in directories)):
        names: _Names = {}
        for directory, ops in zip(directories, kept, strict=True):
            table = directory.durable.copy()
            for op in ops:
                change_names(table, op)
            names[directory] = table
        shape = _shape(names, fs.root)
        if shape not in seen:
            seen.add(shape)
            yield names


def _shape(names: _Names, directory: Directory) -> object:
    return tuple(
        (name, id(node) if isinstance(node, Inode) else _shape(names, node))
        for name, node in sorted(names[directory].items())
    )


def _reachable(names: _Names, directory: Directory) -> list[Inode]:
    """The files that have a name, once each."""
    found: dict[Inode, None] = {}
    for node in names[directory].values():
        found |= {node: None} if isinstance(node, Inode) else dict.fromkeys(_reachable(names, node))
    return list(found)


def _built(fs: SimulatedFileSystem, names: _Names, inodes: dict[Inode, Inode]) -> SimulatedFileSystem:
    def build(directory: Directory) -> Directory:
        twin = Directory()
        for name, node in names[directory].items():
            twin.view[name] = inodes[node] if isinstance(node, Inode) else build(node)
        twin.durable = twin.view.copy()
        return twin

    return fs.twin(build(fs.root))


# --- contents ---


def _gaps(fs: SimulatedFileSystem, inode: Inode, size: int) -> list[Sequence[bytes]]:
    """What may fill the room behind the durable end: zeros, garbage, blocks of deleted files."""
    gap = inode.gap_pieces(size)
    if not gap:
        return [()]
    return [(), (garbage_piece(("gap", inode.number)),), *([tuple(fs.graveyard)] if fs.graveyard else [])]


def _futures(
    inode: Inode, index: int, gap: Sequence[bytes], torn_bytes: int = TORN_BYTES
) -> list[tuple[Outcome, bytes]]:
    before = gap[index % len(gap)] if gap and index in inode.gap_pieces((index + 1) * PIECE_BYTES) else ZEROS
    return inode.futures(index, before, garbage_piece((inode.number, index)), torn_bytes)


def _count(fs: SimulatedFileSystem, inode: Inode) -> int:
    """How many contents the file may have."""
    if not inode.is_dirty:
        return 1
    return sum(
        math.prod(
            len(_futures(inode, index, gap)) for index in inode.unsure_pieces() if index * PIECE_BYTES < size
        )
        for size in inode.possible_sizes()
        for gap in _gaps(fs, inode, size)
    )


def _contents(fs: SimulatedFileSystem, inode: Inode) -> Iterator[_Choice]:
    """Every content that the file may have."""
    for size in inode.possible_sizes():
        for gap in _gaps(fs, inode, size):
            indexes = [index for index in inode.unsure_pieces() if index * PIECE_BYTES < size]
            futures = [[content for _, content in _futures(inode, index, gap)] for index in indexes]
            for contents in itertools.product(*futures):
                yield size, list(zip(indexes, contents, strict=True)), gap


def _all(fs: SimulatedFileSystem, trees: Sequence[_Names]) -> Iterator[SimulatedFileSystem]:
    for names in trees:
        inodes = _reachable(names, fs.root)
        dirty = [inode for inode in inodes if inode.is_dirty]
        for choice in itertools.product(*(_contents(fs, inode) for inode in dirty)):
            chosen = dict(zip(dirty, choice, strict=True))
            yield _built(fs, names, {inode: _left(inode, chosen.get(inode)) for inode in inodes})


def _left(inode: Inode, choice: _Choice | None) -> Inode:
    return inode.clone() if choice is None else inode.left(*choice)


# --- samples ---


def _some(
    fs: SimulatedFileSystem, trees: Sequence[_Names], chance: random.Random, samples: int
) -> Iterator[SimulatedFileSystem]:
    """All kept; with all names nothing of the contents; each single piece lost; nothing kept; then by chance."""
    full, nothing = trees[0], trees[-1]
    yield _made(fs, full, lambda inode: _extreme(inode, Outcome.NEW))
    yield _made(fs, full, lambda inode: _extreme(inode, Outcome.OLD))
    yield _made(fs, nothing, lambda inode: _extreme(inode, Outcome.NEW))
    singles = [(inode, index) for inode in _reachable(full, fs.root) for index in inode.unsure_pieces()]
    for one, lost in chance.sample(singles, min(len(singles), samples // 2)):
        yield _made(fs, full, functools.partial(_all_but_one, one, lost))
    for _ in range(samples):
        names = full if chance.random() < 0.5 else chance.choice(trees)  # noqa: PLR2004 - a coin
        yield _made(fs, names, lambda inode: _by_chance(fs, inode, chance))


def _made(fs: SimulatedFileSystem, names: _Names, choose: Callable[[Inode], _Choice]) -> SimulatedFileSystem:
    return _built(
        fs,
        names,
        {
            inode: _left(inode, choose(inode) if inode.is_dirty else None)
            for inode in _reachable(names, fs.root)
        },
    )


def _extreme(inode: Inode, outcome: Outcome, lost: int | None = None) -> _Choice:
    """All pieces new (but for the one that is lost), or all old."""
    pieces = []
    for index in inode.unsure_pieces():
        futures = dict(reversed(_futures(inode, index, ())))
        old = futures.get(Outcome.OLD, futures[Outcome.NEW])
        pieces.append((index, futures[Outcome.NEW] if outcome is Outcome.NEW and index != lost else old))
    return inode.possible_sizes()[0], pieces, ()


def _all_but_one(one: Inode, lost: int, inode: Inode) -> _Choice:
    return _extreme(inode, Outcome.NEW, lost if inode is one else None)


def _by_chance(fs: SimulatedFileSystem, inode: Inode, chance: random.Random) -> _Choice:
    """A size, a gap, and for each piece an outcome; some draws keep nearly everything, some nearly nothing."""
    size = chance.choice(inode.possible_sizes())
    gap = chance.choice(_gaps(fs, inode, size))
    fresh = chance.choice((0.1, 0.5, 0.9))
    pieces = []
    for index in inode.unsure_pieces():
        futures = _futures(inode, index, gap, chance.randrange(1, PIECE_BYTES))
        keep = chance.random() < fresh
        pieces.append((index, futures[0][1] if keep else chance.choice(futures)[1]))
    return size, pieces, gap
