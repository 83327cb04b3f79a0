"""A read-only look at a store: what recovery would do, every segment's health, the operations in the log.

What is not here: anything that writes, and how to look at a store that an engine is writing to
(`storage.observation`). All functions work on a live store.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from walbatch import limits
from walbatch.core.checksum import crc32c_audit
from walbatch.core.columns import Columns, decode_body
from walbatch.core.controller import ControllerState, LatencyAimd
from walbatch.core.frame import (
    SECTOR,
    FrameError,
    FrameHeader,
    FrameType,
    NewerFrameError,
    SegmentHeader,
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
from walbatch.core.surface import ResponseSurface
from walbatch.errors import ConfigError, CorruptionError, WalbatchError
from walbatch.ports import File, FileSystem
from walbatch.storage.checkpoint import LmdbState
from walbatch.storage.filesystem import RealFileSystem
from walbatch.storage.layout import Layout, read_identity
from walbatch.storage.observation import Observation, Watch, observe, read_beside, read_state
from walbatch.storage.reading import newer_frame
from walbatch.storage.segment import read_header
from walbatch.storage.store import raise_refusal, refusal_error, storage_errors, take_lock
from walbatch.storage.survey import Progress
from walbatch.types import NO_OPTIONS, Checkpoint, DeadLetter, LaneMemory, Mark, Options

_Kept = TypeVar("_Kept")


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
    compacted: bool = False
    """It was rewritten without operations that were settled."""


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
    options: Options = NO_OPTIONS


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """A full check. `problems` are one sentence each; an error that forbids opening is in `store.refusal`."""

    store: StoreReport
    frames: int
    operations: int
    bytes: int
    audited: bool
    problems: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptReport:
    """What a store keeps beside its log. `findings` are one sentence each, of what could not be read."""

    letters: Mapping[str, Count]
    """Dead letters, by lane."""
    idempotency_keys: Mapping[str, int]
    """Keys in state/, by lane. Those of the newest operations are still in the log alone."""
    controllers: Mapping[tuple[str, int], ControllerState | None]
    """What size controllers have learnt, by lane and shard; None where it cannot be told."""
    state_bytes: int
    findings: tuple[str, ...]


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
                lost=segment.scan.lost if segment.scan else 0, compacted=header is not None and header.compacted,
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


def dead_letters(
    path: str | os.PathLike[str], *, kind: str | None = None
) -> tuple[list[DeadLetter], tuple[str, ...]]:
    """The dead letters of a store, by LSN, and what of state/ could not be read, one sentence each.

    Raises ConfigError for a path that is no store, CorruptionError and UnsupportedFormat for one whose identity cannot be
    read, StorageError.
    """
    nothing: list[DeadLetter] = []
    letters, findings = _read_kept(find_store(path), LmdbState.load_letters, nothing)
    return [letter for letter in letters if kind is None or letter.lane == kind], findings


def kept(path: str | os.PathLike[str]) -> KeptReport:
    """What a store keeps beside its log. Raises as `dead_letters`."""
    layout = find_store(path)

    def read(state: LmdbState) -> tuple[KeptReport, list[str]]:
        buried, letter_findings = state.load_letters()
        uses, _, key_findings = state.load_keys()
        snapshots, controller_findings = state.load_controllers()
        letters: dict[str, Count] = {}
        for letter in buried:
            count = letters.setdefault(letter.lane, Count())
            count.operations += 1
            count.bytes += len(letter.key) + len(letter.payload)
        # What is no lane's begins with a zero byte: the history.
        controllers = {
            place: _described(snapshots[place]) for place in sorted(snapshots) if place[0][0] != "\0"
        }
        size = sum(entry.stat().st_size for entry in Path(layout.state).iterdir() if entry.is_file())
        found = KeptReport(
            letters=dict(sorted(letters.items())), idempotency_keys=dict(sorted(Counter(use.lane for use in uses).items())),
            controllers=controllers, state_bytes=size, findings=(),
        )  # fmt: skip
        return found, letter_findings + key_findings + controller_findings

    nothing = KeptReport(letters={}, idempotency_keys={}, controllers={}, state_bytes=0, findings=())
    found, findings = _read_kept(layout, read, nothing)
    return replace(found, findings=findings)


def _read_kept(
    layout: Layout, read: Callable[[LmdbState], tuple[_Kept, list[str]]], nothing: _Kept
) -> tuple[_Kept, tuple[str, ...]]:
    """What `read` finds in state/; `nothing` where the store is not made yet."""
    fs = RealFileSystem()

    def read_all(state: LmdbState) -> tuple[_Kept, list[str]]:
        _, findings = state.load_checkpoint()  # which also tells of a file that cannot be opened
        found, own = read(state)
        return found, findings + own

    with storage_errors(layout.root):
        identity, uuid = read_identity(fs, layout)
        if identity is not IdentityState.VALID or uuid is None:
            raise_refusal(make_plan(observe(fs, layout).facts), layout)
            return nothing, ()
        if not fs.is_directory(layout.state):
            return nothing, ()
        return read_beside(layout, uuid, read_all)


def _described(snapshot: bytes) -> ControllerState | None:
    """What a snapshot says; None for one of no controller that we know."""
    for controller in (ResponseSurface(), LatencyAimd()):
        if controller.restore(snapshot):
            return controller.describe()
    return None


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
    reached = first_lsn - 1
    for index, segment in enumerate(facts.segments):
        following = facts.segments[index + 1].header if index + 1 < len(facts.segments) else None
        bound = min(following.prev_last_lsn if following else segment.last_lsn, last_lsn)
        if segment.header is None or bound < first_lsn:
            continue
        if segment.scan is None and segment.footer is None and pending_only:
            continue  # settled
        with storage_errors(layout.root):
            for operation in _segment_operations(
                fs, layout, segment.number, segment.header, bound, facts.checkpoint
            ):
                # A live engine may have merged segments meanwhile: the later one begins with what stood in those before it.
                if not reached < operation.lsn <= last_lsn:
                    continue
                reached = operation.lsn
                if (
                    (kind is None or operation.kind == kind) and (key is None or operation.key == key)
                    and not (pending_only and operation.settled)
                ):  # fmt: skip
                    yield operation
    raise_refusal(make_plan(facts), layout)


def _segment_operations(
    fs: RealFileSystem, layout: Layout, number: int, header: SegmentHeader, bound: int, checkpoint: Checkpoint | None,
    ) -> Iterator[LoggedOperation]:  # fmt: skip
    """The operations of one segment up to LSN `bound`."""
    path = layout.segment(number)
    try:
        file = fs.open_read(path)
    except FileNotFoundError:
        return  # a live engine trimmed it, or merged it into a later one
    offset = SECTOR
    try:
        if header.first_lsn > bound:
            return
        present = read_header(file)[1]
        if present is not None and present.compacted:
            header = present  # a live engine may have compacted it just now
        for offset, frame in iterate_frames(file.read, header=header, offset=SECTOR, end=file.size()):
            body = file.read(
                frame.total_bytes - limits.FRAME_HEADER_BYTES, offset + limits.FRAME_HEADER_BYTES
            )
            if frame.type is FrameType.OPERATIONS:
                yield from _operations(number, offset, frame, decode_body(frame, body), checkpoint)
            if frame.last_lsn >= bound:
                return
    except NewerFrameError as error:
        raise newer_frame(path, offset, error) from error
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
    rows = zip(
        columns.lsns(frame.first_lsn), columns.kind_indexes, columns.keys, columns.payloads, columns.priorities,
        columns.options or [NO_OPTIONS] * frame.count, strict=True,
    )  # fmt: skip
    for row, (lsn, kind_index, key, payload, priority, options) in enumerate(rows):
        yield LoggedOperation(
            lsn=lsn, kind=columns.kinds[kind_index], key=key, payload=payload, priority=priority, segment=number,
            offset=offset, settled=marks[kind_index][routes[kind_index][row]].covers(lsn), options=options,
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
    lsns = columns.lsns(frame.first_lsn)
    return [row for row in rows if not marks[route[row]].covers(lsns[row])]


def _marks(kind: str, checkpoint: Checkpoint | None) -> tuple[Mark, ...]:
    """What of each shard of a kind is settled."""
    known = checkpoint.lanes.get(kind) if checkpoint else None
    if known is not None and known.shards:
        return known.shards
    return (Mark(watermark=checkpoint.watermark if checkpoint else 0),)
