"""Which segments are written anew, and with what: planned on the facts alone, until recovery would refuse no more.

What is not here: writing.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import replace
from typing import Final

from walbatch import limits
from walbatch.core.frame import SECTOR, SegmentHeader
from walbatch.core.recovery import Case, StoreFacts, make_plan
from walbatch.errors import CorruptionError
from walbatch.ports import File, FileSystem
from walbatch.salvage.header import find_header
from walbatch.salvage.loss import settled_lsn, unsettled
from walbatch.salvage.repair import Repair, in_order, is_zero, opened, valid_frames
from walbatch.storage.layout import Layout

END_JUMP: Final = 2**40
"""LSNs that are skipped where the end of the log is gone. What stood there had handed out LSNs that nobody can count
any more: at most what fits into the files that are missing, which is far less."""

assert END_JUMP > 2**8 * limits.LSN_JUMP


def plan_repairs(
    fs: FileSystem, layout: Layout, facts: StoreFacts, given_up: Collection[int]
) -> tuple[list[Repair], StoreFacts]:
    """The repairs, oldest segment first, and the facts that they leave. Nothing is written.

    `given_up`: LSNs of dead and cancelled operations, which cannot be lost.
    """
    repairs: dict[int, Repair] = {}
    for _ in range(3 * len(facts.segments) + 3):
        refusal = make_plan(facts).refusal
        if refusal is None:
            return [repairs[number] for number in sorted(repairs)], facts
        repair = _plan_repair(fs, layout, facts, refusal)
        repair = replace(repair, lost=unsettled(facts, repair.gaps, given_up))
        repairs[repair.header.number] = repair
        left = [segment for segment in facts.segments if segment.number != repair.header.number]
        ordered = sorted([*left, repair.facts], key=lambda segment: segment.number)
        facts = replace(facts, segments=tuple(ordered))
    raise CorruptionError(
        f"{layout.root}: its segments contradict each other in a way that a salvage cannot resolve. Nothing was changed; restore "
        "wal/ from a copy",
        path=layout.wal,
    )


def _plan_repair(fs: FileSystem, layout: Layout, facts: StoreFacts, refusal: Case) -> Repair:
    """The repair for one refusal, without what it loses."""
    index = next(i for i, segment in enumerate(facts.segments) if segment.number == refusal.segment)
    segment = facts.segments[index]
    before = facts.segments[index - 1] if index else None
    if (
        refusal.label in {"W3", "W4"}
        and before is not None
        and before.scan is not None
        and before.scan.damage is not None
    ):
        # Without its successor's word, nothing has said so far that this one is not whole. Its end counts from here on.
        assert before.header is not None
        with opened(fs, layout, before.number) as file:
            return _rebuild(facts, index - 1, before.header, file, reason=before.scan.damage.reason)
    if refusal.label == "W4":
        return _repair_chain(fs, layout, facts, index)
    if refusal.label == "W8" and facts.last_segment > segment.number:
        return _stand_in_for_end(facts)
    with opened(fs, layout, segment.number) as file:
        header = segment.header or find_header(facts, index, file)
        return _rebuild(facts, index, header, file, reason=refusal.message)


def _rebuild(facts: StoreFacts, index: int, header: SegmentHeader, file: File, *, reason: str) -> Repair:
    """Segment `index` with the whole frames that it has under `header`."""
    frames = list(valid_frames(file, header))
    whole = in_order(frames, header.prev_last_lsn)
    named_lsn = max([header.prev_last_lsn, *(frame.header.last_lsn for frame in frames)])
    if index + 1 < len(facts.segments):
        following = facts.segments[index + 1].header
        chained = following is not None and following.prev_number == header.number
        end = following.prev_last_lsn if following is not None and chained else named_lsn
        kept = tuple(frame for frame in whole if frame.header.last_lsn <= end)
        return Repair(header=header, exists=True, reason=reason, kept=kept, known_lsn=end, last_lsn=end)
    scan = facts.segments[index].scan
    damage = scan.damage if scan else None
    known_lsn = max(named_lsn, damage.evidence_lsn if damage else 0)
    if facts.last_segment <= header.number:
        known_lsn = max(known_lsn, facts.durable_lsn)
    seen_lsn = max(known_lsn, damage.seen_lsn if damage else 0)
    behind = frames[-1].offset + frames[-1].header.total_bytes if frames else SECTOR
    gone = known_lsn > named_lsn or not is_zero(file, behind)
    return Repair(
        header=header,
        exists=True,
        reason=reason,
        kept=whole,
        known_lsn=known_lsn,
        last_lsn=_jump(seen_lsn) if gone else known_lsn,
    )


def _repair_chain(fs: FileSystem, layout: Layout, facts: StoreFacts, index: int) -> Repair:
    """What is missing before segment `index`, or another one than it follows."""
    following = facts.segments[index].header
    assert following is not None
    before = facts.segments[index - 1] if index else None
    if before is not None and before.number == following.prev_number:
        # A segment of another life of the store: what it holds is no part of this log.
        with opened(fs, layout, before.number) as file:
            header = find_header(facts, index - 1, file)
            return _rebuild(
                facts, index - 1, header, file, reason="not the one that the next segment follows"
            )
    if following.prev_number <= (before.number if before else 0):
        raise CorruptionError(
            f"segment {following.number} claims to follow segment {following.prev_number}, which cannot be. Nothing was changed; "
            "restore wal/ from a copy",
            path=layout.segment(following.number),
        )
    reached = before.last_lsn if before else min(settled_lsn(facts), following.prev_last_lsn)
    reached = min(reached, following.prev_last_lsn)
    header = replace(
        following, number=following.prev_number, salt=following.prev_salt, prev_number=before.number if before else 0,
        prev_salt=before.header.salt if before and before.header else 0, prev_last_lsn=reached, first_lsn=reached + 1,
        checkpointed_lsn=0, flags=0,
    )  # fmt: skip
    end = following.prev_last_lsn
    return Repair(header=header, exists=False, reason="missing", known_lsn=end, last_lsn=end)


def _stand_in_for_end(facts: StoreFacts) -> Repair:
    """A last segment in the place of those that the checkpoint or `wal/dropped` knows of and that are gone."""
    last = facts.segments[-1]
    assert last.header is not None
    reached = max(last.last_lsn, last.header.prev_last_lsn)
    known_lsn = max(reached, facts.durable_lsn)
    epoch = max([last.header.epoch, *(known.epoch for known in facts.witnesses)])
    header = replace(
        last.header, number=facts.last_segment, salt=int.from_bytes(os.urandom(8), "little"), prev_number=last.number,
        prev_salt=last.header.salt, prev_last_lsn=reached, first_lsn=reached + 1, checkpointed_lsn=0, flags=0,
        operations_before=last.header.operations_before + last.operations, epoch=epoch,
    )  # fmt: skip
    return Repair(
        header=header, exists=False, reason="missing", known_lsn=known_lsn, last_lsn=_jump(known_lsn)
    )


def _jump(lsn: int) -> int:
    """Beyond everything that can have been handed out above an LSN."""
    return min(lsn + END_JUMP, limits.LSN_MAX - 2 * limits.LSN_JUMP)
