"""Routing: a key belongs to one shard for ever."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from walbatch import limits
from walbatch.core.checksum import crc32c_audit
from walbatch.core.routing import shard_of, shards_of

# What is on somebody's disk was routed with these: a change here is a new format.
PINNED = {b"": 0, b"a": 48, b"key": 109, b"block-7": 125, b"\x00": 81, b"\xff" * 16: 16}


@pytest.mark.parametrize("key", PINNED, ids=repr)
def test_the_shard_of_a_key_never_changes(key: bytes) -> None:
    assert shard_of(key, 256) == crc32c_audit(key, 0) % 256 == PINNED[key]


@given(keys=st.lists(st.binary(max_size=20)), shards=st.integers(1, limits.SHARDS_MAX))
def test_many_keys_go_where_each_of_them_goes(keys: list[bytes], shards: int) -> None:
    routed = shards_of(keys, shards)
    assert routed == [shard_of(key, shards) for key in keys]
    assert all(0 <= shard < shards for shard in routed)


@given(key=st.binary(max_size=20), shards=st.integers(1, limits.SHARDS_MAX))
def test_equal_keys_go_to_one_shard(key: bytes, shards: int) -> None:
    assert shards_of([key, bytes(bytearray(key))], shards) == [shard_of(key, shards)] * 2


def test_all_shards_are_used() -> None:
    keys = [str(number).encode() for number in range(4096)]
    assert set(shards_of(keys, limits.SHARDS_MAX)) == set(range(limits.SHARDS_MAX))
