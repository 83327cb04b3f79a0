"""state/: the checkpoint, what is remembered of the lanes, and the door to everything else that a store keeps there.

What is not here: what it means (`core` decides from it), the bytes (`envelope`), the other tables (`letters`, `given_up`,
`key_uses`, `controllers`), and the LMDB file that holds them (`statefile`).

The idea needed to read it: losing the checkpoint only costs that operations are delivered again; believing a wrong value costs
data. So the checkpoint has two generations, of which a save replaces the older one; every value is checked by itself;
and what is wrong becomes a *finding*, one sentence, never an error. Suspect bytes go to quarantine/ with the first
opener that may write.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Final, Self

from walbatch.errors import ConfigError, CorruptionError, EngineClosed
from walbatch.limits import CONTROLLER_BYTES_MAX, IDEMPOTENCY_KEYS_MAX, KINDS_MAX, SHARDS_MAX
from walbatch.storage import letters, statefile, statefolder
from walbatch.storage.controllers import Controllers
from walbatch.storage.envelope import (
    CHECKPOINT_BYTES_MAX,
    ENVELOPE_BYTES,
    LANE_BYTES_MAX,
    decode_checkpoint,
    decode_lane,
    encode_checkpoint,
    encode_lane,
)
from walbatch.storage.given_up import GivenUp
from walbatch.storage.key_uses import KeyUses
from walbatch.storage.letters import Letters
from walbatch.storage.statefile import Change, StateFile, Table
from walbatch.storage.statefolder import DamagedFileError
from walbatch.storage.tables import COSTS, Damaged, Tables, in_short
from walbatch.types import Checkpoint, DeadLetter, KeyUse, LaneMemory

LOOKS_MAX: Final = 3
"""How often a reader beside a live engine looks at the file before it calls it damaged: the engine may have rewritten
pages under its eyes."""

ENTRIES_MAX: Final = 256
"""Of a small table: twice the lanes of a store, and some that are damaged."""

_CHECKPOINTS: Final = Table(name=b"checkpoint", value_bytes_max=CHECKPOINT_BYTES_MAX, entries_max=ENTRIES_MAX)
_LANES: Final = Table(name=b"lanes", value_bytes_max=LANE_BYTES_MAX + ENVELOPE_BYTES, entries_max=ENTRIES_MAX)
_SLOTS: Final = (b"0", b"1")
"""Keys of the two generations: even, odd."""

_OTHER_BYTES_MAX: Final = (
    letters.BYTES_MAX + 300 * IDEMPOTENCY_KEYS_MAX + KINDS_MAX * SHARDS_MAX * CONTROLLER_BYTES_MAX
)
assert 3 * CHECKPOINT_BYTES_MAX + 2 * _OTHER_BYTES_MAX < statefile.MAP_BYTES_MAX
assert 2 * KINDS_MAX <= ENTRIES_MAX


class LmdbState:
    """The state of one store, open. Implements `ports.StateStore`; make one with `open`.

    Safe from any thread of the process that opened it; in a forked child every method raises EngineClosed. Every save is
    durable when it returns.
    """

    def __init__(self, tables: Tables, findings: Sequence[str] = ()) -> None:
        """Not for users: see `open`."""
        self._tables = tables
        self._findings = tuple(findings)
        self._pid = os.getpid()
        # Guards what the tables below know of their content, and is held during a save: each has to find what the one before
        # it has left.
        self._lock = threading.Lock()
        self._letters = Letters(tables)
        self._given_up = GivenUp(tables)
        self._keys = KeyUses(tables)
        self._controllers = Controllers(tables)

    def __repr__(self) -> str:
        return f"<LmdbState {self._tables!r}>"

    # --- opening --------------------------------------------------------------------------------------------------

    @classmethod
    def open(
        cls,
        path: str,
        store_uuid: bytes,
        *,
        readonly: bool = False,
        shared: bool = False,
        quarantine: str | None = None,
        map_bytes: int = statefile.MAP_BYTES,
    ) -> Self:
        """Open the environment in the directory `path`, made if absent.

        `readonly`: nothing at all is written; the caller holds the store's lock. `shared`: for reading beside an engine
        that may be alive, in this process or in another; LMDB then notes the reader in its own lock file, if there is
        one. Neither: the caller holds the store's lock, and a damaged file is moved to the directory `quarantine` (on
        the same file system; made if absent) and replaced by an empty one, which is a finding. When it returns, what
        `load_checkpoint` tells is durable.

        Raises CorruptionError for a damaged file where there is no quarantine, UnsupportedFormat for a newer version
        (nothing is changed), StorageError where the file system refuses.
        """
        if shared:
            return cls._open_beside(path, store_uuid)
        if readonly:
            return cls._open_reading(path, store_uuid, shared=False)
        return cls._open_writing(path, store_uuid, quarantine, map_bytes)

    @classmethod
    def open_for_engine(cls, path: str, store_uuid: bytes, quarantine: str) -> Self:
        """Open for writing, the store's lock being held; without a quarantine if it is empty. Raises as `open`."""
        return cls.open(path, store_uuid, quarantine=quarantine or None)

    @classmethod
    def _open_beside(cls, path: str, store_uuid: bytes) -> Self:
        own = StateFile.of_this_process(path)
        if own is not None:
            return cls(Tables(own, path, store_uuid, mode="borrowed"))
        for _ in range(LOOKS_MAX - 1):
            state = cls._open_reading(path, store_uuid, shared=True)
            if not state._findings:  # noqa: SLF001 - our own class
                return state
        return cls._open_reading(path, store_uuid, shared=True)

    @classmethod
    def _open_reading(cls, path: str, store_uuid: bytes, *, shared: bool) -> Self:
        with statefolder.os_errors(path, "read"):
            if statefolder.is_empty(path) or statefolder.is_unfinished(path):
                return cls(Tables(None, path, store_uuid, mode="readonly"))
        try:
            file = StateFile.open(path, readonly=True, shared=shared)
        except DamagedFileError as error:
            tables = Tables(None, path, store_uuid, mode="readonly")
            return cls(tables, [f"state is damaged: {error}; {COSTS}"])
        return cls(Tables(file, path, store_uuid, mode="readonly"))

    @classmethod
    def _open_writing(cls, path: str, store_uuid: bytes, quarantine: str | None, map_bytes: int) -> Self:
        with statefolder.os_errors(path, "made"):
            statefolder.make_directory(path)
            if statefolder.is_unfinished(path):
                statefolder.set_aside_unfinished(path)
        try:
            return cls._open_sound(path, store_uuid, quarantine, map_bytes, ())
        except DamagedFileError as error:
            if quarantine is None:
                raise CorruptionError(
                    f"{path} is damaged ({error}): move it aside; {COSTS}",
                    path=path,
                    expected="a sound LMDB environment",
                ) from error
            with statefolder.os_errors(path, "moved aside"):
                note = statefolder.move_aside(path, quarantine, str(error))
            finding = f"state is damaged: {error}; it was moved aside (see {note}), {COSTS}"
        return cls._open_sound(path, store_uuid, quarantine, map_bytes, (finding,))

    @classmethod
    def _open_sound(
        cls, path: str, store_uuid: bytes, quarantine: str | None, map_bytes: int, findings: Sequence[str]
    ) -> Self:
        file = StateFile.open(path, readonly=False, map_bytes=map_bytes)
        state = cls(Tables(file, path, store_uuid, mode="writable"), findings)
        try:
            # First what may refuse (a newer version), then what writes.
            damaged = sum(1 for _ in state._examine())
            if damaged and quarantine is not None:
                for key, value, reason in state._examine():
                    with statefolder.os_errors(quarantine, "written"):
                        statefolder.keep_copy(quarantine, value, f"{path}: the value of {key!r}: {reason}")
            file.prove()
        except BaseException:
            file.close()
            raise
        return state

    def _examine(self) -> Iterator[Damaged]:
        """Every value that would be a finding. Raises DamagedFileError too."""
        yield from self._tables.damaged(_CHECKPOINTS, _decode_slot)
        yield from self._tables.damaged(_LANES, decode_lane)
        yield from self._letters.examine()
        yield from self._given_up.examine()
        yield from self._keys.examine()
        yield from self._controllers.examine()

    @property
    def findings(self) -> tuple[str, ...]:
        """What was found wrong with the file as a whole when it was opened, one sentence each."""
        return self._findings

    # --- the checkpoint -------------------------------------------------------------------------------------------

    def load_checkpoint(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest valid generation, and what was found wrong, at opening too (one sentence each).

        Damage is never an error. Raises UnsupportedFormat for a newer version, StorageError where the file system fails.
        """
        findings: list[str] = []
        problems: list[str] = []
        found: list[Checkpoint] = []
        for key, value in self._tables.entries(_CHECKPOINTS, problems):
            checkpoint, problem = self._tables.decode(key, value, _decode_slot)
            if checkpoint is None:
                findings.append(f"a generation of the checkpoint (key {key!r}) is not usable: {problem}")
            else:
                found.append(checkpoint)
        newest = max(found, key=lambda checkpoint: checkpoint.generation, default=None)
        return newest, [*self._findings, *problems, *in_short(findings)]

    def save_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Replace the older of the two generations. Durable when it returns.

        Crash story: LMDB writes no page that its last commit refers to, so a power cut at any moment leaves that commit
        or this one, whole. Should this value be damaged later, the other slot still has the generation before it.

        Raises StorageError. With errno ENOSPC or EDQUOT the call may be made again; after any other the store must be
        reopened, and later saves raise the same error.
        """
        try:
            body = encode_checkpoint(checkpoint)
        except ValueError as error:
            raise self._tables.refuse("the checkpoint", error) from error
        key = _SLOTS[checkpoint.generation % 2]
        with self._serialised():
            changes = self._given_up.changes(())
            changes.append((_CHECKPOINTS.name, key, self._tables.seal(key, body)))
            self._tables.save(changes, spare_bytes=0)
            self._given_up.changed(changes)

    # --- lanes ----------------------------------------------------------------------------------------------------

    def load_lanes(self) -> tuple[dict[str, LaneMemory], list[str]]:
        """What is remembered of lanes, by name, and what was found wrong. Raises as `load_checkpoint`."""
        findings: list[str] = []
        problems: list[str] = []
        lanes: dict[str, LaneMemory] = {}
        for key, value in self._tables.entries(_LANES, problems):
            memory, problem = self._tables.decode(key, value, decode_lane)
            if memory is None:
                findings.append(f"what is remembered of the lane {key!r} is not usable: {problem}")
            elif len(lanes) == KINDS_MAX:
                findings.append(f"more than {KINDS_MAX} lanes are remembered: the rest is ignored")
                break
            else:
                lanes[memory.name] = memory
        return lanes, problems + in_short(findings)

    def save_lanes(self, lanes: Mapping[str, LaneMemory]) -> None:
        """Remember lanes (others stay as they are), all or none. Durable when it returns.

        Raises ConfigError for what cannot be remembered, such as a URL that is too long; StorageError as
        `save_checkpoint`.
        """
        values: list[Change] = []
        problems: list[str] = []
        for name, memory in lanes.items():
            try:
                key = name.encode()
                values.append((_LANES.name, key, self._tables.seal(key, encode_lane(memory))))
            except ValueError as error:
                problems.append(f"lane {name!r} cannot be remembered: {error}")
        if problems:
            raise ConfigError(*problems)
        if values:
            with self._serialised():
                self._tables.save(values, spare_bytes=0)

    # --- what was given up ----------------------------------------------------------------------------------------

    def load_letters(self) -> tuple[list[DeadLetter], list[str]]:
        """The dead letters, by LSN, and what was found wrong. Raises as `load_checkpoint`."""
        return self._letters.load()

    def bury(self, letters: Sequence[DeadLetter]) -> None:
        """Keep dead letters, all or none, and give up their LSNs. Durable when it returns.

        Crash story: both stand in one commit. Before it the operations are in the log and will be delivered; after it they are
        letters, and what the log still holds of them is passed over.

        Raises StorageError as `save_checkpoint`, with ENOSPC too where there are as many as may be.
        """
        with self._serialised():
            buried = self._letters.changes(letters)
            changes = [*buried, *self._given_up.changes([letter.lsn for letter in letters])]
            if letters:
                self._tables.save(changes)
                self._letters.buried(letters, buried)
                self._given_up.changed(changes)

    def unbury(self, lsns: Collection[int]) -> None:
        """Remove dead letters; LSNs without one are passed over. Durable when it returns. Raises as `save_checkpoint`.

        In portions: a crash, or an error, may leave some of them, to be removed again.
        """
        with self._serialised():
            for changes in self._letters.removals(lsns):
                self._tables.save(changes)

    def load_given_up(self) -> tuple[frozenset[int], list[str]]:
        """LSNs that must not be delivered, although the log may still hold them, and what was found wrong.

        Raises as `load_checkpoint`.
        """
        lsns, findings = self._given_up.load()
        with self._serialised():
            self._look_at_letters()
            return frozenset((lsns | self._letters.lsns) - self._letters.damaged_lsns), findings

    def damaged_letters(self) -> frozenset[int]:
        """LSNs of the letters that cannot be read, as far as those can be told. Raises as `load_checkpoint`."""
        with self._serialised():
            self._look_at_letters()
            return self._letters.damaged_lsns

    def _look_at_letters(self) -> None:
        """Know the letters, where nobody has looked at them yet, or somebody else may have changed them.

        `load_letters` tells what is wrong.
        """
        if self._tables.mode != "writable":
            with contextlib.suppress(DamagedFileError):
                for _ in self._letters.examine():
                    pass

    def cancel(self, lsns: Collection[int]) -> None:
        """Give up LSNs without a letter, all or none. Durable when it returns. Raises as `bury`."""
        with self._serialised():
            changes = self._given_up.changes(lsns)
            if lsns:
                self._tables.save(changes)
                self._given_up.changed(changes)

    def forget_given_up(self, lsn: int) -> None:
        """Allow to forget what was given up to `lsn`; later saves do. Writes nothing."""
        with self._serialised():
            self._given_up.allow_forgetting(lsn)

    # --- idempotency keys and controllers -------------------------------------------------------------------------

    def load_keys(self) -> tuple[list[KeyUse], int, list[str]]:
        """Uses that were saved, the LSN up to which the log's keys are among them (0 if some are damaged), and findings.

        Raises as `load_checkpoint`.
        """
        return self._keys.load()

    def save_keys(self, uses: Sequence[KeyUse], *, up_to_lsn: int, oldest_wall_ns: int) -> None:
        """Add uses, remove what is old, and note `up_to_lsn`, in one commit. Raises as `save_checkpoint`."""
        with self._serialised():
            self._keys.save(uses, up_to_lsn=up_to_lsn, oldest_wall_ns=oldest_wall_ns)

    def load_controllers(self) -> tuple[dict[tuple[str, int], bytes], list[str]]:
        """Snapshots of controllers, by lane and shard, and what was found wrong. Raises as `load_checkpoint`."""
        return self._controllers.load()

    def save_controllers(self, snapshots: Mapping[tuple[str, int], bytes]) -> None:
        """Remember snapshots (others stay as they are), in one commit. Raises as `save_checkpoint`."""
        with self._serialised():
            self._controllers.save(snapshots)

    # --- common ---------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _serialised(self) -> Iterator[None]:
        """With the lock held. It is not even tried in a forked child: its holder was not forked."""
        if self._pid != os.getpid():
            raise EngineClosed(
                f"{self._tables.path} was opened by the process that this one was forked from: open it again"
            )
        with self._lock:
            yield

    def close(self) -> None:
        """Release it. Idempotent."""
        self._tables.close()


def _decode_slot(key: bytes, body: bytes) -> Checkpoint:
    checkpoint = decode_checkpoint(body)
    if key not in _SLOTS or _SLOTS[checkpoint.generation % 2] != key:
        raise ValueError(f"generation {checkpoint.generation} does not belong under this key")
    return checkpoint
