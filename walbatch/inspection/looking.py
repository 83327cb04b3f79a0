"""A look at a whole store: what recovery would do, every segment's health, what is pending of each lane.

What is not here: how to look at a store that an engine is writing to (`storage.observation`).
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from walbatch.core.recovery import Decision, IdentityState, Plan, decide_segment, make_plan, view_segment
from walbatch.errors import ConfigError
from walbatch.inspection.reports import Count, LaneReport, SegmentReport, StoreReport, VerifyReport
from walbatch.inspection.tally import Tally
from walbatch.ports import FileSystem
from walbatch.storage.dropped import noted_lanes, read_dropped
from walbatch.storage.filesystem import RealFileSystem
from walbatch.storage.layout import Layout, read_identity
from walbatch.storage.observation import NOTHING_SETTLED, Observation, Settled, Watch, observe, read_state
from walbatch.storage.store import refusal_error, storage_errors, take_lock
from walbatch.storage.survey import Progress
from walbatch.types import LaneMemory


def look(
    path: str | os.PathLike[str],
    *,
    full: bool = False,
    lock: bool = False,
    audit: bool = False,
    progress: Progress | None = None,
) -> VerifyReport:
    """Look at a store. Writes nothing.

    Without `full`, what is settled or sealed is trusted, and pending operations are not counted by lane, but with those that
    the next opening passes over although the checkpoint does not call them settled. With `lock`, the store's lock is held
    meanwhile (StoreLocked if an engine has it), so that the answer is exact. Without it, an engine may be at work: what is
    shown is what was durable when the look began, at least.

    Raises ConfigError for a path that is no store, UnsupportedFormat for a newer state/, and StorageError for a
    store that cannot be read; damage is reported, not raised.
    """
    layout = find_store(path)
    fs = RealFileSystem()
    tally = Tally(settled=NOTHING_SETTLED)

    def begin(settled: Settled) -> Watch | None:
        nonlocal tally
        tally.close()
        opener = (lambda number: fs.open_read(layout.segment(number))) if audit else None
        tally = Tally(settled=settled, open_segment=opener)
        return tally.visit if full else None

    with storage_errors(layout.root):
        held = take_lock(fs, layout, b"") if lock and fs.exists(layout.lock) else None
        try:
            found = observe(fs, layout, full=full, locked=held is not None, progress=progress, begin=begin)
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
        counted = tally.segments.get(segment.number) if tally else None
        segments.append(
            SegmentReport(
                number=segment.number, file_bytes=segment.file_bytes, epoch=header.epoch if header else 0,
                first_lsn=header.first_lsn if header else 0, last_lsn=segment.last_lsn, operations=segment.operations,
                label=row.label if row else "", decision=row.decision if row else Decision.CORRUPT,
                damage=damage.reason if damage else None if header else str(segment.state),
                lost=segment.scan.lost if segment.scan else 0, compacted=header is not None and header.compacted,
                situation=row.situation if row else "", pending=counted.pending if counted else None,
                frame_bytes=counted.frame_bytes if counted else None,
            )
        )  # fmt: skip
    names = sorted({*lanes, *(tally.pending if tally else ())})
    kinds = {*lanes, *(checkpoint.lanes if checkpoint else ()), *(tally.kinds if tally else ())}
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
        passed_over=tally.passed_over if tally else 0, findings=found.findings,
        kinds=frozenset(kinds),
    )  # fmt: skip


def remembered_lanes(path: str | os.PathLike[str]) -> dict[str, LaneMemory]:
    """The lanes that a store remembers, by name; empty where there is no store yet.

    Of what state/ has lost, those are there that compactions have noted in the log.
    """
    layout = Layout(os.path.realpath(os.fspath(path)))
    fs = RealFileSystem()
    with storage_errors(layout.root):
        if not fs.is_directory(layout.root):
            return {}
        _, uuid = read_identity(fs, layout)
        dropped, _ = read_dropped(fs, layout, uuid)  # a look tells what is wrong with it
        return {**noted_lanes(dropped), **read_state(layout, uuid)[1]}
