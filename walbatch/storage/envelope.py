"""The values of state/ as bytes: the envelope that every value wears, and the bodies of checkpoints and lane memory.

LMDB has no checksums, so every value carries its own, together with the store it belongs to: nothing that fails one of
these checks is believed. What is not here: where values are kept, what happens when one is damaged (`checkpoint`), and the
bodies of the other tables (`letters`, `given_up`, `key_uses`, `controllers`).

Envelope (the same in every version, so that a newer version and a damaged value are told apart):

| offset  | size | field                                                            |
|---------|------|------------------------------------------------------------------|
| 0       | 4    | magic `WBst`                                                     |
| 4       | 4    | version of the body, 1                                           |
| 8       | 16   | the store's UUID                                                 |
| 24      | n    | body                                                             |
| 24 + n  | 4    | CRC-32C over the key of the value, then over all bytes before it |

Body of a checkpoint: generation, epoch, watermark, durable LSN, segment, settled count (8 bytes each), count of lanes
(4 bytes); then for each lane, by name: bytes of the name (2), shards (2), the name, and columns with one entry for
each shard: epochs (8), watermarks (8), counts of ranges (8); then the ranges of all its shards, shard by shard, as in
`core.mark`. Body of a lane's memory: JSON, `{"shards": 4, "url": "lmdb:///data"}`, url may be null. Little-endian.
"""

from __future__ import annotations

import json
import struct
import sys
from array import array
from collections.abc import Iterable
from itertools import chain
from typing import Final

from walbatch.core.checksum import crc32c
from walbatch.core.mark import pack_ranges, unpack_ranges
from walbatch.errors import UnsupportedFormat
from walbatch.limits import GIB, KIB, KIND_BYTES_MAX, KINDS_MAX, LSN_MAX, RANGES_MAX, SHARDS_MAX
from walbatch.types import Checkpoint, LaneMark, LaneMemory, Mark

MAGIC: Final = b"WBst"
VERSION: Final = 1

CHECKPOINT_BYTES_MAX: Final = GIB
"""One generation: room for 64 lanes of 256 shards with 4,096 ranges each, which no engine gets near."""

URL_BYTES_MAX: Final = 4 * KIB
"""As long as a path may be (PATH_MAX on Linux)."""

LANE_BYTES_MAX: Final = 8 * URL_BYTES_MAX
"""A lane's memory: JSON writes a byte of a URL as six characters at worst."""

_HEADER: Final = struct.Struct("<4sI16s")
_CRC: Final = struct.Struct("<I")
_CHECKPOINT: Final = struct.Struct("<QQQQQQI")
_LANE: Final = struct.Struct("<HH")
_RANGE_BYTES: Final = 16
_COLUMNS: Final = 3

HEADER_BYTES: Final = _HEADER.size
ENVELOPE_BYTES: Final = HEADER_BYTES + _CRC.size


class ForeignValueError(ValueError):
    """A sound value that belongs to another store."""


# --- the envelope -------------------------------------------------------------------------------------------------


def seal(key: bytes, body: bytes, store_uuid: bytes) -> bytes:
    """The value that stands for `body` under `key` in the store `store_uuid`."""
    covered = _HEADER.pack(MAGIC, VERSION, store_uuid) + body
    return covered + _CRC.pack(crc32c(covered, crc32c(key, 0)))


def unseal(key: bytes, value: bytes, store_uuid: bytes) -> bytes:
    """The body of a value. Raises ValueError if it is damaged, `ForeignValueError` if it is another store's.

    Raises UnsupportedFormat if it is sound, but of a newer version.
    """
    if len(value) < ENVELOPE_BYTES:
        raise ValueError(f"it has {len(value)} bytes, but no value has fewer than {ENVELOPE_BYTES}")
    magic, version, owner = _HEADER.unpack_from(value)
    covered = value[: -_CRC.size]
    (stored,) = _CRC.unpack_from(value, len(covered))
    computed = crc32c(covered, crc32c(key, 0))
    # The sum before the version: damaged bytes may claim any version.
    if magic != MAGIC or stored != computed:
        raise ValueError(f"its checksum is {computed:#010x}, but {stored:#010x} is stored")
    if version != VERSION:
        raise UnsupportedFormat(
            f"the store's state has version {version}, this walbatch reads version {VERSION}: upgrade walbatch"
        )
    if owner != store_uuid:
        raise ForeignValueError(f"it belongs to the store {owner.hex()}, this is {store_uuid.hex()}")
    return covered[_HEADER.size :]


# --- the checkpoint -----------------------------------------------------------------------------------------------


def encode_checkpoint(checkpoint: Checkpoint) -> bytes:
    """The body of a checkpoint. Raises ValueError for what `decode_checkpoint` would refuse."""
    numbers = (
        checkpoint.generation,
        checkpoint.epoch,
        checkpoint.watermark,
        checkpoint.durable_lsn,
        checkpoint.segment,
        checkpoint.settled_count,
    )
    check_numbers(numbers)
    check_range("lanes", len(checkpoint.lanes), 0, KINDS_MAX)
    parts = [_CHECKPOINT.pack(*numbers, len(checkpoint.lanes))]
    for name, lane in sorted(checkpoint.lanes.items()):
        parts += _encode_lane(name.encode(), lane.shards)
    body = b"".join(parts)
    check_range("bytes of a checkpoint", len(body), 0, CHECKPOINT_BYTES_MAX - ENVELOPE_BYTES)
    return body


def _encode_lane(name: bytes, shards: tuple[Mark, ...]) -> list[bytes]:
    check_range("bytes of a lane's name", len(name), 1, KIND_BYTES_MAX)
    check_range("shards", len(shards), 1, SHARDS_MAX)
    counts = [len(mark.ranges) for mark in shards]
    columns = ([mark.epoch for mark in shards], [mark.watermark for mark in shards], counts)
    check_numbers(chain(*columns))
    ranges = [pack_ranges(mark.ranges, mark.watermark) for mark in shards if mark.ranges]
    return [
        _LANE.pack(len(name), len(shards)),
        name,
        *(pack_column(array("Q", column)) for column in columns),
        *ranges,
    ]


def decode_checkpoint(body: bytes) -> Checkpoint:
    """The checkpoint in a body, which is trusted in nothing. Raises ValueError for what was not written by us."""
    reader = Reader(body)
    *numbers, lanes_count = _CHECKPOINT.unpack(reader.take(_CHECKPOINT.size))
    check_numbers(numbers)
    check_range("lanes", lanes_count, 0, KINDS_MAX)
    lanes: dict[str, LaneMark] = {}
    for _ in range(lanes_count):
        name, lane = _decode_lane(reader)
        if name in lanes:
            raise ValueError(f"the lane {name!r} stands in it twice")
        lanes[name] = lane
    if reader.left:
        raise ValueError(f"{reader.left:,} bytes follow its last lane")
    generation, epoch, watermark, durable_lsn, segment, settled_count = numbers
    return Checkpoint(
        generation=generation,
        epoch=epoch,
        watermark=watermark,
        durable_lsn=durable_lsn,
        segment=segment,
        settled_count=settled_count,
        lanes=lanes,
    )


def _decode_lane(reader: Reader) -> tuple[str, LaneMark]:
    name_bytes, shards_count = _LANE.unpack(reader.take(_LANE.size))
    check_range("bytes of a lane's name", name_bytes, 1, KIND_BYTES_MAX)
    check_range("shards", shards_count, 1, SHARDS_MAX)
    name = bytes(reader.take(name_bytes)).decode()
    epochs, watermarks, counts = (unpack_column("Q", reader.take(8 * shards_count)) for _ in range(_COLUMNS))
    check_numbers(chain(epochs, watermarks))
    shards = []
    for epoch, watermark, count in zip(epochs, watermarks, counts, strict=True):
        check_range("ranges of a shard", count, 0, RANGES_MAX)
        ranges = unpack_ranges(reader.take(count * _RANGE_BYTES), watermark) if count else ()
        shards.append(Mark(epoch=epoch, watermark=watermark, ranges=ranges))
    return name, LaneMark(shards=tuple(shards))


class Reader:
    """Takes bytes from the front, and never more than there are."""

    def __init__(self, data: bytes) -> None:
        self._data = memoryview(data)
        self.left = len(data)

    def take(self, size: int) -> memoryview:
        """The next bytes. Raises ValueError where there are fewer."""
        if size > self.left:
            raise ValueError(f"it ends {size - self.left:,} bytes too early")
        start = len(self._data) - self.left
        self.left -= size
        return self._data[start : start + size]

    def end(self) -> None:
        """Nothing may be left. Raises ValueError."""
        if self.left:
            raise ValueError(f"{self.left:,} bytes follow its end")


def pack_column(values: array[int]) -> bytes:
    """Numbers as little-endian bytes. May change `values`."""
    if sys.byteorder == "big":  # pragma: no cover - the format is little-endian
        values.byteswap()
    return values.tobytes()


def unpack_column(code: str, data: memoryview | bytes) -> array[int]:
    """The numbers of a column; `code` is that of `array`. Raises ValueError for half a number."""
    values = array(code)
    values.frombytes(data)
    if sys.byteorder == "big":  # pragma: no cover - the format is little-endian
        values.byteswap()
    return values


def check_numbers(numbers: Iterable[int]) -> None:
    """Raise ValueError unless all lie from 0 to LSN_MAX."""
    for number in numbers:
        if not 0 <= number <= LSN_MAX:
            raise ValueError(f"it holds the number {number}, but none may be outside 0 to {LSN_MAX}")


def check_range(name: str, value: int, low: int, high: int) -> None:
    """Raise ValueError unless there are `low` to `high` of what `name` says."""
    if not low <= value <= high:
        raise ValueError(f"it has {value:,} {name}, but must have {low:,} to {high:,}")


# --- what is remembered of a lane ---------------------------------------------------------------------------------


def encode_lane(memory: LaneMemory) -> bytes:
    """The body of a lane's memory; its name is the key. Raises ValueError for what `decode_lane` would refuse."""
    body = json.dumps({"shards": memory.shards, "url": memory.url}).encode()
    decode_lane(memory.name.encode(), body)
    return body


def decode_lane(key: bytes, body: bytes) -> LaneMemory:
    """The memory of the lane whose name is `key`. Nothing in it is trusted; raises ValueError for what is out of bounds."""
    check_range("bytes of a lane's name", len(key), 1, KIND_BYTES_MAX)
    check_range("bytes", len(body), 0, LANE_BYTES_MAX)
    name = key.decode()
    try:
        fields: object = json.loads(body.decode())
    except RecursionError as error:
        raise ValueError("its JSON is nested too deeply") from error
    if not isinstance(fields, dict) or fields.keys() != {"shards", "url"}:
        raise ValueError("it must be an object with the names shards and url")
    shards, url = fields["shards"], fields["url"]
    if type(shards) is not int:
        raise ValueError("its shards must be a whole number")
    check_range("shards", shards, 1, SHARDS_MAX)
    if url is not None:
        if not isinstance(url, str) or not url.isprintable():
            raise ValueError("its url must be printable text or null")
        check_range("bytes of a url", len(url.encode()), 1, URL_BYTES_MAX)
    return LaneMemory(name=name, shards=shards, url=url)
