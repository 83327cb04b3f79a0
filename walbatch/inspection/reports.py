"""What looks at a store tell, as frozen values.

What is not here: how any of it is found.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from walbatch.core.controller import ControllerState
from walbatch.core.history import Expectation
from walbatch.core.recovery import Case
from walbatch.errors import WalbatchError
from walbatch.types import NO_OPTIONS, Options


@dataclass(slots=True)
class Count:
    """Operations and the bytes of their keys and payloads."""

    operations: int = 0
    bytes: int = 0


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
    situation: str = ""
    """What the row of the decision table says, in words."""
    pending: int | None = None
    frame_bytes: int | None = None
    """Of the file, what its frames take. Like `pending`, None where nobody counted."""


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
    passed_over: int = 0
    """Operations in the log that the checkpoint does not call settled, and that are not pending all the same: they are dead or
    cancelled, or compactions have taken them for settled."""
    findings: tuple[str, ...] = ()
    """What could not be read of what was given up, one sentence each."""
    kinds: frozenset[str] = frozenset()
    """Every lane that is remembered, or named by the checkpoint or, in a full look, by the log."""


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
    """Also what is dead or cancelled, or was so for a compaction."""
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
    """What a store keeps beside its log."""

    letters: Mapping[str, Count]
    """Dead letters, by lane."""
    idempotency_keys: Mapping[str, int]
    """Keys in state/, by lane. Those of the newest operations are still in the log alone."""
    controllers: Mapping[tuple[str, int], ControllerState | None]
    """What size controllers have learnt, by lane and shard; None where it cannot be told."""
    usual: Mapping[str, Expectation]
    """What the last days were like at this hour, by lane."""
    state_bytes: int
    damage: tuple[str, ...] = ()
    """Dead letters that cannot be read, or a file that cannot be opened and may have held some, one sentence each."""
    findings: tuple[str, ...] = ()
    """What else could not be read."""
