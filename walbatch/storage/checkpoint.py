"""state/: the checkpoint, and what is remembered of the lanes.

What is not here: what they mean (`core` decides from them), their bytes (`envelope`), and the LMDB file that holds them
(`statefile`).

The idea needed to read it: losing state/ only costs that operations are delivered again; believing a wrong value costs
data. So the checkpoint has two generations, of which a save replaces the older one; every value is checked by itself;
and what is wrong becomes a *finding*, one sentence, never an error. Suspect bytes go to quarantine/ with the first
opener that may write.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final, Self, TypeVar

from walbatch.errors import ConfigError, CorruptionError, EngineClosed, StorageError
from walbatch.limits import KINDS_MAX
from walbatch.storage import statefile
from walbatch.storage.envelope import (
    CHECKPOINT_BYTES_MAX,
    ENVELOPE_BYTES,
    LANE_BYTES_MAX,
    ForeignValueError,
    decode_checkpoint,
    decode_lane,
    encode_checkpoint,
    encode_lane,
    seal,
    unseal,
)
from walbatch.storage.statefile import DamagedFileError, Entry, StateFile
from walbatch.types import Checkpoint, LaneMemory

LOOKS_MAX: Final = 3
"""How often a reader beside a live engine looks at the file before it calls it damaged: the engine may have rewritten
pages under its eyes."""

_CHECKPOINTS: Final = b"checkpoint"
_LANES: Final = b"lanes"
_SLOTS: Final = (b"0", b"1")
"""Keys of the two generations: even, odd."""

_BYTES_MAX: Final = {_CHECKPOINTS: CHECKPOINT_BYTES_MAX, _LANES: LANE_BYTES_MAX + ENVELOPE_BYTES}
_REDELIVERY: Final = "operations that were delivered before may be delivered again"

assert 3 * CHECKPOINT_BYTES_MAX < statefile.MAP_BYTES_MAX
assert 2 * KINDS_MAX <= statefile.ENTRIES_MAX

_T = TypeVar("_T")


class LmdbState:
    """The state of one store, open. Implements `ports.StateStore`; make one with `open`.

    Safe from any thread of the process that opened it; in a forked child every method raises EngineClosed. Every save is
    durable when it returns.
    """

    def __init__(
        self, file: StateFile | None, path: str, store_uuid: bytes, findings: Sequence[str] = (), *, mode: str
    ) -> None:
        """Not for users: see `open`."""
        self._file = file
        self._path = path
        self._store_uuid = store_uuid
        self._findings = tuple(findings)
        self._mode = mode
        self._failure: StorageError | None = None

    def __repr__(self) -> str:
        return (
            f"<LmdbState {self._path} {self._mode}, {'no file' if self._file is None else repr(self._file)}>"
        )

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
            return cls(own, path, store_uuid, mode="borrowed")
        for _ in range(LOOKS_MAX - 1):
            state = cls._open_reading(path, store_uuid, shared=True)
            if not state._findings:  # noqa: SLF001 - our own class
                return state
        return cls._open_reading(path, store_uuid, shared=True)

    @classmethod
    def _open_reading(cls, path: str, store_uuid: bytes, *, shared: bool) -> Self:
        with statefile.os_errors(path, "read"):
            if statefile.is_empty(path) or statefile.is_unfinished(path):
                return cls(None, path, store_uuid, mode="readonly")
        try:
            file = StateFile.open(path, readonly=True, shared=shared)
        except DamagedFileError as error:
            return cls(None, path, store_uuid, [f"state is damaged: {error}; {_REDELIVERY}"], mode="readonly")
        return cls(file, path, store_uuid, mode="readonly")

    @classmethod
    def _open_writing(cls, path: str, store_uuid: bytes, quarantine: str | None, map_bytes: int) -> Self:
        with statefile.os_errors(path, "made"):
            statefile.make_directory(path)
            if statefile.is_unfinished(path):
                statefile.set_aside_unfinished(path)
        try:
            return cls._open_sound(path, store_uuid, quarantine, map_bytes, ())
        except DamagedFileError as error:
            if quarantine is None:
                raise CorruptionError(
                    f"{path} is damaged ({error}): move it aside; {_REDELIVERY}",
                    path=path,
                    expected="a sound LMDB environment",
                ) from error
            with statefile.os_errors(path, "moved aside"):
                note = statefile.move_aside(path, quarantine, str(error))
            finding = f"state is damaged: {error}; it was moved aside (see {note}), {_REDELIVERY}"
        return cls._open_sound(path, store_uuid, quarantine, map_bytes, (finding,))

    @classmethod
    def _open_sound(
        cls, path: str, store_uuid: bytes, quarantine: str | None, map_bytes: int, findings: Sequence[str]
    ) -> Self:
        file = StateFile.open(path, readonly=False, map_bytes=map_bytes)
        state = cls(file, path, store_uuid, findings, mode="writable")
        try:
            # First what may refuse (a newer version), then what writes.
            damaged = list(state._damaged_values())
            for key, value, reason in damaged if quarantine is not None else ():
                assert quarantine is not None
                with statefile.os_errors(quarantine, "written"):
                    statefile.keep_copy(quarantine, value, f"{path}: the value of {key!r}: {reason}")
            file.prove()
        except BaseException:
            file.close()
            raise
        return state

    # --- the checkpoint -------------------------------------------------------------------------------------------

    def load_checkpoint(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest valid generation, and what was found wrong, at opening too (one sentence each).

        Damage is never an error. Raises UnsupportedFormat for a newer version, StorageError where the file system fails.
        """
        entries, problems = self._entries(_CHECKPOINTS)
        findings = [*self._findings, *problems]
        found: list[Checkpoint] = []
        for key, value in entries:
            checkpoint, problem = self._decode(key, value, _decode_slot)
            if checkpoint is None:
                findings.append(f"a generation of the checkpoint (key {key!r}) is not usable: {problem}")
            else:
                found.append(checkpoint)
        return max(found, key=lambda checkpoint: checkpoint.generation, default=None), findings

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
            raise StorageError(
                f"{self._path}: the checkpoint cannot be stored: {error}", path=self._path
            ) from error
        key = _SLOTS[checkpoint.generation % 2]
        self._save(_CHECKPOINTS, [(key, seal(key, body, self._store_uuid))])

    # --- lanes ----------------------------------------------------------------------------------------------------

    def load_lanes(self) -> tuple[dict[str, LaneMemory], list[str]]:
        """What is remembered of lanes, by name, and what was found wrong. Raises as `load_checkpoint`."""
        entries, findings = self._entries(_LANES)
        lanes: dict[str, LaneMemory] = {}
        for key, value in entries:
            memory, problem = self._decode(key, value, decode_lane)
            if memory is None:
                findings.append(f"what is remembered of the lane {key!r} is not usable: {problem}")
            elif len(lanes) == KINDS_MAX:
                findings.append(f"more than {KINDS_MAX} lanes are remembered: the rest is ignored")
                break
            else:
                lanes[memory.name] = memory
        return lanes, findings

    def save_lanes(self, lanes: Mapping[str, LaneMemory]) -> None:
        """Remember lanes (others stay as they are), all or none. Durable when it returns.

        Raises ConfigError for what cannot be remembered, such as a URL that is too long; StorageError as
        `save_checkpoint`.
        """
        values: list[Entry] = []
        problems: list[str] = []
        for name, memory in lanes.items():
            try:
                key = name.encode()
                values.append((key, seal(key, encode_lane(memory), self._store_uuid)))
            except ValueError as error:
                problems.append(f"lane {name!r} cannot be remembered: {error}")
        if problems:
            raise ConfigError(*problems)
        if values:
            self._save(_LANES, values)

    # --- common ---------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Release it. Idempotent."""
        file, self._file = self._file, None
        if file is not None and self._mode != "borrowed":
            file.close()
        self._mode = "closed"

    def _entries(self, name: bytes) -> tuple[list[Entry], list[str]]:
        if self._file is None:
            return [], []
        try:
            return self._file.entries(name, _BYTES_MAX[name])
        except DamagedFileError as error:
            return [], [f"state is damaged: {error}; {_REDELIVERY}"]

    def _decode(
        self, key: bytes, value: bytes, decode: Callable[[bytes, bytes], _T]
    ) -> tuple[_T | None, str]:
        """The decoded value, or None and what is wrong with it."""
        try:
            return decode(key, unseal(key, value, self._store_uuid)), ""
        except ForeignValueError as error:
            return None, str(error)
        except ValueError as error:
            return None, f"it is damaged, {error}"

    def _damaged_values(self) -> Iterator[tuple[bytes, bytes, str]]:
        """Every value that would be a finding, with its key and the reason. Raises DamagedFileError too."""
        assert self._file is not None
        decoders: Mapping[bytes, Callable[[bytes, bytes], object]] = {
            _CHECKPOINTS: _decode_slot,
            _LANES: decode_lane,
        }
        for name, decode in decoders.items():
            entries, _ = self._file.entries(name, _BYTES_MAX[name])
            for key, value in entries:
                decoded, problem = self._decode(key, value, decode)
                if decoded is None:
                    yield key, value, problem

    def _save(self, name: bytes, values: Sequence[Entry]) -> None:
        """Commit values. A failure other than a full disk is final: nobody can tell any more what is on disk."""
        if self._failure is not None:
            raise self._failure
        if self._file is None or self._mode != "writable":
            raise EngineClosed(f"{self._path} is {self._mode}: nothing can be saved")
        try:
            self._file.put(name, values)
        except DamagedFileError as error:
            self._failure = StorageError(
                f"{self._path} could not be saved: LMDB finds it damaged ({error}); close the engine and open the store "
                f"again, which moves it aside; {_REDELIVERY}",
                path=self._path,
            )
            raise self._failure from error
        except StorageError as error:
            if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
                self._failure = error
            raise


def _decode_slot(key: bytes, body: bytes) -> Checkpoint:
    checkpoint = decode_checkpoint(body)
    if key not in _SLOTS or _SLOTS[checkpoint.generation % 2] != key:
        raise ValueError(f"generation {checkpoint.generation} does not belong under this key")
    return checkpoint
