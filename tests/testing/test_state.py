"""The stand-in for the state: which images a crash leaves of letters, keys and the like, and how their calls fail."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence

import pytest

from tests.storage.states import checkpoint, letter, use
from tools.modes.faults import _STATES
from walbatch.errors import StorageError
from walbatch.testing.simulation import Cut, Fault, FaultPlan, Machine, Process, SimulatedState, StateDisk

Call = Callable[[SimulatedState], object]

SAVES: dict[str, Call] = {
    "bury": lambda state: state.bury([letter(1)]),
    "unbury": lambda state: state.unbury([1]),
    "cancel": lambda state: state.cancel([2]),
    "save keys": lambda state: state.save_keys([use(3)], up_to_lsn=3, oldest_wall_ns=0),
    "save controllers": lambda state: state.save_controllers({("put", 0): b"x"}),
}
LOADS: dict[str, Call] = {
    "load letters": lambda state: state.load_letters(),
    "load given up": lambda state: state.load_given_up(),
    "load keys": lambda state: state.load_keys(),
    "load controllers": lambda state: state.load_controllers(),
}


def opened(disk: StateDisk, faults: Sequence[Fault] = (), calls: list[str] | None = None) -> SimulatedState:
    return SimulatedState(
        disk, "/state", faults=FaultPlan(tuple(faults)), on_save=lambda _: None,
        on_call=lambda call, _: calls.append(call) if calls is not None else None,
    )  # fmt: skip


def contents(disk: StateDisk) -> object:
    """All that an opening would find."""
    state = opened(disk.clone())
    return state.load_letters(), state.load_given_up(), state.load_keys(), state.load_controllers()


def test_every_call_that_may_fail_is_a_step_of_the_same_name_and_has_faults() -> None:
    calls: list[str] = []
    state = opened(StateDisk(), calls=calls)
    for call in (SAVES | LOADS).values():
        call(state)
    state.forget_given_up(1)
    assert calls == [*SAVES, *LOADS]
    assert {call.replace(" ", "_") for call in calls} == _STATES - {
        "load_checkpoint", "save_checkpoint", "load_lanes", "save_lanes", "open_state",
    }  # fmt: skip


@pytest.mark.parametrize("call", SAVES)
def test_a_save_is_durable_when_it_returns(call: str) -> None:
    disk = StateDisk()
    state = opened(disk)
    SAVES[call](state)
    (image,) = disk.images()
    assert contents(image) == contents(disk)


@pytest.mark.parametrize("call", SAVES)
def test_a_save_that_failed_may_have_been_kept_and_is_the_last(call: str) -> None:
    disk = StateDisk()
    opened(disk).bury([letter(1), letter(9)])
    before = contents(disk)
    state = opened(disk, [Fault(call=call)])
    with pytest.raises(StorageError):
        SAVES[call](state)
    for save in SAVES.values():
        with pytest.raises(StorageError):
            save(state)
    kept, lost = disk.images()
    assert contents(lost) == before
    SAVES[call](opened(lost))
    assert contents(kept) == contents(lost)


@pytest.mark.parametrize("call", SAVES)
def test_a_full_disk_keeps_nothing_and_the_save_can_be_made_again(call: str) -> None:
    disk = StateDisk()
    state = opened(disk, [Fault(call=call, error=errno.ENOSPC)])
    before = contents(disk)
    with pytest.raises(StorageError) as caught:
        SAVES[call](state)
    assert caught.value.errno == errno.ENOSPC
    (image,) = disk.images()
    assert contents(image) == before
    SAVES[call](state)
    assert len(disk.commits) == 1


@pytest.mark.parametrize("call", LOADS)
def test_a_load_fails_as_it_is_told(call: str) -> None:
    state = opened(StateDisk(), [Fault(call=call, error=errno.EROFS)])
    with pytest.raises(StorageError):
        LOADS[call](state)
    LOADS[call](state)


def test_what_may_be_forgotten_is_gone_in_every_image_with_the_next_commit_only() -> None:
    disk = StateDisk()
    state = opened(disk, [Fault(call="cancel", number=2)])
    state.cancel([1, 50])
    state.forget_given_up(10)
    assert [opened(image).load_given_up()[0] for image in disk.images()] == [{1, 50}]
    with pytest.raises(StorageError):
        state.cancel([60])
    found = [opened(image).load_given_up()[0] for image in disk.images()]
    assert found == [{50, 60}, {50}, {1, 50}]


def test_a_damaged_letter_is_found_and_tried_again_until_it_is_removed_or_replaced() -> None:
    disk = StateDisk()
    opened(disk).bury([letter(1), letter(2), letter(3)])
    disk.garbled_letters = frozenset({1, 2})
    state = opened(disk)
    letters, findings = state.load_letters()
    assert (letters, len(findings)) == ([letter(3)], 2)
    assert "1 of lane 'put'" in findings[0]
    assert state.load_given_up()[0] == {3}
    state.bury([letter(1)])
    state.unbury([2])
    assert state.load_letters() == ([letter(1), letter(3)], [])
    assert state.load_given_up()[0] == {1, 2, 3}


def test_damaged_keys_are_found_and_the_log_is_asked_for_all_until_some_are_saved() -> None:
    disk = StateDisk()
    state = opened(disk)
    state.save_keys([use(1)], up_to_lsn=1, oldest_wall_ns=0)
    disk.garbled_keys = len(disk.commits)
    uses, up_to_lsn, findings = state.load_keys()
    assert (uses, up_to_lsn, len(findings)) == ([], 0, 1)
    state.save_keys([use(2)], up_to_lsn=2, oldest_wall_ns=0)
    assert state.load_keys() == ([use(2)], 2, [])
    assert opened(StateDisk(garbled_keys=3)).load_keys() == ([], 0, [])


def test_a_stale_state_has_lost_its_newest_commits_whatever_they_were() -> None:
    disk = StateDisk()
    state = opened(disk)
    state.bury([letter(1)])
    state.save_checkpoint(checkpoint(1))
    state.unbury([1])
    disk.stale_commits = 1
    state = opened(disk)
    assert state.load_letters() == ([letter(1)], [])
    assert state.load_checkpoint() == (checkpoint(1), [])


def test_states_that_differ_have_fingerprints_that_differ() -> None:
    disk = StateDisk()
    seen = {disk.fingerprint()}
    for save in SAVES.values():
        save(opened(disk))
        seen.add(disk.fingerprint())
    for change in ({"garbled_letters": frozenset({1})}, {"garbled_keys": 2}):
        other = disk.clone()
        for name, value in change.items():
            setattr(other, name, value)
        assert other.clone().fingerprint() == other.fingerprint()
        seen.add(other.fingerprint())
    assert len(seen) == len(SAVES) + 3


def test_a_name_that_one_opening_could_not_make_durable_is_made_so_by_the_next() -> None:
    """As with the real state: its file is proven durable as long as nothing was committed to it."""
    machine = Machine()

    def first(process: Process) -> None:
        process.fs.make_directory("/store")
        process.fs.make_directory("/store/state")
        process.fs.sync_directory("/")
        process.fs.sync_directory("/store")
        process.faults.faults = (Fault(call="sync_directory"),)
        with pytest.raises(StorageError):
            process.open_state("/store/state", b"", "")

    def second(process: Process) -> None:
        process.open_state("/store/state", b"", "").bury([letter(1)])

    for use_state in (first, second):
        process = Process(machine, [], seed=0, life=use_state.__name__)
        process.run(lambda use_state=use_state, process=process: use_state(process))  # type: ignore[misc]
    images = [image for _, image in machine.images(Cut.POWER)]
    assert images
    for image in images:
        assert image.fs.holds("/store/state/data.mdb")
