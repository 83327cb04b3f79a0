"""Recovery: the decision table row by row and as a whole, and what holds for every plan."""

from __future__ import annotations

import itertools
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.core.segments import STORE, Placed, Segment, flipped, scan, segment_header, zeroed
from walbatch import limits
from walbatch.core.frame import (
    EMPTY_BODY,
    SECTOR,
    SEGMENT_COMPACTED,
    Body,
    Codec,
    FrameHeader,
    FrameIndex,
    FrameType,
    HeaderState,
    SegmentHeader,
)
from walbatch.core.recovery import (
    SEGMENT_ROWS,
    Decision,
    IdentityState,
    Plan,
    SegmentFacts,
    SegmentView,
    Severity,
    StoreFacts,
    TornTail,
    decide_segment,
    make_plan,
    settled_before,
    superseded_numbers,
    view_segment,
)
from walbatch.core.scanner import Damage, SegmentScan, UnprovenFrame
from walbatch.types import Checkpoint

OTHER_STORE = STORE[::-1]

# --- facts, with what a test does not care about filled in --------------------------------------------------


def frame(first_lsn: int, span: int = 1, *, offset: int = SECTOR) -> UnprovenFrame:
    """A frame of operations without proof."""
    header = FrameHeader(
        type=FrameType.OPERATIONS,
        codec=Codec.RAW,
        flags=0,
        first_lsn=first_lsn,
        synced_lsn=0,
        count=span,
        stored_bytes=0,
        raw_bytes=0,
        body_crc=0,
        span=span,
        wall_ns=0,
    )
    return UnprovenFrame(offset=offset, header=header)


def torn(*, evidence_lsn: int = 0, seen_lsn: int = 0) -> Damage:
    return Damage(
        offset=1024, end=1500, reason="no magic", evidence_lsn=evidence_lsn, seen_lsn=seen_lsn, resume_lsn=0
    )


def scanned(
    last_lsn: int,
    *,
    operations: int = 0,
    clean: bool = False,
    unproven: Sequence[UnprovenFrame] = (),
    damage: Damage | None = None,
) -> SegmentScan:
    proven = unproven[0].header.first_lsn - 1 if unproven else last_lsn
    return SegmentScan(
        end_offset=1024,
        last_lsn=last_lsn,
        proven_lsn=proven,
        frames=1,
        operations=operations,
        sealed=False,
        clean=clean,
        lost=0,
        unproven=tuple(unproven),
        damage=damage,
    )


def footer_of(last_lsn: int, operations: int = 0) -> FrameIndex:
    return FrameIndex(
        last_lsn=last_lsn,
        operation_count=operations,
        kinds=(),
        offsets=[],
        first_lsns=array("Q"),
        priorities=array("B"),
        counts=array("I"),
    )


def file_of(
    header: SegmentHeader | None,
    scan_: SegmentScan | None = None,
    *,
    number: int | None = None,
    state: HeaderState = HeaderState.VALID,
    footer: FrameIndex | None = None,
) -> SegmentFacts:
    if number is None:
        assert header is not None
        number = header.number
    return SegmentFacts(number=number, file_bytes=4096, state=state, header=header, footer=footer, scan=scan_)


FIRST = segment_header(number=1)
SECOND = segment_header(number=2, prev_last_lsn=10, operations_before=10)
SEALED = file_of(FIRST, footer=footer_of(10, 10))
CLEAN = file_of(SECOND, scanned(20, operations=10, clean=True))
INTACT = file_of(SECOND, scanned(20, operations=10))


def checkpoint_of(
    watermark: int, *, durable_lsn: int | None = None, segment: int = 1, settled_count: int = 0
) -> Checkpoint:
    return Checkpoint(
        generation=1,
        epoch=1,
        watermark=watermark,
        durable_lsn=watermark if durable_lsn is None else durable_lsn,
        segment=segment,
        settled_count=settled_count,
    )


def store_of(
    *segments: SegmentFacts,
    checkpoint: Checkpoint | None = None,
    identity: IdentityState = IdentityState.VALID,
    findings: Sequence[str] = (),
    dropped: Checkpoint | None = None,
) -> StoreFacts:
    return StoreFacts(
        identity=identity,
        store=STORE,
        segments=segments,
        checkpoint=checkpoint,
        state_findings=tuple(findings),
        dropped=dropped,
    )


# --- the table of a segment, row by row ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    label: str
    facts: StoreFacts
    segment: int = 2
    """The segment that the row speaks of."""
    offset: int = 0
    lsns: tuple[int | None, int | None] = (None, None)


ZERO = checkpoint_of(0)

SITUATIONS = {
    "W1: settled, although its header is damaged": Situation(
        label="W1",
        facts=store_of(
            file_of(None, number=1, state=HeaderState.BAD_CRC), CLEAN, checkpoint=checkpoint_of(10)
        ),
        segment=1,
    ),
    "W1: settled, although the one before it is missing": Situation(
        label="W1",
        facts=store_of(
            file_of(SECOND, number=2),
            file_of(segment_header(number=3, prev_last_lsn=20), scanned(20, clean=True)),
            checkpoint=checkpoint_of(20),
        ),
    ),
    "W2: newer": Situation(
        label="W2",
        facts=store_of(SEALED, file_of(None, number=2, state=HeaderState.NEWER_VERSION), checkpoint=ZERO),
    ),
    "W3: damaged header": Situation(
        label="W3",
        facts=store_of(SEALED, file_of(None, number=2, state=HeaderState.BAD_CRC), checkpoint=ZERO),
    ),
    "W3: empty file": Situation(
        label="W3", facts=store_of(SEALED, file_of(None, number=2, state=HeaderState.SHORT), checkpoint=ZERO)
    ),
    "W3: another store": Situation(
        label="W3",
        facts=store_of(
            SEALED, file_of(replace(SECOND, store=OTHER_STORE), scanned(20, clean=True)), checkpoint=ZERO
        ),
    ),
    "W3: another segment under its name": Situation(
        label="W3",
        facts=store_of(SEALED, file_of(SECOND, scanned(20, clean=True), number=7), checkpoint=ZERO),
        segment=7,
    ),
    "W4: the middle is missing": Situation(
        label="W4",
        facts=store_of(
            SEALED, file_of(segment_header(number=3, prev_last_lsn=20), scanned(30)), checkpoint=ZERO
        ),
        segment=3,
        lsns=(11, 20),
    ),
    "W4: the beginning is missing": Situation(
        label="W4", facts=store_of(CLEAN, checkpoint=checkpoint_of(9)), lsns=(None, 10)
    ),
    "W4: the one before it is another one": Situation(
        label="W4",
        facts=store_of(
            file_of(replace(FIRST, salt=99), footer=footer_of(10)), CLEAN, checkpoint=checkpoint_of(9)
        ),
    ),
    "W6: cut below what the next one proves": Situation(
        label="W6",
        facts=store_of(file_of(FIRST, scanned(7)), CLEAN, checkpoint=ZERO),
        segment=1,
        offset=1024,
        lsns=(8, 10),
    ),
    "W6: damaged below what the next one proves": Situation(
        label="W6",
        facts=store_of(file_of(FIRST, scanned(7, damage=torn())), CLEAN, checkpoint=ZERO),
        segment=1,
        offset=1024,
        lsns=(8, 10),
    ),
    "W7: a later header proves the damaged bytes": Situation(
        label="W7",
        facts=store_of(SEALED, file_of(SECOND, scanned(15, damage=torn(evidence_lsn=16))), checkpoint=ZERO),
        offset=1024,
        lsns=(16, 16),
    ),
    "W7: the checkpoint proves the damaged bytes": Situation(
        label="W7",
        facts=store_of(
            SEALED,
            file_of(SECOND, scanned(15, damage=torn())),
            checkpoint=checkpoint_of(0, durable_lsn=18),
        ),
        offset=1024,
        lsns=(16, 18),
    ),
    "W7: wal/dropped proves the damaged bytes": Situation(
        label="W7",
        facts=store_of(
            SEALED, file_of(SECOND, scanned(15, damage=torn())), dropped=checkpoint_of(0, durable_lsn=18)
        ),
        offset=1024,
        lsns=(16, 18),
    ),
    "W8: the end is cut off below the checkpoint": Situation(
        label="W8",
        facts=store_of(SEALED, INTACT, checkpoint=checkpoint_of(0, durable_lsn=21)),
        offset=1024,
        lsns=(21, 21),
    ),
    "W8: the end is cut off below what is settled": Situation(
        label="W8",
        facts=store_of(SEALED, INTACT, checkpoint=checkpoint_of(25, durable_lsn=0)),
        offset=1024,
        lsns=(21, 25),
    ),
    "W8: the last segment is missing, and the checkpoint knew it": Situation(
        label="W8",
        facts=store_of(SEALED, CLEAN, checkpoint=checkpoint_of(0, durable_lsn=20, segment=3)),
        offset=1024,
        lsns=(21, 21),
    ),
    "W8: the end is cut off below wal/dropped": Situation(
        label="W8",
        facts=store_of(SEALED, CLEAN, dropped=checkpoint_of(0, durable_lsn=21)),
        offset=1024,
        lsns=(21, 21),
    ),
    "W8: the end is cut off below wal/dropped, which is newer than the checkpoint": Situation(
        label="W8",
        facts=store_of(SEALED, CLEAN, checkpoint=checkpoint_of(5), dropped=checkpoint_of(23, durable_lsn=0)),
        offset=1024,
        lsns=(21, 23),
    ),
    "W8: the last segment is missing, and wal/dropped knew it": Situation(
        label="W8",
        facts=store_of(SEALED, CLEAN, checkpoint=ZERO, dropped=checkpoint_of(0, durable_lsn=20, segment=3)),
        offset=1024,
        lsns=(21, 21),
    ),
    "W9: torn": Situation(
        label="W9",
        facts=store_of(SEALED, file_of(SECOND, scanned(15, damage=torn(evidence_lsn=15))), checkpoint=ZERO),
        offset=1024,
        lsns=(16, None),
    ),
    "W9: torn behind the stamp of a clean close": Situation(
        label="W9",
        facts=store_of(SEALED, file_of(SECOND, scanned(15, clean=True, damage=torn())), checkpoint=ZERO),
        offset=1024,
        lsns=(16, None),
    ),
    "W10: clean": Situation(label="W10", facts=store_of(SEALED, CLEAN, checkpoint=ZERO)),
    "W11: not clean": Situation(label="W11", facts=store_of(SEALED, INTACT, checkpoint=ZERO)),
}

SEVERITY = {
    Decision.IGNORE: Severity.FINE,
    Decision.USE: Severity.FINE,
    Decision.CONTINUE: Severity.FINE,
    Decision.COPY: Severity.FINE,
    Decision.QUARANTINE: Severity.NOTE,
    Decision.NEWER: Severity.REFUSE_NEWER,
    Decision.CORRUPT: Severity.REFUSE,
}
ROWS = {row.label: row for row in SEGMENT_ROWS}


@pytest.mark.parametrize("situation", SITUATIONS.values(), ids=SITUATIONS.keys())
def test_a_segment_falls_under_row(situation: Situation) -> None:
    plan = make_plan(situation.facts)
    case = next(case for case in plan.cases if case.segment == situation.segment)
    row = ROWS[situation.label]
    assert (case.label, case.severity) == (row.label, SEVERITY[row.decision])
    assert case.is_noteworthy == (case.severity is not Severity.FINE)
    assert case.message.startswith(row.situation)
    assert (case.offset, (case.first_lsn, case.last_lsn)) == (situation.offset, situation.lsns)
    assert plan.refusal == (case if case.severity >= Severity.REFUSE_NEWER else None)


def test_every_row_has_a_situation() -> None:
    assert {situation.label for situation in SITUATIONS.values()} | {"W5"} == set(ROWS)


def test_a_segment_of_row_w5_is_used_without_a_word() -> None:
    facts = store_of(SEALED, CLEAN, checkpoint=ZERO)
    assert decide_segment(view_segment(facts, 0)).label == "W5"
    assert [case.segment for case in make_plan(facts).cases] == [2]


def test_a_damaged_header_says_what_it_is() -> None:
    plan = make_plan(SITUATIONS["W3: empty file"].facts)
    assert plan.refusal is not None
    assert "(short)" in plan.refusal.message


# --- the table of a segment, as a whole ---------------------------------------------------------------------

FACTS = [field.name for field in fields(SegmentView)]
VIEWS = [
    SegmentView(**dict(zip(FACTS, values, strict=True)))
    for values in itertools.product([False, True], repeat=len(FACTS))
]


def test_every_combination_is_decided_by_exactly_the_first_row_that_applies() -> None:
    for view in VIEWS:
        row = decide_segment(view)
        assert row.applies(view)
        assert not any(earlier.applies(view) for earlier in SEGMENT_ROWS[: SEGMENT_ROWS.index(row)])


def test_every_row_decides_some_combination() -> None:
    decided = Counter(decide_segment(view).label for view in VIEWS)
    # Of 512: half are settled, half of the rest newer, ...
    assert decided == {
        "W1": 256, "W2": 128, "W3": 64, "W4": 32, "W5": 8, "W6": 8, "W7": 4, "W8": 6, "W9": 2, "W10": 2, "W11": 2,
    }  # fmt: skip


def test_labels_are_in_order_and_unique() -> None:
    assert [row.label for row in SEGMENT_ROWS] == [f"W{number}" for number in range(1, 12)]


GOES_ON = {Decision.USE, Decision.CONTINUE, Decision.COPY, Decision.QUARANTINE}

RULES: dict[str, tuple[Callable[[SegmentView], bool], Callable[[Decision], bool]]] = {
    "what is settled is never an obstacle": (lambda v: v.settled, lambda d: d is Decision.IGNORE),
    "nothing but what is settled is ignored": (lambda v: not v.settled, lambda d: d is not Decision.IGNORE),
    "an unreadable header is never used": (
        lambda v: not v.settled and not v.readable,
        lambda d: d not in GOES_ON,
    ),
    "a broken chain is never used": (lambda v: not v.settled and not v.chained, lambda d: d not in GOES_ON),
    "an end that is missing is never accepted": (
        lambda v: not v.settled and not v.complete,
        lambda d: d not in GOES_ON,
    ),
    "damage with evidence at the end is never used": (
        lambda v: not v.settled and v.last and v.damaged and v.evidence,
        lambda d: d not in GOES_ON,
    ),
    "damage at the end is never passed over": (
        lambda v: not v.settled and v.last and v.damaged,
        lambda d: d in {Decision.NEWER, Decision.CORRUPT, Decision.QUARANTINE},
    ),
    "a newer format is never called corrupt": (
        lambda v: not v.settled and v.newer,
        lambda d: d is Decision.NEWER,
    ),
    "only the last segment is copied, continued or put into quarantine": (
        lambda v: not v.last,
        lambda d: d not in {Decision.COPY, Decision.CONTINUE, Decision.QUARANTINE},
    ),
    "a torn tail alone is never refused": (
        lambda v: (
            not v.settled
            and not v.newer
            and v.readable
            and v.chained
            and v.last
            and v.complete
            and not v.evidence
        ),
        lambda d: d in GOES_ON,
    ),
}


@pytest.mark.parametrize(("concerns", "permits"), RULES.values(), ids=RULES.keys())
def test_in_every_combination(
    concerns: Callable[[SegmentView], bool], permits: Callable[[Decision], bool]
) -> None:
    concerned = [view for view in VIEWS if concerns(view)]
    assert concerned
    for view in concerned:
        assert permits(decide_segment(view).decision), view


# --- the rows about the whole store -------------------------------------------------------------------------

STORE_SITUATIONS = {
    "S1: identity missing, but there are segments": (
        store_of(SEALED, CLEAN, identity=IdentityState.MISSING), "S1", Severity.REFUSE,
    ),
    "S1: identity missing, but there is a checkpoint": (
        store_of(checkpoint=ZERO, identity=IdentityState.MISSING), "S1", Severity.REFUSE,
    ),
    "S2: identity damaged": (store_of(identity=IdentityState.DAMAGED), "S2", Severity.REFUSE),
    "S3: identity newer": (store_of(SEALED, CLEAN, identity=IdentityState.NEWER), "S3", Severity.REFUSE_NEWER),
    "S4: the log is gone": (store_of(checkpoint=ZERO), "S4", Severity.REFUSE),
    "S4: the log is gone, and state/ with it, but not wal/dropped": (store_of(dropped=ZERO), "S4", Severity.REFUSE),
    "S1: identity missing, but there is wal/dropped": (
        store_of(dropped=ZERO, identity=IdentityState.MISSING), "S1", Severity.REFUSE,
    ),
    "S5: new": (store_of(), "S5", Severity.FINE),
    "S5: new, without identity yet": (store_of(identity=IdentityState.MISSING), "S5", Severity.FINE),
    "S6: state is damaged": (store_of(SEALED, CLEAN, findings=["bad page"]), "S6", Severity.NOTE),
    "S4: the log is gone, and state damaged": (store_of(findings=["bad page"]), "S4", Severity.REFUSE),
    "S7: no checkpoint": (store_of(SEALED, CLEAN), "S7", Severity.NOTE),
    "S8: LSNs are used up": (
        store_of(file_of(FIRST, scanned(limits.LSN_MAX - 10, clean=True)), checkpoint=ZERO), "S8", Severity.REFUSE,
    ),
    "S7: no checkpoint, and the beginning trimmed": (store_of(CLEAN), "S7", Severity.NOTE),
    "S10: compacted, and nothing says under which marks": (
        store_of(file_of(replace(FIRST, flags=SEGMENT_COMPACTED), footer=footer_of(10, 3)), CLEAN), "S10", Severity.NOTE,
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("facts", "label", "severity"), STORE_SITUATIONS.values(), ids=STORE_SITUATIONS.keys()
)
def test_a_store_falls_under_row(facts: StoreFacts, label: str, severity: Severity) -> None:
    plan = make_plan(facts)
    case = next(case for case in plan.cases if case.label == label)
    assert (case.severity, case.segment) == (severity, None)
    assert plan.refusal == (case if severity >= Severity.REFUSE_NEWER else None)


def test_every_row_about_the_store_has_a_situation() -> None:
    assert {label for _, label, _ in STORE_SITUATIONS.values()} | {"S9"} == {
        f"S{number}" for number in range(1, 11)
    }


@pytest.mark.parametrize("known", ["by the checkpoint", "by wal/dropped", "nothing was compacted"])
def test_what_compactions_dropped_under_is_missed_only_where_nothing_tells_it(known: str) -> None:
    first = FIRST if known == "nothing was compacted" else replace(FIRST, flags=SEGMENT_COMPACTED)
    facts = store_of(
        file_of(first, footer=footer_of(10, 3)),
        CLEAN,
        checkpoint=ZERO if known == "by the checkpoint" else None,
        dropped=ZERO if known == "by wal/dropped" else None,
    )
    assert "S10" not in {case.label for case in make_plan(facts).cases}


def test_without_a_checkpoint_it_is_said_that_dead_letters_are_gone() -> None:
    (case,) = (case for case in make_plan(store_of(SEALED, CLEAN)).cases if case.label == "S7")
    assert "dead letters" in case.message


def test_a_new_store_starts_with_one() -> None:
    plan = make_plan(store_of())
    assert (plan.fresh, plan.clean, plan.next_lsn, plan.next_segment, plan.epoch) == (True, True, 1, 1, 1)
    assert (plan.prev, plan.prev_last_lsn, plan.pending, plan.first_segment) == (None, 0, 0, 1)


def test_a_store_that_was_opened_once_and_never_used_needs_no_checkpoint() -> None:
    plan = make_plan(store_of(file_of(FIRST, scanned(0, clean=True))))
    assert [case.label for case in plan.cases] == ["W10"]


def test_each_finding_about_state_is_reported() -> None:
    plan = make_plan(store_of(SEALED, CLEAN, checkpoint=ZERO, findings=["one", "two"]))
    assert [case.message for case in plan.cases if case.label == "S6"] == ["one", "two"]


# --- segments that were compacted and merged ---------------------------------------------------------------


Head = tuple[int, HeaderState, SegmentHeader | None]


def compacted(number: int, prev_number: int, *, prev_last_lsn: int = 0, **changes: object) -> SegmentHeader:
    header = segment_header(number=number, prev_number=prev_number, prev_last_lsn=prev_last_lsn)
    return replace(header, flags=SEGMENT_COMPACTED, **changes)  # type: ignore[arg-type]


def head(
    header: SegmentHeader | None, *, number: int | None = None, state: HeaderState = HeaderState.VALID
) -> Head:
    return (header.number if header is not None and number is None else number or 0), state, header


ONE, TWO, THREE = (segment_header(number=n, prev_last_lsn=10 * (n - 1)) for n in (1, 2, 3))
FOUR = segment_header(number=4, prev_last_lsn=30)
MERGED: dict[str, tuple[list[Head], set[int]]] = {
    "nothing was compacted": ([head(ONE), head(TWO), head(THREE)], set()),
    "compacted alone": ([head(compacted(1, 0)), head(TWO)], set()),
    "all that it replaced is gone": ([head(compacted(3, 0)), head(FOUR)], set()),
    "all that it replaced is there": ([head(ONE), head(TWO), head(compacted(3, 0)), head(FOUR)], {1, 2}),
    "some of it is there": ([head(TWO), head(compacted(3, 0)), head(FOUR)], {2}),
    "what stands before it stays": ([head(ONE), head(TWO), head(compacted(3, 1, prev_last_lsn=10))], {2}),
    "merged into one that was merged again": (
        [head(ONE), head(compacted(2, 0)), head(compacted(3, 0)), head(FOUR)], {1, 2},
    ),
    "two of them side by side": (
        [head(ONE), head(compacted(2, 0)), head(THREE), head(compacted(4, 2, prev_last_lsn=20))], {1, 3},
    ),
    "a header that cannot be read any more": (
        [head(None, number=2, state=HeaderState.BAD_CRC), head(compacted(3, 0))], {2},
    ),
    "a newer format": ([head(None, number=2, state=HeaderState.NEWER_VERSION), head(compacted(3, 0))], set()),
    "of another store": ([head(replace(TWO, store=OTHER_STORE)), head(compacted(3, 0))], set()),
    "begins below what replaces it": ([head(ONE), head(compacted(3, 0, prev_last_lsn=10))], set()),
    "what replaces is of another store": ([head(TWO), head(compacted(3, 0, store=OTHER_STORE))], set()),
    "what replaces has another name": ([head(TWO), head(compacted(3, 0), number=4)], set()),
    "a gap before a segment that was not compacted": ([head(TWO), head(segment_header(number=4, prev_number=1))], set()),
}  # fmt: skip


@pytest.mark.parametrize(("heads", "expected"), MERGED.values(), ids=MERGED.keys())
def test_what_was_merged_into_a_later_segment_is_known_by_its_header(
    heads: list[Head], expected: set[int]
) -> None:
    assert superseded_numbers(heads, STORE) == expected


def test_what_was_merged_and_left_by_a_crash_is_removed_and_told_and_no_more() -> None:
    facts = replace(store_of(SEALED, CLEAN, checkpoint=ZERO), superseded=(7, 8))
    plan = make_plan(facts)
    cases = [case for case in plan.cases if case.label == "S9"]
    assert [(case.segment, case.severity) for case in cases] == [(7, Severity.FINE), (8, Severity.FINE)]
    assert plan.superseded == (7, 8)
    assert plan.refusal is None
    assert replace(plan, superseded=(), cases=()) == replace(
        make_plan(replace(facts, superseded=())), cases=()
    )


def test_damage_to_a_compacted_segment_is_never_a_torn_tail() -> None:
    header = compacted(2, 1, prev_last_lsn=10)
    plan = make_plan(
        store_of(SEALED, file_of(header, scanned(15, damage=torn())), checkpoint=checkpoint_of(0))
    )
    assert plan.refusal is not None
    assert (plan.refusal.label, plan.torn) == ("W7", ())
    plain = make_plan(
        store_of(SEALED, file_of(replace(header, flags=0), scanned(15, damage=torn())), checkpoint=ZERO)
    )
    assert plain.refusal is None


# --- chains -------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_an_older_generation_may_lie_below_what_was_trimmed() -> None:
    """The header of a later segment tells that the watermark had been higher once."""
    trimmed = replace(SECOND, checkpointed_lsn=10)
    plan = make_plan(store_of(file_of(trimmed, scanned(20, clean=True)), checkpoint=checkpoint_of(3)))
    assert plan.refusal is None


def test_a_hole_below_the_watermark_is_no_hole() -> None:
    third = segment_header(number=3, prev_last_lsn=20)
    plan = make_plan(
        store_of(SEALED, file_of(third, scanned(30, clean=True)), checkpoint=checkpoint_of(20, segment=3))
    )
    assert (plan.refusal, plan.first_segment) == (None, 3)


def test_the_next_header_that_can_be_read_tells_what_is_settled() -> None:
    unreadable = file_of(None, number=2, state=HeaderState.BAD_CRC)
    third = file_of(segment_header(number=3, prev_last_lsn=20), scanned(30, clean=True))
    assert not settled_before([SEALED], 0, 99)
    assert not settled_before([SEALED, unreadable], 0, 99)
    assert not settled_before([SEALED, unreadable, third], 0, 19)
    assert settled_before([SEALED, unreadable, third], 0, 20)


def test_reading_back_never_starts_before_a_settled_segment_that_cannot_be_read() -> None:
    unreadable = file_of(None, number=2, state=HeaderState.BAD_CRC)
    third = file_of(segment_header(number=3, prev_last_lsn=20), scanned(30, clean=True))
    plan = make_plan(store_of(SEALED, unreadable, third, checkpoint=checkpoint_of(20)))
    assert (plan.refusal, plan.first_segment) == (None, 3)


def test_the_jump_passes_over_a_settled_segment_whose_header_cannot_be_read() -> None:
    unreadable = file_of(None, number=2, state=HeaderState.BAD_CRC)
    third = file_of(segment_header(number=3, prev_last_lsn=20), scanned(30, clean=False))
    plan = make_plan(store_of(SEALED, unreadable, third, checkpoint=checkpoint_of(20)))
    assert (plan.refusal, plan.clean) == (None, False)
    assert plan.next_lsn > 30 + limits.LSN_JUMP


def test_reading_back_starts_at_the_oldest_segment_that_is_not_settled() -> None:
    third = segment_header(number=3, prev_last_lsn=20)
    facts = store_of(
        SEALED,
        file_of(SECOND, footer=footer_of(20)),
        file_of(third, scanned(25, clean=True)),
        checkpoint=checkpoint_of(10),
    )
    assert make_plan(facts).first_segment == 2
    assert make_plan(replace(facts, checkpoint=checkpoint_of(9))).first_segment == 1


def test_a_segment_without_scan_or_footer_reaches_as_far_as_its_header_says() -> None:
    assert (file_of(SECOND).last_lsn, file_of(SECOND).operations, file_of(SECOND).end_offset) == (10, 0, 4096)
    assert (file_of(None, number=1).last_lsn, file_of(None, number=1).operations) == (0, 0)
    assert (SEALED.last_lsn, SEALED.operations) == (10, 10)
    assert file_of(None, number=1).end_offset == 4096
    assert (CLEAN.last_lsn, CLEAN.operations, CLEAN.end_offset) == (20, 10, 1024)


# --- what the plan says -------------------------------------------------------------------------------------


def test_a_clean_log_goes_on_with_the_next_lsn() -> None:
    plan = make_plan(store_of(SEALED, CLEAN, checkpoint=ZERO))
    assert (plan.clean, plan.next_lsn, plan.prev_last_lsn, plan.copied, plan.torn) == (True, 21, 20, (), ())
    assert (plan.next_segment, plan.epoch, plan.prev, plan.operations_before) == (3, 2, SECOND, 20)


def test_a_log_that_was_not_closed_jumps_over_whatever_may_have_been_handed_out() -> None:
    plan = make_plan(store_of(SEALED, INTACT, checkpoint=ZERO))
    assert (plan.clean, plan.next_lsn) == (False, 20 + limits.LSN_JUMP + 1)


def test_the_jump_starts_above_what_only_a_torn_header_names() -> None:
    facts = store_of(SEALED, file_of(SECOND, scanned(20, damage=torn(seen_lsn=5000))), checkpoint=ZERO)
    plan = make_plan(facts)
    assert plan.next_lsn == 5000 + limits.LSN_JUMP + 1
    assert plan.torn == (TornTail(segment=2, offset=1024, end=1500, reason="no magic"),)


def test_unproven_frames_are_copied_in_order_and_leave_their_old_segment() -> None:
    frames = (frame(16, 2, offset=2048), frame(18, 3, offset=2560))
    facts = store_of(SEALED, file_of(SECOND, scanned(20, operations=10, unproven=frames)), checkpoint=ZERO)
    plan = make_plan(facts)
    assert (plan.copied, plan.prev_last_lsn) == (frames, 15)
    assert plan.operations_before == 15


def test_pending_operations_are_those_that_the_checkpoint_does_not_count() -> None:
    facts = store_of(SEALED, CLEAN, checkpoint=checkpoint_of(10, settled_count=12))
    assert make_plan(facts).pending == 8
    assert make_plan(replace(facts, checkpoint=checkpoint_of(10, settled_count=99))).pending == 0
    assert make_plan(store_of(CLEAN)).pending == 10


def test_the_number_of_a_segment_that_only_the_checkpoint_knows_is_not_used_again() -> None:
    assert make_plan(store_of(SEALED, CLEAN, checkpoint=checkpoint_of(0, segment=9))).next_segment == 10


def test_what_only_wal_dropped_knows_is_not_used_again() -> None:
    dropped = replace(checkpoint_of(4, durable_lsn=18, segment=2), epoch=7)
    plan = make_plan(store_of(SEALED, CLEAN, checkpoint=ZERO, dropped=dropped))
    assert (plan.refusal, plan.epoch, plan.next_segment, plan.next_lsn) == (None, 8, 3, 21)
    beyond = replace(dropped, durable_lsn=900, segment=9)
    assert make_plan(store_of(SEALED, CLEAN, checkpoint=ZERO, dropped=beyond)).next_segment == 10


def test_what_wal_dropped_calls_settled_makes_no_segment_superfluous() -> None:
    """It is the union of what different checkpoints called settled; what of it is delivered, the lanes' marks tell."""
    plan = make_plan(store_of(SEALED, CLEAN, checkpoint=ZERO, dropped=checkpoint_of(10, segment=2)))
    assert (plan.first_segment, [case.label for case in plan.cases]) == (1, ["W10"])


def test_a_refused_plan_does_nothing_although_its_last_segment_could_go_on() -> None:
    broken = file_of(FIRST, scanned(7))
    tail = file_of(SECOND, scanned(20, unproven=[frame(20)], damage=torn()))
    plan = make_plan(store_of(broken, tail, checkpoint=ZERO))
    assert plan.refusal is not None
    assert (plan.torn, plan.copied) == ((), ())


# --- every plan ---------------------------------------------------------------------------------------------


BREACHES = ["crc", "newer", "store", "number", "salt", "short", "skip", "gone"]


@st.composite
def stores(draw: st.DrawFn) -> StoreFacts:
    """A log of up to four segments that fit together, with random breaches, and a checkpoint that may not fit."""
    lsn = draw(st.sampled_from([0, 0, 5]))
    number, salt, operations = draw(st.integers(1, 3)), 7, draw(st.integers(0, 5))
    made: list[tuple[SegmentHeader, str | None, int]] = []
    for _ in range(draw(st.integers(0, 4))):
        wrong, span = draw(st.sampled_from([None] * 24 + BREACHES)), draw(st.integers(0, 6))
        header = segment_header(
            number=number,
            prev_last_lsn=lsn,
            epoch=draw(st.integers(1, 3)),
            prev_salt=salt,
            salt=draw(st.sampled_from([7, 8])),
            operations_before=operations,
            checkpointed_lsn=draw(st.integers(0, lsn)),
        )
        salt = header.salt
        made.append((header, wrong, max(lsn, lsn + span - 2) if wrong == "short" else lsn + span))
        lsn, operations = lsn + span, operations + span
        number += 2 if wrong == "skip" else 1
    made = [part for part in made if part[1] != "gone"]
    files = [
        draw(contents(header, wrong, reach, last=index == len(made) - 1))
        for index, (header, wrong, reach) in enumerate(made)
    ]
    checkpoint = None
    if draw(st.booleans()):
        watermark = draw(st.integers(0, lsn + 1))
        checkpoint = checkpoint_of(
            watermark,
            durable_lsn=draw(st.integers(watermark, lsn + 2)),
            segment=draw(st.integers(0, number)),
            settled_count=draw(st.integers(0, 30)),
        )
    dropped = None
    if draw(st.sampled_from([False, False, True])):
        watermark = draw(st.integers(0, lsn + 1))
        dropped = checkpoint_of(
            watermark,
            durable_lsn=draw(st.integers(watermark, lsn + 1)),
            segment=draw(st.integers(0, number)),
        )
    return StoreFacts(
        identity=draw(st.sampled_from([IdentityState.VALID] * 9 + list(IdentityState))),
        store=STORE,
        segments=tuple(files),
        checkpoint=checkpoint,
        state_findings=draw(st.sampled_from([(), (), ("damaged",)])),
        dropped=dropped,
    )


@st.composite
def contents(
    draw: st.DrawFn, header: SegmentHeader, wrong: str | None, reach: int, *, last: bool
) -> SegmentFacts:
    """A segment that reaches `reach`, or what has become of it."""
    number = header.number
    if wrong in {"crc", "newer"}:
        state = HeaderState.BAD_CRC if wrong == "crc" else HeaderState.NEWER_VERSION
        return file_of(None, number=number, state=state)
    if wrong == "store":
        header = replace(header, store=OTHER_STORE)
    elif wrong == "salt":
        header = replace(header, salt=99)
    elif wrong == "number":
        header = replace(header, number=number + 50)
    operations = reach - header.prev_last_lsn
    if not last and draw(st.booleans()):
        return file_of(header, number=number, footer=footer_of(reach, operations))
    proven = draw(st.integers(header.prev_last_lsn, reach))
    damage = None
    if draw(st.booleans()):
        damage = torn(evidence_lsn=draw(st.integers(0, reach + 1)), seen_lsn=draw(st.integers(0, reach + 9)))
    found = scanned(
        reach,
        operations=operations,
        clean=draw(st.booleans()),
        unproven=[frame(lsn) for lsn in range(proven + 1, reach + 1)],
        damage=damage,
    )
    return file_of(header, found, number=number)


def named_lsns(facts: StoreFacts) -> list[int]:
    """Every LSN that stands anywhere in the facts."""
    named = [0]
    for file in facts.segments:
        named.append(file.last_lsn)
        if file.header is not None:
            named += [file.header.prev_last_lsn, file.header.checkpointed_lsn]
        if file.scan is not None and file.scan.damage is not None:
            named += [file.scan.damage.seen_lsn, file.scan.damage.evidence_lsn]
    for witness in (facts.checkpoint, facts.dropped):
        if witness is not None:
            named += [witness.watermark, witness.durable_lsn]
    return named


@given(facts=stores())
def test_the_same_facts_give_the_same_plan(facts: StoreFacts) -> None:
    assert make_plan(facts) == make_plan(facts)


@given(facts=stores())
def test_a_refused_plan_does_nothing(facts: StoreFacts) -> None:
    plan = make_plan(facts)
    refused = [case for case in plan.cases if case.severity >= Severity.REFUSE_NEWER]
    assert plan.refusal == (refused[0] if refused else None)
    if refused:
        assert (plan.torn, plan.copied) == ((), ())


@given(facts=stores())
def test_no_lsn_is_handed_out_twice(facts: StoreFacts) -> None:
    plan = make_plan(facts)
    if plan.refusal is not None:
        return
    if plan.clean:
        assert plan.next_lsn == (facts.segments[-1].last_lsn + 1 if facts.segments else 1)
    else:
        assert plan.next_lsn > max(named_lsns(facts)) + limits.UNSYNCED_COUNT_MAX + limits.FRAME_COUNT_MAX
    assert plan.next_lsn > plan.prev_last_lsn


@given(facts=stores())
def test_what_is_proven_is_never_copied_and_what_is_not_always_is(facts: StoreFacts) -> None:
    plan = make_plan(facts)
    if plan.refusal is not None or not facts.segments:
        return
    found = facts.segments[-1].scan
    assert found is not None
    assert plan.copied == found.unproven
    assert all(copied.header.last_lsn > found.proven_lsn for copied in plan.copied)
    assert plan.prev_last_lsn == (plan.copied[0].header.first_lsn - 1 if plan.copied else found.last_lsn)
    assert plan.prev_last_lsn >= found.proven_lsn


@given(facts=stores())
def test_nothing_that_anything_proves_is_missing_from_a_log_that_goes_on(facts: StoreFacts) -> None:
    plan = make_plan(facts)
    if plan.refusal is not None:
        return
    watermark = facts.checkpoint.watermark if facts.checkpoint else 0
    needed = [file for file in facts.segments if file.number >= plan.first_segment]
    for before, after in itertools.pairwise(needed):
        assert after.header is not None
        assert before.last_lsn >= after.header.prev_last_lsn, "a hole that is not settled"
    if needed and facts.checkpoint is not None:
        header = needed[0].header
        assert header is not None
        assert header.prev_last_lsn <= max(
            watermark, *(file.header.checkpointed_lsn for file in facts.segments if file.header)
        )
    for witness in (facts.checkpoint, facts.dropped):
        if needed and witness is not None:
            assert needed[-1].last_lsn >= max(witness.durable_lsn, witness.watermark)
            assert needed[-1].number >= witness.segment
    for file in needed:
        assert file.header is not None
        assert file.header.store == STORE
    damage = needed[-1].scan.damage if needed and needed[-1].scan else None
    if damage is not None:
        assert damage.evidence_lsn <= needed[-1].last_lsn
        assert [tail.offset for tail in plan.torn] == [damage.offset]
    else:
        assert plan.torn == ()


@given(facts=stores())
def test_numbers_and_epochs_only_grow(facts: StoreFacts) -> None:
    plan = make_plan(facts)
    headers = [file.header for file in facts.segments if file.header is not None]
    assert all(plan.next_segment > file.number for file in facts.segments)
    assert all(plan.epoch > header.epoch for header in headers)
    for witness in (facts.checkpoint, facts.dropped):
        if witness is not None:
            assert plan.next_segment > witness.segment
            assert plan.epoch > witness.epoch
    assert plan.pending >= 0
    assert plan.operations_before >= 0
    assert plan.fresh == (not facts.segments)
    if plan.refusal is None and plan.fresh:
        assert (facts.checkpoint, facts.dropped) == (None, None), "nothing says that the store was used"


@given(facts=stores())
def test_each_segment_is_decided_by_one_row(facts: StoreFacts) -> None:
    plan = make_plan(facts)
    if any(case.segment is None and case.severity >= Severity.REFUSE_NEWER for case in plan.cases):
        assert all(case.segment is None for case in plan.cases)
        return
    expected = [
        (file.number, row.label)
        for index, file in enumerate(facts.segments)
        if (row := decide_segment(view_segment(facts, index))).decision is not Decision.USE
    ]
    assert [(case.segment, case.label) for case in plan.cases if case.segment is not None] == expected


# --- from bytes to plan -------------------------------------------------------------------------------------


def facts_of(
    *files: tuple[Segment, bytes], checkpoint: Checkpoint | None = ZERO, store: bytes = STORE
) -> StoreFacts:
    """What a full survey of these files would say."""
    segments: list[SegmentFacts] = []
    for index, (segment, data) in enumerate(files):
        following = files[index + 1][0].header if index + 1 < len(files) else None
        found = scan(data, segment.header, lsn_bound=following.prev_last_lsn if following else None)
        segments.append(
            SegmentFacts(
                number=segment.header.number,
                file_bytes=len(data),
                state=HeaderState.VALID,
                header=segment.header,
                scan=found,
            )
        )
    return StoreFacts(
        identity=IdentityState.VALID, store=store, segments=tuple(segments), checkpoint=checkpoint
    )


def whole(segment: Segment) -> tuple[Segment, bytes]:
    return segment, bytes(segment.data)


def _two_frames(segment: Segment) -> Placed:
    first = segment.operations(b"a")
    segment.operations(b"b")
    return first


def _last_frame(segment: Segment) -> Placed:
    segment.operations(b"a")
    return segment.operations(b"b")


def _stamped_frame(segment: Segment) -> Placed:
    frame_ = segment.operations(b"a")
    segment.stamp()
    return frame_


def _stamp_with_an_operation_behind(segment: Segment) -> Placed:
    segment.operations(b"a")
    stamp = segment.stamp()
    segment.operations(b"b")
    return stamp


def _first_stamp_of_a_recovered_segment(segment: Segment) -> Placed:
    segment.void(100)
    stamp = segment.stamp()
    segment.operations(b"a")
    return stamp


def _last_stamp(segment: Segment) -> Placed:
    segment.operations(b"a")
    return segment.stamp()


DAMAGES: dict[str, tuple[Callable[[Segment], Placed], str, int]] = {
    "an acknowledged frame, by the one behind it": (_two_frames, "W7", 0),
    "the last frame, that nothing proves": (_last_frame, "W9", 1),
    "a stamped frame": (_stamped_frame, "W7", 0),
    "a stamp, with an acknowledged operation behind it": (_stamp_with_an_operation_behind, "W7", 1),
    "the stamp of a recovery, with an operation behind it": (_first_stamp_of_a_recovered_segment, "W7", 100),
    "the last stamp": (_last_stamp, "W9", 1),
}


@pytest.mark.parametrize(
    "damage",
    [flipped, lambda data, at: zeroed(data, at, 64)],
    ids=["one bit flipped", "header zeroed"],
)
@pytest.mark.parametrize(("build", "label", "last_lsn"), DAMAGES.values(), ids=DAMAGES.keys())
def test_damage_to(
    build: Callable[[Segment], Placed], label: str, last_lsn: int, damage: Callable[[bytes, int], bytes]
) -> None:
    segment = Segment()
    damaged = build(segment)
    data = damage(bytes(segment.preallocated(2).data), damaged.offset)
    if not data[damaged.offset :].strip(b"\0"):
        return  # a stamp is nothing but its header: zeroed, it was never written
    plan = make_plan(facts_of((segment, data)))
    assert plan.cases[-1].label == label
    assert (plan.refusal is not None) == (label == "W7")
    assert facts_of((segment, data)).segments[0].last_lsn == last_lsn


def carry_out(plan: Plan, prev: Segment, *, salt: int) -> Segment:
    """The segment that the plan describes, made in memory."""
    assert plan.prev is not None
    segment = Segment(
        segment_header(
            number=plan.next_segment,
            prev_last_lsn=plan.prev_last_lsn,
            prev_number=plan.prev.number,
            prev_salt=plan.prev.salt,
            salt=salt,
            epoch=plan.epoch,
            operations_before=plan.operations_before,
        )
    )
    for copied in plan.copied:
        header = copied.header
        padded = bytes(
            prev.data[copied.offset + limits.FRAME_HEADER_BYTES : copied.offset + header.total_bytes]
        )
        body = Body(
            codec=header.codec,
            count=header.count,
            stored_bytes=header.stored_bytes,
            raw_bytes=header.raw_bytes,
            parts=(padded,),
            crc=header.body_crc,
        )
        segment.put(body, type_=header.type, span=header.span, synced_lsn=plan.prev_last_lsn)
    if plan.next_lsn > segment.last_lsn + 1:
        skipped = plan.next_lsn - 1 - segment.last_lsn
        segment.put(EMPTY_BODY, type_=FrameType.VOID, span=skipped, synced_lsn=plan.prev_last_lsn)
    segment.stamp()
    return segment


@st.composite
def tails(draw: st.DrawFn) -> tuple[Segment, int]:
    """A segment with a proven part and a tail written since the last sync; where the tail starts."""
    segment = Segment()
    for _ in range(draw(st.integers(0, 3))):
        segment.operations(*draw(st.lists(st.binary(max_size=3), min_size=1, max_size=3)))
    proven = segment.last_lsn
    start = len(segment.data)
    for _ in range(draw(st.integers(0, 3))):
        segment.operations(bytes(draw(st.integers(0, 900))), synced_lsn=proven)
    return segment, start


@given(tail=tails(), data=st.data())
def test_a_power_cut_loses_only_what_was_not_synced_however_often_it_comes(
    tail: tuple[Segment, int], data: st.DataObject
) -> None:
    """Any sectors of the unsynced tail may be lost. After that the log goes on, and again, and invents nothing."""
    segment, start = tail
    torn_ = bytes(segment.data)
    for at in range(start, len(torn_), SECTOR):
        if data.draw(st.booleans()):
            torn_ = zeroed(torn_, at)
    facts = facts_of((segment, torn_))
    plan = make_plan(facts)
    assert plan.refusal is None
    last = facts.segments[0].last_lsn
    proven = [placed.header.last_lsn for placed in segment.frames if placed.end <= start]
    assert last >= max(proven, default=0)
    damaged = Segment(segment.header)
    damaged.data = bytearray(torn_)
    second = carry_out(plan, damaged, salt=8)
    again = facts_of((segment, torn_), whole(second))
    later = make_plan(again)
    assert later.refusal is None
    assert (later.copied, later.torn) == ((), ())
    assert later.next_lsn > plan.next_lsn
    assert sum(file.operations for file in again.segments) == facts.segments[0].operations
    assert later.operations_before == facts.segments[0].operations
    third = carry_out(later, second, salt=9)
    assert make_plan(facts_of((segment, torn_), whole(second), whole(third))).refusal is None


@given(tail=tails(), at=st.integers(0, 10_000))
def test_damage_below_what_the_checkpoint_proves_is_refused(tail: tuple[Segment, int], at: int) -> None:
    segment, start = tail
    proven = [placed.header.last_lsn for placed in segment.frames if placed.end <= start]
    if not proven:
        return
    checkpoint = checkpoint_of(0, durable_lsn=proven[-1])
    data = flipped(segment.data, SECTOR + at % (start - SECTOR))
    assert make_plan(facts_of((segment, data), checkpoint=checkpoint)).refusal is not None
    assert make_plan(facts_of(whole(segment), checkpoint=checkpoint)).refusal is None


def test_a_segment_that_was_cut_off_by_a_recovery_may_rot_behind_the_cut() -> None:
    segment = Segment()
    segment.operations(b"a")
    unproven = segment.operations(b"b", synced_lsn=0)
    plan = make_plan(facts_of(whole(segment)))
    assert [copied.header.first_lsn for copied in plan.copied] == [1, 2]
    second = carry_out(plan, segment, salt=8)
    rotten = flipped(segment.data, unproven.offset)
    assert make_plan(facts_of((segment, rotten), whole(second))).refusal is None
