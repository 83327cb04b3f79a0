"""A read-only look at a store: what recovery would do, every segment's health, the operations in the log.

What is not here: anything that writes, and how to look at a store that an engine is writing to
(`storage.observation`). All functions work on a live store.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

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
    frame_seed,
)
from walbatch.core.recovery import (
    Case,
    Decision,
    IdentityState,
    Plan,
    decide_segment,
    make_plan,
    view_segment,
)
from walbatch.core.routing import shards_of
from walbatch.core.scanner import iterate_frames
from walbatch.errors import ConfigError, CorruptionError, WalbatchError
from walbatch.ports import File, FileSystem
from walbatch.storage.filesystem import RealFileSystem
from walbatch.storage.layout import Layout, read_identity
from walbatch.storage.observation import Observation, Watch, observe, read_state
from walbatch.storage.store import raise_refusal, refusal_error, storage_errors, take_lock
from walbatch.storage.survey import Progress
from walbatch.types import Checkpoint, LaneMemory, Mark


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
    lost: int
    """LSNs in it that an earlier salvage gave up. Some may never have named an operation."""


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
class Count:
    """Operations and the bytes of their keys and payloads."""

    operations: int = 0
    bytes: int = 0


@dataclass(slots=True, kw_only=True)
class Tally:
    """What is counted while frames go by. `open_segment` is for the audit; None: no audit. Close it after one."""

    checkpoint: Checkpoint | None
    open_segment: Callable[[int], File] | None = None
    pending: dict[str, Count] = field(default_factory=dict)
    frames: int = 0
    operations: int = 0
    total_bytes: int = 0
    problems: list[str] = field(default_factory=list)
    _file: File | None = None

    def visit(self, number: int, header: SegmentHeader) -> Callable[[int, FrameHeader, bytes], None]:
        """A function that sees every valid frame of segment `number`."""
        if self.open_segment is not None:
            self.close()
            self._file = self.open_segment(number)
            self._audit(number, 0, SECTOR, 0)

        def see(offset: int, frame: FrameHeader, padded: bytes) -> None:
            self.frames += 1
            self.total_bytes += frame.total_bytes
            if self.open_segment is not None:
                seed = frame_seed(header.salt, number, offset)
                self._audit(number, offset, limits.FRAME_HEADER_BYTES, seed)
                if crc32c_audit(padded, 0) != frame.body_crc:
                    self._disagree(number, offset)
            if frame.type is FrameType.OPERATIONS:
                self.count(number, offset, frame, padded)

        return see

    def count(self, number: int, offset: int, frame: FrameHeader, padded: bytes) -> None:
        """Count the operations of one frame, and what of them is pending."""
        self.operations += frame.count
        try:
            columns = decode_body(frame, padded)
        except FrameError as error:
            self.problems.append(f"segment {number} at offset {offset}: {error}, although its CRC is right")
            return
        for index, kind in enumerate(columns.kinds):
            rows = _pending_rows(frame, columns, index, _marks(kind, self.checkpoint))
            if rows:
                count = self.pending.setdefault(kind, Count())
                count.operations += len(rows)
                count.bytes += sum(len(columns.keys[row]) + len(columns.payloads[row]) for row in rows)

    def close(self) -> None:
        """Release the segment that was audited last."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _audit(self, number: int, offset: int, size: int, seed: int) -> None:
        """Check the CRC at the end of a header with the second implementation."""
        assert self._file is not None
        data = self._file.read(size, offset)
        if crc32c_audit(data[:-4], seed) != int.from_bytes(data[-4:], "little"):
            self._disagree(number, offset)

    def _disagree(self, number: int, offset: int) -> None:
        self.problems.append(f"segment {number} at offset {offset}: the two CRC-32C implementations disagree")


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
    Without it, an engine may be at work: what is shown is what was durable when the look began, at least.
    Raises ConfigError for a path that is no store, UnsupportedFormat for a newer state/, and StorageError for a
    store that cannot be read; damage is reported, not raised.
    """
    layout = find_store(path)
    fs = RealFileSystem()
    tally = Tally(checkpoint=None)

    def begin(checkpoint: Checkpoint | None) -> Watch | None:
        nonlocal tally
        tally.close()
        opener = (lambda number: fs.open_read(layout.segment(number))) if audit else None
        tally = Tally(checkpoint=checkpoint, open_segment=opener)
        return tally.visit if full else None

    with storage_errors(layout.root):
        held = take_lock(fs, layout, b"") if lock and fs.exists(layout.lock) else None
        try:
            found = observe(fs, layout, full=full, locked=held is not None, progress=progress, watch=begin)
            quarantine = list_names(fs, layout.quarantine)
        finally:
            tally.close()
            if held is not None:
                held.release()
    plan = make_plan(found.facts)
    report = _report(layout, found, plan, tally if full else None, quarantine=quarantine)
    return VerifyReport(
        store=report, frames=tally.frames, operations=tally.operations, bytes=tally.total_bytes, audited=audit,
        problems=tuple(tally.problems),
    )  # fmt: skip


def find_store(path: str | os.PathLike[str]) -> Layout:
    """The layout of the store at `path`.

    Raises ConfigError where there is none, StorageError where nobody can tell: what cannot be looked at must not
    pass for what is not there.
    """
    root = os.path.realpath(os.fspath(path))
    layout = Layout(root)
    with storage_errors(root):
        try:
            names = {entry.name for entry in Path(root).iterdir()}
        except FileNotFoundError:
            raise ConfigError(f"{root} does not exist: check the path of the store") from None
        except NotADirectoryError:
            raise ConfigError(f"{root} is a file, and a store is a directory: check the path") from None
        if not {"identity", "wal", "state"} & names:
            raise ConfigError(f"{root} holds no store: check the path")
        # A directory may be listed without its files being within reach.
        with contextlib.suppress(FileNotFoundError):
            Path(layout.identity).lstat()
    return layout


def list_names(fs: FileSystem, path: str) -> tuple[str, ...]:
    """The names in a directory; none where there is no directory."""
    return tuple(fs.list_directory(path)) if fs.is_directory(path) else ()


def _report(
    layout: Layout, found: Observation, plan: Plan, tally: Tally | None, *, quarantine: tuple[str, ...]
) -> StoreReport:  # fmt: skip
    facts, lanes = found.facts, found.lanes
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
                lost=segment.scan.lost if segment.scan else 0,
            )
        )  # fmt: skip
    names = sorted({*lanes, *(tally.pending if tally else ())})
    reports = {}
    for name in names:
        memory = lanes.get(name)
        mark = checkpoint.lanes.get(name) if checkpoint else None
        count = tally.pending.get(name, Count()) if tally else None
        reports[name] = LaneReport(
            name=name, shards=memory.shards if memory else None, url=memory.url if memory else None,
            pending=count.operations if count else None, pending_bytes=count.bytes if count else None,
            settled_lsn=min((shard.watermark for shard in mark.shards), default=0) if mark else 0,
        )  # fmt: skip
    return StoreReport(
        path=layout.root, uuid=facts.store.hex() if facts.store else None, live=found.live,
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
        if not fs.is_directory(layout.root):
            return {}
        _, uuid = read_identity(fs, layout)
        return dict(read_state(layout, uuid)[1])


def operations(
    path: str | os.PathLike[str], *, kind: str | None = None, key: bytes | None = None, first_lsn: int = 1,
    last_lsn: int = limits.LSN_MAX, pending_only: bool = False,
) -> Iterator[LoggedOperation]:  # fmt: skip
    """The operations in the log, by LSN, settled ones included until their segment is trimmed. Memory: one frame.

    Raises ConfigError for a path that is no store; CorruptionError where the log is damaged and UnsupportedFormat
    where it is newer, after everything before that was yielded.
    """
    layout = find_store(path)
    fs = RealFileSystem()
    with storage_errors(layout.root):
        facts = observe(fs, layout).facts
    for index, segment in enumerate(facts.segments):
        following = facts.segments[index + 1].header if index + 1 < len(facts.segments) else None
        bound = min(following.prev_last_lsn if following else segment.last_lsn, last_lsn)
        if segment.header is None or bound < first_lsn:
            continue
        if segment.scan is None and segment.footer is None and pending_only:
            continue  # settled
        with storage_errors(layout.root):
            yield from (
                operation
                for operation in _segment_operations(fs, layout, segment.number, segment.header, bound, facts.checkpoint)
                if first_lsn <= operation.lsn <= last_lsn and (kind is None or operation.kind == kind)
                and (key is None or operation.key == key) and not (pending_only and operation.settled)
            )  # fmt: skip
    raise_refusal(make_plan(facts), layout)


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
            f"{path} at offset {offset}: {error}. Nothing was changed; look with 'walbatch verify {layout.root}'",
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
    marks = [_marks(kind, checkpoint) for kind in columns.kinds]
    routes = [shards_of(columns.keys, len(shards)) for shards in marks]
    rows = zip(columns.kind_indexes, columns.keys, columns.payloads, columns.priorities, strict=True)
    for row, (kind_index, key, payload, priority) in enumerate(rows):
        lsn = frame.first_lsn + row
        yield LoggedOperation(
            lsn=lsn, kind=columns.kinds[kind_index], key=key, payload=payload, priority=priority, segment=number,
            offset=offset, settled=marks[kind_index][routes[kind_index][row]].covers(lsn),
        )  # fmt: skip


def _pending_rows(frame: FrameHeader, columns: Columns, kind: int, marks: tuple[Mark, ...]) -> Sequence[int]:
    """The rows of one kind (by index) that its shards' marks do not call settled."""
    if frame.last_lsn <= min(mark.watermark for mark in marks):
        return ()
    every = range(frame.count)
    rows = every if len(columns.kinds) == 1 else [row for row in every if columns.kind_indexes[row] == kind]
    if all(mark.watermark < frame.first_lsn and not mark.ranges for mark in marks):
        return rows
    route = shards_of(columns.keys, len(marks))
    return [row for row in rows if not marks[route[row]].covers(frame.first_lsn + row)]


def _marks(kind: str, checkpoint: Checkpoint | None) -> tuple[Mark, ...]:
    """What of each shard of a kind is settled."""
    known = checkpoint.lanes.get(kind) if checkpoint else None
    if known is not None and known.shards:
        return known.shards
    return (Mark(watermark=checkpoint.watermark if checkpoint else 0),)
