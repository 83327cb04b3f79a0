"""The table of a lane whose backend is another one: a test for each row, and all combinations."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest

from walbatch.core.moving import Move, MoveFacts, decide_move

A, B, CODE = "lmdb:///a", "lmdb:///b", "python:app:deliver"
WORST = MoveFacts(
    has_backend=True,
    remembered=A,
    present=B,
    moved_from=None,
    pending=1,
    is_transactional=True,
    holds_marks=False,
    is_behind=False,
)
ROWS: dict[str, tuple[dict[str, Any], Move]] = {
    "M1": ({"has_backend": False, "present": None}, Move.GO_ON),
    "M2": ({"remembered": None}, Move.GO_ON),
    "M3": ({"present": A}, Move.GO_ON),
    "M4": ({"remembered": CODE}, Move.GO_ON),
    "M5": ({"pending": 0}, Move.GO_ON),
    "M6": ({"moved_from": A}, Move.SAY_SO),
    "M7": ({"holds_marks": True}, Move.SAY_SO),
    "M8": ({}, Move.REFUSE),
    "M10": ({"remembered": None, "is_behind": True}, Move.SAY_SO),
    "M8, with older marks": ({"holds_marks": True, "is_behind": True}, Move.REFUSE),
    "M9": ({"is_transactional": False}, Move.SAY_SO),
}


@pytest.mark.parametrize("case", ROWS)
def test_each_row_is_what_its_own_fact_makes_of_the_worst_case(case: str) -> None:
    changes, move = ROWS[case]
    decision = decide_move(replace(WORST, **changes))
    assert (decision.case, decision.move) == (case.partition(",")[0], move)


def test_only_a_place_that_promises_exactly_once_and_does_not_know_what_is_settled_is_refused() -> None:
    seen = set()
    for backend, remembered, present, moved_from, pending, transactional, marks, behind in itertools.product(
        (True, False),
        (None, A, CODE),
        (None, A, B),
        (None, A, B),
        (0, 3),
        (True, False),
        (True, False),
        (True, False),
    ):
        facts = MoveFacts(
            has_backend=backend, remembered=remembered, present=present, moved_from=moved_from, pending=pending,
            is_transactional=transactional, holds_marks=marks, is_behind=behind,
        )  # fmt: skip
        decision = decide_move(facts)
        seen.add(decision.case)
        moves = remembered == A and A not in {present, moved_from}
        refused = backend and moves and pending > 0 and transactional and (behind or not marks)
        assert (decision.move is Move.REFUSE) == refused, facts
    assert seen == {case.partition(",")[0] for case in ROWS}


def test_more_pending_operations_than_there_are_change_nothing_where_it_goes_on() -> None:
    for facts in (replace(WORST, **changes) for changes, _ in ROWS.values()):
        many, none = decide_move(replace(facts, pending=9)), decide_move(replace(facts, pending=0))
        assert many.move is not Move.GO_ON or none.move is Move.GO_ON
