"""The ports: what the engine needs from the world outside its pure core, as interfaces.

Each has a real implementation (`storage/`, `runtime/clock.py`, `backends/`) and can have a simulated one. Each method
says what is durable when it returns and what may run at once. File-system errors are raised as `OSError`; the
storage layer turns them into the errors of `walbatch.errors`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from walbatch.types import Answer, Batch, Checkpoint, DeadLetter, KeyUse, LaneMemory, Mark, Options, Position

# --- files ------------------------------------------------------------------------------------------------------


class File(Protocol):
    """An open file. One thread writes; reads at other offsets may run at the same time."""

    def write(self, buffers: Sequence[bytes], offset: int) -> None:
        """Write all buffers one after the other at `offset`. Nothing is durable until `datasync`.

        On an error any part may have been written.
        """

    def read(self, size: int, offset: int) -> bytes:
        """Up to `size` bytes; fewer only at the end of the file."""

    def datasync(self) -> None:
        """Make the file's bytes and size durable, not its name. After an error nothing is known."""

    def preallocate(self, size: int) -> None:
        """Reserve room and grow the file to `size`; the new bytes read as anything. Not durable until `datasync`."""

    def truncate(self, size: int) -> None:
        """Cut or grow the file to `size`. Not durable until `datasync`."""

    def size(self) -> int:
        """The present size in bytes."""

    def close(self) -> None:
        """Release the descriptor. Says nothing of durability."""


class FileLock(Protocol):
    """A held exclusive lock. It ends with `release`, with the process, and in a forked child at the fork."""

    @property
    def held(self) -> bool:
        """False after `release` and in a forked child. Cheap: read on every submit."""

    def release(self) -> None:
        """Give the lock up. The lock file stays."""


class FileSystem(Protocol):
    """Directories and names. Paths are absolute strings. Changes of names are durable after `sync_directory`."""

    def make_directory(self, path: str) -> None:
        """Create one directory, mode 0700. An existing one is left alone."""

    def list_directory(self, path: str) -> list[str]:
        """Names in a directory, sorted. FileNotFoundError where there is none."""

    def is_directory(self, path: str) -> bool:
        """Whether `path` is a directory."""

    def exists(self, path: str) -> bool:
        """Whether `path` names anything."""

    def create(self, path: str) -> File:
        """Create a new file, mode 0600, for reading and writing. FileExistsError if the name is taken."""

    def open_read(self, path: str) -> File:
        """Open for reading. Never follows a symbolic link at the last component."""

    def truncate(self, path: str, size: int) -> None:
        """Cut a file to `size`. Not durable, and needs not be where it is used."""

    def rename(self, source: str, target: str) -> None:
        """Replace `target` by `source` at once. Durable after `sync_directory`."""

    def unlink(self, path: str) -> None:
        """Remove a name. Durable after `sync_directory`."""

    def sync_directory(self, path: str) -> None:
        """Make all creates, renames and unlinks in `path` durable."""

    def lock(self, path: str, note: bytes) -> FileLock | bytes:
        """Take the exclusive lock at `path` (created if absent) without waiting, and leave `note` in the file.

        Where another opener holds it, return the holder's note instead. With an empty note nothing is created
        or written.
        """


# --- the log, as the runtime sees it --------------------------------------------------------------------------------


class DecodedFrame(Protocol):
    """A frame that was read back: parallel columns. `next_position` is where the next frame starts."""

    @property
    def position(self) -> Position: ...
    @property
    def next_position(self) -> Position: ...
    @property
    def lsns(self) -> Sequence[int]: ...
    @property
    def last_lsn(self) -> int: ...
    @property
    def wall_ns(self) -> int: ...
    @property
    def kinds(self) -> Sequence[str]: ...
    @property
    def kind_indexes(self) -> Sequence[int]: ...
    @property
    def priorities(self) -> Sequence[int]: ...
    @property
    def keys(self) -> Sequence[bytes]: ...
    @property
    def payloads(self) -> Sequence[bytes]: ...
    @property
    def options(self) -> Sequence[Options]:
        """Empty where no operation has any."""


class Log(Protocol):
    """One thread at a time appends (the leader), one reads frames, one trims and compacts; the three at once."""

    def append(
        self,
        *,
        first_lsn: int,
        kinds: Sequence[str],
        kind_indexes: Sequence[int],
        priorities: Sequence[int],
        keys: Sequence[bytes],
        payloads: Sequence[bytes],
        synced_lsn: int,
        options: Sequence[Options] = (),
    ) -> Position:
        """Write one frame. Returns its position. Not durable until `sync`. May roll to a new segment first.

        `options` has one for each operation, or none at all.
        """

    def sync(self) -> None:
        """Everything appended so far is durable when this returns. After an error nothing more may be appended."""

    def stamp(self, *, next_lsn: int, clean: bool) -> None:
        """Write and sync an idle stamp: the proof that everything before it was durable."""

    @property
    def end(self) -> Position:
        """Where the next frame will start, if it does not roll."""

    @property
    def disk_bytes(self) -> int:
        """Bytes of all segments."""

    def read_frame(
        self,
        position: Position,
        *,
        next_lsn: int,
        wanted: frozenset[str] | None = None,
        priority_min: int = 0,
    ) -> DecodedFrame | None:
        """The first frame at or after `position` that holds an operation of a kind in `wanted` (None: any kind).

        With `priority_min`, one that also holds an operation of at least that priority, as far as footers tell.

        `next_lsn`: the reader has passed every LSN below it. Where the segment was compacted since the position was handed out,
        that is where it goes on. The frame may hold LSNs below it, and none of `wanted`: both only allow skipping. None where
        the log ends.
        """

    def position_of(self, lsn: int) -> Position:
        """Where to begin to read for an LSN. At most a segment lies before its frame. From any thread."""

    @property
    def last_lsn(self) -> int:
        """Last LSN that was appended."""

    @property
    def checkpointed_lsn(self) -> int:
        """Up to where trimming was allowed."""

    @property
    def has_options(self) -> bool:
        """Whether any operation may ever have had options: if not, nobody has to look for them."""

    def trim(self, lsn: int) -> int:
        """Remove sealed segments whose operations all have an LSN up to `lsn`. Returns how many. Names durable."""

    def compact(self, covered: Checkpoint) -> bool:
        """One step of compaction: rewrite closed segments without the operations that `covered` calls settled.

        Both generations of the checkpoint must cover what `covered` does. It reads one segment at most, or a MiB of small ones.
        Returns whether there may be more to do. A disk without room is no error.
        """


# --- state ----------------------------------------------------------------------------------------------------------


class StateStore(Protocol):
    """What a store keeps beside its log. Safe from any thread: calls are serialised inside.

    Each save is one transaction, durable when it returns. It raises StorageError; with errno ENOSPC or EDQUOT (a full disk, or
    a bound of `limits`) nothing was saved and the call may be made again, after any other every later save fails. Each load
    returns what was found wrong too, one sentence each: damage is never an error.
    """

    # --- the checkpoint and the lanes ---

    def load_checkpoint(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest valid generation, and what was found wrong."""

    def save_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Replace the older of the two generations."""

    def load_lanes(self) -> tuple[dict[str, LaneMemory], list[str]]:
        """What is remembered of lanes, by name, and what was found wrong."""

    def save_lanes(self, lanes: Mapping[str, LaneMemory]) -> None:
        """Remember lanes (others stay as they are)."""

    # --- operations that were given up: dead or cancelled ---

    def load_letters(self) -> tuple[list[DeadLetter], list[str]]:
        """The dead letters, by LSN, and what was found wrong."""

    def bury(self, letters: Sequence[DeadLetter]) -> None:
        """Keep dead letters, all or none; one with the LSN of an older one replaces it. Their LSNs are given up from now on."""

    def unbury(self, lsns: Collection[int]) -> None:
        """Remove dead letters; LSNs without one are passed over. All of them stay given up.

        Many go in several transactions: after an error or a crash some may be left, to be removed again.
        """

    def load_given_up(self) -> tuple[frozenset[int], list[str]]:
        """LSNs that must not be delivered, although the log may still hold them, and what was found wrong.

        All that was cancelled, or buried, and not forgotten; also what was forgotten, as long as its letter is there. A
        letter that is damaged does not count: where the log still holds its operation, that is tried again.
        """

    def cancel(self, lsns: Collection[int]) -> None:
        """Give up LSNs without a letter, all or none."""

    def forget_given_up(self, lsn: int) -> None:
        """Allow to forget what was given up to `lsn`: both generations of the checkpoint cover it.

        Writes nothing and cannot fail: a later save takes the records away, or they are found once more.
        """

    # --- idempotency keys ---

    def load_keys(self) -> tuple[list[KeyUse], int, list[str]]:
        """Uses that were saved, in that order, the LSN up to which the log's keys are among them, and what was found wrong.

        There may be older ones than the last save asked for. Where something is missing the LSN is 0: the log's keys have to
        be read again, all of them.
        """

    def save_keys(self, uses: Sequence[KeyUse], *, up_to_lsn: int, oldest_wall_ns: int) -> None:
        """Add uses, in the order in which they happened, and note `up_to_lsn`.

        Removes what was used before `oldest_wall_ns`, or before anything that was (`core.idempotency`), and the oldest beyond
        `limits.IDEMPOTENCY_KEYS_MAX`; both in portions, so that it costs what is new and what goes, not what there is.
        """

    # --- controllers ---

    def load_controllers(self) -> tuple[dict[tuple[str, int], bytes], list[str]]:
        """Snapshots of size controllers, by lane and shard, and what was found wrong."""

    def save_controllers(self, snapshots: Mapping[tuple[str, int], bytes]) -> None:
        """Remember snapshots (others stay as they are)."""

    def close(self) -> None:
        """Release it."""


# --- time, threads and chance ---


class Clock(Protocol):
    """Time. Only differences of `monotonic_ns` decide anything; wall time is for people."""

    def monotonic_ns(self) -> int: ...
    def wall_ns(self) -> int: ...


class Memory(Protocol):
    """What this process uses of the memory that there is. Safe from any thread, and cheap enough for every tick."""

    def look(self) -> tuple[int, int]:
        """Bytes in use that the system cannot take back, and bytes there are; 0 and 0 where it does not say."""


class Event(Protocol):
    """A flag that threads wait for."""

    def set(self) -> None: ...
    def is_set(self) -> bool: ...
    def wait(self, timeout_ns: int | None = None) -> bool:
        """Wait until set. Returns whether it is."""


class Condition(Protocol):
    """A lock with waiting. Not re-entrant."""

    def __enter__(self) -> Any: ...
    def __exit__(self, *exc: object) -> None: ...
    def wait(self, timeout_ns: int | None = None) -> bool: ...
    def notify(self) -> None: ...
    def notify_all(self) -> None: ...


class Thread(Protocol):
    """A running thread."""

    def join(self, timeout_ns: int | None = None) -> bool:
        """Wait for its end. Returns whether it ended."""

    def is_current(self) -> bool:
        """Whether the caller runs in this thread."""


class Threads(Protocol):
    """Makes threads and what they wait on."""

    def condition(self) -> Condition: ...
    def event(self) -> Event: ...
    def spawn(self, name: str, target: Callable[[], None]) -> Thread: ...


class Entropy(Protocol):
    """Chance: identities, salts and jitter."""

    def random_bytes(self, size: int) -> bytes: ...
    def uniform(self) -> float:
        """In [0, 1). Safe from any thread."""


# --- backends -----------------------------------------------------------------------------------------------------


@runtime_checkable
class Backend(Protocol):
    """Where batches go.

    `apply` returns None (all applied), one outcome for each operation, or `Failures`. An exception speaks for
    the whole batch, which is tried again. When it reports an operation as applied, that must be durable in
    the backend: the engine forgets the operation after it. One call at a time for each shard; shards run in
    parallel, each call in a thread of the engine.

    A backend may also have: `limit_time(timeout_s)` called before `open` and when that setting of the lane changes,
    `open(lane, shards, store)` called before anything else, `close()`, `url` (a
    string from which the command line can make it again), and `key_bytes_min`, `key_bytes_max`,
    `payload_bytes_max` (checked at submit).
    """

    def apply(self, batch: Batch) -> Answer | Awaitable[Answer]: ...


@runtime_checkable
class TransactionalBackend(Backend, Protocol):
    """A backend that commits the batch and the mark in one transaction, which makes the effect exactly once.

    `apply` must, inside its transaction, read the mark it holds, refuse a batch whose mark has an older epoch (raise
    `Fenced`), leave out the operations that the held mark covers, and store the union of both marks.
    """

    def applied_mark(self, shard: int) -> Mark:
        """The mark stored for `shard` of this lane and store; `Mark()` where there is none. Durable."""
