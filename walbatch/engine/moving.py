"""A lane whose backend is another one than the store remembers: whether that is the same data, and what is pending.

What is not here: the decision (`core.moving`), and the number of shards, which never changes (`lanes`).

The idea needed to read it: this comes after the backends were asked for their marks, and before anything is remembered or
delivered. What is refused leaves the store as it was.
"""

from __future__ import annotations

import contextlib
import shlex
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from walbatch.backends.urls import strip_password, url_of
from walbatch.config import Lane
from walbatch.core.columns import decode_body
from walbatch.core.frame import FrameError, FrameHeader, FrameType, SegmentHeader
from walbatch.core.moving import Move, MoveFacts, decide_move
from walbatch.core.routing import shards_of
from walbatch.errors import ConfigError
from walbatch.ports import FileSystem, TransactionalBackend
from walbatch.runtime.lane import LaneSetup
from walbatch.storage.store import OpenStore, storage_errors
from walbatch.storage.survey import survey
from walbatch.types import LaneMemory, Mark


def check_moves(
    fs: FileSystem,
    store: OpenStore,
    lanes: Mapping[str, Lane],
    remembered: Mapping[str, LaneMemory],
    setups: Sequence[LaneSetup],
    given_up: Collection[int],
) -> list[str]:
    """What to say of lanes whose backend is another one now, a sentence each.

    Raises ConfigError with every lane whose pending operations must not go there; StorageError. Reads the log only where a lane
    would be refused or spoken of.
    """
    facts = {
        setup.name: _facts(setup, lanes[setup.name], remembered.get(setup.name), store.plan.pending)
        for setup in setups
        if setup.name in lanes
    }
    moved = {name for name, known in facts.items() if decide_move(known).move is not Move.GO_ON}
    if not moved:
        return []
    seen = _read_log(fs, store, [setup for setup in setups if setup.name in moved], given_up)
    findings: list[str] = []
    problems: list[str] = []
    for name in sorted(moved):
        is_behind = name in seen.behind or (facts[name].remembered is not None and name in seen.unknown)
        known = replace(
            facts[name], pending=seen.pending[name], is_behind=facts[name].is_behind and is_behind
        )
        decision = decide_move(known)
        if decision.move is Move.REFUSE:
            problems.append(_refusal(name, known, store.layout.root))
        elif decision.move is Move.SAY_SO:
            findings.append(_finding(name, known, decision.case))
    if problems:
        raise ConfigError(*problems)
    return findings


def _facts(setup: LaneSetup, lane: Lane, memory: LaneMemory | None, pending: int) -> MoveFacts:
    backend = setup.backend
    remembered, present = memory.url if memory else None, url_of(backend)
    marks = _marks(setup) if memory is not None and (remembered is None or remembered != present) else []
    return MoveFacts(
        has_backend=backend is not None, remembered=remembered, present=present, pending=pending,
        moved_from=None if lane.moved_from is None else strip_password(lane.moved_from),
        is_transactional=setup.transactional, holds_marks=any(mark != Mark() for mark in marks),
        is_behind=not all(map(_has_all, marks, setup.counted)),
    )  # fmt: skip


def _marks(setup: LaneSetup) -> list[Mark]:
    """What the backend has applied, by shard; nothing where it does not tell."""
    if not setup.transactional:
        return []
    assert isinstance(setup.backend, TransactionalBackend)
    return [setup.backend.applied_mark(shard) for shard in range(setup.shards)]


def _has_all(mark: Mark, counted: Mark) -> bool:
    """Whether a mark covers another. Where it does not, the log tells whether that means anything: LSNs of other lanes count."""
    both = mark.union(counted)
    return (both.watermark, both.ranges) == (mark.watermark, mark.ranges)


@dataclass(slots=True)
class _Seen:
    """What the log says of lanes."""

    pending: Counter[str] = field(default_factory=Counter)
    """Operations that are to be delivered."""
    behind: set[str] = field(default_factory=set)
    """Lanes with an operation that the checkpoint counts as settled, that was not given up, and is not in the backend's marks."""
    unknown: set[str] = field(default_factory=set)
    """Lanes of which the backend's marks do not reach what was trimmed: nothing tells whose operations that were."""


def _read_log(
    fs: FileSystem, store: OpenStore, setups: Sequence[LaneSetup], given_up: Collection[int]
) -> _Seen:
    """What all of the log says of these lanes. Raises StorageError."""
    wanted = {setup.name: (setup, _marks(setup)) for setup in setups}
    seen, begins = _Seen(), list[int]()

    def visit(_number: int, header: SegmentHeader) -> Callable[[int, FrameHeader, bytes], None]:
        begins.append(header.first_lsn)

        def see(_offset: int, frame: FrameHeader, padded: bytes) -> None:
            if frame.type is not FrameType.OPERATIONS:
                return
            with contextlib.suppress(FrameError):
                columns = decode_body(frame, padded)
                names = [name if name in wanted else None for name in columns.kinds]
                if not any(names):
                    return
                lsns = columns.lsns(frame.first_lsn)
                for row, kind in enumerate(columns.kind_indexes):
                    name, lsn = names[kind], lsns[row]
                    if name is None or lsn in given_up:
                        continue
                    setup, marks = wanted[name]
                    (shard,) = shards_of([columns.keys[row]], setup.shards)
                    if not setup.initial[shard].covers(lsn):
                        seen.pending[name] += 1
                    elif marks and setup.counted[shard].covers(lsn) and not marks[shard].covers(lsn):
                        seen.behind.add(name)

        return see

    facts = store.facts
    with storage_errors(store.layout.root):
        survey(
            fs, store.layout, identity=facts.identity, store=facts.store, checkpoint=facts.checkpoint, full=True, visit=visit
        )  # fmt: skip
    trimmed = min(begins, default=1) - 1
    for name, (setup, marks) in wanted.items():
        if any(
            mark.watermark < min(known.watermark, trimmed)
            for mark, known in zip(marks, setup.counted, strict=False)
        ):
            seen.unknown.add(name)
    return seen


def _refusal(name: str, facts: MoveFacts, root: str) -> str:
    now = facts.present or "a backend without a URL"
    lacks = (
        "whose marks of this store lack operations that are settled"
        if facts.holds_marks
        else "which holds no mark of this store"
    )
    command = shlex.join(["walbatch", "recover", root, "--lane", f"{name}={facts.remembered}"])
    meant = ""
    if facts.moved_from is not None:
        meant = f" (moved_from is {facts.moved_from!r}, which is not what is remembered)"
    return (
        f"lane {name!r} has {facts.pending:,} pending operations for {facts.remembered}, and is opened with {now}, {lacks}: they "
        "would be split over two places, and what the first has applied last could be applied twice. "
        f"Deliver them there first: {command}; or, if they are meant to go to the new place: "
        f"Lane(..., moved_from={facts.remembered!r}){meant}. Nothing was changed"
    )


def _finding(name: str, facts: MoveFacts, case: str) -> str:
    why = {
        "M6": "as moved_from says: what the old one has applied last may be applied again",
        "M7": "whose marks of this store have all that is settled, and so counts as the same data",
        "M10": "whose marks of this store lack operations that are settled: unless it is the same, they are split over two places",
        "M9": "at least once: what the old one has applied last may be applied again",
    }[case]
    now, before = (url or "a backend without a URL" for url in (facts.present, facts.remembered))
    return (
        f"lane {name!r} has {facts.pending:,} pending operations, was delivered to {before}, and "
        f"is now to {now}, "
        f"{why}"
    )
