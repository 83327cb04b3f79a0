"""LSNs that were given up: what becomes of damaged blocks, and how they are forgotten."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
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
    letter,
    opened,
    plant,
    read_only,
    tamper,
)
from walbatch import limits
from walbatch.errors import StorageError
from walbatch.storage import given_up
from walbatch.storage.envelope import seal
from walbatch.storage.given_up import BLOCK_LSNS, decode_block
from walbatch.storage.lsnkeys import key_of


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store" / "state"


def block(number: int) -> bytes:
    """The key of a block, from 0."""
    return key_of(number + 1)


def cancelled(path: Path, *lsns: int) -> None:
    state = opened(path)
    state.cancel(lsns)
    state.close()


def loaded(path: Path) -> tuple[frozenset[int], list[str]]:
    state = read_only(path)
    found = state.load_given_up()
    state.close()
    return found


def test_a_million_stand_in_few_entries(path: Path) -> None:
    lsns = range(1, 3_000_001, 3)
    state = opened(path)
    state.cancel(lsns)
    state.cancel([2])
    state.close()
    assert len(keys_of(path, "given_up")) == 3_000_000 // BLOCK_LSNS + 1
    assert loaded(path) == (frozenset([*lsns, 2]), [])


def test_the_ends_of_blocks_and_of_all_numbers_come_back(path: Path) -> None:
    lsns = {1, BLOCK_LSNS - 1, BLOCK_LSNS, BLOCK_LSNS + 1, 2 * BLOCK_LSNS - 1, limits.LSN_MAX}
    cancelled(path, *lsns)
    cancelled(path, BLOCK_LSNS, 7)
    assert loaded(path) == (frozenset(lsns | {7}), [])


@pytest.mark.parametrize("lsn", [-1, limits.LSN_MAX + 1])
def test_a_number_that_is_no_lsn_is_refused(path: Path, lsn: int) -> None:
    state = opened(path)
    with pytest.raises(StorageError, match="cannot be stored"):
        state.cancel([5, lsn])
    assert state.load_given_up() == (frozenset(), [])
    state.close()


# --- forgetting ----------------------------------------------------------------------------------------------------


def test_blocks_are_forgotten_whole(path: Path) -> None:
    state = opened(path)
    state.cancel([1, BLOCK_LSNS - 1, BLOCK_LSNS, 2 * BLOCK_LSNS])
    state.forget_given_up(BLOCK_LSNS - 2)
    state.save_checkpoint(checkpoint(1))
    assert sorted(state.load_given_up()[0]) == [1, BLOCK_LSNS - 1, BLOCK_LSNS, 2 * BLOCK_LSNS]
    state.forget_given_up(BLOCK_LSNS - 1)
    state.save_checkpoint(checkpoint(2))
    assert sorted(state.load_given_up()[0]) == [BLOCK_LSNS, 2 * BLOCK_LSNS]
    state.forget_given_up(5 * BLOCK_LSNS)
    state.forget_given_up(0)
    state.cancel([10 * BLOCK_LSNS])
    assert sorted(state.load_given_up()[0]) == [10 * BLOCK_LSNS]
    state.close()


def test_what_is_given_up_late_in_a_block_that_may_be_forgotten_is_remembered(path: Path) -> None:
    state = opened(path)
    state.cancel([1])
    state.forget_given_up(10 * BLOCK_LSNS)
    state.cancel([2])
    assert state.load_given_up()[0] >= {2}
    state.save_checkpoint(checkpoint(1))
    assert state.load_given_up()[0] == frozenset()
    state.close()


def test_many_blocks_are_forgotten_over_several_saves(path: Path) -> None:
    state = opened(path)
    state.cancel([number * BLOCK_LSNS for number in range(150)])
    state.forget_given_up(149 * BLOCK_LSNS)
    left = []
    for generation in range(1, 5):
        state.save_checkpoint(checkpoint(generation))
        left.append(len(state.load_given_up()[0]))
    assert left == [86, 22, 1, 1]
    state.close()


def test_a_save_that_fails_forgets_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = opened(path)
    state.cancel([1])
    state.forget_given_up(BLOCK_LSNS)

    def full(*_: object, **__: object) -> None:
        raise StorageError("full", errno=errno.ENOSPC)

    with monkeypatch.context() as patch:
        patch.setattr("walbatch.storage.statefile.StateFile.put", full)
        with pytest.raises(StorageError, match="full"):
            state.cancel([BLOCK_LSNS + 7])
    assert state.load_given_up()[0] == {1}
    state.save_checkpoint(checkpoint(1))
    assert state.load_given_up()[0] == set(), "and the next save does"
    state.cancel([BLOCK_LSNS + 8])
    assert state.load_given_up()[0] >= {BLOCK_LSNS + 8}
    state.close()


# --- damage --------------------------------------------------------------------------------------------------------

# Situation: what becomes of the block of the second hundred; what the finding says.
DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "a flipped bit": (flip, f"from LSN {BLOCK_LSNS:,} to {2 * BLOCK_LSNS - 1:,} may be delivered.*checksum"),
    "cut": (lambda value: value[:26], "damaged, it has 26 bytes"),
    "another block's value": (lambda _: seal(block(0), b"\1\0", STORE), "checksum"),
    "another store's value": (lambda _: seal(block(1), b"\1\0", OTHER), OTHER.hex()),
    "half an offset": (lambda _: seal(block(1), b"\1\0\2", STORE), "damaged"),
    "no offset": (lambda _: seal(block(1), b"", STORE), "do not ascend"),
    "offsets that do not ascend": (lambda _: seal(block(1), b"\2\0\2\0", STORE), "do not ascend"),
    "an offset outside": (lambda _: seal(block(1), b"\0\x40", STORE), "leave the block"),
}


@pytest.mark.parametrize(("change", "finding"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_block_is_told_and_copied_and_the_others_stay(
    path: Path, change: Callable[[bytes], bytes], finding: str
) -> None:
    cancelled(path, 1, BLOCK_LSNS, 2 * BLOCK_LSNS)
    tamper(path, "given_up", block(1), change)
    predicted = loaded(path)
    state = opened(path)
    found, findings = state.load_given_up()
    assert (found, findings) == predicted
    assert found == {1, 2 * BLOCK_LSNS}
    assert len(findings) == 1
    assert re.search(finding, findings[0])
    assert len(copies(path)) == 1
    state.cancel([BLOCK_LSNS + 5])
    assert state.load_given_up() == (frozenset({1, BLOCK_LSNS + 5, 2 * BLOCK_LSNS}), [])
    state.close()


def test_what_a_letter_holds_is_given_up_even_if_its_block_is_damaged(path: Path) -> None:
    state = opened(path)
    state.bury([letter(7)])
    state.close()
    tamper(path, "given_up", block(0), flip)
    found, findings = loaded(path)
    assert found == {7}
    assert len(findings) == 1


def test_keys_that_are_no_blocks_are_findings(path: Path) -> None:
    cancelled(path, 1)
    for key in (b"x", key_of(limits.LSN_MAX)):
        plant(path, "given_up", key, b"\1\0")
    state = opened(path)
    found, findings = state.load_given_up()
    assert found == {1}
    assert len(findings) == 2
    state.close()


# --- bounds --------------------------------------------------------------------------------------------------------


def test_at_its_bound_nothing_is_given_up_until_something_is_forgotten(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(given_up, "COUNT_MAX", 3)
    state = opened(path)
    state.cancel([1, 2])
    state.bury([letter(3)])
    state.cancel([1, 2, 3])
    with pytest.raises(StorageError, match="requeue or drop"):
        state.cancel([4])
    with pytest.raises(StorageError, match="requeue or drop") as caught:
        state.bury([letter(4)])
    assert caught.value.errno == errno.ENOSPC
    assert state.load_letters()[0] == [letter(3)]
    state.unbury([3])
    state.forget_given_up(BLOCK_LSNS)
    state.save_checkpoint(checkpoint(1))
    state.cancel([4])
    assert state.load_given_up()[0] == {4}
    state.close()


def test_more_than_may_be_given_up_is_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cancelled(path, 1, 2, BLOCK_LSNS)
    monkeypatch.setattr(given_up, "COUNT_MAX", 2)
    assert loaded(path) == (
        frozenset({1, 2}),
        ["more than 2 operations were given up: the rest may be delivered"],
    )


# --- any bytes -----------------------------------------------------------------------------------------------------


@given(st.binary(max_size=9), st.binary(max_size=60))
def test_any_bytes_give_lsns_or_a_value_error(key: bytes, body: bytes) -> None:
    try:
        lsns = decode_block(key, body)
    except ValueError:
        return
    assert len(lsns) == len(body) // 2
    assert lsns == sorted(set(lsns))
    assert 0 <= lsns[0] <= lsns[-1] <= limits.LSN_MAX


@given(st.lists(st.sets(st.integers(0, 200_000), max_size=30), max_size=6))
def test_what_was_given_up_in_any_order_is_all_given_up(rounds: list[set[int]]) -> None:
    """Against a table in a dictionary, by what a save would write."""
    held: dict[bytes, bytes] = {}

    class Values:
        def get(self, _table: object, keys: list[bytes]) -> dict[bytes, bytes]:
            return {key: held[key] for key in keys}

        def seal(self, key: bytes, body: bytes) -> bytes:
            return seal(key, body, STORE)

        def decode(self, key: bytes, value: bytes, decode: Callable[[bytes, bytes], list[int]]) -> object:
            return decode(key, value[24:-4]), ""

    table = given_up.GivenUp(Values())  # type: ignore[arg-type]
    for lsns in rounds:
        changes = table.changes(lsns)
        held |= {key: value for _, key, value in changes if value is not None}
        table.changed(changes)
    found = {lsn for key, value in held.items() for lsn in decode_block(key, value[24:-4])}
    assert found == set().union(*rounds)
    assert table._count == len(found)
