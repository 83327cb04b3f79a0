"""Idempotency keys in state/: which were used, by which operation, when.

What is not here: which of them still count (`core.idempotency`).

The idea needed to read it: a million keys as a million entries would make every opening slow, so uses stand in *chunks*, in the
order in which they happened. A save rewrites the last chunk and adds new ones; what is old goes by whole chunks from the front.
A chunk is old if all of it is, or if a later one is: it was used before that, whatever a clock that was set back has said.

The key of a chunk is its number, from 1, 8 bytes, big-endian. Its body: count of uses, count of lanes (2 bytes each); for each lane
the bytes of its name (2) and the name; then columns with one entry for each use: index of the lane (1 byte), LSN (8), wall-clock
time (8), bytes of the key (2); then the keys. Under the key of 8 zero bytes stands the LSN up to which the log's keys are in the
chunks (8 bytes). Little-endian.
"""

from __future__ import annotations

import errno
import struct
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise, takewhile
from typing import Final

from walbatch.errors import StorageError
from walbatch.limits import (
    IDEMPOTENCY_KEY_BYTES_MAX,
    IDEMPOTENCY_KEYS_MAX,
    KIB,
    KIND_BYTES_MAX,
    KINDS_MAX,
    MIB,
)
from walbatch.storage.envelope import (
    ENVELOPE_BYTES,
    Reader,
    check_numbers,
    check_range,
    pack_column,
    unpack_column,
)
from walbatch.storage.lsnkeys import key_of, lsn_of
from walbatch.storage.statefile import SLACK_BYTES, SPARE_BYTES, Change, Table
from walbatch.storage.tables import Damaged, Tables, in_short
from walbatch.types import KeyUse

CHUNK_BYTES: Final = 16 * KIB
"""A chunk takes no more uses when it is that large. A save rewrites that much at most beside what is new."""

_SPARE_BYTES_MAX: Final = 16 * MIB
"""What a save leaves free at most: twice what it wrote, so that a disk that fills up before the next one has room for that."""

_LEFT_BYTES: Final = SLACK_BYTES + 128 * KIB
"""What it leaves free on a full disk: a checkpoint with a few thousand ranges."""

_COUNTS: Final = struct.Struct("<HH")
_NAME: Final = struct.Struct("<H")
_POSITION: Final = struct.Struct("<Q")
_POSITION_KEY: Final = bytes(8)
_CODES: Final = "BQQH"
"""Columns: lane, LSN, time, bytes of the key."""
_USE_BYTES: Final = 19

CHUNK_COUNT_MAX: Final = CHUNK_BYTES // _USE_BYTES + 1

_VALUE_BYTES_MAX: Final = (
    ENVELOPE_BYTES + _COUNTS.size + KINDS_MAX * (_NAME.size + KIND_BYTES_MAX) + CHUNK_BYTES + _USE_BYTES
    + IDEMPOTENCY_KEY_BYTES_MAX
)  # fmt: skip
TABLE: Final = Table(name=b"keys", value_bytes_max=_VALUE_BYTES_MAX, entries_max=2**15)

assert TABLE.entries_max > IDEMPOTENCY_KEYS_MAX * (_USE_BYTES + IDEMPOTENCY_KEY_BYTES_MAX) // CHUNK_BYTES
assert KINDS_MAX < 2**8
assert _LEFT_BYTES < SPARE_BYTES < _SPARE_BYTES_MAX
assert sum(array(code).itemsize for code in _CODES) == _USE_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Uses as columns, in their order."""

    lanes: tuple[str, ...]
    lane_indexes: Sequence[int]
    lsns: Sequence[int]
    times: Sequence[int]
    keys: Sequence[bytes]

    def __len__(self) -> int:
        return len(self.keys)

    def uses(self) -> Iterator[KeyUse]:
        """Its uses."""
        for index, lsn, time, key in zip(self.lane_indexes, self.lsns, self.times, self.keys, strict=True):
            yield KeyUse(key=key, lane=self.lanes[index], lsn=lsn, used_wall_ns=time)


class KeyUses:
    """The uses of one store. Its caller serialises whatever changes them."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._closed: deque[tuple[int, int]] = deque()
        """Number and count of uses, of all chunks but the last."""
        self._newest: deque[tuple[int, int]] = deque()
        """Number and newest time, of those among them that no later one is older than: both ascend."""
        self._last: list[KeyUse] = []
        """The last chunk: it takes more."""
        self._last_number = 1
        self._count = 0
        """Of uses, in all chunks."""
        self._damaged: list[bytes] = []

    def load(self) -> tuple[list[KeyUse], int, list[str]]:
        """All uses, the LSN up to which the log's keys are among them (0 if anything is damaged), and findings."""
        uses: list[KeyUse] = []
        findings: list[str] = []
        problems: list[str] = []
        up_to_lsn = 0
        for key, value in self._tables.entries(TABLE, problems):
            if key == _POSITION_KEY:
                position, problem = self._tables.decode(key, value, _decode_position)
                if position is None:
                    findings.append(f"up to where idempotency keys were saved cannot be told: {problem}")
                up_to_lsn = position or 0
                continue
            chunk, problem = self._tables.decode(key, value, decode_chunk)
            if chunk is None:
                findings.append(f"some idempotency keys (chunk {key!r}) are not usable: {problem}")
                continue
            if len(uses) + len(chunk) > IDEMPOTENCY_KEYS_MAX + CHUNK_COUNT_MAX:
                problems.append(
                    f"state holds more than {IDEMPOTENCY_KEYS_MAX:,} idempotency keys: the rest is ignored"
                )
                break
            uses.extend(chunk.uses())
        complete = not findings and not problems
        return uses, up_to_lsn if complete else 0, problems + in_short(findings)

    def examine(self) -> Iterator[Damaged]:
        """Look at all chunks, and tell which are damaged. Raises as `Tables.damaged`."""
        self._closed, self._newest, self._last = deque(), deque(), []
        self._last_number, self._count, self._damaged = 1, 0, []
        last: Chunk | None = None
        for key, value in self._tables.raw_entries(TABLE):
            if key == _POSITION_KEY:
                position, problem = self._tables.decode(key, value, _decode_position)
                if position is None:
                    yield key, value, f"up to where idempotency keys were saved: {problem}"
                continue
            chunk, problem = self._tables.decode(key, value, decode_chunk)
            if chunk is None:
                self._damaged.append(key)
                yield key, value, f"idempotency keys: {problem}"
            number = lsn_of(key)
            if number is None:
                continue
            if last is not None:
                self._close(self._last_number, last.times)
            last, self._last_number = chunk, number + (chunk is None)
            self._count += len(chunk or ())
        self._last = [] if last is None else list(last.uses())

    def save(self, uses: Sequence[KeyUse], *, up_to_lsn: int, oldest_wall_ns: int) -> None:
        """Add uses and remove what is old, in one commit. Raises StorageError."""
        tables = self._tables
        pieces = list(_pieces([*self._last, *uses])) or [[]]
        numbered = list(enumerate(pieces, self._last_number))
        old = self._old_up_to(numbered, self._count + len(uses), oldest_wall_ns)
        removed = [number for number, _ in takewhile(lambda chunk: chunk[0] <= old, self._closed)]
        if self._last and self._last_number <= old:
            removed.append(self._last_number)
        changes: list[Change] = [(TABLE.name, key, None) for key in self._damaged]
        changes += [(TABLE.name, key_of(number), None) for number in removed]
        try:
            for number, piece in numbered if uses else ():
                if number > old:
                    key = key_of(number)
                    changes.append((TABLE.name, key, tables.seal(key, encode_chunk(piece))))
            position = tables.seal(_POSITION_KEY, _encode_position(up_to_lsn))
        except ValueError as error:
            raise tables.refuse("an idempotency key", error) from error
        changes.append((TABLE.name, _POSITION_KEY, position))
        self._commit(changes)
        self._saved(numbered, old)

    def _commit(self, changes: Sequence[Change]) -> None:
        """Save, and leave room for what comes until the next save. On a full disk, only what a checkpoint needs.

        Without the keys the checkpoint may not trim the log; without the checkpoint it cannot.
        """
        written = sum(len(value or b"") for _, _, value in changes)
        try:
            self._tables.save(changes, spare_bytes=max(SPARE_BYTES, min(2 * written, _SPARE_BYTES_MAX)))
        except StorageError as error:
            if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
                raise
            self._tables.save(changes, spare_bytes=_LEFT_BYTES)

    def _saved(self, numbered: Sequence[tuple[int, list[KeyUse]]], old: int) -> None:
        """The chunks from the last one on are `numbered` now, and those up to `old` are gone."""
        self._damaged = []
        self._count += sum(len(piece) for _, piece in numbered) - len(self._last)
        *closed, (self._last_number, self._last) = numbered
        for number, piece in closed:
            self._close(number, [use.used_wall_ns for use in piece])
        while self._closed and self._closed[0][0] <= old:
            self._count -= self._closed.popleft()[1]
        while self._newest and self._newest[0][0] <= old:
            self._newest.popleft()
        if self._last_number <= old:
            self._count -= len(self._last)
            self._last, self._last_number = [], old + 1

    def _close(self, number: int, times: Sequence[int]) -> None:
        """The chunk takes no more."""
        newest = max(times)
        while self._newest and self._newest[-1][1] >= newest:
            self._newest.pop()
        self._newest.append((number, newest))
        self._closed.append((number, len(times)))

    def _old_up_to(
        self, numbered: Sequence[tuple[int, list[KeyUse]]], count: int, oldest_wall_ns: int
    ) -> int:
        """The last chunk that may go, 0 if none: it is old, or there are enough uses without it. O(chunks that go)."""
        old = 0
        for number, newest in self._newest:
            if newest >= oldest_wall_ns:
                break
            old = number
        for number, piece in numbered:
            if piece and max(use.used_wall_ns for use in piece) < oldest_wall_ns:
                old = number
        present = chain(self._closed, ((number, len(piece)) for number, piece in numbered))
        for number, size in present:
            if number > old and count - size < IDEMPOTENCY_KEYS_MAX:
                break
            count -= size
            old = max(old, number)
        return old


def _pieces(uses: Iterable[KeyUse]) -> Iterator[list[KeyUse]]:
    """Uses cut into chunks."""
    piece: list[KeyUse] = []
    size = 0
    for use in uses:
        if size >= CHUNK_BYTES:
            yield piece
            piece, size = [], 0
        piece.append(use)
        size += _USE_BYTES + len(use.key)
    if piece:
        yield piece


def encode_chunk(uses: Sequence[KeyUse]) -> bytes:
    """The body of a chunk. Raises ValueError for what `decode_chunk` would refuse."""
    lanes = {lane: index for index, lane in enumerate(dict.fromkeys(use.lane for use in uses))}
    names = [lane.encode() for lane in lanes]
    lsns, times = [use.lsn for use in uses], [use.used_wall_ns for use in uses]
    lengths = [len(use.key) for use in uses]
    check_range("uses", len(uses), 1, CHUNK_COUNT_MAX)
    _check(list(map(len, names)), lsns, times, lengths)
    columns = ([lanes[use.lane] for use in uses], lsns, times, lengths)
    return b"".join(
        [
            _COUNTS.pack(len(uses), len(names)),
            *(_NAME.pack(len(name)) + name for name in names),
            *(pack_column(array(code, column)) for code, column in zip(_CODES, columns, strict=True)),
            *(use.key for use in uses),
        ]
    )


def decode_chunk(key: bytes, body: bytes) -> Chunk:
    """The uses in a body, which is trusted in nothing. Raises ValueError for what was not written by us."""
    if lsn_of(key) is None:
        raise ValueError("its key is no number of a chunk")
    reader = Reader(body)
    count, lanes_count = _COUNTS.unpack(reader.take(_COUNTS.size))
    check_range("uses", count, 1, CHUNK_COUNT_MAX)
    check_range("lanes", lanes_count, 1, KINDS_MAX)
    names = [bytes(reader.take(*_NAME.unpack(reader.take(_NAME.size)))) for _ in range(lanes_count)]
    indexes, lsns, times, lengths = (
        unpack_column(code, reader.take(count * array(code).itemsize)) for code in _CODES
    )
    _check(list(map(len, names)), lsns, times, lengths)
    if max(indexes) >= lanes_count:
        raise ValueError(f"it names the lane {max(indexes)} of {lanes_count}")
    if sum(lengths) != reader.left:
        raise ValueError(f"its keys have {sum(lengths):,} bytes, but {reader.left:,} are left")
    ends = list(accumulate(lengths, initial=len(body) - reader.left))
    return Chunk(
        lanes=tuple(name.decode() for name in names), lane_indexes=indexes, lsns=lsns, times=times,
        keys=[body[start:end] for start, end in pairwise(ends)],
    )  # fmt: skip


def _check(names: Sequence[int], lsns: Sequence[int], times: Sequence[int], lengths: Sequence[int]) -> None:
    check_range("lanes", len(names), 1, KINDS_MAX)
    check_range("bytes of a lane's name", min(names), 1, KIND_BYTES_MAX)
    check_range("bytes of a lane's name", max(names), 1, KIND_BYTES_MAX)
    check_range("bytes of an idempotency key", max(lengths), 0, IDEMPOTENCY_KEY_BYTES_MAX)
    check_numbers((min(lsns), max(lsns), min(times), max(times)))


def _encode_position(lsn: int) -> bytes:
    check_numbers((lsn,))
    return _POSITION.pack(lsn)


def _decode_position(_key: bytes, body: bytes) -> int:
    if len(body) != _POSITION.size:
        raise ValueError(f"it has {len(body):,} bytes, but must have {_POSITION.size}")
    (lsn,) = _POSITION.unpack(body)
    check_numbers((lsn,))
    return int(lsn)
