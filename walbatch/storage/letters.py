"""Dead letters in state/: one value each, under the LSN of the operation.

What is not here: when an operation dies, and how many letters an engine keeps (`runtime.letters`).

The idea needed to read it: the log gives up a dead operation's bytes once the checkpoint covers it, so its letter is the only
copy. A letter that is damaged is told of by lane and LSN, and does not count as a letter: where the log still holds the
operation, that is tried again.

Body of a value: time of death, not-before, deadline, origin, attempts (8 bytes each), priority, reason (1 byte
each), bytes of the lane's name and of the idempotency key (2 each), of the key, the error and the payload (4 each); then these
five, in this order. The key of the value is the LSN, 8 bytes, big-endian. The body's numbers are little-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Final

from walbatch.limits import (
    DEAD_LETTER_BYTES_MAX,
    DEAD_LETTERS_MAX,
    IDEMPOTENCY_KEY_BYTES_MAX,
    KEY_BYTES_MAX,
    KIB,
    KIND_BYTES_MAX,
    PAYLOAD_BYTES_MAX,
)
from walbatch.storage.envelope import ENVELOPE_BYTES, HEADER_BYTES, check_numbers, check_range
from walbatch.storage.lsnkeys import key_of, lsn_of
from walbatch.storage.statefile import Change, Table
from walbatch.storage.tables import Damaged, Tables, in_short
from walbatch.types import PRIORITY_MAX, DeadLetter, DeathReason, Options

ERROR_BYTES_MAX: Final = 4 * KIB
"""Of the text of an error, in UTF-8: what goes beyond is cut off. A backend's message may hold a whole batch."""

REMOVED_AT_ONCE: Final = 500
"""Letters removed in one commit: each may copy a page, for which room has to be there."""

_BODY: Final = struct.Struct("<QQQQQBBHHIII")
_LANE_BYTES: Final = 7
"""Which of its numbers is the bytes of the lane's name."""
_REASONS: Final = {
    DeathReason.REJECTED: 1, DeathReason.ATTEMPTS: 2, DeathReason.DEADLINE: 3, DeathReason.LEFT_OUT: 4,
}  # fmt: skip
_LENGTHS: Final = (
    ("bytes of a lane's name", 1, KIND_BYTES_MAX),
    ("bytes of an idempotency key", 0, IDEMPOTENCY_KEY_BYTES_MAX),
    ("bytes of a key", 0, KEY_BYTES_MAX),
    ("bytes of an error", 0, ERROR_BYTES_MAX),
    ("bytes of payload", 0, PAYLOAD_BYTES_MAX),
)
_REASON_OF: Final = {code: reason for reason, code in _REASONS.items()}

_BESIDE_PAYLOAD: Final = (
    ENVELOPE_BYTES + _BODY.size + KIND_BYTES_MAX + IDEMPOTENCY_KEY_BYTES_MAX + ERROR_BYTES_MAX
)
BYTES_MAX: Final = DEAD_LETTER_BYTES_MAX + DEAD_LETTERS_MAX * _BESIDE_PAYLOAD
"""All values together: as many letters, and as many bytes of keys and payloads, as an engine may keep."""

TABLE: Final = Table(
    name=b"letters",
    value_bytes_max=_BESIDE_PAYLOAD + KEY_BYTES_MAX + PAYLOAD_BYTES_MAX,
    entries_max=DEAD_LETTERS_MAX,
)


class Letters:
    """The letters of one store. Its caller serialises whatever changes them."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._sizes: dict[int, int] = {}
        """Bytes of each value, by LSN; also of those that are damaged."""
        self._bytes = 0
        self._damaged: set[int] = set()

    def load(self) -> tuple[list[DeadLetter], list[str]]:
        """Those that can be read, by LSN, and a finding for each other one."""
        letters: list[DeadLetter] = []
        findings: list[str] = []
        problems: list[str] = []
        size = 0
        for key, value in self._tables.entries(TABLE, problems):
            size += len(value)
            if size > BYTES_MAX:
                problems.append(f"the dead letters take more than {BYTES_MAX:,} bytes: the rest is ignored")
                break
            letter, problem = self._tables.decode(key, value, decode_letter)
            if letter is None:
                findings.append(f"the dead letter {_described(key, value)} is not usable: {problem}")
            else:
                letters.append(letter)
        return letters, problems + in_short(findings)

    def examine(self) -> Iterator[Damaged]:
        """Look at all of them, and tell which are damaged. Afterwards `lsns` is right. Raises as `Tables.damaged`."""
        self._sizes, self._bytes, self._damaged = {}, 0, set()
        for key, value in self._tables.raw_entries(TABLE):
            fields, problem = self._tables.decode(key, value, _fields)
            lsn = lsn_of(key)
            if lsn is not None:
                self._note(lsn, len(value))
            if fields is None:
                self._damaged |= {lsn} if lsn is not None else set()
                yield key, value, f"dead letter {_described(key, value)}: {problem}"

    @property
    def lsns(self) -> set[int]:
        """Of the letters that can be read."""
        return self._sizes.keys() - self._damaged

    @property
    def damaged_lsns(self) -> frozenset[int]:
        """Of those that cannot, as far as that can be told."""
        return frozenset(self._damaged)

    def changes(self, letters: Sequence[DeadLetter]) -> list[Change]:
        """What keeps letters. Raises StorageError for what cannot be stored, with ENOSPC where there are too many."""
        changes: list[Change] = []
        for letter in letters:
            try:
                key, body = key_of(letter.lsn), encode_letter(letter)
            except ValueError as error:
                raise self._tables.refuse(f"the dead letter {letter.lsn}", error) from error
            changes.append((TABLE.name, key, self._tables.seal(key, body)))
        new = {letter.lsn for letter in letters} - self._sizes.keys()
        size = sum(len(value or b"") for _, _, value in changes)
        if len(self._sizes) + len(new) > TABLE.entries_max or self._bytes + size > BYTES_MAX:
            raise self._tables.full("dead letters")
        return changes

    def buried(self, letters: Sequence[DeadLetter], changes: Sequence[Change]) -> None:
        """`changes` have been saved."""
        for letter, (_, _, value) in zip(letters, changes, strict=True):
            self._note(letter.lsn, len(value or b""))
            self._damaged.discard(letter.lsn)

    def removals(self, lsns: Collection[int]) -> Iterator[list[Change]]:
        """What removes letters, in portions. Each is saved before the next one is asked for."""
        present = sorted(lsn for lsn in lsns if lsn in self._sizes)
        for start in range(0, len(present), REMOVED_AT_ONCE):
            portion = present[start : start + REMOVED_AT_ONCE]
            yield [(TABLE.name, key_of(lsn), None) for lsn in portion]
            for lsn in portion:
                self._bytes -= self._sizes.pop(lsn)
                self._damaged.discard(lsn)

    def _note(self, lsn: int, size: int) -> None:
        self._bytes += size - self._sizes.get(lsn, 0)
        self._sizes[lsn] = size


def encode_letter(letter: DeadLetter) -> bytes:
    """The body of a letter; its LSN is the key. Raises ValueError for what `decode_letter` would refuse."""
    options = letter.options
    error = _cut(letter.error)
    numbers = (
        letter.died_wall_ns, options.not_before_ns, options.deadline_ns, options.origin, letter.attempts,
    )  # fmt: skip
    lane = letter.lane.encode()
    texts = (lane, options.idempotency_key, letter.key, error, letter.payload)
    _check(numbers, letter.priority, tuple(map(len, texts)))
    return b"".join(
        (_BODY.pack(*numbers, letter.priority, _REASONS[letter.reason], *map(len, texts)), *texts)
    )


def decode_letter(key: bytes, body: bytes) -> DeadLetter:
    """The letter under `key`. Nothing in it is trusted; raises ValueError for what was not written by us."""
    lsn, numbers, priority, reason, (lane, idempotency_key, its_key, error, payload) = _fields(key, body)
    died_wall_ns, not_before_ns, deadline_ns, origin, attempts = numbers
    options = Options(
        not_before_ns=not_before_ns, deadline_ns=deadline_ns, origin=origin, idempotency_key=idempotency_key
    )
    return DeadLetter(
        lsn=lsn, lane=lane.decode(), key=its_key, payload=payload, priority=priority, options=options, reason=reason,
        error=error.decode(), attempts=attempts, died_wall_ns=died_wall_ns,
    )  # fmt: skip


def _fields(key: bytes, body: bytes) -> tuple[int, Sequence[int], int, DeathReason, Sequence[bytes]]:
    """LSN, numbers, priority, reason and texts of a letter, checked."""
    lsn = lsn_of(key)
    if lsn is None:
        raise ValueError("its key is no LSN")
    if len(body) < _BODY.size:
        raise ValueError(f"it has {len(body)} bytes, but no letter has fewer than {_BODY.size}")
    *numbers, priority, code, lane, idempotency, its_key, error, payload = _BODY.unpack_from(body)
    lengths = (lane, idempotency, its_key, error, payload)
    _check(numbers, priority, lengths)
    if code not in _REASON_OF:
        raise ValueError(f"it has the reason {code}, which is none")
    ends = list(accumulate(lengths, initial=_BODY.size))
    if ends[-1] != len(body):
        raise ValueError(f"it has {len(body):,} bytes, but its parts take {ends[-1]:,}")
    texts = [body[start:end] for start, end in pairwise(ends)]
    for text in (texts[0], texts[3]):
        text.decode()
    return lsn, numbers, priority, _REASON_OF[code], texts


def _check(numbers: Sequence[int], priority: int, lengths: Sequence[int]) -> None:
    check_numbers(numbers)
    check_range("as its priority", priority, 0, PRIORITY_MAX)
    for (name, low, high), length in zip(_LENGTHS, lengths, strict=True):
        if not low <= length <= high:
            check_range(name, length, low, high)


def _cut(error: str) -> bytes:
    """The text of an error as it is stored: what UTF-8 cannot say is escaped, what is too long is cut off."""
    return (
        error[:ERROR_BYTES_MAX]
        .encode(errors="backslashreplace")[:ERROR_BYTES_MAX]
        .decode(errors="ignore")
        .encode()
    )


def _described(key: bytes, value: bytes) -> str:
    """Whose letter a value seems to be: its LSN by the key, its lane if the damage has spared that."""
    lsn = lsn_of(key)
    name = f"under {key!r}" if lsn is None else f"{lsn}"
    lane = _lane_of(value)
    return name if lane is None else f"{name} of lane {lane!r}"


def _lane_of(value: bytes) -> str | None:
    start = HEADER_BYTES + _BODY.size
    if len(value) < start:
        return None
    length = _BODY.unpack_from(value, HEADER_BYTES)[_LANE_BYTES]
    try:
        lane = value[start : start + length].decode()
    except ValueError:
        return None
    return lane if len(lane) > 0 and length <= KIND_BYTES_MAX and lane.isprintable() else None
