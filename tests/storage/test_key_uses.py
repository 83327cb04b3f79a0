"""Idempotency keys in state/: chunks, what of them is removed when, and what becomes of damaged ones."""

from __future__ import annotations

import errno
import os
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.storage.states import (
    OTHER,
    STORE,
    checkpoint,
    copies,
    flip,
    keys_of,
    opened,
    plant,
    read_only,
    tamper,
    use,
)
from walbatch import limits
from walbatch.errors import StorageError
from walbatch.storage import key_uses
from walbatch.storage.envelope import seal
from walbatch.storage.key_uses import CHUNK_COUNT_MAX, decode_chunk, encode_chunk
from walbatch.storage.lsnkeys import key_of
from walbatch.storage.statefile import SPARE_BYTES
from walbatch.types import KeyUse

POSITION = bytes(8)
Loaded = tuple[list[KeyUse], int, list[str]]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store" / "state"


def wide(*lsns: int) -> list[KeyUse]:
    """Uses of which 64 fill a chunk."""
    return [use(lsn, key=b"%0237d" % lsn) for lsn in lsns]


def saved(path: Path, uses: Sequence[KeyUse], *, up_to_lsn: int, oldest: int = 0) -> None:
    state = opened(path)
    state.save_keys(uses, up_to_lsn=up_to_lsn, oldest_wall_ns=oldest)
    state.close()


def loaded(path: Path) -> Loaded:
    state = read_only(path)
    found = state.load_keys()
    state.close()
    return found


# --- chunks --------------------------------------------------------------------------------------------------------


def test_single_uses_share_a_chunk_until_it_is_full(path: Path) -> None:
    uses = wide(*range(1, 151))
    state = opened(path)
    for number, one in enumerate(uses, 1):
        state.save_keys([one], up_to_lsn=number, oldest_wall_ns=0)
        if number % 40 == 0:
            state.close()
            state = opened(path)
    state.close()
    assert loaded(path) == (uses, 150, [])
    assert keys_of(path, "keys") == [POSITION, *map(key_of, (1, 2, 3))]


def test_many_uses_are_cut_into_chunks_of_the_same_size(path: Path) -> None:
    uses = wide(*range(1, 1_001))
    saved(path, uses, up_to_lsn=1_000)
    assert len(keys_of(path, "keys")) == 1 + 16
    assert loaded(path) == (uses, 1_000, [])


def test_a_save_without_uses_writes_no_chunk_again(path: Path) -> None:
    state = opened(path)
    state.save_keys(wide(1, 2), up_to_lsn=2, oldest_wall_ns=0)
    state.close()
    tamper(path, "keys", key_of(1), lambda value: seal(key_of(1), encode_chunk(wide(1)), STORE))
    state = opened(path)
    state.save_keys([], up_to_lsn=9, oldest_wall_ns=0)
    assert state.load_keys() == (wide(1), 9, [])
    state.close()


def test_what_is_removed_makes_room_for_new_numbers(path: Path) -> None:
    state = opened(path)
    for start in range(0, 2_000, 100):
        uses = wide(*range(start + 1, start + 101))
        state.save_keys(uses, up_to_lsn=start + 100, oldest_wall_ns=start)
    found, up_to_lsn, findings = state.load_keys()
    state.close()
    assert (up_to_lsn, findings) == (2_000, [])
    assert found == wide(*range(found[0].lsn, 2_001))
    assert 1_840 < found[0].lsn <= 1_900
    assert len(keys_of(path, "keys")) <= 5


def test_a_save_that_fails_leaves_what_was_there(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = opened(path)
    state.save_keys(wide(*range(1, 101)), up_to_lsn=100, oldest_wall_ns=0)

    def full(*_: object, **__: object) -> None:
        raise StorageError("full", errno=28)

    with monkeypatch.context() as patch:
        patch.setattr("walbatch.storage.statefile.StateFile.put", full)
        with pytest.raises(StorageError, match="full"):
            state.save_keys(wide(101), up_to_lsn=101, oldest_wall_ns=90)
    assert state.load_keys() == (wide(*range(1, 101)), 100, [])
    state.save_keys(wide(101), up_to_lsn=101, oldest_wall_ns=0)
    assert state.load_keys() == (wide(*range(1, 102)), 101, [])
    state.close()


def no_room(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_on_a_full_disk_some_are_saved_and_the_checkpoint_that_trims_the_log_still_finds_room(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = opened(path)
    state.save_checkpoint(checkpoint(1))
    monkeypatch.setattr(os, "posix_fallocate", no_room)
    saved_lsn = 0
    full: StorageError | None = None
    while full is None and saved_lsn < 10_000:
        uses = wide(*range(saved_lsn + 1, saved_lsn + 101))
        try:
            state.save_keys(uses, up_to_lsn=saved_lsn + 100, oldest_wall_ns=0)
            saved_lsn += 100
        except StorageError as error:
            full = error
    assert full is not None
    assert full.errno == errno.ENOSPC
    assert 500 <= saved_lsn < 5_000
    for generation in range(2, 5):
        state.save_checkpoint(checkpoint(generation))
    assert state.load_keys()[:2] == (wide(*range(1, saved_lsn + 1)), saved_lsn)
    state.close()


def test_a_save_leaves_room_for_another_one_of_its_size(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = opened(path)
    state.save_keys(wide(*range(1, 10_001)), up_to_lsn=10_000, oldest_wall_ns=0)
    monkeypatch.setattr(os, "posix_fallocate", no_room)
    state.save_keys(wide(*range(10_001, 20_001)), up_to_lsn=20_000, oldest_wall_ns=0)
    assert state.load_keys()[1] == 20_000
    state.close()


def test_at_its_bound_the_oldest_chunks_go(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_uses, "IDEMPOTENCY_KEYS_MAX", 200)
    state = opened(path)
    for lsn in range(1, 501):
        state.save_keys(wide(lsn), up_to_lsn=lsn, oldest_wall_ns=0)
        assert state._keys._count < 264
    found = state.load_keys()[0]
    assert found == wide(*range(found[0].lsn, 501))
    assert len(found) >= 200
    state.close()
    state = opened(path)
    state.save_keys(wide(*range(501, 1_501)), up_to_lsn=1_500, oldest_wall_ns=0)
    assert 200 <= len(state.load_keys()[0]) < 264
    state.close()


@given(st.lists(st.tuples(st.integers(0, 90), st.integers(0, 1_000)), max_size=12), st.data())
def test_only_what_is_old_goes_and_soon(rounds: list[tuple[int, int]], data: st.DataObject) -> None:
    """Against a model, by what a save would write; the clock goes forth and back."""
    held: dict[bytes, bytes] = {}

    class Values:
        def seal(self, key: bytes, body: bytes) -> bytes:
            return seal(key, body, STORE)

        def save(self, changes: Sequence[tuple[bytes, bytes, bytes | None]], *, spare_bytes: int) -> None:
            assert spare_bytes >= SPARE_BYTES
            for _, key, value in changes:
                if value is None:
                    del held[key]
                else:
                    held[key] = value

    table = key_uses.KeyUses(Values())  # type: ignore[arg-type]
    model: list[KeyUse] = []
    lsn = 0
    for count, time in rounds:
        uses = [replace(one, used_wall_ns=time) for one in wide(*range(lsn + 1, lsn + count + 1))]
        lsn += count
        oldest = data.draw(st.integers(0, 1_000))
        table.save(uses, up_to_lsn=lsn, oldest_wall_ns=oldest)
        model += uses
        old = [index for index, one in enumerate(model) if one.used_wall_ns < oldest]
        del model[: old[-1] + 1 if old else 0]
        found = [
            one
            for key, value in sorted(held.items())
            if key != POSITION
            for one in decode_chunk(key, value[24:-4]).uses()
        ]
        assert found[len(found) - len(model) :] == model
        assert table._count == len(found)
        model = found  # what was spared may be spared as long as it shares a chunk


# --- damage --------------------------------------------------------------------------------------------------------


def body(**changes: int) -> bytes:
    """The body of a chunk of one use, with some of its numbers changed."""
    numbers = {"count": 1, "lanes": 1, "name": 3, "lane": 0, "lsn": 1, "time": 1, "key": 1} | changes
    return (
        struct.pack("<HHH3s", numbers["count"], numbers["lanes"], numbers["name"], b"put")
        + struct.pack("<BQQH", *(numbers[name] for name in ("lane", "lsn", "time", "key")))
        + b"k"
    )


def sealed(content: bytes, store: bytes = STORE) -> Callable[[bytes], bytes]:
    return lambda _: seal(key_of(2), content, store)


# Situation: what becomes of the second of three chunks; what the finding says.
DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "a flipped bit": (flip, "checksum"),
    "cut": (lambda value: value[:100], "checksum"),
    "emptied": (lambda _: b"", "0 bytes"),
    "the first chunk's value": (lambda _: seal(key_of(1), encode_chunk(wide(1)), STORE), "checksum"),
    "another store's value": (sealed(encode_chunk(wide(1)), OTHER), OTHER.hex()),
    "nonsense": (sealed(b"?"), "too early"),
    "no uses": (sealed(body(count=0)), "0 uses"),
    "too many uses": (sealed(body(count=CHUNK_COUNT_MAX + 1)), "uses, but must"),
    "more uses than there are": (sealed(body(count=500)), "too early"),
    "no lanes": (sealed(body(lanes=0)), "0 lanes"),
    "too many lanes": (sealed(body(lanes=65)), "65 lanes"),
    "a lane without a name": (sealed(body(name=0)), "too early|bytes of a lane's name"),
    "a lane with a name that is too long": (sealed(body(name=2**16 - 1)), "too early"),
    "a lane that is not there": (sealed(body(lane=1)), "the lane 1 of 1"),
    "an LSN beyond 63 bits": (sealed(body(lsn=2**63)), str(2**63)),
    "a time beyond 63 bits": (sealed(body(time=2**64 - 1)), str(2**64 - 1)),
    "a key that is too long": (sealed(body(key=257)), "257 bytes of an idempotency key"),
    "a key that is longer than what is left": (sealed(body(key=2)), "but 1 are left"),
    "bytes behind the keys": (sealed(body() + b"?"), "but 2 are left"),
}


def test_the_body_that_the_damages_begin_with_is_sound() -> None:
    (one,) = decode_chunk(key_of(2), body()).uses()
    assert one == KeyUse(key=b"k", lane="put", lsn=1, used_wall_ns=1)


@pytest.mark.parametrize(("change", "finding"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_chunk_is_told_copied_and_the_log_is_asked_for_all_keys_until_it_is_replaced(
    path: Path, change: Callable[[bytes], bytes], finding: str
) -> None:
    saved(path, wide(*range(1, 151)), up_to_lsn=150)
    tamper(path, "keys", key_of(2), change)
    predicted = loaded(path)
    state = opened(path)
    uses, up_to_lsn, findings = state.load_keys()
    assert (uses, up_to_lsn, findings) == predicted
    assert len(findings) == 1
    assert re.search("some idempotency keys.*" + finding, findings[0])
    assert up_to_lsn == 0
    left = [*wide(*range(1, 65)), *wide(*range(129, 151))]
    assert uses == left
    assert len(copies(path)) == 1
    state.save_keys(wide(151), up_to_lsn=151, oldest_wall_ns=0)
    assert state.load_keys() == ([*left, *wide(151)], 151, [])
    state.close()


def test_a_damaged_last_chunk_is_replaced_by_the_next_save(path: Path) -> None:
    saved(path, wide(*range(1, 101)), up_to_lsn=100)
    tamper(path, "keys", key_of(2), flip)
    state = opened(path)
    state.save_checkpoint(checkpoint(1))
    assert state.load_keys()[1] == 0
    state.save_keys(wide(101), up_to_lsn=101, oldest_wall_ns=0)
    state.close()
    assert loaded(path) == (wide(*range(1, 65), 101), 101, [])


POSITIONS: dict[str, Callable[[bytes], bytes]] = {
    "a flipped bit": flip,
    "too short": lambda _: seal(POSITION, b"\1", STORE),
    "beyond 63 bits": lambda _: seal(POSITION, b"\xff" * 8, STORE),
}


@pytest.mark.parametrize("change", POSITIONS.values(), ids=POSITIONS.keys())
def test_without_knowing_how_far_the_keys_go_the_log_is_asked_for_all(
    path: Path, change: Callable[[bytes], bytes]
) -> None:
    saved(path, wide(1), up_to_lsn=7)
    tamper(path, "keys", POSITION, change)
    state = opened(path)
    uses, up_to_lsn, findings = state.load_keys()
    assert (uses, up_to_lsn) == (wide(1), 0)
    assert re.search("up to where idempotency keys were saved cannot be told", findings[0])
    assert len(copies(path)) == 1
    state.save_keys([], up_to_lsn=8, oldest_wall_ns=0)
    assert state.load_keys() == (wide(1), 8, [])
    state.close()


def test_a_chunk_under_a_key_that_is_none_is_a_finding_and_goes(path: Path) -> None:
    saved(path, wide(1), up_to_lsn=1)
    for key in (b"x", b"\xff" * 8):
        plant(path, "keys", key, encode_chunk(wide(2)))
    state = opened(path)
    assert len(state.load_keys()[2]) == 2
    state.save_keys(wide(3), up_to_lsn=3, oldest_wall_ns=0)
    state.close()
    assert loaded(path) == (wide(1, 3), 3, [])


def test_more_keys_than_may_be_are_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = [use(lsn) for lsn in range(1, 2_001)]
    saved(path, narrow, up_to_lsn=2_000)
    monkeypatch.setattr(key_uses, "IDEMPOTENCY_KEYS_MAX", 10)
    uses, up_to_lsn, findings = loaded(path)
    assert 100 < len(uses) <= 10 + CHUNK_COUNT_MAX
    assert (uses, up_to_lsn) == (narrow[: len(uses)], 0)
    assert findings == ["state holds more than 10 idempotency keys: the rest is ignored"]


# --- what can be stored --------------------------------------------------------------------------------------------

# Situation: a use that no reader would accept, and how far the keys go.
UNFIT: dict[str, tuple[KeyUse, int]] = {
    "no lane": (use(1, lane=""), 1),
    "a lane that is too long": (use(1, lane="x" * 65), 1),
    "a key that is too long": (use(1, key=bytes(limits.IDEMPOTENCY_KEY_BYTES_MAX + 1)), 1),
    "a negative time": (use(1, at=-1), 1),
    "an LSN beyond 63 bits": (use(2**63, at=1), 1),
    "a position beyond 63 bits": (use(1), 2**63),
}


@pytest.mark.parametrize(("unfit", "up_to_lsn"), UNFIT.values(), ids=UNFIT.keys())
def test_a_use_that_could_not_be_read_back_is_not_written(path: Path, unfit: KeyUse, up_to_lsn: int) -> None:
    state = opened(path)
    with pytest.raises(StorageError, match="cannot be stored"):
        state.save_keys([use(5), unfit], up_to_lsn=up_to_lsn, oldest_wall_ns=0)
    assert state.load_keys() == ([], 0, [])
    state.save_keys([use(5)], up_to_lsn=5, oldest_wall_ns=0)
    assert state.load_keys() == ([use(5)], 5, [])
    state.close()


def test_more_lanes_than_a_store_may_have_are_refused(path: Path) -> None:
    state = opened(path)
    with pytest.raises(StorageError, match="65 lanes"):
        state.save_keys(
            [use(lsn, lane=f"lane {lsn}") for lsn in range(1, 66)], up_to_lsn=65, oldest_wall_ns=0
        )
    state.close()


NUMBERS = st.integers(0, limits.LSN_MAX)
USES = st.lists(
    st.builds(
        KeyUse,
        key=st.binary(max_size=40),
        lane=st.text(min_size=1, max_size=16),
        lsn=NUMBERS,
        used_wall_ns=NUMBERS,
    ),
    min_size=1,
    max_size=20,
)


@given(USES)
def test_a_chunk_comes_back_as_it_was(uses: list[KeyUse]) -> None:
    assert list(decode_chunk(key_of(1), encode_chunk(uses)).uses()) == uses


@given(USES, st.data())
def test_changed_bytes_give_uses_or_a_value_error(uses: list[KeyUse], data: st.DataObject) -> None:
    content = bytearray(encode_chunk(uses))
    for _ in range(data.draw(st.integers(1, 5))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        changed = list(
            decode_chunk(key_of(1), bytes(content[: data.draw(st.integers(0, len(content)))])).uses()
        )
    except ValueError:
        return
    assert list(decode_chunk(key_of(1), encode_chunk(changed)).uses()) == changed


@given(st.binary(max_size=200))
def test_any_bytes_give_uses_or_a_value_error(content: bytes) -> None:
    try:
        found = decode_chunk(key_of(1), content)
    except ValueError:
        return
    assert len(list(found.uses())) == len(found)
