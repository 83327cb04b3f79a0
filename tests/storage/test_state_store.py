"""What every state store does, the real one and the simulated one: letters, what was given up, keys, controllers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.storage.states import checkpoint, letter, opened, read_only, use
from walbatch.errors import StorageError
from walbatch.ports import StateStore
from walbatch.storage import letters, statefile
from walbatch.storage.lsnkeys import key_of
from walbatch.storage.statefolder import DamagedFileError
from walbatch.testing.simulation import FaultPlan, SimulatedState, StateDisk

Open = Callable[[], StateStore]
"""The store after a restart. What was open before is closed."""


@pytest.fixture(params=["real", "simulated"])
def reopen(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    disk = StateDisk()
    states: list[StateStore] = []

    def open_it() -> StateStore:
        for state in states:
            state.close()
        if request.param == "real":
            states.append(opened(tmp_path / "state"))
        else:
            states.append(SimulatedState(
                disk, "/state", faults=FaultPlan(), on_call=lambda *_: None, on_save=lambda _: None
            ))  # fmt: skip
        return states[-1]

    yield open_it
    for state in states:
        state.close()


def test_a_new_store_holds_nothing_and_nothing_is_wrong_with_it(reopen: Open) -> None:
    state = reopen()
    assert state.load_letters() == ([], [])
    assert state.load_given_up() == (frozenset(), [])
    assert state.load_keys() == ([], 0, [])
    assert state.load_controllers() == ({}, [])


def test_what_was_saved_is_there_after_a_restart(reopen: Open) -> None:
    state = reopen()
    state.bury([letter(7), letter(3)])
    state.cancel([9, 100_000])
    state.save_keys([use(1), use(2, lane="get")], up_to_lsn=2, oldest_wall_ns=0)
    state.save_controllers({("put", 0): b"first", ("get", 255): b""})
    state = reopen()
    assert state.load_letters() == ([letter(3), letter(7)], [])
    assert state.load_given_up() == (frozenset({3, 7, 9, 100_000}), [])
    assert state.load_keys() == ([use(1), use(2, lane="get")], 2, [])
    assert state.load_controllers() == ({("put", 0): b"first", ("get", 255): b""}, [])


def test_saving_nothing_changes_nothing(reopen: Open) -> None:
    state = reopen()
    state.bury([])
    state.unbury([])
    state.cancel([])
    state.save_controllers({})
    assert state.load_given_up() == (frozenset(), [])
    assert reopen().load_letters() == ([], [])


def test_a_letter_that_was_removed_is_gone_and_its_operation_stays_given_up(reopen: Open) -> None:
    state = reopen()
    state.bury([letter(1), letter(2)])
    state.unbury([1, 5])
    for _ in range(2):
        assert state.load_letters()[0] == [letter(2)]
        assert state.load_given_up()[0] == {1, 2}
        state = reopen()


def test_a_letter_replaces_one_of_the_same_operation(reopen: Open) -> None:
    state = reopen()
    state.bury([letter(1)])
    state.bury([letter(1, error="again", attempts=9)])
    assert reopen().load_letters()[0] == [letter(1, error="again", attempts=9)]


def test_what_may_be_forgotten_goes_with_a_later_save_and_letters_keep_their_operations(
    reopen: Open,
) -> None:
    state = reopen()
    state.cancel([1, 2, 70_000])
    state.bury([letter(4)])
    state.forget_given_up(60_000)
    assert state.load_given_up()[0] == {1, 2, 4, 70_000}, "nothing was written yet"
    state.save_checkpoint(checkpoint(1))
    for _ in range(2):
        assert state.load_given_up()[0] == {4, 70_000}
        state = reopen()
    state.unbury([4])
    assert reopen().load_given_up()[0] == {70_000}


def test_what_may_be_forgotten_is_found_once_more_where_nothing_was_saved(reopen: Open) -> None:
    state = reopen()
    state.cancel([1])
    state.forget_given_up(60_000)
    assert reopen().load_given_up()[0] == {1}


def test_the_key_of_every_use_is_kept_in_order(reopen: Open) -> None:
    state = reopen()
    uses = [use(lsn, key=b"x" * (lsn % 250 + 1), lane=f"lane {lsn % 5}") for lsn in range(1, 4_001)]
    for start in range(0, 4_000, 250):
        state.save_keys(uses[start : start + 250], up_to_lsn=start + 250, oldest_wall_ns=0)
        if start % 1_000 == 0:
            state = reopen()
    assert reopen().load_keys() == (uses, 4_000, [])


def test_what_is_old_goes_and_nothing_else_that_is_not_among_it(reopen: Open) -> None:
    state = reopen()
    uses = [use(lsn, key=b"%0200d" % lsn) for lsn in range(1, 2_001)]
    state.save_keys(uses, up_to_lsn=2_000, oldest_wall_ns=0)
    state.save_keys([use(2_001)], up_to_lsn=2_001, oldest_wall_ns=1_500)
    found, up_to_lsn, findings = reopen().load_keys()
    assert (up_to_lsn, findings) == (2_001, [])
    assert found == [*uses, use(2_001)][-len(found) :]
    assert 502 <= len(found) < 700, "in portions"


def test_what_was_used_before_something_old_is_old_too(reopen: Open) -> None:
    state = reopen()
    future = [use(lsn, at=10**18 + lsn, key=b"%0200d" % lsn) for lsn in range(1, 301)]
    state.save_keys(future, up_to_lsn=300, oldest_wall_ns=0)
    state.save_keys(
        [use(lsn, key=b"%0200d" % lsn) for lsn in range(301, 901)], up_to_lsn=900, oldest_wall_ns=0
    )
    state.save_keys([use(901)], up_to_lsn=901, oldest_wall_ns=901)
    found = reopen().load_keys()[0]
    assert 1 <= len(found) < 100
    assert found[-1] == use(901)


def test_everything_may_be_old(reopen: Open) -> None:
    state = reopen()
    state.save_keys([use(1), use(2)], up_to_lsn=2, oldest_wall_ns=0)
    state.save_keys([], up_to_lsn=5, oldest_wall_ns=100)
    assert state.load_keys() == ([], 5, [])
    state = reopen()
    state.save_keys([use(200)], up_to_lsn=200, oldest_wall_ns=150)
    assert reopen().load_keys() == ([use(200)], 200, [])


def test_snapshots_that_are_not_saved_again_stay(reopen: Open) -> None:
    state = reopen()
    state.save_controllers({("put", 0): b"a", ("put", 1): b"b"})
    state.save_controllers({("put", 1): b"c"})
    assert reopen().load_controllers() == ({("put", 0): b"a", ("put", 1): b"c"}, [])


def test_any_thread_may_call_it(reopen: Open) -> None:
    state = reopen()
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for lsn in range(number, 200, 4):
                state.bury([letter(lsn + 1)])
                state.cancel([1_000 + lsn])
                state.load_letters()
        except BaseException as error:  # noqa: BLE001 - told by the test's own thread
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    state = reopen()
    assert [found.lsn for found in state.load_letters()[0]] == [*range(1, 201)]
    assert state.load_given_up()[0] == {*range(1, 201), *range(1_000, 1_200)}


# --- the real one: reading in pages ---------------------------------------------------------------------------------


def test_a_table_is_read_in_pages_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statefile, "PAGE_COUNT", 3)
    state = opened(tmp_path / "state")
    for count in range(1, 9):
        state.bury([letter(count)])
        assert state.load_letters() == ([letter(lsn) for lsn in range(1, count + 1)], [])
    state.close()


def test_large_values_are_read_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statefile, "PAGE_BYTES", 10_000)
    pages: list[int] = []
    read_page = statefile._page

    def noted(*arguments: Any, **options: Any) -> Any:
        found = read_page(*arguments, **options)
        pages.append(len(found))
        return found

    monkeypatch.setattr(statefile, "_page", noted)
    kept = [letter(lsn, payload=bytes(4_000)) for lsn in range(1, 8)]
    state = opened(tmp_path / "state")
    state.bury(kept)
    pages.clear()
    assert state.load_letters() == (kept, [])
    assert pages == [3, 3, 1, 0]
    state.close()


def test_who_reads_a_table_holds_nobody_up_between_two_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statefile, "PAGE_COUNT", 2)
    state = opened(tmp_path / "state")
    state.bury([letter(lsn) for lsn in range(1, 6)])
    file = state._tables.file
    assert file is not None
    reading = file.entries(letters.TABLE, [])
    seen = [next(reading)[0]]
    state.unbury([1, 2, 4])
    state.bury([letter(9)])
    seen += [key for key, _ in reading]
    assert seen == [key_of(lsn) for lsn in (1, 2, 3, 5, 9)]
    state.close()


def test_the_map_grows_until_letters_fit(tmp_path: Path) -> None:
    state = opened(tmp_path / "state", map_bytes=2**16)
    kept = [letter(lsn, payload=bytes(100_000)) for lsn in range(1, 30)]
    state.bury(kept)
    state.close()
    state = opened(tmp_path / "state", map_bytes=2**16)
    assert state.load_letters() == (kept, [])
    state.close()


def test_letters_are_removed_from_a_map_that_is_full(tmp_path: Path) -> None:
    state = opened(tmp_path / "state")
    state.bury([letter(lsn, payload=bytes(1_000)) for lsn in range(1, 300)])
    file = state._tables.file
    assert file is not None
    env = file._env
    assert env is not None
    full = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
    env.set_mapsize(full)
    state.unbury(range(1, 300))
    assert env.info()["map_size"] == 2 * full
    assert state.load_letters() == ([], [])
    state.close()


# --- the real one: LMDB finds damage when the file is in use --------------------------------------------------------


def damaged(*_: object, **__: object) -> Any:
    raise DamagedFileError("MDB_CORRUPTED")


def test_damage_that_shows_while_a_table_is_read_is_a_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = opened(tmp_path / "state")
    state.bury([letter(1)])
    with monkeypatch.context() as patch:
        patch.setattr(statefile.StateFile, "entries", damaged)
        for _, findings in (state.load_letters(), state.load_given_up(), state.load_controllers()):
            assert len(findings) == 1
            assert "MDB_CORRUPTED" in findings[0]
        assert state.load_keys()[1] == 0
    state.close()
    reader = read_only(tmp_path / "state")
    with monkeypatch.context() as patch:
        patch.setattr(statefile.StateFile, "entries", damaged)
        assert len(reader.load_given_up()[1]) == 1
    reader.close()


@pytest.mark.parametrize("call", ["put", "get"])
def test_damage_that_shows_in_a_save_ends_all_saving(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    state = opened(tmp_path / "state")
    state.cancel([1])
    with monkeypatch.context() as patch:
        patch.setattr(statefile.StateFile, call, damaged)
        with pytest.raises(StorageError, match="open the store again"):
            state.cancel([2])
    with pytest.raises(StorageError, match="open the store again"):
        state.bury([letter(3)])
    assert state.load_given_up() == (frozenset({1}), [])
    state.close()
