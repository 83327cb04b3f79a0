"""The directory of a store: locked, made, identified, looked at.

What is not here: the log once it is open (`log`), and decisions (`core.recovery`).
"""

from __future__ import annotations

import contextlib
import errno
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from walbatch.core.recovery import IdentityState, Plan, Severity, StoreFacts, make_plan
from walbatch.errors import (
    ConfigError,
    CorruptionError,
    StorageError,
    StoreLocked,
    UnsupportedFormat,
    WalbatchError,
)
from walbatch.ports import Clock, Entropy, FileLock, FileSystem, StateStore
from walbatch.storage.layout import (
    TEMPORARY_SUFFIX,
    Layout,
    encode_identity,
    read_identity,
    sync_directory,
    sync_failed,
    write_durably,
)
from walbatch.storage.survey import Progress, survey

OpenState = Callable[[str, bytes], StateStore]
"""open_state(path, store UUID)."""

_OWN_NAMES = frozenset({"identity", "lock", "wal", "state", "quarantine", "identity" + TEMPORARY_SUFFIX})


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenStore:
    """A store that is locked and understood, but not yet changed."""

    layout: Layout
    uuid: bytes
    lock: FileLock
    state: StateStore
    facts: StoreFacts
    plan: Plan


@contextlib.contextmanager
def storage_errors(path: str) -> Iterator[None]:
    """Turn an OSError into a StorageError that says what to do."""
    try:
        yield
    except (NotADirectoryError, FileExistsError) as error:
        raise StorageError(
            f"{error.filename or path} is not a directory, so it cannot hold a store: choose another path", path=path,
            errno=error.errno,
        ) from error  # fmt: skip
    except OSError as error:
        raise StorageError(
            f"{error.filename or path}: {error.strerror or error}. Nothing was lost; repair the cause (room, permissions, a "
            "read-only disk) and open the store again",
            path=path, errno=error.errno,
        ) from error  # fmt: skip


def open_store(
    fs: FileSystem, root: str, *, clock: Clock, entropy: Entropy, open_state: OpenState, note: dict[str, object],
    full: bool = False, progress: Progress | None = None,
) -> OpenStore:  # fmt: skip
    """Lock the store, make it if it does not exist, and plan its recovery.

    Raises what forbids to go on, with the lock released.

    Crash story of making a store: directories first, then the identity (whole, under a temporary name,
    renamed, synced). A crash before it leaves empty directories, which the next open takes over and syncs;
    nothing was ever submitted to them.
    """
    layout = Layout(root)
    with storage_errors(root):
        _make_root(fs, layout)
        lock = take_lock(fs, layout, json.dumps(note).encode())
    state: StateStore | None = None
    try:
        with storage_errors(root):
            uuid = _identify(fs, layout, clock, entropy)
            state = open_state(layout.state, uuid)
            facts = collect_facts(fs, layout, state, full=full, progress=progress)
        plan = make_plan(facts)
        raise_refusal(plan, layout)
    except BaseException:
        if state is not None:
            state.close()
        lock.release()
        raise
    return OpenStore(layout=layout, uuid=uuid, lock=lock, state=state, facts=facts, plan=plan)


def take_lock(fs: FileSystem, layout: Layout, note: bytes) -> FileLock:
    """The store's lock, or StoreLocked with what the holder's note says."""
    lock = fs.lock(layout.lock, note)
    if not isinstance(lock, bytes):
        return lock
    pid = host = None
    with contextlib.suppress(ValueError, AttributeError, RecursionError):
        holder = json.loads(lock)
        pid, host = holder.get("pid"), holder.get("host")
    raise StoreLocked(
        layout.root, pid=pid if isinstance(pid, int) else None, host=host if isinstance(host, str) else None
    )


def _make_root(fs: FileSystem, layout: Layout) -> None:
    """Make the store's directory and missing parents; where there is no identity yet, make their names durable.

    Crash story: the identity is written after this, so where it stands the way to it is durable. Where it does not, an
    earlier opener may have made any of the directories and stopped before it had synced their names: all of them are
    synced, and not just those made here.
    """
    root = layout.root
    missing = []
    path = root
    while path and path != "/" and not fs.exists(path):
        missing.append(path)
        path = path.rpartition("/")[0]
    for made in reversed(missing):
        fs.make_directory(made)
    if not missing and not fs.is_directory(root):
        raise NotADirectoryError(20, "not a directory", root)
    if not fs.exists(layout.identity):
        parent = root.rpartition("/")[0]
        while parent:
            _sync_parent(fs, parent)
            parent = parent.rpartition("/")[0]
        _sync_parent(fs, "/")


def _sync_parent(fs: FileSystem, path: str) -> None:
    """Sync a directory above the store. One that may not be opened holds nothing that this user's engines have made."""
    try:
        fs.sync_directory(path)
    except OSError as error:
        if error.errno not in {errno.EACCES, errno.EPERM}:
            raise sync_failed(path, error) from error


def _identify(fs: FileSystem, layout: Layout, clock: Clock, entropy: Entropy) -> bytes:
    """The store's UUID; a new store is made where there is certainly none."""
    identity, uuid = read_identity(fs, layout)
    if identity is IdentityState.VALID and uuid is not None:
        for directory in (layout.wal, layout.state, layout.quarantine):
            fs.make_directory(directory)
        # Whoever wrote the identity may have stopped before its name was durable; and somebody may have removed
        # a directory, which is made again here.
        sync_directory(fs, layout.root)
        return uuid
    used = any(
        fs.is_directory(directory) and fs.list_directory(directory) for directory in (layout.wal, layout.state)
    )  # fmt: skip
    if identity is not IdentityState.MISSING or used:
        facts = StoreFacts(identity=identity, store=None, segments=(), checkpoint=None)
        plan = make_plan(facts)
        if plan.refusal is None:
            raise CorruptionError(
                f"{layout.root} has no identity, but wal/ or state/ hold files: it was a store. Nothing was changed; restore the "
                "file 'identity' from a copy",
                path=layout.identity, expected="the identity of the store",
            )  # fmt: skip
        raise_refusal(plan, layout)
    foreign = [name for name in fs.list_directory(layout.root) if name not in _OWN_NAMES]
    if foreign:
        raise ConfigError(
            f"{layout.root} holds other files ({', '.join(foreign[:3])}) and is no store: choose an empty directory"
        )
    for directory in (layout.wal, layout.state, layout.quarantine):
        fs.make_directory(directory)
    sync_directory(fs, layout.root)
    uuid = entropy.random_bytes(16)
    write_durably(fs, layout.identity, encode_identity(uuid, clock.wall_ns()))
    return uuid


def collect_facts(
    fs: FileSystem,
    layout: Layout,
    state: StateStore | None,
    *,
    full: bool = False,
    progress: Progress | None = None,
) -> StoreFacts:
    """Read everything that recovery decides from. Writes nothing."""
    identity, uuid = read_identity(fs, layout)
    checkpoint, findings = state.load_checkpoint() if state is not None else (None, [])
    return survey(
        fs,
        layout,
        identity=identity,
        store=uuid,
        checkpoint=checkpoint,
        state_findings=tuple(findings),
        full=full,
        progress=progress,
    )


def raise_refusal(plan: Plan, layout: Layout) -> None:
    """Raise what a plan's refusal means; do nothing for a plan that can be carried out."""
    error = refusal_error(plan, layout)
    if error is not None:
        raise error


_IDENTITY_ADVICE: Final = (
    "restore identity from any copy of this store, since it never changes; if this directory never was a store, open "
    "another one"
)
STORE_ADVICE: Final[Mapping[str, str]] = {
    "S1": _IDENTITY_ADVICE,
    "S2": _IDENTITY_ADVICE,
    "S4": "restore wal/ from where it went (a mount that is missing, say); if it is gone, what was pending is lost: start a new "
    "store under another path",
    "S8": "take what it holds from a copy with 'walbatch dump', and start a new store under another path",
}
"""What to do where the store as a whole is refused; in more words in docs/recovery.md."""


def refusal_error(plan: Plan, layout: Layout) -> WalbatchError | None:
    """The error for a plan's refusal."""
    case = plan.refusal
    if case is None:
        return None
    path = layout.segment(case.segment) if case.segment is not None else layout.root
    if case.severity is Severity.REFUSE_NEWER:
        return UnsupportedFormat(
            f"{path}: {case.message} ({case.label}). Upgrade walbatch; nothing was changed"
        )
    if case.segment is None:  # a salvage has nothing to work with either
        advice = STORE_ADVICE[case.label]
        return CorruptionError(
            f"{path}: {case.message} ({case.label}). Nothing was changed; keep a copy of the store; {advice}",
            path=path, expected=case.message,
        )  # fmt: skip
    lsns = f", operations {case.first_lsn} to {case.last_lsn}" if case.first_lsn is not None else ""
    return CorruptionError(
        f"{path} at offset {case.offset}{lsns}: {case.message} ({case.label}). Nothing was changed; keep a copy of the store, look "
        f"with 'walbatch verify {layout.root}', restore the file from a copy, or give up what is lost with "
        f"'walbatch recover --salvage {layout.root}'",
        path=path, offset=case.offset, first_lsn=case.first_lsn, last_lsn=case.last_lsn, expected=case.message,
    )  # fmt: skip
