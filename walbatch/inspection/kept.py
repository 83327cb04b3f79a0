"""What a store keeps beside its log: dead letters, idempotency keys, what was learnt.

What is not here: reading state/ beside an engine that writes it (`storage.observation`).
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from walbatch.core.controller import ControllerState, FixedSize, LatencyAimd
from walbatch.core.frame import SEGMENT_OPTIONS
from walbatch.core.history import HISTORY, Expectation, History
from walbatch.core.idempotency import OWN_PREFIX, requeue_key
from walbatch.core.recovery import IdentityState, make_plan
from walbatch.core.surface import ResponseSurface
from walbatch.errors import CorruptionError, UnsupportedFormat
from walbatch.inspection.logged import segment_operations
from walbatch.inspection.looking import find_store
from walbatch.inspection.reports import Count, KeptReport
from walbatch.storage.checkpoint import LmdbState
from walbatch.storage.filesystem import RealFileSystem
from walbatch.storage.layout import Layout, read_identity
from walbatch.storage.observation import NOTHING_SETTLED, observe, read_beside
from walbatch.storage.store import raise_refusal, storage_errors
from walbatch.types import DeadLetter

_Kept = TypeVar("_Kept")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Letters:
    """What state/ says of dead letters."""

    letters: Sequence[DeadLetter] = ()
    damaged: frozenset[int] = frozenset()
    own_keys: frozenset[tuple[str, bytes]] = frozenset()
    """Lane and key, of the keys that are the engine's own."""
    keys_lsn: int = 0
    """The keys of newer operations are in the log alone."""


def dead_letters(
    path: str | os.PathLike[str], *, kind: str | None = None
) -> tuple[list[DeadLetter], tuple[str, ...]]:
    """The dead letters of a store, by LSN, and what of them could not be read, one sentence each.

    One that was submitted again, by a process that was cut off before it dropped the letter, is none: the next opening drops
    it. Where there are letters, the end of the log is read for that.

    Raises ConfigError for a path that is no store, CorruptionError and UnsupportedFormat for one whose identity cannot be
    read, StorageError.
    """
    layout = find_store(path)
    found, findings = _read_kept(layout, _load_letters, _Letters())
    letters = _without_requeued(layout, found)
    return [letter for letter in letters if kind is None or letter.lane == kind], findings


def passes_over(path: str | os.PathLike[str]) -> bool:
    """Whether the log of a store may hold what is dead, cancelled, or dropped, beside what is pending. Raises as `dead_letters`."""
    layout = find_store(path)
    if os.path.lexists(layout.dropped):
        return True

    def read(state: LmdbState) -> tuple[bool, list[str]]:
        given_up, findings = state.load_given_up()
        return bool(given_up), findings

    return _read_kept(layout, read, False)[0]


def damaged_letters(path: str | os.PathLike[str]) -> frozenset[int]:
    """LSNs of the dead letters that cannot be read, as far as those can be told. Raises as `dead_letters`."""
    return _read_kept(find_store(path), _load_letters, _Letters())[0].damaged


def kept(path: str | os.PathLike[str]) -> KeptReport:
    """What a store keeps beside its log. Raises as `dead_letters`."""
    layout = find_store(path)
    wall_ns = time.time_ns()

    def read(state: LmdbState) -> tuple[tuple[KeptReport, _Letters], list[str]]:
        letters, letter_findings = _load_letters(state)
        uses, _, key_findings = state.load_keys()
        snapshots, controller_findings = state.load_controllers()
        keys = Counter(use.lane for use in uses if not use.key.startswith(OWN_PREFIX))
        history = snapshots.pop(HISTORY, b"")
        size = sum(entry.stat().st_size for entry in Path(layout.state).iterdir() if entry.is_file())
        found = KeptReport(
            letters={}, idempotency_keys=dict(sorted(keys.items())),
            controllers={place: _described(snapshots[place]) for place in sorted(snapshots)},
            usual=_usual(history, wall_ns), state_bytes=size,
        )  # fmt: skip
        found = replace(found, damage=tuple(letter_findings), findings=(*key_findings, *controller_findings))
        return (found, letters), [*letter_findings, *key_findings, *controller_findings]

    nothing = KeptReport(letters={}, idempotency_keys={}, controllers={}, usual={}, state_bytes=0)
    (found, letters), _ = _read_kept(layout, read, (nothing, _Letters()))
    counts: dict[str, Count] = {}
    for letter in _without_requeued(layout, letters):
        count = counts.setdefault(letter.lane, Count())
        count.operations += 1
        count.bytes += len(letter.key) + len(letter.payload)
    return replace(found, letters=dict(sorted(counts.items())))


def _read_kept(
    layout: Layout, read: Callable[[LmdbState], tuple[_Kept, list[str]]], nothing: _Kept
) -> tuple[_Kept, tuple[str, ...]]:
    """What `read` finds in state/; `nothing` where the store is not made yet."""
    fs = RealFileSystem()
    with storage_errors(layout.root):
        identity, uuid = read_identity(fs, layout)
        if identity is not IdentityState.VALID or uuid is None:
            raise_refusal(make_plan(observe(fs, layout).facts), layout)
            return nothing, ()
        if not fs.is_directory(layout.state):
            return nothing, ()
        return read_beside(layout, uuid, read)


def _load_letters(state: LmdbState) -> tuple[_Letters, list[str]]:
    """Findings: of a file that cannot be opened, and of letters."""
    letters, findings = state.load_letters()
    findings = [*state.findings, *findings]
    damaged = state.damaged_letters() if findings else frozenset[int]()
    if not letters:
        return _Letters(damaged=damaged), findings
    uses, keys_lsn, _ = state.load_keys()
    own = frozenset((use.lane, use.key) for use in uses if use.key.startswith(OWN_PREFIX))
    return _Letters(letters=letters, damaged=damaged, own_keys=own, keys_lsn=keys_lsn), findings


def _without_requeued(layout: Layout, found: _Letters) -> list[DeadLetter]:
    """The letters whose operations were not submitted again."""
    if not found.letters:
        return []
    own = found.own_keys | _own_keys_in_log(layout, found.keys_lsn)
    return [letter for letter in found.letters if (letter.lane, requeue_key(letter.lsn)) not in own]


def _own_keys_in_log(layout: Layout, above_lsn: int) -> frozenset[tuple[str, bytes]]:
    """The engine's own keys of operations above an LSN. Of a damaged log, as far as it can be read: others tell of that."""
    fs = RealFileSystem()
    own: set[tuple[str, bytes]] = set()
    with storage_errors(layout.root):
        facts = observe(fs, layout).facts
        for segment in facts.segments:
            header = segment.header
            if header is None or not header.flags & SEGMENT_OPTIONS or segment.last_lsn <= above_lsn:
                continue
            found = segment_operations(fs, layout, segment.number, header, segment.last_lsn, NOTHING_SETTLED)
            with contextlib.suppress(CorruptionError, UnsupportedFormat):
                own.update(
                    (operation.kind, operation.options.idempotency_key) for operation in found
                    if operation.lsn > above_lsn and operation.options.idempotency_key.startswith(OWN_PREFIX)
                )  # fmt: skip
    return frozenset(own)


def _described(snapshot: bytes) -> ControllerState | None:
    """What a snapshot says; None for one of no controller that we know."""
    for controller in (FixedSize(count=1), ResponseSurface(), LatencyAimd()):
        if controller.restore(snapshot):
            return controller.describe()
    return None


def _usual(snapshot: bytes, wall_ns: int) -> Mapping[str, Expectation]:
    """What the history says of this hour, by lane; nothing where it cannot be read."""
    try:
        history = History.decode(snapshot)
    except ValueError:
        return {}
    found = {kind: history.expect(kind, wall_ns) for kind in sorted(history.kinds)}
    return {kind: expected for kind, expected in found.items() if expected is not None}
