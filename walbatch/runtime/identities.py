"""Idempotency keys of an open store: who used one, and who is using one right now.

What is not here: the window (`core.idempotency`), and how uses are kept (behind `ports.StateStore`; the log has them, too).

The idea needed to read it: a key is *reserved* while its operation is on the way into a commit group, *used* from the moment it
has an LSN. Whoever comes second while it is reserved waits; whoever comes while it is used gets the first one's LSN.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from walbatch import limits
from walbatch.core.idempotency import KeyWindow
from walbatch.ports import Log, StateStore, Threads
from walbatch.runtime.ticket import Promise
from walbatch.types import KeyUse, Position

NOTE_LSNS: Final = 100_000
"""Operations after which the next opening is spared searching them for keys, where there are none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Used:
    """The operation that used a key. Its promises, as long as somebody keeps them."""

    lsn: int
    durable: Promise | None
    settled: Promise | None


class KeyIndex:
    """Keys by lane. Safe from any thread."""

    def __init__(self, *, threads: Threads, age_ns: int, uses: Iterable[KeyUse], saved_lsn: int) -> None:
        # Guards all below.
        self._guard = threads.condition()
        self._age_ns = age_ns
        self._window = KeyWindow(age_ns, limits.IDEMPOTENCY_KEYS_MAX)
        self._reserved: set[tuple[str, bytes]] = set()
        self._under_way: dict[int, tuple[Promise, Promise]] = {}
        self._saved_lsn = saved_lsn
        self._is_used = False
        self._searches = False
        self.own: set[tuple[str, bytes]] = set()
        """Keys of the engine's own (no user's begins with a zero byte) that were used before this opening, however long ago."""
        for use in uses:
            self._note(use.lane, use.key)
            self._window.add(use.lane, use.key, use.lsn, use.used_wall_ns, is_saved=True)
            self._is_used = True

    def __repr__(self) -> str:
        return f"<KeyIndex {len(self._window)} keys, saved to LSN {self._saved_lsn}>"

    def _note(self, lane: str, key: bytes) -> None:
        if key.startswith(b"\0"):
            self.own.add((lane, key))

    def read_log(self, log: Log, start: Position) -> None:
        """Take up what the log has and state/ has not. Called once, before the engine starts. Raises as reading does.

        Costs nothing in a store whose operations never had options, and in others what was logged since the last save.
        """
        self._searches = log.has_options
        if not self._searches:
            return
        # Not before `start`: what is settled as a whole was not looked at by recovery, and its keys were saved before it was.
        position, next_lsn = max(start, log.position_of(self._saved_lsn + 1)) if self._saved_lsn else start, 0
        while True:
            frame = log.read_frame(position, next_lsn=next_lsn)
            if frame is None:
                return
            for lsn, kind, options in zip(frame.lsns, frame.kind_indexes, frame.options or (), strict=False):
                if options.idempotency_key and lsn > self._saved_lsn:
                    self._note(frame.kinds[kind], options.idempotency_key)
                    self._window.add(frame.kinds[kind], options.idempotency_key, lsn, frame.wall_ns)
                    self._is_used = True
            position, next_lsn = frame.next_position, frame.last_lsn + 1

    def reserve(self, lane: str, key: bytes, wall_ns: int) -> Used | None:
        """Who used this key; None: nobody, and it is reserved for the caller, who must call `release`."""
        with self._guard:
            while (lane, key) in self._reserved:
                self._guard.wait()
            lsn = self._window.find((lane, key), wall_ns)
            if lsn is None:
                self._reserved.add((lane, key))
                return None
            durable, settled = self._under_way.get(lsn, (None, None))
            return Used(lsn=lsn, durable=durable, settled=settled)

    def use(
        self, lane: str, key: bytes, lsn: int, wall_ns: int, *, durable: Promise, settled: Promise
    ) -> None:
        """A reserved key has its LSN. Others that wait for it go on."""
        with self._guard:
            self._window.add(lane, key, lsn, wall_ns)
            self._is_used = True
            self._under_way[lsn] = durable, settled
            self._reserved.discard((lane, key))
            self._guard.notify_all()

    def release(self, lane: str, key: bytes) -> None:
        """The submission has ended, well or not. One that was refused leaves the key unused."""
        with self._guard:
            self._reserved.discard((lane, key))
            self._guard.notify_all()

    def find(self, lane: str, key: bytes, wall_ns: int) -> int | None:
        """The LSN of the operation that used this key."""
        with self._guard:
            return self._window.find((lane, key), wall_ns)

    def save(self, state: StateStore, *, up_to_lsn: int, wall_ns: int) -> None:
        """Keep what was used up to a durable LSN. Raises StorageError.

        Costs nothing where no key was ever used, but for a note now and then of how far the log was searched for them.
        """
        with self._guard:
            if not self._is_used and not (self._searches and up_to_lsn > self._saved_lsn + NOTE_LSNS):
                return
            self._window.prune(wall_ns)
            uses = self._window.unsaved(up_to_lsn)
            for lsn in [lsn for lsn in self._under_way if lsn <= up_to_lsn]:
                del self._under_way[lsn]
        if uses or up_to_lsn > self._saved_lsn + NOTE_LSNS:
            state.save_keys(uses, up_to_lsn=up_to_lsn, oldest_wall_ns=wall_ns - self._age_ns)
            with self._guard:
                self._window.saved(up_to_lsn)
                self._saved_lsn = up_to_lsn
