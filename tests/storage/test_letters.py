"""Dead letters in state/: what survives which damage, and that nothing is lost without a word."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import struct
import subprocess
import sys
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
    letter,
    opened,
    plant,
    read_only,
    tamper,
)
from walbatch import limits
from walbatch.core.checksum import crc32c
from walbatch.errors import EngineClosed, StorageError, UnsupportedFormat
from walbatch.storage import envelope, letters
from walbatch.storage.checkpoint import LmdbState
from walbatch.storage.envelope import seal
from walbatch.storage.letters import decode_letter, encode_letter
from walbatch.storage.lsnkeys import key_of
from walbatch.types import DeadLetter, DeathReason, Options

LETTER_BYTES = len(seal(key_of(1), encode_letter(letter(1)), STORE))
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store" / "state"


def buried(path: Path, *lsns: int) -> None:
    state = opened(path)
    state.save_checkpoint(checkpoint(1))
    state.bury([letter(lsn) for lsn in lsns])
    state.close()


def test_every_part_of_a_letter_comes_back(path: Path) -> None:
    state = opened(path)
    kept = [
        letter(1, key=b"", payload=b"", error="", options=Options(), attempts=0, died_wall_ns=0),
        letter(2, payload=bytes(limits.PAYLOAD_BYTES_MAX), key=b"k" * limits.KEY_BYTES_MAX),
        letter(limits.LSN_MAX, lane="ü" * 32, reason=DeathReason.DEADLINE, priority=10),
    ]
    state.bury(kept)
    assert state.load_letters() == (kept, [])
    state.close()


def test_every_reason_can_be_stored() -> None:
    for reason in DeathReason:
        one = letter(1, reason=reason)
        assert decode_letter(key_of(1), encode_letter(one)) == one


# What a backend may say, and how it is kept.
ERRORS: dict[str, tuple[str, str]] = {
    "a text that is too long": ("x" * 5_000, "x" * 4_096),
    "a text that is cut inside a character": ("ü" * 4_000, "ü" * 2_048),
    "half of a surrogate pair": ("bad \ud800", "bad \\ud800"),
    "control characters": ("a\0b\x1b", "a\0b\x1b"),
}


@pytest.mark.parametrize(("error", "kept"), ERRORS.values(), ids=ERRORS.keys())
def test_no_text_of_an_error_keeps_a_letter_from_being_stored(error: str, kept: str) -> None:
    assert decode_letter(key_of(1), encode_letter(letter(1, error=error))).error == kept


# --- damage --------------------------------------------------------------------------------------------------------


def sealed(body: bytes, store: bytes = STORE) -> Callable[[bytes], bytes]:
    return lambda _: seal(key_of(2), body, store)


# Situation: what becomes of the value of the second of three letters; what the finding says.
DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "a flipped bit": (flip, "letter 2 of lane 'put' is not usable: it is damaged.*checksum"),
    "cut": (lambda value: value[:60], "letter 2 .*damaged"),
    "emptied": (lambda _: b"", "letter 2 is not usable.*0 bytes"),
    "another letter's value": (
        lambda _: seal(key_of(1), encode_letter(letter(1)), STORE),
        "letter 2 .*checksum",
    ),
    "another store's value": (sealed(encode_letter(letter(2)), OTHER), f"letter 2 .*{OTHER.hex()}"),
    "a sound envelope around nonsense": (sealed(b"nonsense"), "letter 2 .*no letter has fewer"),
    "a reason that is none": (
        sealed(encode_letter(letter(2)).replace(bytes([5, 2, 3, 0]), bytes([5, 9, 3, 0]), 1)),
        "the reason 9",
    ),
    "a priority that is none": (
        sealed(encode_letter(letter(2)).replace(bytes([5, 2, 3, 0]), bytes([11, 2, 3, 0]), 1)),
        "11 as its priority",
    ),
    "a byte too many": (sealed(encode_letter(letter(2)) + b"?"), "its parts take"),
    "a payload of four gigabytes": (
        sealed(struct.pack("<QQQQQBBHHIII", 0, 0, 0, 0, 0, 5, 1, 1, 0, 0, 0, 2**32 - 1) + b"x"),
        "4,294,967,295 bytes of payload",
    ),
    "a time that is none": (
        sealed(struct.pack("<QQQQQBBHHIII", 2**64 - 1, 0, 0, 0, 0, 5, 1, 1, 0, 0, 0, 0) + b"x"),
        "the number 18446744073709551615",
    ),
    "a lane that is no text": (
        sealed(struct.pack("<QQQQQBBHHIII", 0, 0, 0, 0, 0, 5, 1, 1, 0, 0, 0, 0) + b"\xff"),
        "letter 2 is not usable.*utf-8",
    ),
}


@pytest.mark.parametrize(("change", "finding"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_letter_is_told_copied_and_tried_again_and_the_others_stay(
    path: Path, change: Callable[[bytes], bytes], finding: str
) -> None:
    buried(path, 1, 2, 3)
    values: list[bytes] = []
    tamper(path, "letters", key_of(2), lambda value: values.append(change(value)) or values[0])  # type: ignore[func-returns-value]
    predicted = read_only(path)
    expected = predicted.load_letters(), predicted.load_given_up()
    predicted.close()
    state = opened(path)
    found, findings = state.load_letters()
    assert found == [letter(1), letter(3)]
    assert len(findings) == 1
    assert re.search(finding, findings[0])
    assert state.load_given_up() == (frozenset({1, 3}), []), "where the log still holds it, it is tried again"
    assert (state.load_letters(), state.load_given_up()) == expected
    assert state.load_checkpoint() == (checkpoint(1), [])
    (note,) = [note for value, note in copies(path).items() if value == values[0]]
    assert "dead letter 2" in note
    assert str(path) in note
    state.close()


def test_a_damaged_letter_is_a_finding_until_it_is_removed_or_replaced(path: Path) -> None:
    buried(path, 1, 2)
    for lsn in (1, 2):
        tamper(path, "letters", key_of(lsn), flip)
    for _ in range(2):
        state = opened(path)
        assert len(state.load_letters()[1]) == 2
        assert state.load_given_up()[0] == frozenset()
        state.close()
    state = opened(path)
    state.bury([letter(1)])
    state.unbury([2])
    for _ in range(2):
        assert state.load_letters() == ([letter(1)], [])
        assert state.load_given_up()[0] == {1, 2}
        state.close()
        state = opened(path)
    assert len(copies(path)) == 2
    state.close()


def test_a_value_under_a_key_that_is_no_lsn_is_a_finding(path: Path) -> None:
    buried(path, 1)
    for key in (b"x", bytes(8), b"\xff" * 8):
        plant(path, "letters", key, encode_letter(letter(2)))
    state = opened(path)
    found, findings = state.load_letters()
    assert found == [letter(1)]
    assert len(findings) == 3
    assert all(re.search("letter under b.*lane 'put'.*no LSN", finding) for finding in findings)
    assert state.load_given_up() == (frozenset({1}), [])
    assert len(copies(path)) == 3
    state.close()


def test_a_value_that_is_too_long_is_a_finding(path: Path) -> None:
    buried(path, 1)
    tamper(path, "letters", key_of(2), lambda _: bytes(letters.TABLE.value_bytes_max + 1))
    state = opened(path)
    found, findings = state.load_letters()
    assert found == [letter(1)]
    assert "no value of ours is that long" in findings[0]
    state.close()


def test_many_damaged_letters_are_told_in_short_and_copied_all(path: Path) -> None:
    buried(path, *range(1, 131))
    for lsn in range(1, 130):
        tamper(path, "letters", key_of(lsn), flip)
    state = opened(path)
    found, findings = state.load_letters()
    state.close()
    assert found == [letter(130)]
    assert len(findings) == 101
    assert findings[-1] == "and 29 more values like these"
    assert len(copies(path)) == 129


def test_two_damaged_values_with_equal_sums_are_both_copied(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    buried(path, 1, 2)
    for lsn in (1, 2):
        tamper(path, "letters", key_of(lsn), flip)
    monkeypatch.setattr("walbatch.storage.statefolder.crc32c", lambda *_: 7)
    for _ in range(2):
        opened(path).close()
    assert len(copies(path)) == 2
    assert {path.name for path in (path.parent / "quarantine").iterdir()} == {
        f"state-value-00000007{suffix}" for suffix in (".bytes", ".note", "-2.bytes", "-2.note")
    }


def test_a_copy_that_a_crash_cut_off_is_made_again(path: Path) -> None:
    buried(path, 1)
    values: list[bytes] = []
    tamper(path, "letters", key_of(1), lambda value: values.append(flip(value)) or values[0])  # type: ignore[func-returns-value]
    opened(path).close()
    folder = path.parent / "quarantine"
    (copy,) = folder.glob("*.bytes")
    copy.write_bytes(values[0][:10])
    opened(path).close()
    assert values[0] in {found.read_bytes() for found in folder.glob("*.bytes")}


def test_a_lost_file_is_told_to_have_held_letters(path: Path) -> None:
    buried(path, 1)
    with (path / "data.mdb").open("r+b") as file:
        file.write(b"\xa5" * 8192)
    state = opened(path)
    (finding,) = state.load_checkpoint()[1]
    assert "dead letters that it held are in the copy only" in finding
    assert state.load_letters() == ([], [])
    state.close()
    (copy,) = (path.parent / "quarantine").glob("*.data.mdb")
    assert b"payload of 1" in copy.read_bytes()


def test_a_newer_letter_is_refused_and_nothing_is_changed(path: Path) -> None:
    buried(path, 1, 2)
    tamper(path, "letters", key_of(1), flip)
    covered = struct.pack("<4sI16s", envelope.MAGIC, 2, STORE) + b"whatever comes"
    value = covered + struct.pack("<I", crc32c(covered, crc32c(key_of(2), 0)))
    tamper(path, "letters", key_of(2), lambda _: value)
    before = (path / "data.mdb").read_bytes()
    with pytest.raises(UnsupportedFormat, match=r"version 2.*upgrade"):
        opened(path)
    assert (path / "data.mdb").read_bytes() == before
    assert not (path.parent / "quarantine").exists()


@pytest.mark.parametrize("kind", ["bit in the heads of pages", "bit anywhere", "page"])
def test_no_damaged_file_makes_a_letter_vanish_without_a_word(tmp_path: Path, kind: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.storage.letter_probe", str(tmp_path), kind, "1", "60"],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)
    assert sum(outcomes.values()) >= 60
    assert outcomes.get("reported", 0) > 0
    assert outcomes.keys() <= {"sound", "reported", "stale"}


# --- bounds --------------------------------------------------------------------------------------------------------


def test_at_its_bound_no_letter_is_kept_and_after_a_removal_one_is(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(letters, "BYTES_MAX", 4 * LETTER_BYTES - 1)
    state = opened(path)
    state.bury([letter(1), letter(2), letter(3)])
    with pytest.raises(StorageError, match="as many dead letters as it may") as caught:
        state.bury([letter(4)])
    assert caught.value.errno == errno.ENOSPC
    assert state.load_given_up()[0] == {1, 2, 3}
    state.unbury([2])
    state.bury([letter(4)])
    state.close()
    state = opened(path)
    assert [found.lsn for found in state.load_letters()[0]] == [1, 3, 4]
    with pytest.raises(StorageError, match="as many"):
        state.bury([letter(5)])
    state.close()


def test_more_letters_than_may_be_are_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    buried(path, 1, 2, 3)
    monkeypatch.setattr(letters, "BYTES_MAX", 3 * LETTER_BYTES - 1)
    state = read_only(path)
    found, findings = state.load_letters()
    assert [one.lsn for one in found] == [1, 2]
    assert findings == [f"the dead letters take more than {3 * LETTER_BYTES - 1} bytes: the rest is ignored"]
    state.close()


def test_many_letters_are_removed_in_portions(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(letters, "REMOVED_AT_ONCE", 3)
    buried(path, *range(1, 12))
    state = opened(path)
    state.unbury(range(2, 12))
    assert state.load_letters()[0] == [letter(1)]
    state.close()


# Situation: a letter that no reader would accept.
UNFIT: dict[str, DeadLetter] = {
    "no lane": letter(1, lane=""),
    "a lane that is too long": letter(1, lane="x" * 65),
    "a key that is too long": letter(1, key=bytes(limits.KEY_BYTES_MAX + 1)),
    "a payload that is too long": letter(1, payload=bytes(limits.PAYLOAD_BYTES_MAX + 1)),
    "an idempotency key that is too long": letter(1, options=Options(idempotency_key=bytes(257))),
    "a priority of 11": letter(1, priority=11),
    "a negative time": letter(1, died_wall_ns=-1),
    "an LSN of 0": letter(0),
}


@pytest.mark.parametrize("unfit", UNFIT.values(), ids=UNFIT.keys())
def test_a_letter_that_could_not_be_read_back_is_not_written(path: Path, unfit: DeadLetter) -> None:
    state = opened(path)
    with pytest.raises(StorageError, match="cannot be stored"):
        state.bury([letter(5), unfit])
    assert state.load_letters() == ([], [])
    state.bury([letter(5)])
    assert state.load_letters() == ([letter(5)], [])
    state.close()


# --- any bytes -----------------------------------------------------------------------------------------------------

NUMBERS = st.integers(0, limits.LSN_MAX)
LETTERS = st.builds(
    DeadLetter,
    lsn=st.integers(1, limits.LSN_MAX),
    lane=st.text(min_size=1, max_size=16),
    key=st.binary(max_size=40),
    payload=st.binary(max_size=80),
    priority=st.integers(0, 10),
    options=st.builds(
        Options,
        not_before_ns=NUMBERS,
        deadline_ns=NUMBERS,
        origin=NUMBERS,
        idempotency_key=st.binary(max_size=20),
    ),
    reason=st.sampled_from(DeathReason),
    error=st.text(max_size=40),
    attempts=NUMBERS,
    died_wall_ns=NUMBERS,
)


@given(LETTERS)
def test_a_letter_comes_back_as_it_was(value: DeadLetter) -> None:
    assert decode_letter(key_of(value.lsn), encode_letter(value)) == value


@given(LETTERS, st.data())
def test_changed_bytes_give_a_letter_or_a_value_error(value: DeadLetter, data: st.DataObject) -> None:
    body = bytearray(encode_letter(value))
    for _ in range(data.draw(st.integers(1, 5))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    try:
        changed = decode_letter(key_of(value.lsn), bytes(body[: data.draw(st.integers(0, len(body)))]))
    except ValueError:
        return
    assert decode_letter(key_of(value.lsn), encode_letter(changed)) == changed


@given(st.binary(max_size=12), st.binary(max_size=120))
def test_any_bytes_give_a_letter_or_a_value_error(key: bytes, body: bytes) -> None:
    try:
        found = decode_letter(key, body)
    except ValueError:
        return
    assert key == key_of(found.lsn)


# --- failing disks and crashes -------------------------------------------------------------------------------------


def test_on_a_full_disk_a_burial_can_be_made_again_and_leaves_room_for_the_checkpoint(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    state = opened(path)
    state.save_checkpoint(checkpoint(1))
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        kept = 0
        with pytest.raises(StorageError, match="make room") as caught:  # noqa: PT012 - the first that fails
            while kept < 1_000:
                state.bury([letter(kept + 1, payload=bytes(20_000))])
                kept += 1
        assert caught.value.errno == errno.ENOSPC
        with pytest.raises(StorageError, match="make room"):
            state.cancel([5_000])
        for generation in range(2, 40):
            state.save_checkpoint(checkpoint(generation))
    assert state.load_given_up()[0] == set(range(1, kept + 1))
    state.bury([letter(kept + 1)])
    state.close()
    state = opened(path)
    assert len(state.load_letters()[0]) == kept + 1
    state.close()


def test_after_any_other_failure_nothing_is_saved_any_more(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    state = opened(path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", broken)
        with pytest.raises(StorageError, match="check the disk"):
            state.bury([letter(1, payload=bytes(10**7))])
    with pytest.raises(StorageError, match="check the disk"):
        state.cancel([1])
    with pytest.raises(StorageError, match="check the disk"):
        state.save_checkpoint(checkpoint(1))
    state.close()
    state = opened(path)
    assert state.load_given_up() == (frozenset(), [])
    state.close()


BURY_FOR_EVER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from tests.storage.states import letter, opened
state = opened(Path(sys.argv[1]))
lsn = max((found.lsn for found in state.load_letters()[0]), default=0)
while True:
    lsn += 1
    state.bury([letter(lsn), letter(100_000 + lsn)])
    state.unbury([100_000 + lsn])
    print(lsn, flush=True)
"""


def test_a_letter_survives_kill_9_whole_and_with_its_lsn_given_up(path: Path) -> None:
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", BURY_FOR_EVER, str(path), str(ROOT)],
            env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stdout is not None
        for _ in range(20):
            acknowledged = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        acknowledged = max([acknowledged, *map(int, process.stdout.read().split("\n")[:-1])])
        process.stdout.close()
        process.wait()
        state = read_only(path)
        found, findings = state.load_letters()
        given_up, _ = state.load_given_up()
        state.close()
        first = [one for one in found if one.lsn < 100_000]
        assert findings == []
        assert [one.lsn for one in first] == [*range(1, len(first) + 1)]
        assert acknowledged <= len(first) <= acknowledged + 1
        assert all(one == letter(one.lsn) for one in found)
        assert len(found) - len(first) <= 1
        assert given_up == {*range(1, len(first) + 1), *range(100_001, 100_001 + len(first))}
        state = opened(path)
        state.unbury([one.lsn for one in found if one.lsn > 100_000])
        state.close()


# --- beside others -------------------------------------------------------------------------------------------------


def test_letters_of_a_live_state_can_be_read_in_the_same_process(path: Path) -> None:
    state = opened(path)
    state.bury([letter(1)])
    reader = LmdbState.open(str(path), STORE, readonly=True, shared=True)
    assert reader.load_letters() == ([letter(1)], [])
    state.bury([letter(2)])
    state.unbury([1])
    assert reader.load_letters() == ([letter(2)], [])
    assert reader.load_given_up() == (frozenset({1, 2}), [])
    with pytest.raises(EngineClosed, match="borrowed"):
        reader.bury([letter(3)])
    reader.close()
    state.close()


def test_a_closed_state_tells_nothing(path: Path) -> None:
    state = opened(path)
    state.bury([letter(1)])
    state.close()
    for call in (state.load_letters, state.load_given_up, state.load_keys, state.load_checkpoint):
        with pytest.raises(EngineClosed, match="closed"):
            call()


def test_a_store_that_is_not_there_has_no_letters(path: Path) -> None:
    state = read_only(path)
    assert state.load_letters() == ([], [])
    assert state.load_given_up() == (frozenset(), [])
    state.close()
