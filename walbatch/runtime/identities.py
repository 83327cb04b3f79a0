"""Idempotency keys of an open store: who used one, and who is using one right now.

What is not here: the window (`core.idempotency`), and how uses are kept (behind `ports.StateStore`; the log has them, too).

The idea needed to read it: a key is *reserved* while its operation is on the way into a commit group, *used* from the moment it
has an LSN. Whoever comes second while it is reserved waits; whoever comes while it is used gets the first one's LSN. A key of
the engine's own counts as long as its owner wants it to, whatever the window: until `forget_own`.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Final

from walbatch import limits
from walbatch.core.idempotency import KeyWindow, LaneKey
from walbatch.errors import Overloaded, StorageError
from walbatch.ports import Clock, Log, StateStore, Threads
from walbatch.runtime.ticket import Fate
from walbatch.types import KeyUse, Position

_logger = logging.getLogger("walbatch")

NOTE_LSNS: Final = 100_000
"""Operations after which the next opening is spared searching them for keys, where there are none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Used:
    """The operation that used a key, and its fate until the key is saved."""

    lsn: int
    fate: Fate | None


class KeyIndex:
    """Keys by lane. Safe from any thread."""

    def __init__(
        self, *, threads: Threads, clock: Clock, age_ns: int, uses: Iterable[KeyUse], saved_lsn: int
    ) -> None:
        self._clock = clock
        # Guards all below.
        self._guard = threads.condition()
        self._age_ns = age_ns
        self._window = KeyWindow(age_ns, limits.IDEMPOTENCY_KEYS_MAX)
        self._reserved: set[LaneKey] = set()
        self._under_way: dict[int, Fate] = {}
        self._saved_lsn = saved_lsn
        self._is_used = False
        self._searches = False
        # Keys of the engine's own: no user's begins with a zero byte.
        self._own: dict[LaneKey, KeyUse] = {}
        for use in uses:
            self._note(use)
            self._window.add(use.lane, use.key, use.lsn, use.used_wall_ns, is_saved=True)
            self._is_used = True

    def __repr__(self) -> str:
        return f"<KeyIndex {len(self._window)} keys, saved to LSN {self._saved_lsn}>"

    def _note(self, use: KeyUse) -> None:
        if use.key.startswith(b"\0"):
            self._own[use.lane, use.key] = use

    def is_own(self, lane: str, key: bytes) -> bool:
        """Whether it is a key of the engine's own that was used, however long ago, and not forgotten."""
        return (lane, key) in self._own

    def forget_own(self, is_wanted: Callable[[bytes], bool]) -> None:
        """Keys of the engine's own which are not wanted any more are as others from now on."""
        with self._guard:
            self._own = {name: use for name, use in self._own.items() if is_wanted(use.key)}

    def read_log(self, log: Log, start: Position) -> None:
        """Take up what the log has and state/ has not. Called once, before the engine starts. Raises as reading does.

        Costs nothing in a store whose operations never had options, and in others what was logged since the last save.
        """
        self._searches = log.has_options
        if not self._searches:
            return
        position, next_lsn = log.position_of(self._saved_lsn + 1), 0
        while True:
            try:
                frame = log.read_frame(position, next_lsn=next_lsn)
            except StorageError as error:
                # What is settled as a whole was not looked at by recovery: it may be damaged. Its keys were saved, unless
                # the disk was full.
                if position.segment >= start.segment:
                    raise
                _logger.warning("some idempotency keys may be forgotten: %s", error)
                position, next_lsn = start, 0
                continue
            if frame is None:
                return
            for lsn, kind, options in zip(frame.lsns, frame.kind_indexes, frame.options or (), strict=False):
                if options.idempotency_key and lsn > self._saved_lsn:
                    self._add(frame.kinds[kind], options.idempotency_key, lsn, frame.wall_ns)
            position, next_lsn = frame.next_position, frame.last_lsn + 1

    def _add(self, lane: str, key: bytes, lsn: int, wall_ns: int) -> None:
        self._window.add(lane, key, lsn, wall_ns)
        self._note(KeyUse(lane=lane, key=key, lsn=lsn, used_wall_ns=wall_ns))
        self._is_used = True

    def _find(self, lane: str, key: bytes, wall_ns: int) -> int | None:
        own = self._own.get((lane, key))
        return self._window.find((lane, key), wall_ns) if own is None else own.lsn

    def reserve(self, lane: str, key: bytes, wall_ns: int, *, timeout_ns: int | None) -> Used | None:
        """Who used this key; None: nobody, and it is reserved for the caller, who must call `release`.

        Somebody who is submitting it is waited for; after `timeout_ns`, Overloaded is raised.
        """
        deadline = None if timeout_ns is None else self._clock.monotonic_ns() + timeout_ns
        with self._guard:
            while (lane, key) in self._reserved:
                left = None if deadline is None else deadline - self._clock.monotonic_ns()
                if left is not None and left <= 0:
                    raise Overloaded(
                        "submissions under way with one idempotency key", value=1, maximum=1,
                        hint="another thread waits for room with it: try again later",
                    )  # fmt: skip
                self._guard.wait(left)
            lsn = self._find(lane, key, wall_ns)
            if lsn is None:
                self._reserved.add((lane, key))
                return None
            return Used(lsn=lsn, fate=self._under_way.get(lsn))

    def use(self, lane: str, key: bytes, lsn: int, wall_ns: int, fate: Fate) -> None:
        """A reserved key has its LSN. Others that wait for it go on."""
        with self._guard:
            self._add(lane, key, lsn, wall_ns)
            self._under_way[lsn] = fate
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
            return self._find(lane, key, wall_ns)

    def save(self, state: StateStore, *, up_to_lsn: int, wall_ns: int) -> int | None:
        """Keep what was used up to a durable LSN; on a full disk, as much of it as there is room for. Raises StorageError.

        Returns the LSN up to which all is kept, if that is not all: what comes behind it must stay in the log. Costs nothing
        where no key was ever used, but for a note now and then of how far the log was searched for them.
        """
        with self._guard:
            if not self._is_used and not (self._searches and up_to_lsn > self._saved_lsn + NOTE_LSNS):
                return None
            self._window.prune(wall_ns)
            uses = self._window.unsaved(up_to_lsn)
            own = [use for use in self._own.values() if use.lsn <= up_to_lsn]
            # What the window has lost already is saved all the same.
            kept = {use.lsn for use in uses}
            lost = [use for use in own if use.lsn > self._saved_lsn and use.lsn not in kept]
            uses = sorted([*uses, *lost], key=attrgetter("lsn"))
            # Nothing is removed while one of these is wanted: they are wanted for a moment, unless the disk is full.
            oldest_wall_ns = 0 if own else wall_ns - self._age_ns
            for lsn in [lsn for lsn in self._under_way if lsn <= up_to_lsn]:
                del self._under_way[lsn]
        if not uses and up_to_lsn <= self._saved_lsn + NOTE_LSNS:
            return None
        if self._is_saved(state, uses, up_to_lsn, oldest_wall_ns):
            return None
        count = len(uses) // 2
        while count:
            if self._is_saved(state, uses[:count], uses[count - 1].lsn, oldest_wall_ns):
                del uses[:count]
                count = min(count, len(uses))
            else:
                count //= 2
        return uses[0].lsn - 1 if uses else None

    def _is_saved(
        self, state: StateStore, uses: Sequence[KeyUse], up_to_lsn: int, oldest_wall_ns: int
    ) -> bool:
        """Save all uses up to an LSN, unless the disk is too full for that."""
        try:
            state.save_keys(uses, up_to_lsn=up_to_lsn, oldest_wall_ns=oldest_wall_ns)
        except StorageError as error:
            if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
                raise
            return False
        with self._guard:
            self._window.saved(up_to_lsn)
            self._saved_lsn = up_to_lsn
        return True
