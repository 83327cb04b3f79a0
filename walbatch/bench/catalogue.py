"""All subjects, by name, in the order in which they are shown."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

import walbatch as wb
from walbatch.bench.bounds import TasksBound, ThreadsBound
from walbatch.bench.embedded import LevelDb, Lmdb, RocksDb, Sqlite
from walbatch.bench.own import Walbatch
from walbatch.bench.queues import DiskcacheDeque, Litequeue, PersistFileQueue, PersistQueue
from walbatch.bench.raw import Raw, RawOver
from walbatch.bench.results import SubjectNote
from walbatch.bench.servers import NatsJetStream, RedisStream
from walbatch.bench.subject import Subject

SUBJECTS: Final[tuple[type[Subject], ...]] = (
    Walbatch, Raw, RawOver, ThreadsBound, TasksBound, Sqlite, Lmdb, RocksDb, LevelDb, PersistQueue, PersistFileQueue,
    DiskcacheDeque, Litequeue, RedisStream, NatsJetStream,
)  # fmt: skip


def chosen(names: Collection[str] | None) -> list[type[Subject]]:
    """The subjects of these names, or all. Raises ConfigError for a name that none has."""
    if names is None:
        return list(SUBJECTS)
    known = {subject.name for subject in SUBJECTS}
    wrong = sorted(set(names) - known)
    if wrong:
        raise wb.ConfigError(
            f"no subject is named {', '.join(map(repr, wrong))}: the subjects are {', '.join(sorted(known))}"
        )
    return [subject for subject in SUBJECTS if subject.name in names]


def describe(subject: type[Subject]) -> SubjectNote:
    """What is to be known of it, its version included."""
    missing = subject.missing()
    return SubjectNote(
        name=subject.name, title=subject.title, role=subject.role, syncs=subject.syncs, note=subject.note, missing=missing,
        version="" if missing else subject.release(),
    )  # fmt: skip
