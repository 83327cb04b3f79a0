"""Every state that a crash may leave of a file system, as new file systems.

What is not here: when a crash comes (`explore`), and the machine around the disk (`machine`).

The idea needed to read it: a choice is made for each directory (which pending names it keeps), then for each file that can
still be reached (its size, the content of each unsure piece, what fills a gap). If all combinations together are at most
`bound`, all of them are produced; else the extremes come first, then `samples` drawn with the seed. No image comes twice
for the same crash. Images share what the crash did not touch: clone one before a process works on it.
"""

from __future__ import annotations

import enum
import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from walbatch.testing.simulation.directory import Directory, NameOp, change_names
from walbatch.testing.simulation.disk import PIECE_BYTES, ZEROS, Inode, Outcome, garbage_piece
from walbatch.testing.simulation.filesystem import SimulatedFileSystem

BOUND = 64
"""Images of one crash that are tried one by one. Beyond it there are extremes and samples."""
SAMPLES = 24

TORN_CHANCE = 0.3
"""How often a sampled piece that is not the newest is a torn one, cut anywhere."""

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
_Choice = tuple[int, tuple[tuple[int, bytes], ...], Sequence[bytes]]
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
    futures = _Futures(fs)
    reachable = [_reachable(names, fs.root) for names in trees]
    total = sum(math.prod(futures.count(inode) for inode in inodes) for inodes in reachable)
    exhaustive = total <= bound and len(trees) < bound
    made = (
        _all(futures, trees, reachable)
        if exhaustive
        else _some(futures, trees, reachable, random.Random(f"images {seed}"), samples)
    )
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


def _built(fs: SimulatedFileSystem, names: _Names, choice: _Contents) -> SimulatedFileSystem:
    made = {inode: inode.left(*chosen) for inode, chosen in choice.items()}

    def build(directory: Directory) -> Directory:
        twin = Directory()
        twin.view = {
            name: made.get(node, node) if isinstance(node, Inode) else build(node)
            for name, node in names[directory].items()
        }
        twin.durable = twin.view.copy()
        return twin

    return fs.twin(build(fs.root))


# --- contents ---

_Contents = dict[Inode, _Choice]
"""What becomes of each dirty file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Variant:
    """One size and gap of a file, and what each of its unsure pieces may be then."""

    size: int
    gap: Sequence[bytes]
    indexes: tuple[int, ...]
    contents: tuple[tuple[bytes, ...], ...]
    """For each index: the newest content first, the old one second where it differs."""


@dataclass(slots=True)
class _Futures:
    """The variants of each dirty file, worked out once for a crash."""

    fs: SimulatedFileSystem
    _variants: dict[Inode, list[_Variant]] = field(default_factory=dict)

    def of(self, inode: Inode) -> list[_Variant]:
        """All variants of a dirty file, the newest size first."""
        found = self._variants.get(inode)
        if found is None:
            found = self._variants[inode] = [
                self._variant(inode, size, gap)
                for size in inode.possible_sizes()
                for gap in self._gaps(inode, size)
            ]
        return found

    def count(self, inode: Inode) -> int:
        """How many contents the file may have, at most."""
        if not inode.is_dirty:
            return 1
        return sum(math.prod(map(len, variant.contents)) for variant in self.of(inode))

    def all(self, inode: Inode) -> Iterator[_Choice]:
        """Every content that the file may have, once."""
        seen: set[object] = set()
        for variant in self.of(inode):
            filled = variant.gap if set(inode.gap_pieces(variant.size)) - set(variant.indexes) else ()
            for contents in itertools.product(*variant.contents):
                key = (variant.size, contents, filled)
                if key not in seen:
                    seen.add(key)
                    yield variant.size, tuple(zip(variant.indexes, contents, strict=True)), variant.gap

    def extreme(self, inode: Inode, outcome: Outcome, lost: int | None = None) -> _Choice:
        """All pieces new (but for the one that is lost), or all old; the newest size, and zeros in the gap."""
        variant = self.of(inode)[0]
        pieces = [
            (
                index,
                contents[0]
                if outcome is Outcome.NEW and index != lost
                else contents[min(1, len(contents) - 1)],
            )
            for index, contents in zip(variant.indexes, variant.contents, strict=True)
        ]
        return variant.size, tuple(pieces), variant.gap

    def by_chance(self, inode: Inode, chance: random.Random) -> _Choice:
        """A size, a gap, and for each piece an outcome; some draws keep nearly everything, some nearly nothing."""
        variants = self.of(inode)
        variant = variants[int(chance.random() * len(variants))]
        fresh = chance.choice((0.1, 0.5, 0.9))
        torn_bytes = chance.randrange(1, PIECE_BYTES)
        pieces = []
        for index, contents in zip(variant.indexes, variant.contents, strict=True):
            if chance.random() < fresh:
                content = contents[0]
            else:
                content = contents[int(chance.random() * len(contents))]
                if len(contents) > 1 and chance.random() < TORN_CHANCE:
                    content = contents[0][:torn_bytes] + contents[1][torn_bytes:]
            pieces.append((index, content))
        return variant.size, tuple(pieces), variant.gap

    def _gaps(self, inode: Inode, size: int) -> list[Sequence[bytes]]:
        """What may fill the room behind the durable end: zeros, garbage, blocks of deleted files."""
        if not inode.gap_pieces(size):
            return [()]
        stale = [tuple(self.fs.graveyard)] if self.fs.graveyard else []
        return [(), (garbage_piece(("gap", inode.number)),), *stale]

    @staticmethod
    def _variant(inode: Inode, size: int, gap: Sequence[bytes]) -> _Variant:
        indexes = tuple(index for index in inode.unsure_pieces() if index * PIECE_BYTES < size)
        in_gap = inode.gap_pieces(size) if gap else range(0)
        contents = tuple(
            tuple(
                content
                for _, content in inode.futures(
                    index,
                    gap[index % len(gap)] if index in in_gap else ZEROS,
                    garbage_piece((inode.number, index)),
                )
            )
            for index in indexes
        )
        return _Variant(size=size, gap=gap, indexes=indexes, contents=contents)


def _all(
    futures: _Futures, trees: Sequence[_Names], reachable: Sequence[Sequence[Inode]]
) -> Iterator[SimulatedFileSystem]:
    for names, inodes in zip(trees, reachable, strict=True):
        dirty = [inode for inode in inodes if inode.is_dirty]
        for choice in itertools.product(*map(futures.all, dirty)):
            yield _built(futures.fs, names, dict(zip(dirty, choice, strict=True)))


# --- samples ---


def _some(
    futures: _Futures, trees: Sequence[_Names], reachable: Sequence[Sequence[Inode]], chance: random.Random, samples: int
) -> Iterator[SimulatedFileSystem]:  # fmt: skip
    """Those of `_draws`, each once."""
    seen: set[object] = set()
    for number, choice in _draws(futures, reachable, chance, samples):
        key = number, tuple((inode.number, chosen) for inode, chosen in choice.items())
        if key not in seen:
            seen.add(key)
            yield _built(futures.fs, trees[number], choice)


def _draws(
    futures: _Futures, reachable: Sequence[Sequence[Inode]], chance: random.Random, samples: int
) -> Iterator[tuple[int, _Contents]]:
    """All kept; with all names nothing of the contents; each single piece lost; nothing kept; then by chance."""
    dirty = [[inode for inode in inodes if inode.is_dirty] for inodes in reachable]
    last = len(dirty) - 1
    yield 0, {inode: futures.extreme(inode, Outcome.NEW) for inode in dirty[0]}
    yield 0, {inode: futures.extreme(inode, Outcome.OLD) for inode in dirty[0]}
    yield last, {inode: futures.extreme(inode, Outcome.NEW) for inode in dirty[last]}
    singles = [(inode, index) for inode in dirty[0] for index in inode.unsure_pieces()]
    for one, lost in chance.sample(singles, min(len(singles), samples // 2)):
        yield (
            0,
            {
                inode: futures.extreme(inode, Outcome.NEW, lost if inode is one else None)
                for inode in dirty[0]
            },
        )
    for _ in range(samples):
        number = 0 if chance.random() < 0.5 else chance.randrange(len(dirty))  # noqa: PLR2004 - a coin
        yield number, {inode: futures.by_chance(inode, chance) for inode in dirty[number]}
