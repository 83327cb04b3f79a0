"""Snapshots of controllers in state/: damage costs what was learnt, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.storage.states import OTHER, STORE, checkpoint, copies, flip, opened, plant, read_only, tamper
from walbatch import limits
from walbatch.errors import StorageError
from walbatch.storage.controllers import decode_snapshot
from walbatch.storage.envelope import seal

KEY = b"\x00\x01put"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store" / "state"


# Situation: how to damage the value of one of two shards; what the finding says.
DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "a flipped bit": (flip, "checksum"),
    "emptied": (lambda _: b"", "0 bytes"),
    "another shard's value": (lambda _: seal(b"\x00\x00put", b"first", STORE), "checksum"),
    "another store's value": (lambda _: seal(KEY, b"second", OTHER), OTHER.hex()),
}


@pytest.mark.parametrize(("change", "finding"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_snapshot_is_told_and_copied_and_the_others_stay(
    path: Path, change: Callable[[bytes], bytes], finding: str
) -> None:
    state = opened(path)
    state.save_checkpoint(checkpoint(1))
    state.save_controllers({("put", 0): b"first", ("put", 1): b"second"})
    state.close()
    tamper(path, "controllers", KEY, change)
    reader = read_only(path)
    predicted = reader.load_controllers()
    reader.close()
    state = opened(path)
    found, findings = state.load_controllers()
    assert (found, findings) == predicted
    assert found == {("put", 0): b"first"}
    assert len(findings) == 1
    assert re.search(
        r"what a controller learnt \(b'\\x00\\x01put'\) is not usable: .*" + finding, findings[0]
    )
    assert len(copies(path)) == 1
    assert state.load_checkpoint() == (checkpoint(1), [])
    state.save_controllers({("put", 1): b"third"})
    assert state.load_controllers() == ({("put", 0): b"first", ("put", 1): b"third"}, [])
    state.close()


# Situation: a key that no save of ours has made.
KEYS: dict[str, bytes] = {
    "one byte": b"x",
    "no lane": b"\x00\x00",
    "a lane that is too long": b"\x00\x00" + b"x" * 65,
    "a lane that is no text": b"\x00\x00\xff",
    "a shard that is none": b"\x01\x00put",
}


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS.keys())
def test_a_key_that_names_no_shard_of_a_lane_is_a_finding(path: Path, key: bytes) -> None:
    opened(path).close()
    plant(path, "controllers", key, b"x")
    state = opened(path)
    found, findings = state.load_controllers()
    assert (found, len(findings)) == ({}, 1)
    state.close()


@pytest.mark.parametrize(
    ("place", "snapshot"),
    [
        (("", 0), b""),
        (("x" * 65, 0), b""),
        (("put", -1), b""),
        (("put", limits.SHARDS_MAX), b""),
        (("put", 0), bytes(limits.CONTROLLER_BYTES_MAX + 1)),
    ],
    ids=["no lane", "a long lane", "a negative shard", "a high shard", "a long snapshot"],
)
def test_a_snapshot_that_could_not_be_read_back_is_not_written(
    path: Path, place: tuple[str, int], snapshot: bytes
) -> None:
    state = opened(path)
    with pytest.raises(StorageError, match="cannot be stored"):
        state.save_controllers({("get", 0): b"fits", place: snapshot})
    assert state.load_controllers() == ({}, [])
    state.close()


def test_the_largest_snapshot_comes_back(path: Path) -> None:
    state = opened(path)
    largest = {("ü" * 32, limits.SHARDS_MAX - 1): bytes(limits.CONTROLLER_BYTES_MAX)}
    state.save_controllers(largest)
    assert state.load_controllers() == (largest, [])
    state.close()


@given(st.binary(max_size=70), st.binary(max_size=9))
def test_any_bytes_give_a_snapshot_or_a_value_error(key: bytes, body: bytes) -> None:
    try:
        (lane, shard), snapshot = decode_snapshot(key, body)
    except ValueError:
        return
    assert shard.to_bytes(2, "big") + lane.encode() == key
    assert snapshot == body
