"""Recovers a damaged store with the shipped code, reads everything back, and says what became of it.

What is not here: how it was damaged (`damages`), and the shortcut (`memory`).

The idea needed to read it: the model is computed from the undamaged bytes. A *witness* of an LSN is a header (of a frame or a
segment) that the damage did not touch and that says that the LSN was durable, or the checkpoint. What has a witness is recovered
or refused; what has none may be given up as a torn tail that is reported. Only where nothing but zeros is left of it, or the
file ends there or is gone, is there nothing that anybody could report.
"""

from __future__ import annotations

import contextlib
import enum
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import walbatch as wb
from tools.bitrot.memory import CHANGED, RememberingLog, remembering
from tools.bitrot.store import PROMPT, ROOT, SECTOR, SETTINGS, Files, Placed, Row, Store
from walbatch import limits
from walbatch.core.frame import decode_segment_header
from walbatch.errors import WalbatchError
from walbatch.runtime.clock import RealThreads
from walbatch.storage.layout import segment_number
from walbatch.storage.log import Log, LogSettings
from walbatch.storage.store import open_store
from walbatch.testing.simulation.clock import ManualClock, SeededEntropy
from walbatch.testing.simulation.directory import Directory
from walbatch.testing.simulation.disk import Inode
from walbatch.testing.simulation.faults import FaultPlan
from walbatch.testing.simulation.filesystem import SimulatedFileSystem
from walbatch.testing.simulation.history import AppliedTo, Event
from walbatch.testing.simulation.machine import Machine, Process
from walbatch.testing.simulation.state import SimulatedState, StateDisk
from walbatch.types import Checkpoint, Position

_numbers = itertools.count(CHANGED - 1, -1)

LOG_SETTINGS: Final = LogSettings(
    segment_bytes=SETTINGS.segment_bytes, compress_bytes_min=SETTINGS.compress_bytes_min, compress_level=1
)

Changes = Mapping[str, bytes | None]
"""Files that are different: name -> bytes, or None for one that is gone."""


class Outcome(enum.StrEnum):
    """What became of a damaged store."""

    DETECTED = "detected"
    """A typed error that names the place; nothing was changed."""
    REPORTED = "acknowledged and given up with a report"
    """Operations that nothing proves any more were given up as a torn write, and that was reported."""
    HARMLESS = "harmless"
    """Everything acknowledged was recovered, byte for byte."""
    BEYOND_PROOF = "acknowledged and given up, nothing could tell"
    """The end is gone, and nothing is left that could tell that it was there; or the oldest segments and state/ are both gone."""
    SILENT = "silent"
    """Something acknowledged was lost or changed, or something was invented, without a word."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """What came of opening: an error, or the labels of recovery's cases and everything that would be delivered."""

    error: Exception | None
    rows: Mapping[int, Row]
    labels: frozenset[str] = frozenset()
    changed: bool = False
    """Whether opening changed a file although it refused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """An outcome, and what is wrong with it (empty: nothing)."""

    outcome: Outcome
    problem: str = ""


def resting_state(checkpoint: Checkpoint | None) -> SimulatedState:
    """The state of a store at rest: just the checkpoint. What is saved in it is forgotten."""
    return SimulatedState(
        StateDisk([] if checkpoint is None else [checkpoint]), f"{ROOT}/state", faults=FaultPlan(),
        on_call=lambda _call, _path: None, on_save=lambda _checkpoint: None,
    )  # fmt: skip


class Bench:
    """One store on a simulated disk, to be damaged again and again. Files that a damage does not change are shared."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._inodes = {name: inode_of(data, next(_numbers)) for name, data in store.files.items()}
        self._clock = ManualClock()
        self._entropy = SeededEntropy("bitrot")
        self._threads = RealThreads()
        self._last = store.segments[-1]

    def disk(self, changes: Changes) -> SimulatedFileSystem:
        """The store's disk with these files changed."""
        fs = SimulatedFileSystem()
        inodes = self._inodes.copy()
        for name, data in changes.items():
            if data is None:
                inodes.pop(name, None)
            else:
                inodes[name] = inode_of(data, CHANGED)
        names = [name for name in inodes if name.startswith("wal/")]
        if names:
            last = max(names)  # recovery cuts the last segment, so this one is not shared
            inodes[last] = inodes[last].clone()
        root, wal = Directory(), Directory()
        wal.view = {name[4:]: inodes.pop(name) for name in names}
        root.view = {**inodes, "wal": wal, "state": Directory(), "quarantine": Directory()}
        for directory in (root, wal):
            directory.durable = directory.view.copy()
        fs.root.view = {ROOT[1:]: root}
        fs.root.durable = fs.root.view.copy()
        return fs

    def open(
        self, changes: Changes, checkpoint: Checkpoint | None, *, full: bool = False, remember: bool = True
    ) -> Opened:
        """Open the damaged store as an engine does, and read back everything that it would deliver.

        With `remember`, unchanged files are not decoded again, and what was damaged is read back first: once it is refused, the
        rest is not read.
        """
        fs = self.disk(changes)
        rows: dict[int, Row] = {}
        log: Log | None = None
        try:
            with remembering() if remember else contextlib.nullcontext():
                store = open_store(
                    fs, ROOT, clock=self._clock, entropy=self._entropy, open_state=lambda _path, _uuid: resting_state(checkpoint),
                    note={"pid": 1}, full=full,
                )  # fmt: skip
        except Exception as error:  # noqa: BLE001 - judged: an error that is not typed is a finding
            return Opened(error=error, rows={}, changed=_is_changed(fs.root))
        try:
            log = (RememberingLog if remember else Log).open(
                fs, store.layout, self._clock, self._entropy, self._threads, LOG_SETTINGS, facts=store.facts,
                plan=store.plan,
            )  # fmt: skip
            if remember:
                for name in changes:
                    number = segment_number(name.removeprefix("wal/"))
                    if number is not None and number >= store.plan.first_segment:
                        _read(log, Position(number, SECTOR), rows, end=Position(number + 1, 0))
            _read(log, Position(store.plan.first_segment, SECTOR), rows)
        except Exception as error:  # noqa: BLE001 - as above
            return Opened(error=error, rows=rows)
        finally:
            if log is not None:
                log.close(next_lsn=None)
        return Opened(error=None, rows=rows, labels=frozenset(case.label for case in store.plan.cases))

    def open_by_engine(self, changes: Changes, checkpoint: Checkpoint | None) -> Opened:
        """Open the damaged store with a whole engine, and take what it delivers."""
        state = f"{ROOT}/state"
        fs = self.disk(changes)
        if checkpoint is not None:
            fs.create(f"{state}/data.mdb").close()
        machine = Machine(fs, {state: StateDisk([checkpoint], 1)} if checkpoint is not None else {})
        history: list[Event] = []
        process = Process(machine, history)
        errors: list[Exception] = []
        labels: list[str] = []

        def live() -> None:
            environment = wb.Environment(
                fs=process.fs, clock=process.clock, threads=process.threads, entropy=process.entropy,
                open_state=process.open_state,
            )  # fmt: skip
            lanes = {
                name: wb.Lane(process.backend(name), shards=2 if name == "put" else 1, trigger=PROMPT)
                for name in ("put", "kept", "soon")
            }
            try:
                engine = wb.Engine.open(ROOT, lanes, settings=SETTINGS, environment=environment)
            except Exception as error:  # noqa: BLE001 - judged
                errors.append(error)
                return
            labels.extend(case.label for case in engine.recovery)
            try:
                engine.flush(timeout=60)
            except Exception as error:  # noqa: BLE001 - judged
                errors.append(error)
            engine.close(timeout=60)

        process.run(live)
        rows: dict[int, Row] = {}
        for event in history:
            if isinstance(event, AppliedTo) and event.lsn is not None:
                known = self.store.rows.get(event.lsn)
                rows[event.lsn] = (event.lane, event.key, event.payload, known[3] if known else 0)
        return Opened(error=errors[0] if errors else None, rows=rows, labels=frozenset(labels))

    def judge(self, changes: Changes, checkpoint: Checkpoint | None, opened: Opened) -> Verdict:
        """Hold what opening gave against the model."""
        store = self.store
        if not opened.rows.items() <= store.rows.items():
            wrong = min(lsn for lsn, row in opened.rows.items() if store.rows.get(lsn) != row)
            return Verdict(outcome=Outcome.SILENT, problem=f"LSN {wrong} is not what was submitted")
        if opened.error is not None:
            problem = self._refusal_problem(changes, opened, opened.error)
            return Verdict(outcome=Outcome.DETECTED, problem=problem)
        missing = set(store.unsettled - opened.rows.keys())
        if not missing:
            return Verdict(outcome=Outcome.HARMLESS)
        if checkpoint is None and "S7" in opened.labels:
            # Without state/ nothing tells whether the oldest segments are lost, or were trimmed: that much is S7's to say.
            # So it is where the oldest one has become what it was before others were merged into it.
            left = [
                (decode_segment_header(data[:SECTOR])[1] or header).first_lsn
                for name, header in store.headers.items()
                if (data := changes.get(name, b"")) is not None
            ]
            missing = {lsn for lsn in missing if lsn >= min(left, default=0)}
            if not missing:
                return Verdict(outcome=Outcome.BEYOND_PROOF)
        return self._judge_loss({**store.files, **changes}, checkpoint, min(missing), opened.labels)

    def _refusal_problem(self, changes: Changes, opened: Opened, error: Exception) -> str:
        if opened.changed:
            return "a refusal changed files"
        if not isinstance(error, WalbatchError):
            return f"an untyped error: {error!r}"
        if isinstance(error, wb.CorruptionError):
            if not (error.path.startswith(ROOT) and error.offset % SECTOR == 0 and error.expected):
                return f"an error that does not name its place: {error}"
            if not self._is_blamed_rightly(changes, error.path, error.expected):
                return f"an error that blames another file than the damaged {sorted(changes)}: {error}"
        elif not isinstance(error, wb.UnsupportedFormat):
            return f"damage is answered with {type(error).__name__}: {error}"
        if changes and all(self._is_slack(name, data) for name, data in changes.items()):
            return f"nothing that counts was touched, and it is refused: {error}"
        return ""

    def _is_blamed_rightly(self, changes: Changes, path: str, expected: str) -> bool:
        """Whether an error names what was damaged: the file, a neighbour of it in the chain, or the store that lacks a file."""
        if path == ROOT:
            # S2 names the store and says in words that its identity is damaged.
            return None in changes.values() or ("identity" in changes and expected.startswith("identity"))
        segments = sorted({*self.store.segments, *(name for name in changes if name.startswith("wal/"))})
        blamed = path.removeprefix(f"{ROOT}/")
        for name in changes:
            if name == blamed:
                return True
            if name in segments and blamed in segments:
                between = abs(segments.index(name) - segments.index(blamed))
                if between == 1:
                    return True
        # With a sound identity of another store every segment is foreign, and the first that counts is named.
        return "identity" in changes and blamed in segments

    def _is_slack(self, name: str, data: bytes | None) -> bool:
        """Whether a change is confined to the room behind the frames of a segment."""
        if data is None or name not in self.store.headers:
            return False
        end = max((frame.end for frame in self.store.frames if frame.name == name), default=SECTOR)
        return data[:end] == self.store.files[name][:end] and name != self._last

    def _judge_loss(
        self,
        files: Mapping[str, bytes | None],
        checkpoint: Checkpoint | None,
        lost: int,
        labels: frozenset[str],
    ) -> Verdict:
        """Whether operations from `lost` on could be given up."""
        store = self.store
        left: Files = {name: data for name, data in files.items() if data is not None}
        headers = [
            header.prev_last_lsn for name, header in store.headers.items()
            if left.get(name, b"")[:SECTOR] == store.files[name][:SECTOR]
        ]  # fmt: skip
        frames = [
            frame.header.synced_lsn
            for frame in store.frames
            if _has_header(store.files[frame.name], left, frame)
        ]
        witnessed = max([checkpoint.durable_lsn if checkpoint else 0, *headers, *frames])
        if lost <= witnessed:
            return Verdict(
                outcome=Outcome.SILENT, problem=f"LSN {lost} is lost, but {witnessed} was proven durable"
            )
        (frame,) = [
            frame for frame in store.frames
            if frame.header.count and frame.header.first_lsn <= lost <= frame.header.last_lsn and self._counts(frame)
        ]  # fmt: skip
        place = slice(frame.offset, frame.end)
        if left.get(frame.name, b"")[place] == store.files[frame.name][place]:
            before = [f for f in store.frames if f.name == frame.name and f.offset < frame.offset]
            if all(_is_intact(store.files[f.name], left, f) for f in before):
                return Verdict(outcome=Outcome.SILENT, problem=f"the intact frame of LSN {lost} was given up")
        if "W9" in labels:
            return Verdict(outcome=Outcome.REPORTED)
        if not left.get(frame.name, b"")[frame.offset :].strip(b"\0"):
            return Verdict(outcome=Outcome.BEYOND_PROOF)
        return Verdict(outcome=Outcome.SILENT, problem=f"LSN {lost} was given up, and nobody said so")

    def _counts(self, frame: Placed) -> bool:
        """Whether the frame was not superseded by a copy of it in the next segment."""
        following = [
            header
            for header in self.store.headers.values()
            if header.number > self.store.headers[frame.name].number
        ]
        bound = min((header.prev_last_lsn for header in following), default=limits.LSN_MAX)
        return frame.header.last_lsn <= bound


def _read(log: Log, position: Position, rows: dict[int, Row], *, end: Position | None = None) -> None:
    """Read frames back from `position` on, to the end of the log or to `end`."""
    next_lsn = 0
    while (end is None or position < end) and (
        frame := log.read_frame(position, next_lsn=next_lsn)
    ) is not None:
        kinds = frame.kinds
        rows.update(zip(
            frame.lsns,
            zip([kinds[index] for index in frame.kind_indexes], frame.keys, frame.payloads, frame.priorities, strict=True),
            strict=True,
        ))  # fmt: skip
        position, next_lsn = frame.next_position, frame.last_lsn + 1


def inode_of(data: bytes, number: int) -> Inode:
    """A file at rest."""
    inode = Inode(number)
    inode.view = {
        index: data[at : at + SECTOR].ljust(SECTOR, b"\0")
        for index, at in enumerate(range(0, len(data), SECTOR))
    }
    inode.durable = inode.view
    inode.size = inode.durable_size = len(data)
    return inode


def _is_changed(directory: Directory) -> bool:
    """Whether anything but the lock file was made or written."""
    for name, node in directory.view.items():
        if isinstance(node, Directory):
            if _is_changed(node):
                return True
        elif node.is_dirty and name != "lock":
            return True
    return any(op.name != "lock" for op in directory.ops)


def _is_intact(before: bytes, left: Files, frame: Placed) -> bool:
    place = slice(frame.offset, frame.end)
    return left.get(frame.name, b"")[place] == before[place]


def _has_header(before: bytes, left: Files, frame: Placed) -> bool:
    """Whether the header of a frame can be read in its place, under an untouched segment header."""
    data = left.get(frame.name, b"")
    place = slice(frame.offset, frame.offset + limits.FRAME_HEADER_BYTES)
    return data[:SECTOR] == before[:SECTOR] and data[place] == before[place]
