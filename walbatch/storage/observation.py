"""A survey of a store that an engine may be writing to: what it shows is true of one moment, or it says so.

What is not here: the survey itself (`survey`), and a look whose caller holds the lock, which needs none of this.

The idea needed to read it: the engine writes in one order, and the observer reads so that this order helps.

- What was given up is read first: it is forgotten only after a checkpoint that covers it.
- The checkpoint is read *before* the segments, so all that it calls durable can be seen in them; and again *after*
  them, so whatever was trimmed meanwhile is settled by what the second one says.
- The engine writes one frame after the other. So where something stands behind damage, the damaged bytes were
  finished before, and a second reading of them, made after what stands behind was seen, tells damage from motion.
- A file that was listed may be trimmed before it is read: the oldest ones are kept open from the first moment on.

What still looks like damage after that is looked at again, and believed when it is in the same place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Self, TypeVar

from walbatch import limits
from walbatch.core.frame import FrameError, SegmentHeader, check_body
from walbatch.core.recovery import Case, SegmentFacts, StoreFacts, make_plan
from walbatch.core.scanner import Visit, read_frame_header
from walbatch.errors import StorageError
from walbatch.storage.checkpoint import LmdbState
from walbatch.storage.dropped import read_dropped, with_dropped
from walbatch.storage.filesystem import RealFile, RealFileSystem
from walbatch.storage.holder import Holder, holder_of
from walbatch.storage.layout import Layout, read_identity
from walbatch.storage.survey import Progress, survey
from walbatch.types import Checkpoint, LaneMemory

LOOKS_MAX: Final = 8
"""Looks at a store that changes faster than it is read. Each is wrong only by a coincidence of its own."""

STATE_LOOKS_MAX: Final = 8
"""Looks at a state that seems damaged while an engine may be rewriting it."""

PINNED_MAX: Final = 256
"""Segments kept open during a look. Trimming takes the oldest first, and so does the survey."""

Watch = Callable[[int, SegmentHeader], Visit | None]
"""watch(number, header) returns a function that sees the frames of that segment, or None."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """What of the operations in a log is settled."""

    checkpoint: Checkpoint | None = None
    """What the checkpoint says of that."""
    passed_over: Checkpoint | None = None
    """The same with the marks under which compactions dropped operations: what the next opening passes over."""
    given_up: frozenset[int] = frozenset()
    """LSNs that it passes over besides: dead or cancelled."""


NOTHING_SETTLED: Final = Settled()

Begin = Callable[[Settled], Watch | None]
"""begin(settled) is called at the beginning of a look, and returns what watches it, or None."""

_Found = TypeVar("_Found")


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What was seen."""

    facts: StoreFacts
    lanes: Mapping[str, LaneMemory]
    settled: Settled
    findings: tuple[str, ...]
    """What could not be read of what was given up, one sentence each."""
    live: bool
    """An engine has the store open (or had, during the look)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _State:
    """What state/ says."""

    checkpoint: Checkpoint | None
    lanes: Mapping[str, LaneMemory]
    findings: tuple[str, ...] = ()
    given_up: frozenset[int] = frozenset()
    given_up_findings: tuple[str, ...] = ()


def observe(
    fs: RealFileSystem,
    layout: Layout,
    *,
    full: bool = False,
    locked: bool = False,
    progress: Progress | None = None,
    begin: Begin = lambda _settled: None,
) -> Observation:
    """Look at a store; nothing of it is changed, and an engine that has it open (or opens it now) does not notice.

    `locked`: the caller holds the store's lock, so nothing moves. `begin` is called at the beginning of each look, of
    which the last one counts. Where an engine is alive, LMDB notes the reader in its own lock file.

    Raises UnsupportedFormat for a newer state, StorageError for a store that changes faster than it is read; OSError.
    """
    refused: Case | None = None
    for attempt in range(LOOKS_MAX):
        last = attempt + 1 == LOOKS_MAX
        try:
            found = _look(fs, layout, full=full, locked=locked, progress=progress, begin=begin)
        except FileNotFoundError as error:
            if locked:
                raise
            if last:
                raise StorageError(
                    f"{layout.root} changes faster than it can be read ({error.filename} is gone): try again, or close the engine "
                    "that has it open",
                    path=layout.root,
                ) from error  # fmt: skip
            continue
        refusal = make_plan(found.facts).refusal
        if refusal is None or refusal == refused or locked or last:
            return found
        refused = refusal
    raise AssertionError("the last look returns or raises")


def _look(
    fs: RealFileSystem, layout: Layout, *, full: bool, locked: bool, progress: Progress | None,
    begin: Begin,
) -> Observation:  # fmt: skip
    identity, uuid = read_identity(fs, layout)
    before = _read_quietly(layout, uuid, _load_with_given_up, locked=locked)
    dropped, _ = read_dropped(fs, layout, uuid)  # the survey tells what is wrong with it
    settled = Settled(
        checkpoint=before.checkpoint, passed_over=with_dropped(before.checkpoint, dropped), given_up=before.given_up
    )  # fmt: skip
    with _Pinned(PINNED_MAX) as pinned:
        facts = survey(
            pinned, layout, identity=identity, store=uuid, checkpoint=before.checkpoint, state_findings=before.findings,
            full=full, progress=progress, visit=begin(settled),
        )  # fmt: skip
        live = False
        if not locked:
            facts = _without_motion(pinned, layout, facts)
            after = _read_quietly(layout, uuid, _load, locked=False)
            facts = replace(facts, checkpoint=_both(before.checkpoint, after.checkpoint, facts))
            live = holder_of(layout.lock) is Holder.SOMEBODY
    return Observation(
        facts=facts, lanes=before.lanes, settled=settled, findings=before.given_up_findings, live=live
    )  # fmt: skip


# --- state/ ----------------------------------------------------------------------------------------------------------


def read_state(layout: Layout, uuid: bytes | None) -> tuple[Checkpoint | None, Mapping[str, LaneMemory]]:
    """The checkpoint and the lanes' memory, read beside an engine that may be alive. Raises UnsupportedFormat."""
    state = _read_quietly(layout, uuid, _load, locked=False)
    return state.checkpoint, state.lanes


def read_beside(
    layout: Layout, uuid: bytes, read: Callable[[LmdbState], tuple[_Found, Sequence[str]]], *, locked: bool = False
) -> tuple[_Found, tuple[str, ...]]:  # fmt: skip
    """What `read` finds in state/, and what it found wrong. Raises UnsupportedFormat.

    Where nobody has the store open, LMDB's lock file is left alone. An engine that opens it during the reading shows
    afterwards, and then it is read again.
    """
    shared = not locked and holder_of(layout.lock) is not Holder.NOBODY
    found = _read(layout, uuid, read, shared=shared)
    if locked or shared or holder_of(layout.lock) is Holder.NOBODY:
        return found
    return _read(layout, uuid, read, shared=True)


def _read(
    layout: Layout, uuid: bytes, read: Callable[[LmdbState], tuple[_Found, Sequence[str]]], *, shared: bool
) -> tuple[_Found, tuple[str, ...]]:  # fmt: skip
    left = STATE_LOOKS_MAX if shared else 1
    while True:
        left -= 1
        state = LmdbState.open(layout.state, uuid, readonly=True, shared=shared)
        try:
            found, findings = read(state)
        finally:
            state.close()
        if not findings or not left:
            return found, tuple(findings)


def _read_quietly(
    layout: Layout, uuid: bytes | None, load: Callable[[LmdbState], tuple[_State, Sequence[str]]], *, locked: bool
) -> _State:  # fmt: skip
    """What `load` tells of state/."""
    if uuid is None:
        return _State(checkpoint=None, lanes={})
    return read_beside(layout, uuid, load, locked=locked)[0]


def _load(state: LmdbState) -> tuple[_State, Sequence[str]]:
    """The checkpoint and the lanes."""
    checkpoint, findings = state.load_checkpoint()
    lanes, lane_findings = state.load_lanes()
    found = _State(checkpoint=checkpoint, lanes=lanes, findings=(*findings, *lane_findings))
    return found, found.findings


def _load_with_given_up(state: LmdbState) -> tuple[_State, Sequence[str]]:
    """What was given up, then the checkpoint and the lanes. A finding of both is one of the latter."""
    given_up, own = state.load_given_up()
    found, findings = _load(state)
    own = [finding for finding in own if finding not in findings]
    return replace(found, given_up=given_up, given_up_findings=tuple(own)), [*findings, *own]


def _both(before: Checkpoint | None, after: Checkpoint | None, facts: StoreFacts) -> Checkpoint | None:
    """One checkpoint that is right about segments which were read between two of them.

    What the first calls durable was there to be read; what was trimmed meanwhile, the second one calls settled. Its
    watermark counts as far as the segments were read: what lies above was written after them.
    """
    if after is None or (before is not None and before.generation == after.generation):
        return before
    read_lsn = facts.segments[-1].last_lsn if facts.segments else 0
    if before is None:
        return replace(after, watermark=min(after.watermark, read_lsn), durable_lsn=0, segment=0)
    return replace(before, watermark=max(before.watermark, min(after.watermark, read_lsn)))


# --- the log ---------------------------------------------------------------------------------------------------------


def _without_motion(fs: RealFileSystem, layout: Layout, facts: StoreFacts) -> StoreFacts:
    """The facts without damage at the log's end that was a write in motion.

    What is whole when it is read again was a frame that was being written. What is not, still may be, as long as
    somebody has the store open and nothing proves that it was finished.
    """
    last = facts.segments[-1] if facts.segments else None
    if last is None or last.scan is None or last.scan.damage is None or last.header is None:
        return facts
    damage = last.scan.damage
    durable_lsn = facts.checkpoint.durable_lsn if facts.checkpoint else 0
    proven = max(damage.evidence_lsn, durable_lsn) > last.scan.last_lsn
    moving = not proven and holder_of(layout.lock) is Holder.SOMEBODY
    if not moving and not _is_whole(fs, layout, last, damage.offset):
        return facts
    return replace(
        facts, segments=(*facts.segments[:-1], replace(last, scan=replace(last.scan, damage=None)))
    )


def _is_whole(fs: RealFileSystem, layout: Layout, segment: SegmentFacts, offset: int) -> bool:
    """Whether a valid frame stands at `offset`, or nothing at all any more."""
    assert segment.header is not None
    file = fs.open_read(layout.segment(segment.number))
    try:
        frame = read_frame_header(file.read, header=segment.header, offset=offset)
        check_body(
            frame,
            file.read(frame.total_bytes - limits.FRAME_HEADER_BYTES, offset + limits.FRAME_HEADER_BYTES),
        )
    except FrameError:
        return file.size() <= offset
    finally:
        file.close()
    return True


class _Pinned(RealFileSystem):
    """The real file system, which keeps the first files that are opened open, so that they can be opened again."""

    def __init__(self, files_max: int) -> None:
        self._files_max = files_max
        self._files: dict[str, RealFile] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def open_read(self, path: str) -> RealFile:
        """Open for reading, or again if it is still open."""
        kept = self._files.get(path)
        if kept is not None:
            return _Borrowed(kept)
        file = super().open_read(path)
        if len(self._files) >= self._files_max:
            return file
        self._files[path] = file
        return _Borrowed(file)


class _Borrowed(RealFile):
    """A file that somebody else closes."""

    def __init__(self, file: RealFile) -> None:
        super().__init__(file._fd, file._path)  # noqa: SLF001 - the same class

    def close(self) -> None:
        """Leave it open."""
