"""Snapshots of size controllers in state/, for each shard of a lane: a restart does not start over.

What is not here: what a snapshot says (`core.controller`). Losing one costs nothing but time.

The key of a value is the shard (2 bytes, big-endian), then the name of the lane in UTF-8. Its body is the snapshot.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import Final

from walbatch.limits import CONTROLLER_BYTES_MAX, KIND_BYTES_MAX, KINDS_MAX, SHARDS_MAX
from walbatch.storage.envelope import ENVELOPE_BYTES, check_range
from walbatch.storage.statefile import Change, Table
from walbatch.storage.tables import Damaged, Tables, in_short

_SHARD: Final = struct.Struct(">H")

TABLE: Final = Table(
    name=b"controllers",
    value_bytes_max=ENVELOPE_BYTES + CONTROLLER_BYTES_MAX,
    entries_max=KINDS_MAX * SHARDS_MAX,
)

Place = tuple[str, int]
"""Lane and shard."""


class Controllers:
    """The snapshots of one store."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables

    def load(self) -> tuple[dict[Place, bytes], list[str]]:
        """All that can be read, and a finding for each other one."""
        snapshots: dict[Place, bytes] = {}
        findings: list[str] = []
        problems: list[str] = []
        for key, value in self._tables.entries(TABLE, problems):
            found, problem = self._tables.decode(key, value, decode_snapshot)
            if found is None:
                findings.append(f"what a controller learnt ({key!r}) is not usable: {problem}")
            else:
                place, snapshots[place] = found
        return snapshots, problems + in_short(findings)

    def examine(self) -> Iterator[Damaged]:
        """Those that are damaged. Raises as `Tables.damaged`."""
        for key, value, problem in self._tables.damaged(TABLE, decode_snapshot):
            yield key, value, f"what a controller learnt: {problem}"

    def save(self, snapshots: Mapping[Place, bytes]) -> None:
        """Remember snapshots, in one commit. Raises StorageError."""
        changes: list[Change] = []
        for (lane, shard), snapshot in snapshots.items():
            try:
                key = _key(lane, shard)
                check_range("bytes of a snapshot", len(snapshot), 0, CONTROLLER_BYTES_MAX)
            except ValueError as error:
                raise self._tables.refuse(
                    f"the controller of lane {lane!r}, shard {shard},", error
                ) from error
            changes.append((TABLE.name, key, self._tables.seal(key, snapshot)))
        if changes:
            self._tables.save(changes)


def _key(lane: str, shard: int) -> bytes:
    check_range("as its shard", shard, 0, SHARDS_MAX - 1)
    name = lane.encode()
    check_range("bytes of a lane's name", len(name), 1, KIND_BYTES_MAX)
    return _SHARD.pack(shard) + name


def decode_snapshot(key: bytes, body: bytes) -> tuple[Place, bytes]:
    """Whose snapshot a value is, and the snapshot. Raises ValueError for what was not written by us."""
    if len(key) < _SHARD.size:
        raise ValueError("its key names no shard")
    (shard,) = _SHARD.unpack_from(key)
    lane = key[_SHARD.size :].decode()
    _key(lane, shard)
    return (lane, shard), body
