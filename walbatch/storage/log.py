"""The log: the chain of segments. It carries out recovery's plan, appends, syncs, rolls, reads back and trims.

What is not here: decisions about damage (`core.recovery`), and who waits for what (`runtime.committer`).

The idea needed to read it: one thread appends, to a segment that this process made; all other segments never
change again until they are trimmed. Each directory change is durable before anything relies on it.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import zstandard

from walbatch import limits
from walbatch.core.frame import (
    EMPTY_BODY,
    FLAG_CLEAN,
    FLAG_COPIED,
    SECTOR,
    Body,
    Columns,
    FrameError,
    FrameHeader,
    FrameIndex,
    FrameType,
    SegmentHeader,
    check_body,
    decode_body,
    encode_body,
)
from walbatch.core.recovery import Plan, StoreFacts, TornTail
from walbatch.core.scanner import read_frame_header
from walbatch.errors import CorruptionError, StorageError
from walbatch.ports import Clock, Entropy, File, FileSystem, Threads
from walbatch.storage.layout import TEMPORARY_SUFFIX, Layout, keep_copy, sync_directory, write_durably
from walbatch.storage.segment import FirstFrame, SegmentWriter, next_wanted_offset, read_footer
from walbatch.types import Position


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """A frame of operations that was read back."""

    position: Position
    next_position: Position
    header: FrameHeader
    columns: Columns

    @property
    def lsns(self) -> range:
        """The LSNs of its operations."""
        return range(self.header.first_lsn, self.header.last_lsn + 1)

    @property
    def last_lsn(self) -> int:
        """Its last LSN."""
        return self.header.last_lsn

    @property
    def kinds(self) -> Sequence[str]:
        """Names of kinds."""
        return self.columns.kinds

    @property
    def kind_indexes(self) -> Sequence[int]:
        """For each operation, the index of its kind in `kinds`."""
        return self.columns.kind_indexes

    @property
    def priorities(self) -> Sequence[int]:
        """Priorities, 0 to 10."""
        return self.columns.priorities

    @property
    def keys(self) -> Sequence[bytes]:
        """Keys."""
        return self.columns.keys

    @property
    def payloads(self) -> Sequence[bytes]:
        """Payloads."""
        return self.columns.payloads


@dataclass(frozen=True, slots=True, kw_only=True)
class ClosedSegment:
    """A segment that will not change: up to `end_offset` its frames count, up to `last_lsn`."""

    header: SegmentHeader
    end_offset: int
    last_lsn: int
    file_bytes: int
    kinds: frozenset[str] | None
    """Kinds that it holds operations of, where its footer was read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogSettings:
    """What the log needs of the settings."""

    segment_bytes: int
    compress_bytes_min: int | None
    compress_level: int


class Log:
    """An open log. One thread at a time appends, syncs and stamps; one reads frames; one trims; all three at once."""

    def __init__(
        self, fs: FileSystem, layout: Layout, clock: Clock, entropy: Entropy, threads: Threads, settings: LogSettings,
        active: SegmentWriter, closed: dict[int, ClosedSegment],
    ) -> None:  # fmt: skip
        self._fs = fs
        self._layout = layout
        self._clock = clock
        self._entropy = entropy
        self._settings = settings
        self._compressor = zstandard.ZstdCompressor(level=settings.compress_level)
        self._active = active
        self._unsynced = False
        self._syncing = False
        self._broken: str | None = None
        self._checkpointed_lsn = 0
        # Guards _closed, _files and _indexes: the reader, the leader (rolling) and the checkpointer
        # (trimming) meet here.
        self._guard = threads.condition()
        self._closed = closed
        self._closed_bytes = sum(segment.file_bytes for segment in closed.values())
        self._reading: tuple[int, File] | None = None
        self._indexes: dict[int, FrameIndex | None] = {}

    def __repr__(self) -> str:
        return f"<Log {self._layout.root}: {len(self._closed)} closed segments, active {self._active!r}>"

    # --- opening ---------------------------------------------------------------------------------------------------

    @classmethod
    def open(
        cls, fs: FileSystem, layout: Layout, clock: Clock, entropy: Entropy, threads: Threads, settings: LogSettings,
        *, facts: StoreFacts, plan: Plan,
    ) -> Log:  # fmt: skip
        """Carry out a plan that refuses nothing, and open the log for appending to a new segment.

        Crash story, in order: torn bytes are copied to quarantine/ and synced (repeating finds the copy and
        writes it again); the new segment, holding the unproven frames and the skipped LSNs, is made durable
        as a whole. Until that moment a second recovery sees the same facts; after it, the new header cuts the
        old tail off. Nothing is ever removed here but temporary files, which hold nothing acknowledged.
        """
        assert plan.refusal is None
        assert facts.store is not None
        # An opening that was killed between its rename and its directory sync left a segment that is there now, and might not be
        # after a power cut. Nothing may build on a name before the name is durable.
        sync_directory(fs, layout.wal)
        _remove_temporary_files(fs, layout)
        for torn in plan.torn:
            _quarantine(fs, layout, torn)
        watermark = facts.checkpoint.watermark if facts.checkpoint else _trimmed_lsn(facts)
        prev = plan.prev
        header = SegmentHeader(
            store=facts.store, salt=int.from_bytes(entropy.random_bytes(8), "little"), epoch=plan.epoch,
            number=plan.next_segment, first_lsn=plan.prev_last_lsn + 1, prev_number=prev.number if prev else 0,
            prev_salt=prev.salt if prev else 0, prev_last_lsn=plan.prev_last_lsn, operations_before=plan.operations_before,
            checkpointed_lsn=watermark, created_wall_ns=clock.wall_ns(),
        )  # fmt: skip
        active = SegmentWriter.create(
            fs, layout.segment(header.number), header, segment_bytes=settings.segment_bytes, wall_ns=clock.wall_ns(),
            first=list(_first_frames(fs, layout, plan)),
        )  # fmt: skip
        closed = _closed_segments(facts, plan)
        try:
            _cut_predecessor(fs, layout, closed, header.prev_number)
        except BaseException:
            active.close()
            raise
        log = cls(fs, layout, clock, entropy, threads, settings, active, closed)
        log._checkpointed_lsn = watermark
        return log

    # --- appending -------------------------------------------------------------------------------------------------

    @property
    def end(self) -> Position:
        """Where the next frame will start, if it does not roll."""
        return Position(self._active.header.number, self._active.offset)

    @property
    def last_lsn(self) -> int:
        """Last LSN that was appended."""
        return self._active.last_lsn

    @property
    def checkpointed_lsn(self) -> int:
        """Up to where trimming was allowed."""
        return self._checkpointed_lsn

    @property
    def disk_bytes(self) -> int:
        """Bytes of all segments, the active one as far as it is written."""
        return self._closed_bytes + self._active.file_bytes

    @property
    def segment_count(self) -> int:
        """Segments on disk."""
        return len(self._closed) + 1

    def append(
        self, *, first_lsn: int, kinds: Sequence[str], kind_indexes: Sequence[int], priorities: Sequence[int],
        keys: Sequence[bytes], payloads: Sequence[bytes], synced_lsn: int,
    ) -> Position:  # fmt: skip
        """Write one frame; returns its position. Not durable until `sync`. Repeating after an OSError is safe."""
        self._check()
        assert first_lsn == self._active.last_lsn + 1, "LSNs are contiguous"
        body = encode_body(
            Columns(kinds=tuple(kinds), kind_indexes=kind_indexes, priorities=priorities, keys=keys, payloads=payloads),
            compress_bytes_min=self._settings.compress_bytes_min, compressor=self._compressor,
        )  # fmt: skip
        if (
            self._active.offset > SECTOR
            and self._active.offset + body.total_bytes > self._settings.segment_bytes
        ):
            self._roll()
        number = self._active.header.number
        self._unsynced = True
        offset = self._active.append(
            body, type=FrameType.OPERATIONS, first_lsn=first_lsn, span=body.count, synced_lsn=synced_lsn,
            wall_ns=self._clock.wall_ns(), kind_counts=_kind_counts(kinds, kind_indexes), priority=max(priorities),
        )  # fmt: skip
        return Position(number, offset)

    def sync(self) -> None:
        """fdatasync the active segment. After a StorageError the log refuses everything: it must be reopened.

        A signal's exception may arrive at any bytecode, and hide that the sync has failed. So `_syncing` stays set unless
        it is certain that it has not; a sync that was merely interrupted can be made again.
        """
        self._check()
        if self._syncing:
            raise StorageError(
                "the log accepts nothing more: how a sync of it ended is unknown", path=self._layout.root
            )
        if not self._unsynced:
            return
        ambient = sys.exception()
        try:
            self._syncing = True
            with self._breaking():
                self._active.sync()
            self._unsynced = False
            self._syncing = False
        except BaseException as error:
            if _failure_under(error, ambient) is None:
                self._syncing = False
            raise

    def stamp(self, *, next_lsn: int, clean: bool) -> None:
        """Sync, then write and sync an idle stamp.

        Crash story: the stamp is written only after what it proves was synced; a stamp that is lost proves
        nothing and costs nothing.
        """
        self.sync()
        assert next_lsn == self._active.last_lsn + 1
        self._unsynced = True
        self._active.stamp(next_lsn=next_lsn, flags=FLAG_CLEAN if clean else 0, wall_ns=self._clock.wall_ns())
        self.sync()

    def close(self, *, next_lsn: int | None) -> None:
        """Release all files. With `next_lsn`, stamp a clean end first and give back preallocated room."""
        try:
            if next_lsn is not None and self._broken is None:
                self.stamp(next_lsn=next_lsn, clean=True)
                self._active.cut()
        finally:
            self._active.close()
            with self._guard:
                self._close_reading()
                self._broken = self._broken or "it is closed"

    def _check(self) -> None:
        if self._broken is not None:
            raise StorageError(f"the log accepts nothing more: {self._broken}", path=self._layout.root)

    @contextlib.contextmanager
    def _breaking(self) -> Iterator[None]:
        """A failed sync ends the log: the kernel may have dropped the pages, and says so only once.

        An OSError is one of a write, which may be made again; under a signal's exception nobody can tell.
        """
        ambient = sys.exception()
        try:
            yield
        except StorageError as error:
            self._broken = str(error)
            raise
        except OSError:
            raise
        except BaseException as error:
            failure = _failure_under(error, ambient)
            if failure is not None:
                self._broken = str(failure)
            raise

    def _roll(self) -> None:
        """Seal the active segment and make the next one. Repeating after an error goes on where it stopped.

        Crash story: what was appended is synced, then the footer is synced, then the next segment becomes
        durable as a whole. In between, the sealed segment is simply the last one. Nothing is written to the
        next before it is durable.
        """
        old = self._active
        self.sync()
        with self._breaking():
            old.seal(wall_ns=self._clock.wall_ns())
            header = replace(
                old.header, number=old.header.number + 1, first_lsn=old.last_lsn + 1, prev_number=old.header.number,
                prev_salt=old.header.salt, prev_last_lsn=old.last_lsn,
                operations_before=old.header.operations_before + old.operations,
                checkpointed_lsn=self._checkpointed_lsn, created_wall_ns=self._clock.wall_ns(),
            )  # fmt: skip
            active = SegmentWriter.create(
                self._fs, self._layout.segment(header.number), header, segment_bytes=self._settings.segment_bytes,
                wall_ns=self._clock.wall_ns(), first=[],
            )  # fmt: skip
        index = old.index()
        with self._guard:
            self._closed[old.header.number] = ClosedSegment(
                header=old.header, end_offset=old.offset, last_lsn=old.last_lsn, file_bytes=old.file_bytes,
                kinds=frozenset(index.kinds),
            )  # fmt: skip
            self._closed_bytes += old.file_bytes
            self._active = active
        old.close()

    # --- reading back ---

    def read_frame(self, position: Position, *, wanted: frozenset[str] | None = None) -> Frame | None:
        """The first frame of operations at or after `position`, skipping where footers allow.

        None where the log ends.

        Raises CorruptionError for a frame that is not what was written, StorageError where it cannot be read.
        """
        while True:
            with self._guard:
                active = self._active
                number, offset = position.segment, position.offset
                closed = self._closed.get(number)
                if number != active.header.number and closed is None:
                    number = min((n for n in [*self._closed, active.header.number] if n > number), default=0)
                    if not number:
                        return None
                    position = Position(number, SECTOR)
                    continue
                end = closed.end_offset if closed else active.offset
                header = closed.header if closed else active.header
            if closed and wanted is not None and offset < end:
                skipped = self._skip(closed, offset, wanted)
                if skipped is None:
                    position = Position(number + 1, SECTOR)
                    continue
                offset = skipped
            if offset >= end:
                if closed is None:
                    return None
                position = Position(number + 1, SECTOR)
                continue
            frame = self._read_at(header, Position(number, offset))
            if isinstance(frame, Frame):
                return frame
            position = Position(number, offset + frame.total_bytes) if frame else Position(number + 1, SECTOR)

    def _skip(self, closed: ClosedSegment, offset: int, wanted: frozenset[str]) -> int | None:
        """The next offset worth reading in a closed segment; None if it holds nothing more of `wanted`."""
        if closed.kinds is None:
            return offset
        if closed.kinds.isdisjoint(wanted):
            return None
        if closed.kinds <= wanted:
            return offset
        number = closed.header.number
        if number not in self._indexes:
            with self._reading_errors(number):
                file = self._file(number)
                found = read_footer(file, closed.header, closed.file_bytes) if file else None
            with self._guard:
                if len(self._indexes) >= 2:  # noqa: PLR2004 - two readers, two places
                    self._indexes.clear()
                self._indexes[number] = found[1] if found else None
        index = self._indexes.get(number)
        return offset if index is None else next_wanted_offset(index, offset, wanted)

    def _read_at(self, segment: SegmentHeader, position: Position) -> Frame | FrameHeader | None:
        """The frame at `position`, decoded if it holds operations; None if its segment was trimmed meanwhile."""
        path = self._layout.segment(position.segment)
        try:
            with self._reading_errors(position.segment):
                file = self._file(position.segment)
                if file is None:
                    return None
                header = read_frame_header(file.read, header=segment, offset=position.offset)
                if header.type is not FrameType.OPERATIONS:
                    return header
                body = file.read(
                    header.total_bytes - limits.FRAME_HEADER_BYTES,
                    position.offset + limits.FRAME_HEADER_BYTES,
                )
            columns = decode_body(header, body)
        except FrameError as error:
            raise CorruptionError(
                f"{path} at offset {position.offset}: {error}. These operations were acknowledged. Nothing was changed; "
                f"keep a copy of the store, then run 'walbatch verify {self._layout.root}'",
                path=path, offset=position.offset, expected="a valid frame",
            ) from error  # fmt: skip
        return Frame(
            position=position, next_position=Position(position.segment, position.offset + header.total_bytes),
            header=header, columns=columns,
        )  # fmt: skip

    @contextlib.contextmanager
    def _reading_errors(self, number: int) -> Iterator[None]:
        """An error of the file system while a segment is read back is no damage."""
        path = self._layout.segment(number)
        try:
            yield
        except OSError as error:
            raise StorageError(
                f"cannot read {path}: {error.strerror or error}. Nothing is lost; repair the disk and reopen", path=path,
                errno=error.errno,
            ) from error  # fmt: skip

    def _file(self, number: int) -> File | None:
        """A segment's open file; None if it was trimmed. The reader's thread alone opens and closes it.

        One file stays open, so a trimmed segment's room is given back when the reader goes on to the next.
        """
        if self._reading is not None and self._reading[0] == number:
            return self._reading[1]
        self._close_reading()
        try:
            file = self._fs.open_read(self._layout.segment(number))
        except FileNotFoundError:
            with self._guard:
                if number in self._closed or number == self._active.header.number:
                    raise
            return None
        self._reading = (number, file)
        return file

    def _close_reading(self) -> None:
        reading, self._reading = self._reading, None
        if reading is not None:
            reading[1].close()

    # --- trimming ---

    def trim(self, lsn: int) -> int:
        """Remove the oldest segments whose operations all have an LSN up to `lsn`. Returns how many.

        Crash story: the caller made the checkpoint that allows this durable first. Unlinks may be undone by a
        power cut in any order; a segment that comes back is below the checkpoint, and a hole that it leaves
        is too. One thread at a time.
        """
        self._check()
        self._checkpointed_lsn = max(self._checkpointed_lsn, lsn)
        with self._guard:
            oldest = sorted(self._closed)
        removed = 0
        for number in oldest:
            if self._closed[number].last_lsn > lsn:
                break
            with self._guard:  # forgotten first: a reader that still wants it goes on behind it
                segment = self._closed.pop(number)
                self._closed_bytes -= segment.file_bytes
                self._indexes.pop(number, None)
            try:
                self._fs.unlink(self._layout.segment(number))
            except BaseException:
                with self._guard:  # it is still there, and counts until a later trim removes it
                    self._closed[number] = segment
                    self._closed_bytes += segment.file_bytes
                raise
            removed += 1
        if removed:
            with self._breaking():
                sync_directory(self._fs, self._layout.wal)
        return removed


def _failure_under(error: BaseException, ambient: BaseException | None) -> BaseException | None:
    """The failure that `error` is or hides, if any; what the caller was handling before (`ambient`) does not count."""
    cause: BaseException | None = error
    while cause is not None and cause is not ambient:
        if isinstance(cause, (OSError, StorageError)):
            return cause
        cause = cause.__context__
    return None


def _kind_counts(kinds: Sequence[str], kind_indexes: Sequence[int]) -> dict[str, int]:
    """Operations by kind."""
    if len(kinds) == 1:
        return {kinds[0]: len(kind_indexes)}
    indexes = list(kind_indexes)
    return {kind: indexes.count(index) for index, kind in enumerate(kinds)}


def _trimmed_lsn(facts: StoreFacts) -> int:
    """Without a checkpoint: what was trimmed, hence settled. The log itself has to go on telling it.

    The next checkpoint will begin below what is missing, and would make it look lost.
    """
    first = facts.segments[0].header if facts.segments else None
    return first.prev_last_lsn if first is not None else 0


def _remove_temporary_files(fs: FileSystem, layout: Layout) -> None:
    """Remove what an interrupted creation left. No temporary file ever holds the only copy of anything."""
    for name in fs.list_directory(layout.wal):
        if name.endswith(TEMPORARY_SUFFIX):
            fs.unlink(f"{layout.wal}/{name}")


def _quarantine(fs: FileSystem, layout: Layout, torn: TornTail) -> None:
    """Copy a torn tail out of its segment, with a note of where it came from. The segment itself stays as it is."""
    fs.make_directory(layout.quarantine)
    size = torn.end - torn.offset
    name = keep_copy(
        fs,
        layout.segment(torn.segment),
        f"{layout.quarantine}/{torn.segment:019d}-{torn.offset}",
        torn.offset,
        size,
    )
    note = f"segment {torn.segment}, offset {torn.offset}, {size} bytes: torn tail, never acknowledged ({torn.reason})\n"
    write_durably(fs, f"{name}.note", note.encode())


def _cut_predecessor(fs: FileSystem, layout: Layout, closed: dict[int, ClosedSegment], number: int) -> None:
    """Give back the preallocated room of the segment that a crash left behind.

    Crash story: the new segment's header, which cuts the old one off at this very place, is durable. What stood behind it was
    copied to the new segment or to quarantine/. Whether the cut itself survives does not matter.
    """
    old = closed.get(number)
    if old is not None and old.file_bytes > old.end_offset:
        fs.truncate(layout.segment(number), old.end_offset)
        closed[number] = replace(old, file_bytes=old.end_offset)


def _first_frames(fs: FileSystem, layout: Layout, plan: Plan) -> Iterator[FirstFrame]:
    """What the new segment starts with: unproven frames, the skipped LSNs, and the proof that they are durable.

    The stamp is honest although it is written with the rest: nobody sees the segment before all of it is synced.
    """
    next_lsn = plan.prev_last_lsn + 1
    if plan.copied:
        assert plan.prev is not None
        file = fs.open_read(layout.segment(plan.prev.number))
        try:
            for frame in plan.copied:
                size = frame.header.total_bytes - limits.FRAME_HEADER_BYTES
                yield _copied_frame(
                    frame.header, file.read(size, frame.offset + limits.FRAME_HEADER_BYTES), plan
                )
                next_lsn = frame.header.last_lsn + 1
        finally:
            file.close()
    if plan.next_lsn > next_lsn:
        yield FirstFrame(
            body=EMPTY_BODY, type=FrameType.VOID, first_lsn=next_lsn, span=plan.next_lsn - next_lsn, synced_lsn=plan.prev_last_lsn,
            flags=0, kind_counts={}, priority=0,
        )  # fmt: skip
    if plan.next_lsn > plan.prev_last_lsn + 1:
        yield FirstFrame(
            body=EMPTY_BODY, type=FrameType.STAMP, first_lsn=plan.next_lsn, span=0,
            synced_lsn=plan.next_lsn - 1, flags=0, kind_counts={}, priority=0,
        )  # fmt: skip


def _copied_frame(header: FrameHeader, padded: bytes, plan: Plan) -> FirstFrame:
    """An unproven frame for its new place: the same body under a new header.

    Checked again, since it was read again.
    """
    try:
        check_body(header, padded)
        columns = decode_body(header, padded) if header.type is FrameType.OPERATIONS else None
    except FrameError as error:
        raise StorageError(
            f"the unproven tail reads differently the second time ({error}): check the disk"
        ) from error
    body = Body(
        codec=header.codec, count=header.count, stored_bytes=header.stored_bytes, raw_bytes=header.raw_bytes,
        padded=padded, crc=header.body_crc,
    )  # fmt: skip
    return FirstFrame(
        body=body, type=header.type, first_lsn=header.first_lsn, span=header.span, synced_lsn=plan.prev_last_lsn,
        flags=header.flags | FLAG_COPIED, kind_counts=_kind_counts(columns.kinds, columns.kind_indexes) if columns else {},
        priority=max(columns.priorities) if columns else 0,
    )  # fmt: skip


def _closed_segments(facts: StoreFacts, plan: Plan) -> dict[int, ClosedSegment]:
    """The segments of earlier incarnations, each up to where the next one cuts it off.

    A segment whose header cannot be read is there only if it is settled; it is taken for its place in the
    order, to be trimmed.
    """
    closed: dict[int, ClosedSegment] = {}
    for index, segment in enumerate(facts.segments):
        following = facts.segments[index + 1].header if index + 1 < len(facts.segments) else None
        last = index + 1 == len(facts.segments)
        last_lsn = plan.prev_last_lsn if last else following.prev_last_lsn if following else segment.last_lsn
        end = plan.copied[0].offset if last and plan.copied else segment.end_offset
        header = segment.header or SegmentHeader(
            store=facts.store or b"", salt=0, epoch=0, number=segment.number, first_lsn=1, prev_number=0, prev_salt=0,
            prev_last_lsn=0, operations_before=0, checkpointed_lsn=0, created_wall_ns=0,
        )  # fmt: skip
        closed[segment.number] = ClosedSegment(
            header=header, end_offset=end, last_lsn=last_lsn, file_bytes=segment.file_bytes,
            kinds=frozenset(segment.footer.kinds) if segment.footer else None,
        )  # fmt: skip
    return closed
