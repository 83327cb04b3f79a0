"""The log: the chain of segments. It carries out recovery's plan, appends, syncs, rolls, trims and compacts.

What is not here: decisions about damage (`core.recovery`), reading back (`reading`), what a compaction writes
(`compaction`), and who waits for what (`runtime.committer`).

The idea needed to read it: one thread appends, to a segment that this process made; all other segments never change
again, until they are trimmed or replaced as a whole. Each directory change is durable before anything relies on it.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from walbatch import limits
from walbatch.core.columns import ONE_BYTES_MAX, Columns, encode_body, encode_one
from walbatch.core.compaction import by_kind, measured_bytes, scaled, summed
from walbatch.core.compression import Compressor
from walbatch.core.frame import FLAG_CLEAN, SECTOR, SEGMENT_OPTIONS, FrameType, SegmentHeader
from walbatch.core.recovery import Plan, StoreFacts
from walbatch.errors import StorageError
from walbatch.ports import Clock, Entropy, FileSystem, Threads
from walbatch.storage.compaction import (
    Compactions,
    DamagedSegmentError,
    Rewritten,
    UnreadableSegmentError,
    discard,
    rewrite,
)
from walbatch.storage.dropped import joined, write_dropped
from walbatch.storage.layout import TEMPORARY_SUFFIX, Layout, sync_directory, sync_failed
from walbatch.storage.opening import (
    closed_segments,
    cut_predecessor,
    first_frames,
    highest,
    kind_counts,
    quarantine,
    remove_temporary_files,
    trimmed_lsn,
)
from walbatch.storage.reading import Extent, Frame, Reader
from walbatch.storage.segment import ClosedSegment, SegmentWriter
from walbatch.types import Checkpoint, Options, Position

_logger = logging.getLogger("walbatch")


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
        *, active: SegmentWriter, closed: dict[int, ClosedSegment], dropped: Checkpoint | None,
    ) -> None:  # fmt: skip
        self._fs = fs
        self._layout = layout
        self._clock = clock
        self._entropy = entropy
        self._settings = settings
        self._compressor = Compressor(level=settings.compress_level)
        self._active = active
        self._unsynced = False
        self._syncing = False
        self._broken: str | None = None
        self._checkpointed_lsn = 0
        # Guards _active, _closed and _closed_bytes: the reader, the leader (rolling) and the checkpointer
        # (trimming, compacting) meet here.
        self._guard = threads.condition()
        self._closed = closed
        self._closed_bytes = sum(segment.file_bytes for segment in closed.values())
        self._reader = Reader(fs, layout, self._extent_at)
        # Of the checkpointer's thread.
        self._compactions = Compactions(dropped=dropped, level=settings.compress_level)

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
        old tail off. Nothing is ever removed here but temporary files, which hold nothing acknowledged, and
        segments that a compaction had merged into another one, whose name is durable.
        """
        assert plan.refusal is None
        assert facts.store is not None
        # An opening that was killed between its rename and its directory sync left a segment that is there now, and might not be
        # after a power cut. Nothing may build on a name before the name is durable.
        sync_directory(fs, layout.wal)
        remove_temporary_files(fs, layout)
        for number in plan.superseded:  # their successor's name is durable: nobody will need them
            fs.unlink(layout.segment(number))
        for torn in plan.torn:
            quarantine(fs, layout, torn)
        watermark = facts.checkpoint.watermark if facts.checkpoint else trimmed_lsn(facts)
        prev = plan.prev
        header = SegmentHeader(
            store=facts.store, salt=int.from_bytes(entropy.random_bytes(8), "little"), epoch=plan.epoch,
            number=plan.next_segment, first_lsn=plan.prev_last_lsn + 1, prev_number=prev.number if prev else 0,
            prev_salt=prev.salt if prev else 0, prev_last_lsn=plan.prev_last_lsn, operations_before=plan.operations_before,
            checkpointed_lsn=watermark, created_wall_ns=clock.wall_ns(), flags=prev.flags & SEGMENT_OPTIONS if prev else 0,
        )  # fmt: skip
        active = SegmentWriter.create(
            fs, layout.segment(header.number), header, segment_bytes=settings.segment_bytes, wall_ns=clock.wall_ns(),
            first=list(first_frames(fs, layout, plan)),
        )  # fmt: skip
        keep_freed_memory()
        closed = closed_segments(facts, plan)
        try:
            cut_predecessor(fs, layout, closed, header.prev_number)
        except BaseException:
            active.close()
            raise
        log = cls(
            fs, layout, clock, entropy, threads, settings, active=active, closed=closed, dropped=facts.dropped
        )
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
    def has_options(self) -> bool:
        """Whether any operation of this store, trimmed ones included, may ever have had options. Survives reopening."""
        return bool(self._active.header.flags & SEGMENT_OPTIONS)

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
        keys: Sequence[bytes], payloads: Sequence[bytes], synced_lsn: int, options: Sequence[Options] = (),
    ) -> Position:  # fmt: skip
        """Write one frame; returns its position. Not durable until `sync`. Repeating after an OSError is safe.

        The first options of a store begin a new segment, whose header says so: an older walbatch refuses it as a whole.
        """
        self._check()
        assert first_lsn == self._active.last_lsn + 1, "LSNs are contiguous"
        compress_bytes_min = self._settings.compress_bytes_min
        if (
            len(keys) == 1 and not options and len(kinds) == 1
            and (compress_bytes_min is None or len(keys[0]) + len(payloads[0]) + ONE_BYTES_MAX < compress_bytes_min)
        ):  # fmt: skip
            priority, counts = priorities[0], {kinds[0]: 1}
            body = encode_one((kinds[0],), priority, keys[0], payloads[0])
        else:
            priority, counts = highest(priorities), kind_counts(kinds, kind_indexes)
            body = encode_body(
                Columns(
                    kinds=tuple(kinds), kind_indexes=kind_indexes, priorities=priorities, keys=keys, payloads=payloads,
                    options=options,
                ),
                compress_bytes_min=compress_bytes_min, compressor=self._compressor,
            )  # fmt: skip
        flags = SEGMENT_OPTIONS if options else 0
        full = (
            self._active.offset > SECTOR
            and self._active.offset + body.total_bytes > self._settings.segment_bytes
        )
        if full or flags & ~self._active.header.flags:
            self._roll(flags=flags)
        number = self._active.header.number
        self._unsynced = True
        offset = self._active.append(
            body, type=FrameType.OPERATIONS, first_lsn=first_lsn, span=body.count, synced_lsn=synced_lsn,
            wall_ns=self._clock.wall_ns(), kind_counts=counts, priority=priority,
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
            self._active.sync()
            self._unsynced = False
            self._syncing = False
        except BaseException as error:
            failure = _failure_under(error, ambient)
            if failure is None:
                self._syncing = False
            else:
                self._broken = str(failure)
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
            self._reader.close()
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

    def _roll(self, *, flags: int) -> None:
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
                checkpointed_lsn=self._checkpointed_lsn, created_wall_ns=self._clock.wall_ns(), flags=old.header.flags | flags,
            )  # fmt: skip
            active = SegmentWriter.create(
                self._fs, self._layout.segment(header.number), header, segment_bytes=self._settings.segment_bytes,
                wall_ns=self._clock.wall_ns(), first=[],
            )  # fmt: skip
        index = old.index()
        with self._guard:
            self._closed[old.header.number] = ClosedSegment(
                header=old.header, end_offset=old.offset, last_lsn=old.last_lsn, file_bytes=old.file_bytes,
                kinds=frozenset(index.kinds), unsettled=by_kind(index.kind_totals()),
            )  # fmt: skip
            self._closed_bytes += old.file_bytes
            self._active = active
        old.close()

    # --- reading back ---

    def read_frame(
        self,
        position: Position,
        *,
        next_lsn: int,
        wanted: frozenset[str] | None = None,
        priority_min: int = 0,
    ) -> Frame | None:
        """The first frame of operations at or after `position`, skipping what lies below `next_lsn` and where footers allow.

        None where the log ends.

        Raises CorruptionError for a frame that is not what was written, StorageError where it cannot be read,
        UnsupportedFormat for what a later version wrote.
        """
        return self._reader.read_frame(position, next_lsn=next_lsn, wanted=wanted, priority_min=priority_min)

    def position_of(self, lsn: int) -> Position:
        """Where to begin to read for an LSN: the beginning of the segment that holds it, or the first one behind it."""
        with self._guard:
            numbers = (number for number, segment in sorted(self._closed.items()) if segment.last_lsn >= lsn)
            return Position(next(numbers, self._active.header.number), SECTOR)

    def _extent_at(self, number: int) -> Extent | None:
        """The segment of this number, or the first one behind it."""
        with self._guard:
            active = self._active
            closed = self._closed.get(number)
            if closed is None and number != active.header.number:
                number = min((n for n in [*self._closed, active.header.number] if n > number), default=0)
                if not number:
                    return None
                closed = self._closed.get(number)
            if closed is not None:
                return Extent(segment=closed, active=False)
            growing = ClosedSegment(
                header=active.header, end_offset=active.offset, last_lsn=active.last_lsn, file_bytes=active.offset, kinds=None,
                unsettled=None,
            )  # fmt: skip
            return Extent(segment=growing, active=True)

    # --- trimming ---

    def trim(self, lsn: int) -> int:
        """Remove the oldest segments whose operations all have an LSN up to `lsn`. Returns how many.

        Crash story: the caller made the checkpoint that allows this durable first. Unlinks may be undone by a
        power cut in any order; a segment that comes back is below the checkpoint, and a hole that it leaves
        is too. One thread at a time.
        """
        self._check()
        self._checkpointed_lsn = max(self._checkpointed_lsn, lsn)
        # What was merged into a segment must not outlive it: nothing would tell any more that it is of no use.
        failure = self._remove_superseded()
        with self._guard:
            oldest = sorted(self._closed)
        successors = {
            min((n for n in oldest if n > left), default=0) for left in self._compactions.superseded
        }
        removed = 0
        held_up: OSError | None = None
        for number in oldest:
            if self._closed[number].last_lsn > lsn:
                break
            if number in successors:
                held_up = failure
                break
            with self._guard:  # forgotten first: a reader that still wants it goes on behind it
                segment = self._closed.pop(number)
                self._closed_bytes -= segment.file_bytes
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
        if held_up is not None:
            raise held_up
        return removed

    # --- compacting ---

    def compact(self, covered: Checkpoint) -> bool:
        """Rewrite one run of closed segments without what `covered` calls settled; see `ports.Log.compact`.

        Both generations of the checkpoint cover it, so no recovery, not even one that has lost the newest of them, expects
        what is dropped. Raises StorageError for a failed sync, which ends the log; whatever else fails is tried again later.
        """
        self._check()
        with self._guard:
            closed = [self._closed[number] for number in sorted(self._closed)]
        self._remove_superseded()
        chosen = self._compactions.choose(closed, covered, segment_bytes=self._settings.segment_bytes)
        if chosen is None:
            return not self._compactions.is_exhausted
        run = closed[chosen.start : chosen.end]
        path = self._layout.segment(run[-1].header.number)
        goes_on = False
        rewritten: Rewritten | None = None
        try:
            self._note_dropped(covered)
            with self._breaking():
                rewritten = rewrite(
                    self._fs, self._layout, run, covered, path=path + TEMPORARY_SUFFIX, bytes_max=chosen.bytes_max,
                    wall_ns=self._clock.wall_ns(), compress_bytes_min=self._settings.compress_bytes_min,
                    compressor=self._compactions.compressor,
                )  # fmt: skip
            if not rewritten.written:
                self._measured(run, rewritten, chosen.bytes_max)
                goes_on = True
        except UnreadableSegmentError as error:
            self._compactions.unreadable(error, covered)
            goes_on = True
        except (OSError, ValueError) as error:
            self._compactions.failed(error)
        except DamagedSegmentError as error:
            self._leave_alone(error)
            goes_on = True
        if rewritten is None or not rewritten.written or not self._replace(run, rewritten):
            with contextlib.suppress(OSError):
                discard(self._fs, path + TEMPORARY_SUFFIX)
            return goes_on
        self._compactions.succeeded()
        self._remove_superseded()
        return True

    def _note_dropped(self, covered: Checkpoint) -> None:
        """Make durable, in the log itself, under which marks operations are dropped from now on. See `dropped`."""
        if self._compactions.noted is covered:
            return
        union = joined(self._compactions.dropped, covered)
        with self._breaking():
            write_dropped(self._fs, self._layout, self._active.header.store, union)
        self._compactions.dropped, self._compactions.noted = union, covered

    def _replace(self, run: Sequence[ClosedSegment], rewritten: Rewritten) -> bool:
        """Give the new segment its name; returns whether it has it.

        Crash story: the new file was synced as a whole. Before the rename is durable the run stands as it was; after it, the
        new segment has the place of all of it, and its header says so of those that are not removed yet. Either is right.
        Only when it is durable, the others are removed: an unlink may reach the disk before a rename that came first.

        The guard is held over the rename, so that no reader takes the one file for the other.
        """
        last = run[-1].header.number
        path = self._layout.segment(last)
        unsettled = summed(rewritten.unsettled)
        segment = ClosedSegment(
            header=rewritten.header, end_offset=rewritten.end_offset, last_lsn=run[-1].last_lsn, file_bytes=rewritten.file_bytes,
            kinds=frozenset(kind for kind, _ in unsettled),
            unsettled=scaled(unsettled, rewritten.end_offset - SECTOR, measured_bytes(unsettled)),
        )  # fmt: skip
        with self._guard:
            try:
                self._fs.rename(path + TEMPORARY_SUFFIX, path)
            except OSError as error:
                if self._is_there(path + TEMPORARY_SUFFIX):
                    self._compactions.failed(error)
                    return False
            for old in run:
                del self._closed[old.header.number]
                self._compactions.superseded[old.header.number] = old.file_bytes
            del self._compactions.superseded[last]
            self._closed_bytes += rewritten.file_bytes - run[-1].file_bytes
            self._closed[last] = segment
        with self._breaking():
            sync_directory(self._fs, self._layout.wal)
        return True

    def _is_there(self, path: str) -> bool:
        """Whether a temporary file has kept its name although its rename failed. If nobody can tell, the log ends."""
        with self._breaking():
            try:
                return self._fs.exists(path)
            except OSError as error:
                raise sync_failed(path, error) from error

    def _remove_superseded(self) -> OSError | None:
        """Remove what was merged into a segment whose name is durable. What cannot be removed is left for later, and told."""
        superseded = self._compactions.superseded
        failure: OSError | None = None
        removed = False
        for number in list(superseded):
            try:
                self._fs.unlink(self._layout.segment(number))
            except OSError as error:
                failure = error
                self._compactions.not_removed(number, error)
                continue
            removed = True
            with self._guard:
                self._closed_bytes -= superseded.pop(number)
        if removed:
            with self._breaking():
                sync_directory(self._fs, self._layout.wal)
        return failure

    def _measured(self, run: Sequence[ClosedSegment], rewritten: Rewritten, bytes_max: int) -> None:
        """Remember what was found, and that it was too much, so that it is not tried again before more is settled."""
        found = sum(map(measured_bytes, rewritten.unsettled))
        too_much = max(found, bytes_max + 1)
        with self._guard:
            for segment, unsettled in zip(run, rewritten.unsettled, strict=True):
                self._closed[segment.header.number] = replace(
                    segment, unsettled=scaled(unsettled, too_much, found)
                )

    def _leave_alone(self, error: DamagedSegmentError) -> None:
        """A segment that does not read as it should is not rewritten."""
        _logger.warning("segment %d is not compacted, since it cannot be read: %s", error.number, error)
        with self._guard:
            self._closed[error.number] = replace(self._closed[error.number], damaged=True)


def keep_freed_memory() -> None:
    """Let the allocator keep the memory of a commit group for the next one.

    glibc gives large blocks back to the kernel as soon as they are freed; having the pages mapped in again costs several times
    what encoding the group does. It keeps blocks up to the size of the largest one that it has seen freed (mallopt(3), the
    dynamic M_MMAP_THRESHOLD), and twice that much per arena. These bytes are never touched. Other allocators do not care.
    """
    bytes(limits.GROUP_BYTES_MAX)


def _failure_under(error: BaseException, ambient: BaseException | None) -> BaseException | None:
    """The failure that `error` is or hides, if any; what the caller was handling before (`ambient`) does not count."""
    cause: BaseException | None = error
    while cause is not None and cause is not ambient:
        if isinstance(cause, (OSError, StorageError)):
            return cause
        cause = cause.__context__
    return None
