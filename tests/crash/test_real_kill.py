"""kill -9 through the public API, with several threads, and the judge that compares what is left with what was promised."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import pytest

from tools.modes import kill
from tools.modes.judge import EXCUSED_S, Judge
from tools.modes.tally import Job
from tools.modes.worker import key_at, name_of, payload_of

NAME: Final = "0.0.0"
OTHER: Final = "0.0.1"
KEY: Final = key_at(NAME).decode()


def test_no_kill_loses_invents_repeats_or_reorders_anything(tmp_path: Path) -> None:
    tally = kill.run(Job(seed=7, count=60, scratch=tmp_path), lambda _: None)
    assert not tally.failures, tally.failures[0]
    assert tally.complete
    assert tally.figures["cycles"] == 60
    assert tally.figures["full checks"] == 3
    assert tally.figures["kills before recovery was done"] > 0, "some kills must fall into recovery"
    assert tally.figures["acknowledged operations"] > 100


def test_a_replay_does_the_round_of_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kill, "REPLAYS", 1)
    monkeypatch.setattr(kill, "ROUND_CYCLES", 2)
    assert kill.replay("kill seed=7 part=0 round=0", tmp_path) == []


# --- the judge ----------------------------------------------------------------------------------------------------------


def judge_of(*said: list[Any], durability: str = "sync") -> Judge:
    judge = Judge(durability={"once": durability, "least": durability})
    judge.begin()
    for fields in said:
        judge.hear(0, fields)
    return judge


SUBMIT: Final = ["submit", "once", 0, 0, 2]
GIVEN_AT: Final = 1_000.0
ACK: Final = ["ack", "once", 0, 0, 2, 1, GIVEN_AT]
WHOLE: Final = [(f"n:{NAME}", "1 1"), (f"n:{OTHER}", "1 2")]


def test_what_was_acknowledged_and_took_effect_once_is_right() -> None:
    assert judge_of(SUBMIT, ACK).check(WHOLE) == []


def test_what_was_submitted_and_not_acknowledged_may_be_there_or_not() -> None:
    assert judge_of(SUBMIT).check(WHOLE) == []
    assert judge_of(SUBMIT).check([]) == []


@pytest.mark.parametrize(
    ("said", "found", "problem"),
    [
        ([SUBMIT, ACK], WHOLE[:1], "LOST from lane once"),
        ([SUBMIT, ACK], [*WHOLE[:1], (f"n:{OTHER}", "2 2")], "took effect 2 times"),
        ([SUBMIT, ACK], [*WHOLE, ("n:0.0.2", "1 3")], "invented"),
        ([SUBMIT, ACK], [*WHOLE, ("wrong", "lsn 2 after lsn 3")], "wrong in LMDB"),
        ([SUBMIT, ACK], [*WHOLE[:1], (f"n:{OTHER}", "1 7")], "other LSNs"),
        ([SUBMIT], [*WHOLE[:1], (f"n:{OTHER}", "1 1")], "names two operations"),
        ([SUBMIT, ["refused", "once", 0, 0, 2, "Overloaded"]], WHOLE, "refused, and applied"),
        ([SUBMIT, ["applied", [[1, KEY, ""]]]], [], "invented"),
        ([SUBMIT, ["applied", [[1, KEY, "0.0.5"]]]], [], "invented"),
        ([SUBMIT, ["applied", [[1, KEY, NAME], [2, KEY, NAME]]]], [], "two LSNs"),
        ([SUBMIT, ["applied", [[2, KEY, NAME], [1, KEY, OTHER]]]], [], "first applied after"),
        ([SUBMIT, ["applied", [[1, KEY, NAME]]]], WHOLE, "both lanes"),
        ([["crash", "ValueError"]], [], "a worker broke"),
    ],
)  # fmt: skip
def test_the_judge_says_what_is_wrong(
    said: list[list[Any]], found: list[tuple[str, str]], problem: str
) -> None:
    assert any(problem in text for text in judge_of(*said).check(found))


def test_a_power_cut_may_take_what_a_lane_syncs_later_until_a_recovery_has_shown_it() -> None:
    taken = judge_of(SUBMIT, ACK, durability="interval")
    taken.end(power=True, at=GIVEN_AT + EXCUSED_S / 2)
    assert taken.check([]) == []
    killed = judge_of(SUBMIT, ACK, durability="interval")
    killed.end(power=False, at=GIVEN_AT)
    assert any("LOST" in problem for problem in killed.check([]))
    shown = judge_of(SUBMIT, ACK, ["ready", GIVEN_AT], durability="interval")
    shown.end(power=True, at=GIVEN_AT)
    assert any("LOST" in problem for problem in shown.check([]))


def test_a_power_cut_may_not_take_what_was_acknowledged_longer_ago_than_its_interval() -> None:
    judge = judge_of(SUBMIT, ACK, durability="interval")
    judge.end(power=True, at=GIVEN_AT + 2 * EXCUSED_S)
    assert any("LOST from lane once" in problem for problem in judge.check([]))
    assert judge.figures["acknowledged longer ago than their interval at a cut"] == 2
    assert judge.figures["acknowledged within their interval, lost or not"] == 0


def test_what_a_kill_left_unsynced_grows_no_older_until_the_power_cut() -> None:
    young = judge_of(SUBMIT, ACK, durability="interval")
    young.end(power=False, at=GIVEN_AT)
    young.end(power=True, at=GIVEN_AT + 2 * EXCUSED_S)
    assert young.check([]) == []
    assert young.figures["acknowledged within their interval, lost or not"] == 2
    old = judge_of(SUBMIT, ACK, durability="interval")
    old.end(power=False, at=GIVEN_AT + 2 * EXCUSED_S)
    old.end(power=True, at=GIVEN_AT + 3 * EXCUSED_S)
    assert any("LOST" in problem for problem in old.check([]))


def test_a_payload_says_which_operation_it_is_and_nothing_else_passes() -> None:
    payload = payload_of(NAME, "once", 300)
    key = key_at(NAME)
    assert name_of("once", key, payload) == NAME
    assert name_of("least", key, payload) == ""
    assert name_of("once", b"other", payload) == ""
    assert name_of("once", key, payload + b"\0") == ""
    assert name_of("once", key, b"") == ""
