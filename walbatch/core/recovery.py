"""Recovery as a labelled decision table: facts about the directory in, a plan (or a refusal) out.

What is not here: reading the facts and carrying out the plan (`storage/log.py`). docs/recovery.md carries the same
labels, and a test walks every row and every combination of the facts.

The idea needed to read it: nothing is judged by where it stands, only by evidence. Bytes that something later
proves to have been durable are acknowledged: their damage is corruption and refuses. Bytes that nothing
proves are a torn tail if damaged, and are copied forward (and synced) before delivery if intact.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from walbatch import limits
from walbatch.core.frame import FrameIndex, HeaderState, SegmentHeader
from walbatch.core.scanner import SegmentScan, UnprovenFrame
from walbatch.types import Checkpoint


class IdentityState(enum.StrEnum):
    """What the identity file is."""

    VALID = "valid"
    MISSING = "missing"
    DAMAGED = "damaged"
    NEWER = "newer"


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentFacts:
    """One file of wal/. `scan` is None where it was not needed: settled, unreadable, or trusted for its footer."""

    number: int
    file_bytes: int
    state: HeaderState
    header: SegmentHeader | None
    footer: FrameIndex | None = None
    scan: SegmentScan | None = None

    @property
    def last_lsn(self) -> int:
        """The last LSN that its valid frames reach."""
        if self.scan is not None:
            return self.scan.last_lsn
        if self.footer is not None:
            return self.footer.last_lsn
        return self.header.prev_last_lsn if self.header is not None else 0

    @property
    def end_offset(self) -> int:
        """Where its valid frames end. A trusted footer ends the file."""
        return self.scan.end_offset if self.scan is not None else self.file_bytes

    @property
    def operations(self) -> int:
        """Operations in its valid frames."""
        if self.scan is not None:
            return self.scan.operations
        return self.footer.operation_count if self.footer is not None else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreFacts:
    """Everything that recovery decides from."""

    identity: IdentityState
    store: bytes | None
    segments: tuple[SegmentFacts, ...]
    checkpoint: Checkpoint | None
    state_findings: tuple[str, ...] = ()
    """What was wrong with state/, one sentence each."""
    superseded: tuple[int, ...] = ()
    """Segments that a compaction has merged into a later one, and a crash has left. They are not among `segments`."""
    dropped: Checkpoint | None = None
    """What the log's compactions took for settled, and have dropped in part. None where nothing was ever dropped."""

    @property
    def witnesses(self) -> tuple[Checkpoint, ...]:
        """What tells of the log's end beside its segments: the checkpoint, and the one that compactions have noted."""
        return tuple(known for known in (self.checkpoint, self.dropped) if known is not None)

    @property
    def durable_lsn(self) -> int:
        """Up to this LSN the log was durable, by its witnesses."""
        return max((max(known.durable_lsn, known.watermark) for known in self.witnesses), default=0)

    @property
    def last_segment(self) -> int:
        """The last segment that there was, by its witnesses."""
        return max((known.segment for known in self.witnesses), default=0)


class Severity(enum.IntEnum):
    """What a case means for the user."""

    FINE = 0
    NOTE = 1
    """Worth knowing; nothing acknowledged is lost."""
    REFUSE_NEWER = 2
    """The store is of a newer format."""
    REFUSE = 3
    """Acknowledged bytes are damaged or gone: nothing is changed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One row of the table that applied, with where it did."""

    label: str
    severity: Severity
    message: str
    segment: int | None = None
    offset: int = 0
    first_lsn: int | None = None
    last_lsn: int | None = None

    @property
    def is_noteworthy(self) -> bool:
        """Whether a person should hear of it."""
        return self.severity > Severity.FINE


@dataclass(frozen=True, slots=True, kw_only=True)
class TornTail:
    """Bytes to copy to quarantine/: a write that was never acknowledged."""

    segment: int
    offset: int
    end: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What recovery will do, or why it will not. `--dry-run` prints it; the real run carries it out."""

    cases: tuple[Case, ...]
    fresh: bool
    """The store has never been used."""
    torn: tuple[TornTail, ...]
    copied: tuple[UnprovenFrame, ...]
    """Frames of the last segment to copy into the new one, in order."""
    prev: SegmentHeader | None
    """Header of the last segment, which the new one follows."""
    prev_last_lsn: int
    """Where the new segment cuts the last one off."""
    next_lsn: int
    """First LSN that the new incarnation hands out."""
    next_segment: int
    epoch: int
    clean: bool
    operations_before: int
    """Operations of the store before the new segment, trimmed ones included."""
    pending: int
    """Operations in the log that the checkpoint does not call settled."""
    first_segment: int
    """Where reading back starts."""
    superseded: tuple[int, ...] = ()
    """Segments to remove: a later one holds what of them is not settled."""

    @property
    def refusal(self) -> Case | None:
        """The first case that forbids to go on; None if the plan can be carried out."""
        return next((case for case in self.cases if case.severity >= Severity.REFUSE_NEWER), None)


# --- the table of a segment ---


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentView:
    """The facts across the table's columns."""

    settled: bool
    """The next segment begins at or below the checkpoint's watermark: nothing in this one is needed."""
    newer: bool
    readable: bool
    """A valid header of this store."""
    chained: bool
    """It follows the segment before it, or what is missing between them is settled."""
    last: bool
    complete: bool
    """Its valid frames reach the LSN that the next segment (or, on the last one, the checkpoint or `wal/dropped`) says
    they reach, and neither of these knows of a later segment."""
    damaged: bool
    """Bytes that are no frame behind its valid frames."""
    evidence: bool
    """Something later proves that the damaged bytes were durable."""
    clean: bool


class Decision(enum.StrEnum):
    """What a row decides."""

    IGNORE = "ignore"
    USE = "use"
    CONTINUE = "continue"
    COPY = "copy"
    QUARANTINE = "quarantine"
    NEWER = "newer"
    CORRUPT = "corrupt"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row: a label, the situation in words, its decision, and the condition."""

    label: str
    situation: str
    decision: Decision
    applies: Callable[[SegmentView], bool]


SEGMENT_ROWS: tuple[Row, ...] = (
    Row(label="W1", situation="everything in the segment is settled", decision=Decision.IGNORE,
        applies=lambda v: v.settled),
    Row(label="W2", situation="the segment has a newer format", decision=Decision.NEWER,
        applies=lambda v: v.newer),
    Row(label="W3", situation="the segment's header is damaged or from another store", decision=Decision.CORRUPT,
        applies=lambda v: not v.readable),
    Row(label="W4", situation="the segment before it is missing or another one", decision=Decision.CORRUPT,
        applies=lambda v: not v.chained),
    Row(label="W5", situation="complete, and followed by another segment", decision=Decision.USE,
        applies=lambda v: not v.last and v.complete),
    Row(label="W6", situation="damaged or cut below what the next segment proves", decision=Decision.CORRUPT,
        applies=lambda v: not v.last and not v.complete),
    Row(label="W7", situation="damaged bytes that were proven durable", decision=Decision.CORRUPT,
        applies=lambda v: v.damaged and v.evidence),
    Row(label="W8", situation="the log ends below what the checkpoint or wal/dropped proves", decision=Decision.CORRUPT,
        applies=lambda v: not v.complete),
    Row(label="W9", situation="torn tail that nothing proves", decision=Decision.QUARANTINE,
        applies=lambda v: v.damaged),
    Row(label="W10", situation="cleanly closed", decision=Decision.CONTINUE,
        applies=lambda v: v.clean),
    Row(label="W11", situation="intact, not cleanly closed", decision=Decision.COPY,
        applies=lambda _: True),
)  # fmt: skip


def decide_segment(view: SegmentView) -> Row:
    """The first row that applies. The last row always does."""
    return next(row for row in SEGMENT_ROWS if row.applies(view))


# --- the whole store ---


def _store_cases(facts: StoreFacts) -> list[Case]:
    """The rows about the store as a whole, but for S8, which needs the plan."""
    known = bool(facts.witnesses) or bool(facts.state_findings)
    used = bool(facts.segments) or known
    cases: list[Case] = []
    match facts.identity:
        case IdentityState.MISSING if used:
            cases.append(
                Case(
                    label="S1",
                    severity=Severity.REFUSE,
                    message="identity is missing, but the store holds data",
                )
            )
        case IdentityState.DAMAGED:
            cases.append(Case(label="S2", severity=Severity.REFUSE, message="identity is damaged"))
        case IdentityState.NEWER:
            cases.append(
                Case(label="S3", severity=Severity.REFUSE_NEWER, message="the store has a newer format")
            )
        case _:
            pass
    if cases:
        return cases
    if not facts.segments and known:
        return [
            Case(
                label="S4",
                severity=Severity.REFUSE,
                message="wal/ holds no segment, but state/ or wal/dropped says the store was used: the log is lost",
            )
        ]
    if not used:
        cases.append(Case(label="S5", severity=Severity.FINE, message="the store is new"))
    cases.extend(Case(label="S6", severity=Severity.NOTE, message=text) for text in facts.state_findings)
    if facts.checkpoint is None and any(
        segment.number > 1 or segment.operations for segment in facts.segments
    ):
        message = (
            "no checkpoint: every operation in the log is delivered again (transactional backends leave out what they hold); if "
            "state/ was lost, its dead letters are gone, but for a copy in quarantine/"
        )
        cases.append(Case(label="S7", severity=Severity.NOTE, message=message))
    if not facts.witnesses and any(_is_compacted(segment) for segment in facts.segments):
        message = (
            "segments were compacted, and neither wal/dropped nor a checkpoint says under which marks: of a key whose newest "
            "operations were dropped, older ones may be delivered again"
        )
        cases.append(Case(label="S10", severity=Severity.NOTE, message=message))
    cases.extend(
        Case(
            label="S9",
            severity=Severity.FINE,
            message="a segment was merged into a later one, and a crash left it",
            segment=number,
        )
        for number in facts.superseded
    )
    return cases


def superseded_numbers(
    heads: Sequence[tuple[int, HeaderState, SegmentHeader | None]], store: bytes | None
) -> frozenset[int]:
    """The segments among `heads` (ascending numbers) that a compaction has merged into a later one.

    The later one is complete and durable before any of them is removed; its header says from which segment on it replaces
    them. What belongs to another store, is of a newer format or begins before it, is none of them.
    """
    found: set[int] = set()
    merged: SegmentHeader | None = None
    for number, state, header in reversed(heads):
        if (
            merged is not None
            and number > merged.prev_number
            and state is not HeaderState.NEWER_VERSION
            and (header is None or (header.store == store and header.first_lsn >= merged.first_lsn))
        ):
            found.add(number)
            continue
        own = header is not None and header.store == store and header.number == number
        merged = header if own and header is not None and header.compacted else None
    return frozenset(found)


def settled_before(segments: Sequence[SegmentFacts], index: int, watermark: int) -> bool:
    """Whether everything in segment `index` is settled, told by the next header that can be read."""
    for later in range(index + 1, len(segments)):
        following = segments[later].header
        if following is not None:
            return following.prev_last_lsn <= watermark
    return False


def _is_chained(facts: StoreFacts, index: int, watermark: int) -> bool:
    """Whether nothing unsettled is missing before segment `index`."""
    header = facts.segments[index].header
    assert header is not None
    if header.prev_last_lsn <= watermark:
        return True
    if index == 0:
        # Without a checkpoint, the headers still tell what had been checkpointed, hence may have been trimmed.
        trimmed = max(s.header.checkpointed_lsn for s in facts.segments if s.header is not None)
        return facts.checkpoint is None or header.prev_last_lsn <= trimmed
    before = facts.segments[index - 1]
    return (
        before.number == header.prev_number
        and before.header is not None
        and before.header.salt == header.prev_salt
    )


def view_segment(facts: StoreFacts, index: int) -> SegmentView:
    """The facts of one segment as the table's columns."""
    segment = facts.segments[index]
    checkpoint = facts.checkpoint
    watermark = checkpoint.watermark if checkpoint else 0
    durable_lsn = facts.durable_lsn
    last = index + 1 == len(facts.segments)
    lost = last and facts.last_segment > segment.number
    readable = (
        segment.header is not None
        and segment.header.store == facts.store
        and segment.header.number == segment.number
    )
    damage = segment.scan.damage if segment.scan else None
    if last:
        bound = durable_lsn
    else:
        # A segment that follows another one than this says nothing of this one's end: the missing one is its own case.
        following = facts.segments[index + 1].header
        bound = following.prev_last_lsn if following and following.prev_number == segment.number else 0
    return SegmentView(
        settled=settled_before(facts.segments, index, watermark),
        newer=segment.state is HeaderState.NEWER_VERSION,
        readable=readable,
        chained=readable and _is_chained(facts, index, watermark),
        last=last,
        complete=segment.last_lsn >= bound and not lost,
        damaged=damage is not None,
        # A segment that was compacted was synced as a whole before it got its name.
        evidence=damage is not None
        and (max(damage.evidence_lsn, durable_lsn) > segment.last_lsn or _is_compacted(segment)),
        clean=segment.scan is not None and segment.scan.clean,
    )


def _is_compacted(segment: SegmentFacts) -> bool:
    return segment.header is not None and segment.header.compacted


def _segment_case(facts: StoreFacts, index: int, row: Row) -> Case:
    """The case that reports what `row` found in segment `index`."""
    segment = facts.segments[index]
    damage = segment.scan.damage if segment.scan else None
    refused = row.decision is Decision.CORRUPT
    severity = {
        Decision.CORRUPT: Severity.REFUSE, Decision.NEWER: Severity.REFUSE_NEWER, Decision.QUARANTINE: Severity.NOTE,
    }.get(row.decision, Severity.FINE)  # fmt: skip
    first = last = None
    offset = 0
    detail = ""
    if row.label == "W3":
        detail = f" ({segment.state})" if segment.header is None else " (another store or another number)"
    elif row.label == "W4" and segment.header is not None:
        first = facts.segments[index - 1].last_lsn + 1 if index else None
        last = segment.header.prev_last_lsn
        if first is not None and first > last:
            first = last = None  # nothing is missing in between: what stands there is another segment
    elif refused or (damage is not None and row.decision is not Decision.IGNORE):
        first = segment.last_lsn + 1
        offset = damage.offset if damage else segment.end_offset
        if index + 1 < len(facts.segments):
            following = facts.segments[index + 1].header
            last = following.prev_last_lsn if following else None
        elif refused:
            last = max(facts.durable_lsn, damage.evidence_lsn if damage else 0, first)
        detail = f" ({damage.reason})" if damage else ""
    return Case(
        label=row.label, severity=severity, message=row.situation + detail, segment=segment.number,
        offset=offset, first_lsn=first, last_lsn=last,
    )  # fmt: skip


def make_plan(facts: StoreFacts) -> Plan:
    """Decide. Pure: the same facts give the same plan, and nothing is changed."""
    cases = _store_cases(facts)
    checkpoint = facts.checkpoint
    watermark = checkpoint.watermark if checkpoint else 0
    torn: list[TornTail] = []
    copied: tuple[UnprovenFrame, ...] = ()
    clean = not facts.segments
    prev_last_lsn = next_lsn = 0
    if not any(case.severity >= Severity.REFUSE_NEWER for case in cases):
        for index, segment in enumerate(facts.segments):
            view = view_segment(facts, index)
            row = decide_segment(view)
            if row.decision is not Decision.USE:
                cases.append(_segment_case(facts, index, row))
            if not view.last or row.decision in {Decision.CORRUPT, Decision.NEWER}:
                continue
            assert segment.scan is not None
            scan = segment.scan
            clean = row.decision is Decision.CONTINUE
            if row.decision is Decision.QUARANTINE:
                assert scan.damage is not None
                damage = scan.damage
                torn.append(
                    TornTail(
                        segment=segment.number, offset=damage.offset, end=damage.end, reason=damage.reason
                    )
                )
            copied = scan.unproven
            prev_last_lsn = copied[0].header.first_lsn - 1 if copied else scan.last_lsn
            next_lsn = scan.last_lsn + 1 if clean else _highest_lsn(facts) + limits.LSN_JUMP + 1
    if next_lsn > limits.LSN_MAX - limits.LSN_JUMP:
        cases.append(
            Case(label="S8", severity=Severity.REFUSE, message="the log names LSNs at the end of their range")
        )
    headers = [segment.header for segment in facts.segments if segment.header is not None]
    logged = (
        facts.segments[-1].operations + (headers[-1].operations_before if headers else 0)
        if facts.segments
        else 0
    )
    if any(case.severity >= Severity.REFUSE_NEWER for case in cases):
        torn, copied = [], ()  # nothing is carried out
    copied_count = sum(frame.header.count for frame in copied)
    # Without a checkpoint, all that the log holds is pending. Headers would count what a salvage gave up as well.
    settled = checkpoint.settled_count if checkpoint else logged - sum(s.operations for s in facts.segments)
    first_needed = next(
        (s.number for i, s in enumerate(facts.segments) if not settled_before(facts.segments, i, watermark)),
        1,
    )
    epochs = [0, *(header.epoch for header in headers), *(known.epoch for known in facts.witnesses)]
    numbers = [facts.last_segment, *(segment.number for segment in facts.segments)]
    return Plan(
        cases=tuple(cases), fresh=not facts.segments, torn=tuple(torn), copied=copied,
        prev=facts.segments[-1].header if facts.segments else None, prev_last_lsn=prev_last_lsn,
        next_lsn=max(next_lsn, 1), next_segment=max(numbers) + 1, epoch=max(epochs) + 1, clean=clean,
        operations_before=logged - copied_count, pending=max(0, logged - settled), first_segment=first_needed,
        superseded=facts.superseded,
    )  # fmt: skip


def _highest_lsn(facts: StoreFacts) -> int:
    """The highest LSN that anything in the store names."""
    lsns = [facts.durable_lsn]
    for segment in facts.segments:
        lsns.append(segment.last_lsn)
        if segment.header is not None:
            lsns += [segment.header.prev_last_lsn, segment.header.checkpointed_lsn]
        if segment.scan is not None and segment.scan.damage is not None:
            lsns.append(segment.scan.damage.seen_lsn)
    return max(lsns)
