"""A read-only look at a store: what recovery would do, every segment's health, the operations in the log.

What is not here: anything that writes. All functions work on a live store; its last frames may be in motion
while they look, so what looks like damage is looked at again before it is believed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from walbatch import limits
from walbatch.core.checksum import crc32c_audit
from walbatch.core.frame import (
    SECTOR,
    Columns,
    FrameError,
    FrameHeader,
    FrameType,
    SegmentHeader,
    decode_body,
)
from walbatch.core.recovery import (
    Case,
    Decision,
    IdentityState,
    Plan,
    Severity,
    StoreFacts,
    decide_segment,
    make_plan,
    view_segment,
)
from walbatch.core.routing import shards_of
from walbatch.core.scanner import iterate_frames
from walbatch.errors import CorruptionError, StorageError, WalbatchError
from walbatch.ports import FileLock, StateStore
from walbatch.storage.checkpoint import LmdbState
from walbatch.storage.filesystem import RealFileSystem
from walbatch.storage.layout import Layout, read_identity
from walbatch.storage.store import collect_facts, raise_refusal, refusal_error, storage_errors, take_lock
from walbatch.storage.survey import Progress, survey
from walbatch.types import Checkpoint, LaneMemory, Mark

LOOKS_MAX = 3
"""How often damage is looked at before it is believed: a live engine may have been in the middle of a write."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentReport:
    """One segment file. LSNs are inclusive; last_lsn is first_lsn - 1 for one without operations."""

    number: int
    file_bytes: int
    epoch: int
    first_lsn: int
    last_lsn: int
    operations: int
    label: str
    """The row of the decision table that applies."""
    decision: str
    damage: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneReport:
    """One lane. `pending` and `pending_bytes` are None where nobody counted."""

    name: str
    shards: int | None
    url: str | None
    pending: int | None = None
    pending_bytes: int | None = None
    settled_lsn: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreReport:
    """What a look found."""

    path: str
    uuid: str | None
    live: bool
    """Another engine has the store open."""
    durable_lsn: int
    settled_lsn: int
    next_lsn: int
    """What the next opening would hand out first."""
    checkpoint_generation: int | None
    settled_count: int
    """Operations settled since the store was made, as the checkpoint knows."""
    pending: int
    segments: tuple[SegmentReport, ...]
    lanes: Mapping[str, LaneReport]
    cases: tuple[Case, ...]
    quarantine: tuple[str, ...]
    torn_bytes: int
    copied_operations: int
    refusal: WalbatchError | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggedOperation:
    """An operation in the log."""

    lsn: int
    kind: str
    key: bytes
    payload: bytes
    priority: int
    segment: int
    offset: int
    settled: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """A full check. `problems` are one sentence each; an error that forbids opening is in `store.refusal`."""

    store: StoreReport
    frames: int
    operations: int
    bytes: int
    audited: bool
    problems: tuple[str, ...]


@dataclass(slots=True)
class _Count:
    operations: int = 0
    bytes: int = 0


@dataclass(slots=True)
class _Tally:
    """What is counted while frames go by."""

    checkpoint: Checkpoint | None
    audit: bool = False
    pending: dict[str, _Count] = field(default_factory=dict)
    frames: int = 0
    operations: int = 0
    total_bytes: int = 0
    problems: list[str] = field(default_factory=list)

    def visit(self, number: int, _header: SegmentHeader) -> Callable[[int, FrameHeader, bytes], None]:
        """A function that sees every valid frame of segment `number`."""

        def see(offset: int, frame: FrameHeader, padded: bytes) -> None:
            self.frames += 1
            self.total_bytes += frame.total_bytes
            if self.audit and crc32c_audit(padded, 0) != frame.body_crc:
                self.problems.append(
                    f"segment {number} at offset {offset}: the two CRC-32C implementations disagree"
                )
            if frame.type is not FrameType.OPERATIONS:
                return
            self.operations += frame.count
            try:
                columns = decode_body(frame, padded)
            except FrameError as error:
                self.problems.append(
                    f"segment {number} at offset {offset}: {error}, although its CRC is right"
                )
                return
            for operation in _operations(number, offset, frame, columns, self.checkpoint):
                if not operation.settled:
                    count = self.pending.setdefault(operation.kind, _Count())
                    count.operations += 1
                    count.bytes += len(operation.key) + len(operation.payload)

        return see


def look(
    path: str | os.PathLike[str],
    *,
    full: bool = False,
    lock: bool = False,
    audit: bool = False,
    progress: Progress | None = None,
) -> VerifyReport:
    """Look at a store. Writes nothing.

    Without `full`, what is settled or sealed is trusted, and pending operations are not counted by lane. With
    `lock`, the store's lock is held meanwhile (StoreLocked if an engine has it), so that the answer is exact.
    Raises ConfigError for a path that is no store and StorageError for one that cannot be read; damage is
    reported, not raised.
    """
    root = os.path.realpath(os.fspath(path))
    fs = RealFileSystem()
    layout = Layout(root)
    with storage_errors(root):
        if not fs.is_directory(root):
            raise StorageError(f"{root} is not a directory: there is no store", path=root)
        held: FileLock | None = take_lock(fs, layout, b"") if lock and fs.exists(layout.lock) else None
    try:
        for attempt in range(LOOKS_MAX):
            report = _look_once(fs, layout, full=full, audit=audit, progress=progress)
            if report.store.refusal is None or held is not None or attempt + 1 == LOOKS_MAX:
                return report
        raise AssertionError("unreachable")
    finally:
        if held is not None:
            held.release()


def _look_once(
    fs: RealFileSystem, layout: Layout, *, full: bool, audit: bool, progress: Progress | None
) -> VerifyReport:
    with storage_errors(layout.root):
        identity, uuid = read_identity(fs, layout)
        state = open_state_for_reading(layout, uuid)
        try:
            checkpoint, findings = state.load_checkpoint() if state else (None, [])
            lanes, lane_findings = state.load_lanes() if state else ({}, [])
        finally:
            if state is not None:
                state.close()
        tally = _Tally(checkpoint=checkpoint, audit=audit)
        facts = survey(
            fs, layout, identity=identity, store=uuid, checkpoint=checkpoint, state_findings=(*findings, *lane_findings),
            full=full, progress=progress, visit=tally.visit if full else None,
        )  # fmt: skip
        live = _is_live(fs, layout)
        quarantine = tuple(fs.list_directory(layout.quarantine)) if fs.is_directory(layout.quarantine) else ()
    plan = make_plan(facts)
    return VerifyReport(
        store=_report(layout, facts, plan, lanes, tally if full else None, live=live, quarantine=quarantine),
        frames=tally.frames, operations=tally.operations, bytes=tally.total_bytes, audited=audit, problems=tuple(tally.problems),
    )  # fmt: skip


def open_state_for_reading(layout: Layout, uuid: bytes | None) -> StateStore | None:
    """state/, opened so that nothing is written; None where the store has no identity or no state."""
    if uuid is None:
        return None
    return LmdbState.open(layout.state, uuid, readonly=True, shared=True)


def _is_live(fs: RealFileSystem, layout: Layout) -> bool:
    """Whether another opener holds the lock. The probe takes it for a moment if nobody does."""
    if not fs.exists(layout.lock):
        return False
    probe = fs.lock(layout.lock, b"")
    if isinstance(probe, bytes):
        return True
    probe.release()
    return False


def _report(
    layout: Layout, facts: StoreFacts, plan: Plan, lanes: Mapping[str, LaneMemory], tally: _Tally | None, *, live: bool,
    quarantine: tuple[str, ...],
) -> StoreReport:  # fmt: skip
    checkpoint = facts.checkpoint
    segments = []
    usable = facts.identity is IdentityState.VALID
    for index, segment in enumerate(facts.segments):
        row = decide_segment(view_segment(facts, index)) if usable else None
        header = segment.header
        damage = segment.scan.damage if segment.scan else None
        segments.append(
            SegmentReport(
                number=segment.number, file_bytes=segment.file_bytes, epoch=header.epoch if header else 0,
                first_lsn=header.first_lsn if header else 0, last_lsn=segment.last_lsn, operations=segment.operations,
                label=row.label if row else "", decision=row.decision if row else Decision.CORRUPT,
                damage=damage.reason if damage else None if header else str(segment.state),
            )
        )  # fmt: skip
    names = sorted({*lanes, *(tally.pending if tally else ())})
    reports = {}
    for name in names:
        memory = lanes.get(name)
        mark = checkpoint.lanes.get(name) if checkpoint else None
        count = tally.pending.get(name, _Count()) if tally else None
        reports[name] = LaneReport(
            name=name, shards=memory.shards if memory else None, url=memory.url if memory else None,
            pending=count.operations if count else None, pending_bytes=count.bytes if count else None,
            settled_lsn=min((shard.watermark for shard in mark.shards), default=0) if mark else 0,
        )  # fmt: skip
    return StoreReport(
        path=layout.root, uuid=facts.store.hex() if facts.store else None, live=live,
        durable_lsn=facts.segments[-1].last_lsn if facts.segments else 0, settled_lsn=checkpoint.watermark if checkpoint else 0,
        next_lsn=plan.next_lsn, checkpoint_generation=checkpoint.generation if checkpoint else None,
        settled_count=checkpoint.settled_count if checkpoint else 0,
        pending=sum(count.operations for count in tally.pending.values()) if tally else plan.pending,
        segments=tuple(segments), lanes=reports, cases=plan.cases, quarantine=quarantine,
        torn_bytes=sum(torn.end - torn.offset for torn in plan.torn),
        copied_operations=sum(frame.header.count for frame in plan.copied), refusal=refusal_error(plan, layout),
    )  # fmt: skip


def remembered_lanes(path: str | os.PathLike[str]) -> dict[str, LaneMemory]:
    """The lanes that a store remembers, by name; empty where there is no store yet."""
    layout = Layout(os.path.realpath(os.fspath(path)))
    fs = RealFileSystem()
    with storage_errors(layout.root):
        _, uuid = read_identity(fs, layout) if fs.is_directory(layout.root) else (IdentityState.MISSING, None)
        state = open_state_for_reading(layout, uuid)
        if state is None:
            return {}
        try:
            return state.load_lanes()[0]
        finally:
            state.close()


def operations(
    path: str | os.PathLike[str], *, kind: str | None = None, key: bytes | None = None, first_lsn: int = 1,
    last_lsn: int = limits.LSN_MAX, pending_only: bool = False,
) -> Iterator[LoggedOperation]:  # fmt: skip
    """The operations in the log, by LSN, settled ones included until their segment is trimmed. Memory: one frame.

    Raises CorruptionError where the log is damaged, after everything before the damage was yielded.
    """
    layout = Layout(os.path.realpath(os.fspath(path)))
    fs = RealFileSystem()
    with storage_errors(layout.root):
        _, uuid = read_identity(fs, layout)
        state = open_state_for_reading(layout, uuid)
        try:
            facts = collect_facts(fs, layout, state)
        finally:
            if state is not None:
                state.close()
    for index, segment in enumerate(facts.segments):
        following = facts.segments[index + 1].header if index + 1 < len(facts.segments) else None
        bound = following.prev_last_lsn if following else segment.last_lsn
        if segment.header is None or (following and bound < first_lsn):
            continue
        if segment.scan is None and segment.footer is None and pending_only:
            continue  # settled
        yield from (
            operation
            for operation in _segment_operations(fs, layout, segment.number, segment.header, bound, facts.checkpoint)
            if first_lsn <= operation.lsn <= last_lsn and (kind is None or operation.kind == kind)
            and (key is None or operation.key == key) and not (pending_only and operation.settled)
        )  # fmt: skip
    plan = make_plan(facts)
    if plan.refusal is not None and plan.refusal.severity is Severity.REFUSE:
        raise_refusal(plan, layout)


def _segment_operations(
    fs: RealFileSystem, layout: Layout, number: int, header: SegmentHeader, bound: int, checkpoint: Checkpoint | None,
    ) -> Iterator[LoggedOperation]:  # fmt: skip
    """The operations of one segment up to LSN `bound`."""
    path = layout.segment(number)
    try:
        file = fs.open_read(path)
    except FileNotFoundError:
        return  # a live engine trimmed it
    offset = SECTOR
    try:
        if header.first_lsn > bound:
            return
        for offset, frame in iterate_frames(file.read, header=header, offset=SECTOR, end=file.size()):
            body = file.read(
                frame.total_bytes - limits.FRAME_HEADER_BYTES, offset + limits.FRAME_HEADER_BYTES
            )
            if frame.type is FrameType.OPERATIONS:
                yield from _operations(number, offset, frame, decode_body(frame, body), checkpoint)
            if frame.last_lsn >= bound:
                return
    except FrameError as error:
        raise CorruptionError(
            f"{path}: {error}. Run 'walbatch verify {layout.root}'",
            path=path,
            offset=offset,
            expected="a valid frame",
        ) from error
    finally:
        file.close()


def _operations(
    number: int,
    offset: int,
    frame: FrameHeader,
    columns: Columns,
    checkpoint: Checkpoint | None,
) -> Iterator[LoggedOperation]:
    """The operations of one frame, each with whether the checkpoint calls it settled."""
    marks: list[tuple[str, tuple[Mark, ...], list[int]]] = []
    for kind in columns.kinds:
        mark = checkpoint.lanes.get(kind) if checkpoint else None
        shards = len(mark.shards) if mark else 1
        fallback = (Mark(watermark=checkpoint.watermark if checkpoint else 0),)
        marks.append((kind, mark.shards if mark else fallback, shards_of(columns.keys, shards)))
    rows = zip(columns.kind_indexes, columns.keys, columns.payloads, columns.priorities, strict=True)
    for row, (kind_index, key, payload, priority) in enumerate(rows):
        kind, shard_marks, route = marks[kind_index]
        lsn = frame.first_lsn + row
        yield LoggedOperation(
            lsn=lsn, kind=kind, key=key, payload=payload, priority=priority, segment=number, offset=offset,
            settled=shard_marks[route[row]].covers(lsn),
        )  # fmt: skip
