"""What each kind of operation was like at each hour of the day: how many came, in what batches, and how long those took.

Not here: what is done with it (it warms the linger and the size controller of a shard that knows nothing yet), and where it is
kept (`state/`, with the checkpoint).

The idea needed to read it: for each kind and hour (of UTC) there are four sums, halved when the hour comes round on another
day, so that the last few days count. Averages are quotients of sums. As bytes a quotient takes one byte, a logarithm in
steps of an eighth of an octave (4.4 %): a whole history stays below HISTORY_BYTES_MAX.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, Self

from walbatch.limits import KIND_BYTES_MAX, KINDS_MAX

HISTORY: Final = ("\0history", 0)
"""Where the history is kept among the snapshots of controllers: no lane has such a name."""
HISTORY_BYTES_MAX: Final = 16 * 1024

HOURS: Final = 24
FOLLOWERS_MAX: Final = 4
"""How many of the kinds that come after one are kept in bytes: those that do so most."""

FOLLOWED_MAX: Final = 4096
"""Successions of a kind that are counted before the counts are halved."""

BATCHES_MIN: Final = 8
"""Fewer batches in an hour say less of it than the whole day does."""
WATCHED_S_MIN: Final = 60.0
"""The same for seconds of watching, where the rate is concerned."""

NS_PER_S: Final = 1_000_000_000
HOUR_NS: Final = 3_600 * NS_PER_S

_MAGIC: Final = b"WBhi"
_VERSION: Final = 1
_HEADER: Final = struct.Struct("<4sBB")
_WATCHED: Final = struct.Struct(f"<{HOURS}f")
_STEPS: Final = 8
"""Steps of an octave in a logarithm that is kept as a byte."""
_SECONDS_UNIT: Final = 2.0**-20
"""The shortest batch that a byte can tell from nothing: a microsecond."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Expectation:
    """What to expect of a kind at some hour: averages over the past."""

    rate: float
    """Operations in a second; 0 where it was not watched for long enough."""
    count: float
    """Operations in a batch."""
    bytes: float
    """Of an operation."""
    seconds: float
    """Of a batch."""


@dataclass(slots=True)
class _Cell:
    """The sums of one kind in one hour."""

    batches: float = 0.0
    operations: float = 0.0
    bytes: float = 0.0
    seconds: float = 0.0

    def fade(self) -> None:
        """Count for half."""
        self.batches /= 2
        self.operations /= 2
        self.bytes /= 2
        self.seconds /= 2

    def add(self, other: _Cell) -> None:
        """Add the sums of another."""
        self.batches += other.batches
        self.operations += other.operations
        self.bytes += other.bytes
        self.seconds += other.seconds


def _cells() -> list[_Cell]:
    return [_Cell() for _ in range(HOURS)]


@dataclass(slots=True)
class _Kind:
    """One kind: its hours, and how often which kind came after it."""

    hours: list[_Cell] = field(default_factory=_cells)
    followers: dict[str, float] = field(default_factory=dict)

    def whole(self) -> _Cell:
        """The sums over the day."""
        whole = _Cell()
        for cell in self.hours:
            whole.add(cell)
        return whole


class History:
    """What was observed, by kind. Bounded: KINDS_MAX kinds of HOURS cells. Not thread-safe: its owner locks.

    Wall-clock times are nanoseconds since 1970.
    """

    __slots__ = ("_hour", "_kinds", "_last_kind", "_last_wall_ns", "_watched_s")

    def __init__(self) -> None:
        self._kinds: dict[str, _Kind] = {}
        self._watched_s = [0.0] * HOURS
        self._hour: int | None = None
        self._last_wall_ns = 0
        self._last_kind = ""

    def __repr__(self) -> str:
        return f"<History of {len(self._kinds)} kinds, {sum(self._watched_s):.0f} s watched>"

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds that it knows."""
        return tuple(self._kinds)

    def observe(self, kind: str, wall_ns: int, count: int, bytes: int, seconds: float) -> None:
        """A batch of `count` operations and `bytes` ended at `wall_ns`, after `seconds`."""
        self.watch(wall_ns)
        known = self._kinds.get(kind)
        if known is None:
            known = self._enter(kind)
        cell = known.hours[self._hour_of(wall_ns)]
        cell.batches += 1
        cell.operations += count
        cell.bytes += bytes
        cell.seconds += seconds
        if self._last_kind in self._kinds:
            self._follow(self._kinds[self._last_kind].followers, kind)
        self._last_kind = kind

    def watch(self, wall_ns: int) -> None:
        """Time went by until `wall_ns`. A clock that was set back adds nothing, one that was set forward a day at most."""
        hour = wall_ns // HOUR_NS
        if self._hour is None or wall_ns < self._last_wall_ns:
            self._hour, self._last_wall_ns = hour, wall_ns
            return
        start_ns = max(self._last_wall_ns, (hour - HOURS + 1) * HOUR_NS)
        while self._hour < hour:
            self._hour = max(self._hour + 1, hour - HOURS + 1)
            end_ns = self._hour * HOUR_NS
            self._watched_s[(self._hour - 1) % HOURS] += max(0, end_ns - start_ns) / NS_PER_S
            start_ns = max(start_ns, end_ns)
            self._fade(self._hour % HOURS)
        self._watched_s[hour % HOURS] += (wall_ns - start_ns) / NS_PER_S
        self._last_wall_ns = wall_ns

    def expect(self, kind: str, wall_ns: int) -> Expectation | None:
        """What to expect of a kind at this time of day: of the hour, or of the whole day where the hour says too little.

        None where nothing is known.
        """
        known = self._kinds.get(kind)
        if known is None:
            return None
        hour = self._hour_of(wall_ns)
        cell, watched_s = known.hours[hour], self._watched_s[hour]
        if cell.batches < BATCHES_MIN or watched_s < WATCHED_S_MIN:
            cell, watched_s = known.whole(), sum(self._watched_s)
        if not cell.batches or not cell.operations:
            return None
        return Expectation(
            rate=cell.operations / watched_s if watched_s >= WATCHED_S_MIN else 0.0, count=cell.operations / cell.batches,
            bytes=cell.bytes / cell.operations, seconds=cell.seconds / cell.batches,
        )  # fmt: skip

    def followers(self, kind: str) -> tuple[tuple[str, float], ...]:
        """Which kinds' batches come after one of `kind`, and how often (shares of 1), the most frequent first."""
        known = self._kinds.get(kind)
        if known is None:
            return ()
        whole = sum(known.followers.values())
        ranked = sorted(known.followers.items(), key=lambda item: (-item[1], item[0]))
        return tuple((name, times / whole) for name, times in ranked)

    @staticmethod
    def _hour_of(wall_ns: int) -> int:
        return wall_ns // HOUR_NS % HOURS

    def _enter(self, kind: str) -> _Kind:
        """Make room for a new kind, if need be in place of the one that was seen least."""
        if len(self._kinds) >= KINDS_MAX:
            least = min(self._kinds, key=lambda name: self._kinds[name].whole().batches)
            del self._kinds[least]
            for other in self._kinds.values():
                other.followers.pop(least, None)
        known = self._kinds[kind] = _Kind()
        return known

    @staticmethod
    def _follow(followers: dict[str, float], kind: str) -> None:
        followers[kind] = followers.get(kind, 0.0) + 1
        if sum(followers.values()) > FOLLOWED_MAX:
            for name in followers:
                followers[name] /= 2

    def _fade(self, hour: int) -> None:
        """An hour comes round: what it was like on earlier days counts for half."""
        self._watched_s[hour] /= 2
        for known in self._kinds.values():
            known.hours[hour].fade()

    # --- as bytes ---

    def encode(self) -> bytes:
        """All of it, in at most HISTORY_BYTES_MAX bytes. Without a checksum: its keeper adds one."""
        names = list(self._kinds)
        index = {name: number for number, name in enumerate(names)}
        parts = [_HEADER.pack(_MAGIC, _VERSION, len(names)), _WATCHED.pack(*self._watched_s)]
        for name, known in self._kinds.items():
            raw = name.encode()
            parts += [bytes([len(raw)]), raw]
            for cell in known.hours:
                parts.append(_encode_cell(cell))
            ranked = self.followers(name)[:FOLLOWERS_MAX]
            parts.append(bytes([len(ranked)]))
            for follower, share in ranked:
                parts.append(bytes([index[follower], max(1, round(share * 255))]))
        return b"".join(parts)

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """What `encode` gave. Raises ValueError for anything else."""
        if len(data) > HISTORY_BYTES_MAX:
            raise ValueError(f"{len(data):,} bytes are more than a history has")
        history = cls()
        reader = _Reader(data)
        magic, version, count = _HEADER.unpack(reader.take(_HEADER.size))
        if (magic, version) != (_MAGIC, _VERSION) or count > KINDS_MAX:
            raise ValueError("no history of this version")
        watched_s = _WATCHED.unpack(reader.take(_WATCHED.size))
        if not all(math.isfinite(seconds) and seconds >= 0 for seconds in watched_s):
            raise ValueError("a history was watched for no such time")
        history._watched_s = list(watched_s)
        followed: list[list[tuple[int, int]]] = []
        for _ in range(count):
            name = reader.name()
            if name in history._kinds:
                raise ValueError("a history names a kind twice")
            known = history._kinds[name] = _Kind()
            known.hours = [_decode_cell(reader.take(_CELL_BYTES)) for _ in range(HOURS)]
            followed.append(list(reader.followers(count)))
        if not reader.is_at_end:
            raise ValueError("bytes follow the end of a history")
        names = list(history._kinds)
        for known, pairs in zip(history._kinds.values(), followed, strict=True):
            known.followers = {names[number]: float(share) for number, share in pairs}
        return history


_CELL_BYTES: Final = 4


def _encode_cell(cell: _Cell) -> bytes:
    """Batches, operations of a batch, bytes of an operation, seconds of a batch: a logarithm each, 0 for nothing."""
    batches = cell.batches
    if batches < 1 or cell.operations < 1:
        return bytes(_CELL_BYTES)
    return bytes(
        (
            _level(batches), _level(cell.operations / batches), _level(cell.bytes / cell.operations),
            _level(cell.seconds / batches / _SECONDS_UNIT),
        )
    )  # fmt: skip


def _decode_cell(raw: bytes) -> _Cell:
    batches, count, size, seconds = map(_value, raw)
    if not batches or not count:
        if any(raw):
            raise ValueError("a history has an hour without batches that lasted")
        return _Cell()
    operations = batches * count
    return _Cell(
        batches=batches,
        operations=operations,
        bytes=operations * size,
        seconds=batches * seconds * _SECONDS_UNIT,
    )


def _level(value: float) -> int:
    """A positive number as a byte; what is below 1 counts as nothing."""
    if value < 1:
        return 0
    return min(255, 1 + round(math.log2(value) * _STEPS))


def _value(level: int) -> float:
    return 2.0 ** ((level - 1) / _STEPS) if level else 0.0


class _Reader:
    """Takes bytes from the front, and raises ValueError where there are none."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def is_at_end(self) -> bool:
        return self._at == len(self._data)

    def take(self, size: int) -> bytes:
        taken = self._data[self._at : self._at + size]
        if len(taken) != size:
            raise ValueError("a history ends in the middle")
        self._at += size
        return taken

    def name(self) -> str:
        size = self.take(1)[0]
        if not 1 <= size <= KIND_BYTES_MAX:
            raise ValueError(f"no kind has a name of {size} bytes")
        return self.take(size).decode()

    def followers(self, kinds: int) -> Iterator[tuple[int, int]]:
        count = self.take(1)[0]
        if count > FOLLOWERS_MAX:
            raise ValueError(f"a history keeps no {count} followers")
        seen: set[int] = set()
        for _ in range(count):
            number, share = self.take(2)
            if number >= kinds or number in seen or not share:
                raise ValueError("a history has a follower that is none")
            seen.add(number)
            yield number, share
