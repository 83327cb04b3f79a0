"""Gives up what is damaged, and says exactly what: the one place that changes a store which recovery refuses.

What is not here: guessing. A frame is kept only if its header and body are whole in their place; LSNs that
nothing names are listed as lost and stand as void frames from then on, so that later openings see a
contiguous log.

The idea needed to read it: repairs are planned on the facts alone, each giving the facts that it would leave, until
recovery would refuse no more. Only then is anything written: each damaged segment is copied to quarantine/ as it is,
rebuilt from its whole frames under a temporary name, and replaced by a rename.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from walbatch import limits
from walbatch.core.checksum import crc32c
from walbatch.core.frame import (
    EMPTY_BODY,
    FLAG_LOST,
    SECTOR,
    SEGMENT_COMPACTED,
    SEGMENT_OPTIONS,
    Body,
    FrameError,
    FrameHeader,
    FrameType,
    HeaderState,
    SegmentHeader,
    check_body,
    decode_segment_header,
    encode_segment_header,
)
from walbatch.core.recovery import Case, Plan, SegmentFacts, Severity, StoreFacts, make_plan
from walbatch.core.scanner import SegmentScan, read_frame_header
from walbatch.errors import CorruptionError, StorageError
from walbatch.inspection import Count, Tally, find_store
from walbatch.ports import File, FileSystem
from walbatch.storage.checkpoint import LmdbState
from walbatch.storage.filesystem import RealFileSystem
from walbatch.storage.layout import (
    TEMPORARY_SUFFIX,
    Layout,
    read_identity,
    sync_directory,
    sync_file,
    write_durably,
)
from walbatch.storage.segment import SegmentWriter
from walbatch.storage.store import raise_refusal, storage_errors, take_lock
from walbatch.storage.survey import survey
from walbatch.types import Checkpoint, Mark, Range, merge_ranges

END_JUMP: Final = 2**40
"""LSNs that are skipped where the end of the log is gone. What stood there had handed out LSNs that nobody can count
any more: at most what fits into the files that are missing, which is far less."""

assert END_JUMP > 2**8 * limits.LSN_JUMP


@dataclass(frozen=True, slots=True, kw_only=True)
class Salvage:
    """What a salvage gave up, or would."""

    lost: tuple[Range, ...] = ()
    """LSNs that are lost and were not settled. Some may never have named an operation."""
    end_lost_after: int | None = None
    """The end of the log is gone: what was acknowledged after this LSN cannot even be named. None: nothing."""
    rebuilt: tuple[int, ...] = ()
    """Numbers of the segments that were rebuilt, or put in the place of missing ones."""
    pending: Mapping[str, Count] = field(default_factory=dict)
    """What is left to deliver, by kind."""
    torn_bytes: int = 0
    copied_operations: int = 0
    next_lsn: int = 1
    """What the opening after it will copy, and hand out first."""

    @property
    def lost_something(self) -> bool:
        """Whether operations may be lost."""
        return bool(self.lost) or self.end_lost_after is not None


def salvage_store(path: str | os.PathLike[str], *, dry_run: bool = False) -> Salvage:
    """Rebuild every segment that recovery refuses; returns what that costs.

    With `dry_run` nothing is written. Otherwise the damaged files are in quarantine/, with a note of what is lost,
    before anything is replaced, and everything is durable at return. A crash at any point leaves a store on which it
    can be run again. A store that recovery does not refuse is left as it is (but for the count of what is pending, where a
    crash cut a salvage short).

    Raises CorruptionError for damage it cannot work around (nothing was changed), UnsupportedFormat, StoreLocked,
    ConfigError for a path that is no store, StorageError.
    """
    layout = find_store(path)
    fs = RealFileSystem()
    note = b"" if dry_run else json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode()
    with storage_errors(layout.root):
        lock = take_lock(fs, layout, note)
        try:
            return _salvage(fs, layout, dry_run=dry_run)
        finally:
            lock.release()


def _salvage(fs: FileSystem, layout: Layout, *, dry_run: bool) -> Salvage:
    seen = _see(fs, layout)
    _refuse_hopeless(seen.facts, layout)
    repairs, facts = _plan_repairs(fs, layout, seen.facts)
    plan = make_plan(facts)
    if dry_run:
        return _report(repairs, plan, _pending(fs, layout, seen, repairs))
    for repair in repairs:
        _carry_out(fs, layout, repair)
    if repairs:
        seen = _see(fs, layout)
        plan = make_plan(seen.facts)
        raise_refusal(plan, layout)
    pending = _pending(fs, layout, seen, ())
    _correct_count(layout, seen.facts, plan, sum(count.operations for count in pending.values()))
    return _report(repairs, plan, pending)


def _report(repairs: Sequence[_Repair], plan: Plan, pending: Mapping[str, Count]) -> Salvage:
    ends = [repair.known_lsn for repair in repairs if repair.last_lsn > repair.known_lsn]
    return Salvage(
        lost=merge_ranges((span for repair in repairs for span in repair.lost), 0),
        end_lost_after=min(ends, default=None),
        rebuilt=tuple(repair.header.number for repair in repairs),
        pending=pending,
        torn_bytes=sum(torn.end - torn.offset for torn in plan.torn),
        copied_operations=sum(frame.header.count for frame in plan.copied),
        next_lsn=plan.next_lsn,
    )


# --- what there is ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    """The facts, and what was counted in each segment on the way."""

    facts: StoreFacts
    tallies: Mapping[int, Tally]


def _see(fs: FileSystem, layout: Layout) -> _Seen:
    """Read every byte of the store."""
    identity, uuid = read_identity(fs, layout)
    checkpoint, findings = None, list[str]()
    if uuid is not None:
        state = LmdbState.open(layout.state, uuid, readonly=True)
        try:
            checkpoint, findings = state.load_checkpoint()
        finally:
            state.close()
    tallies: dict[int, Tally] = {}
    facts = survey(
        fs, layout, identity=identity, store=uuid, checkpoint=checkpoint, state_findings=tuple(findings), full=True,
        visit=lambda number, header: tallies.setdefault(number, Tally(checkpoint=checkpoint)).visit(number, header),
    )  # fmt: skip
    believed = (
        segment
        if segment.header is None or (segment.header.store, segment.header.number) == (uuid, segment.number)
        else replace(segment, header=None, scan=None)
        for segment in facts.segments
    )
    return _Seen(facts=replace(facts, segments=tuple(believed)), tallies=tallies)


def _refuse_hopeless(facts: StoreFacts, layout: Layout) -> None:
    """Raise where there is nothing to work with, or a newer walbatch has to do it."""
    plan = make_plan(facts)
    newer = next((case for case in plan.cases if case.severity is Severity.REFUSE_NEWER), None)
    if newer is not None:
        raise_refusal(replace(plan, cases=(newer,)), layout)
    refusal = plan.refusal
    if refusal is not None and refusal.segment is None:
        raise CorruptionError(
            f"{layout.root}: {refusal.message} ({refusal.label}), and a salvage has nothing to work with without it. Nothing was "
            "changed; restore what is missing from a copy",
            path=layout.root, expected=refusal.message,
        )  # fmt: skip


def _pending(fs: FileSystem, layout: Layout, seen: _Seen, repairs: Sequence[_Repair]) -> dict[str, Count]:
    """What is not settled, by kind: in the segments as they are, and as they would be rebuilt."""
    tallies = dict(seen.tallies)
    for repair in repairs:
        tallies[repair.header.number] = tally = Tally(checkpoint=seen.facts.checkpoint)
        if not repair.kept:
            continue
        with _opened(fs, layout, repair.header.number) as file:
            for whole in repair.kept:
                if whole.header.type is FrameType.OPERATIONS:
                    tally.count(repair.header.number, whole.offset, whole.header, whole.body(file))
    total: dict[str, Count] = {}
    for tally in tallies.values():
        for kind, count in tally.pending.items():
            entry = total.setdefault(kind, Count())
            entry.operations += count.operations
            entry.bytes += count.bytes
    return total


def _correct_count(layout: Layout, facts: StoreFacts, plan: Plan, pending: int) -> None:
    """Let the checkpoint count what was given up as settled, so that nobody waits for it.

    Crash story: nothing but this count depends on it. If it is not done, the next salvage does it.
    """
    checkpoint = facts.checkpoint
    if checkpoint is None or plan.pending == pending:
        return
    assert facts.store is not None
    state = LmdbState.open_for_engine(layout.state, facts.store, layout.quarantine)
    try:
        state.save_checkpoint(
            replace(
                checkpoint,
                generation=checkpoint.generation + 1,
                settled_count=max(0, checkpoint.settled_count + plan.pending - pending),
            )
        )
    finally:
        state.close()


# --- planning --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Whole:
    """A whole frame of a damaged segment."""

    offset: int
    header: FrameHeader

    def body(self, file: File) -> bytes:
        """Its body and padding, checked again, since it is read again."""
        at = self.offset + limits.FRAME_HEADER_BYTES
        padded = file.read(self.header.total_bytes - limits.FRAME_HEADER_BYTES, at)
        try:
            check_body(self.header, padded)
        except FrameError as error:
            raise StorageError(
                f"a frame reads differently the second time ({error}): check the disk, then try again"
            ) from error
        return padded


@dataclass(frozen=True, slots=True, kw_only=True)
class _Repair:
    """One segment to write: the frames it keeps, and the LSNs that become void."""

    header: SegmentHeader
    exists: bool
    """There is a damaged file, to be kept in quarantine/."""
    reason: str
    kept: tuple[_Whole, ...] = ()
    known_lsn: int
    """The last LSN that is known to have stood in it."""
    last_lsn: int
    """Its last LSN: above `known_lsn` where the end of the log is gone and LSNs are skipped."""
    lost: tuple[Range, ...] = ()

    @property
    def gaps(self) -> list[Range]:
        """The known LSNs that no frame names."""
        gaps: list[Range] = []
        reached = self.header.prev_last_lsn
        for whole in self.kept:
            if whole.header.first_lsn > reached + 1:
                gaps.append((reached + 1, whole.header.first_lsn - 1))
            reached = whole.header.last_lsn
        if reached < self.known_lsn:
            gaps.append((reached + 1, self.known_lsn))
        return gaps

    @property
    def facts(self) -> SegmentFacts:
        """What recovery will see once it is written."""
        size = SECTOR + sum(whole.header.total_bytes for whole in self.kept)
        scan = SegmentScan(
            end_offset=size, last_lsn=self.last_lsn, proven_lsn=self.last_lsn, frames=len(self.kept),
            operations=sum(whole.header.count for whole in self.kept), sealed=False, clean=False, lost=0, unproven=(),
            damage=None,
        )  # fmt: skip
        return SegmentFacts(
            number=self.header.number, file_bytes=size, state=HeaderState.VALID, header=self.header, scan=scan
        )


def _plan_repairs(fs: FileSystem, layout: Layout, facts: StoreFacts) -> tuple[list[_Repair], StoreFacts]:
    """The repairs, oldest segment first, and the facts that they leave. Nothing is written."""
    repairs: dict[int, _Repair] = {}
    for _ in range(3 * len(facts.segments) + 3):
        refusal = make_plan(facts).refusal
        if refusal is None:
            return [repairs[number] for number in sorted(repairs)], facts
        repair = _plan_repair(fs, layout, facts, refusal)
        repair = replace(repair, lost=_unsettled(facts, repair.gaps))
        repairs[repair.header.number] = repair
        left = [segment for segment in facts.segments if segment.number != repair.header.number]
        ordered = sorted([*left, repair.facts], key=lambda segment: segment.number)
        facts = replace(facts, segments=tuple(ordered))
    raise CorruptionError(
        f"{layout.root}: its segments contradict each other in a way that a salvage cannot resolve. Nothing was changed; restore "
        "wal/ from a copy",
        path=layout.wal,
    )


def _plan_repair(fs: FileSystem, layout: Layout, facts: StoreFacts, refusal: Case) -> _Repair:
    """The repair for one refusal, without what it loses."""
    index = next(i for i, segment in enumerate(facts.segments) if segment.number == refusal.segment)
    segment = facts.segments[index]
    checkpoint = facts.checkpoint
    before = facts.segments[index - 1] if index else None
    if (
        refusal.label in {"W3", "W4"}
        and before is not None
        and before.scan is not None
        and before.scan.damage is not None
    ):
        # Without its successor's word, nothing has said so far that this one is not whole. Its end counts from here on.
        assert before.header is not None
        with _opened(fs, layout, before.number) as file:
            return _rebuild(facts, index - 1, before.header, file, reason=before.scan.damage.reason)
    if refusal.label == "W4":
        return _repair_chain(fs, layout, facts, index)
    if refusal.label == "W8" and checkpoint is not None and checkpoint.segment > segment.number:
        return _stand_in_for_end(facts, checkpoint)
    with _opened(fs, layout, segment.number) as file:
        header = segment.header or _find_header(facts, index, file)
        return _rebuild(facts, index, header, file, reason=refusal.message)


def _rebuild(facts: StoreFacts, index: int, header: SegmentHeader, file: File, *, reason: str) -> _Repair:
    """Segment `index` with the whole frames that it has under `header`."""
    frames = list(_valid_frames(file, header))
    whole = _in_order(frames, header.prev_last_lsn)
    named_lsn = max([header.prev_last_lsn, *(frame.header.last_lsn for frame in frames)])
    if index + 1 < len(facts.segments):
        following = facts.segments[index + 1].header
        chained = following is not None and following.prev_number == header.number
        end = following.prev_last_lsn if following is not None and chained else named_lsn
        kept = tuple(frame for frame in whole if frame.header.last_lsn <= end)
        return _Repair(header=header, exists=True, reason=reason, kept=kept, known_lsn=end, last_lsn=end)
    scan = facts.segments[index].scan
    damage = scan.damage if scan else None
    known_lsn = max(named_lsn, damage.evidence_lsn if damage else 0)
    if facts.checkpoint is not None and facts.checkpoint.segment <= header.number:
        known_lsn = max(known_lsn, facts.checkpoint.durable_lsn)
    seen_lsn = max(known_lsn, damage.seen_lsn if damage else 0)
    behind = frames[-1].offset + frames[-1].header.total_bytes if frames else SECTOR
    gone = known_lsn > named_lsn or not _is_zero(file, behind)
    return _Repair(
        header=header,
        exists=True,
        reason=reason,
        kept=whole,
        known_lsn=known_lsn,
        last_lsn=_jump(seen_lsn) if gone else known_lsn,
    )


def _repair_chain(fs: FileSystem, layout: Layout, facts: StoreFacts, index: int) -> _Repair:
    """What is missing before segment `index`, or another one than it follows."""
    following = facts.segments[index].header
    assert following is not None
    before = facts.segments[index - 1] if index else None
    if before is not None and before.number == following.prev_number:
        # A segment of another life of the store: what it holds is no part of this log.
        with _opened(fs, layout, before.number) as file:
            header = _find_header(facts, index - 1, file)
            return _rebuild(
                facts, index - 1, header, file, reason="not the one that the next segment follows"
            )
    if following.prev_number <= (before.number if before else 0):
        raise CorruptionError(
            f"segment {following.number} claims to follow segment {following.prev_number}, which cannot be. Nothing was changed; "
            "restore wal/ from a copy",
            path=layout.segment(following.number),
        )
    reached = before.last_lsn if before else min(_settled_lsn(facts), following.prev_last_lsn)
    reached = min(reached, following.prev_last_lsn)
    header = replace(
        following, number=following.prev_number, salt=following.prev_salt, prev_number=before.number if before else 0,
        prev_salt=before.header.salt if before and before.header else 0, prev_last_lsn=reached, first_lsn=reached + 1,
        checkpointed_lsn=0, flags=0,
    )  # fmt: skip
    end = following.prev_last_lsn
    return _Repair(header=header, exists=False, reason="missing", known_lsn=end, last_lsn=end)


def _stand_in_for_end(facts: StoreFacts, checkpoint: Checkpoint) -> _Repair:
    """A last segment in the place of those that the checkpoint knows of and that are gone."""
    last = facts.segments[-1]
    assert last.header is not None
    reached = max(last.last_lsn, last.header.prev_last_lsn)
    known_lsn = max(reached, checkpoint.durable_lsn)
    header = replace(
        last.header, number=checkpoint.segment, salt=int.from_bytes(os.urandom(8), "little"), prev_number=last.number,
        prev_salt=last.header.salt, prev_last_lsn=reached, first_lsn=reached + 1, checkpointed_lsn=0, flags=0,
        operations_before=last.header.operations_before + last.operations, epoch=max(last.header.epoch, checkpoint.epoch),
    )  # fmt: skip
    return _Repair(
        header=header, exists=False, reason="missing", known_lsn=known_lsn, last_lsn=_jump(known_lsn)
    )


def _jump(lsn: int) -> int:
    """Beyond everything that can have been handed out above an LSN."""
    return min(lsn + END_JUMP, limits.LSN_MAX - 2 * limits.LSN_JUMP)


# --- the header of a segment that has none any more ------------------------------------------------------------------


def _find_header(facts: StoreFacts, index: int, file: File) -> SegmentHeader:
    """The header that a segment must have had, as its neighbours and its own remains tell.

    A wrong guess does no harm: no frame is whole under the salt of another life of the store.
    """
    assert facts.store is not None
    number = facts.segments[index].number
    before = facts.segments[index - 1] if index else None
    following = facts.segments[index + 1].header if index + 1 < len(facts.segments) else None
    if following is not None and following.prev_number != number:
        following = None
    remains = _remains(file.read(SECTOR, 0), facts.store, number)
    models = [
        header for header in (following, remains, before.header if before else None) if header is not None
    ]
    if not models:
        raise CorruptionError(
            f"the header of segment {number} is damaged, and nothing else tells what it was. Nothing was changed; restore the "
            "file from a copy",
            path=f"segment {number}",
            expected="a header, or another segment beside it",
        )
    salts = [following.prev_salt] if following is not None else [header.salt for header in models]
    # Every flag only allows something; those that the frames do not need are taken back.
    candidates = [
        replace(
            models[0], number=number, salt=salt, store=facts.store, flags=SEGMENT_COMPACTED | SEGMENT_OPTIONS
        )
        for salt in salts
    ]
    header = max(candidates, key=lambda candidate: sum(1 for _ in _valid_frames(file, candidate)))
    if before is not None:
        prev_last_lsn = before.last_lsn
        operations_before = (before.header.operations_before if before.header else 0) + before.operations
    else:
        prev_last_lsn = _first_prev_lsn(facts, file, header, remains)
        operations_before = remains.operations_before if remains is not None else 0
    epochs = [model.epoch for model in models] + ([facts.checkpoint.epoch] if facts.checkpoint else [])
    return replace(
        header, epoch=following.epoch if following is not None else max(epochs) + 1, prev_number=before.number if before else 0,
        prev_salt=before.header.salt if before and before.header else 0, prev_last_lsn=prev_last_lsn,
        first_lsn=prev_last_lsn + 1, operations_before=operations_before,
        checkpointed_lsn=min(_settled_lsn(facts), prev_last_lsn), flags=_flags_needed(file, header),
    )  # fmt: skip


def _flags_needed(file: File, header: SegmentHeader) -> int:
    """What the frames of a segment need its header to say. Whether their bodies have options is not looked at: they may."""
    sparse = any(
        whole.header.type is FrameType.OPERATIONS and whole.header.count < whole.header.span
        for whole in _valid_frames(file, header)
    )
    return SEGMENT_OPTIONS | (SEGMENT_COMPACTED if sparse else 0)


def _first_prev_lsn(
    facts: StoreFacts, file: File, header: SegmentHeader, remains: SegmentHeader | None
) -> int:
    """The LSN that the log's first segment follows. Everything up to it was trimmed, hence settled."""
    settled_lsn = _settled_lsn(facts)
    first = next(_valid_frames(file, header), None)
    if first is None:
        return settled_lsn
    limit = first.header.first_lsn - 1
    if facts.checkpoint is not None:
        return min(settled_lsn, limit)  # what lies between them is gone, and nobody has settled it
    if first.offset == SECTOR:
        return limit
    return min(remains.prev_last_lsn if remains is not None else settled_lsn, limit)


def _remains(sector: bytes, store: bytes, number: int) -> SegmentHeader | None:
    """What a damaged header says, if it still says that it is of this store and segment.

    Only its salt is used as it is, and proven by the frames that are whole under it.
    """
    if len(sector) < SECTOR:
        return None
    body = _HEADER_START + sector[len(_HEADER_START) : -_CRC_BYTES]
    _, header = decode_segment_header(body + crc32c(body, 0).to_bytes(_CRC_BYTES, "little"))
    return header if header is not None and (header.store, header.number) == (store, number) else None


_CRC_BYTES: Final = 4
_HEADER_START: Final = encode_segment_header(
    SegmentHeader(
        store=bytes(16), salt=0, epoch=0, number=1, first_lsn=1, prev_number=0, prev_salt=0, prev_last_lsn=0,
        operations_before=0, checkpointed_lsn=0, created_wall_ns=0,
    )
)[:16]  # fmt: skip
"""Magic, version and flags: the same in every segment of this version."""


# --- what is lost, and what is whole ---------------------------------------------------------------------------------


def _settled_lsn(facts: StoreFacts) -> int:
    """Everything up to this LSN is settled: by the checkpoint, or by one that a segment's header has seen."""
    headers = [segment.header.checkpointed_lsn for segment in facts.segments if segment.header is not None]
    return max([facts.checkpoint.watermark if facts.checkpoint else 0, *headers])


def _unsettled(facts: StoreFacts, gaps: Iterable[Range]) -> tuple[Range, ...]:
    """The LSNs in `gaps` that may have named an operation which is not settled.

    Nobody knows any more to which shard a lost LSN belonged; only what all of them have settled is certain.
    """
    lanes = facts.checkpoint.lanes.values() if facts.checkpoint else ()
    marks = [mark for lane in lanes for mark in lane.shards] or [Mark()]
    ranges = [span for gap in gaps for mark in marks for span in _not_covered(gap, mark)]
    return merge_ranges(ranges, _settled_lsn(facts))


def _not_covered(span: Range, mark: Mark) -> Iterator[Range]:
    """The parts of `span` that a mark does not call settled."""
    at, last = max(span[0], mark.watermark + 1), span[1]
    for low, high in mark.ranges:
        if low > last:
            break
        if low > at:
            yield at, low - 1
        at = max(at, high + 1)
    if at <= last:
        yield at, last


def _valid_frames(file: File, header: SegmentHeader) -> Iterator[_Whole]:
    """Every frame that is whole in its place."""
    size = file.size()
    offset = SECTOR
    while offset < size:
        try:
            frame = read_frame_header(file.read, header=header, offset=offset)
            check_body(
                frame,
                file.read(frame.total_bytes - limits.FRAME_HEADER_BYTES, offset + limits.FRAME_HEADER_BYTES),
            )
        except FrameError:
            offset += SECTOR
            continue
        yield _Whole(offset=offset, header=frame)
        offset += frame.total_bytes


def _in_order(frames: Iterable[_Whole], reached: int) -> tuple[_Whole, ...]:
    """The frames that name LSNs above `reached`, ascending and without overlap."""
    kept = []
    for frame in frames:
        if frame.header.span and frame.header.first_lsn > reached:
            kept.append(frame)
            reached = frame.header.last_lsn
    return tuple(kept)


def _is_zero(file: File, offset: int) -> bool:
    """Whether only zeros stand from `offset` on."""
    while data := file.read(limits.SCAN_CHUNK_BYTES, offset):
        if data.strip(b"\0"):
            return False
        offset += len(data)
    return True


# --- carrying out ----------------------------------------------------------------------------------------------------


def _carry_out(fs: FileSystem, layout: Layout, repair: _Repair) -> None:
    """Write one segment over the damaged one, or in the place of a missing one.

    Crash story: the note and the copy in quarantine/ are durable before the rename; the rename is atomic, and durable
    after the directory sync. A crash before it leaves the damage as it was, after it one segment less to repair.
    """
    path = layout.segment(repair.header.number)
    if not fs.is_directory(layout.quarantine):
        fs.make_directory(layout.quarantine)
        sync_directory(fs, layout.root)
    _quarantine(fs, layout, repair)
    temporary = path + TEMPORARY_SUFFIX
    with contextlib.suppress(FileNotFoundError):
        fs.unlink(temporary)
    target = fs.create(temporary)
    try:
        _write(fs, layout, repair, SegmentWriter(target, temporary, repair.header))
        sync_file(target, temporary)
        fs.rename(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            fs.unlink(temporary)
        raise
    finally:
        target.close()
    sync_directory(fs, layout.wal)


def _write(fs: FileSystem, layout: Layout, repair: _Repair, writer: SegmentWriter) -> None:
    """The frames that are kept, voids between them, and a stamp: the proof that all of it was synced at once."""
    writer.write_header()
    gaps = iter([*repair.gaps, None])
    gap = next(gaps)
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(_opened(fs, layout, repair.header.number)) if repair.kept else None
        for whole in repair.kept:
            assert file is not None
            if gap is not None and gap[0] == writer.last_lsn + 1:
                _void(writer, *gap, flags=FLAG_LOST)
                gap = next(gaps)
            writer.append(
                _body(whole.header, whole.body(file)), type=whole.header.type, first_lsn=whole.header.first_lsn,
                span=whole.header.span, synced_lsn=repair.header.prev_last_lsn, wall_ns=whole.header.wall_ns,
                flags=whole.header.flags,
            )  # fmt: skip
    if gap is not None:
        _void(writer, *gap, flags=FLAG_LOST)
    if repair.last_lsn > writer.last_lsn:
        _void(writer, writer.last_lsn + 1, repair.last_lsn, flags=0)
    writer.stamp(next_lsn=writer.last_lsn + 1, flags=0, wall_ns=repair.header.created_wall_ns)


def _void(writer: SegmentWriter, first: int, last: int, *, flags: int) -> None:
    """LSNs that name no operation."""
    writer.append(
        EMPTY_BODY, type=FrameType.VOID, first_lsn=first, span=last - first + 1, synced_lsn=writer.header.prev_last_lsn,
        wall_ns=writer.header.created_wall_ns, flags=flags,
    )  # fmt: skip


def _body(header: FrameHeader, padded: bytes) -> Body:
    return Body(
        codec=header.codec, count=header.count, stored_bytes=header.stored_bytes, raw_bytes=header.raw_bytes, padded=padded,
        crc=header.body_crc,
    )  # fmt: skip


def _quarantine(fs: FileSystem, layout: Layout, repair: _Repair) -> None:
    """Keep the damaged file, with a note of what is lost. A copy is made once, and never overwritten."""
    number = repair.header.number
    copy = 0
    while fs.exists(name := f"{layout.quarantine}/{number:019d}.seg.{copy}") and not (
        repair.exists and _is_same(fs, layout.segment(number), name)
    ):
        copy += 1
    lost = ", ".join(f"{first} to {last}" for first, last in repair.lost) or "none that was not settled"
    note = f"segment {number} was rebuilt by a salvage: {repair.reason}. LSNs that are lost: {lost}\n"
    write_durably(fs, f"{name}.note", note.encode())
    if not repair.exists or fs.exists(name):
        return
    temporary = name + TEMPORARY_SUFFIX
    with contextlib.suppress(FileNotFoundError):
        fs.unlink(temporary)
    with _opened(fs, layout, number) as source:
        target = fs.create(temporary)
        try:
            for offset, data in _chunks(source):
                target.write([data], offset)
            sync_file(target, temporary)
        finally:
            target.close()
    fs.rename(temporary, name)
    sync_directory(fs, layout.quarantine)


def _is_same(fs: FileSystem, path: str, other: str) -> bool:
    """Whether two files hold the same bytes."""
    first, second = fs.open_read(path), fs.open_read(other)
    try:
        return first.size() == second.size() and all(
            data == second.read(len(data), offset) for offset, data in _chunks(first)
        )
    finally:
        first.close()
        second.close()


def _chunks(file: File) -> Iterator[tuple[int, bytes]]:
    """The bytes of a file, a bounded piece at a time, each with its offset."""
    offset = 0
    while data := file.read(limits.SCAN_CHUNK_BYTES, offset):
        yield offset, data
        offset += len(data)


@contextlib.contextmanager
def _opened(fs: FileSystem, layout: Layout, number: int) -> Iterator[File]:
    """A segment, open for reading."""
    file = fs.open_read(layout.segment(number))
    try:
        yield file
    finally:
        file.close()
