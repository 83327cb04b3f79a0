"""Which idempotency keys were used within the window, and by which operations.

What is not here: clocks, and where uses are kept across a restart (behind `ports.StateStore`).

The idea needed to read it: the order of uses is certain, the wall clock is not. A key is forgotten once it is older than the
window's age, or any key that was used after it is, or any later look at the clock says so: *what was used before something old
is old*. So a clock that was set back makes nothing old before its time, and keeps nothing much longer: from the next use or look
on, the time of every earlier use counts as no later than that (of one that was saved before a restart, from the first use or look
after it). A clock that was set forward cannot be told from a long stop, and makes old what is old by it.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from walbatch.limits import LSN_MAX
from walbatch.types import KeyUse

LaneKey = tuple[str, bytes]
"""The scope of a key is its lane."""

STEPS: Final = 1_024
"""Times are kept in steps of this part of the age, rounded up: that much longer a key may be remembered. It bounds the memory
for times, whatever the number of keys."""


OWN_PREFIX: Final = b"\0"
"""Of the keys that are the engine's own. No user's begins like that."""

REQUEUE_PREFIX: Final = OWN_PREFIX + b"requeue "


def requeue_key(lsn: int) -> bytes:
    """The key under which the dead letter of `lsn` is submitted again."""
    return REQUEUE_PREFIX + b"%d" % lsn


def requeued_lsn(key: bytes) -> int:
    """The LSN of the dead letter that was submitted again under `key`; 0 if that is no such key."""
    number = key.removeprefix(REQUEUE_PREFIX)
    return int(number) if key.startswith(REQUEUE_PREFIX) and number.isdigit() else 0


class KeyWindow:
    """The keys of one store. Not thread-safe: its owner locks.

    Uses are added in the order in which they happened: first those that were saved, then those of the log, then new ones. At
    `count_max` the oldest is forgotten before its time (`evicted`).
    """

    def __init__(self, age_ns: int, count_max: int) -> None:
        assert age_ns >= 0
        assert count_max >= 1
        self._age_ns = age_ns
        self._count_max = count_max
        self._step_ns = max(1, age_ns // STEPS)
        self._lsns: dict[LaneKey, int] = {}
        self._order: deque[tuple[LaneKey, int]] = deque()
        """Keys with their LSNs as they were used; one that was used again later stands here twice."""
        self._runs: deque[list[int]] = deque()
        """The same in runs: the time that counts for them, which ascends, and how many they are."""
        self._unsaved: deque[KeyUse] = deque()
        self.evicted = 0
        """How many were forgotten before their time."""

    def __repr__(self) -> str:
        return f"<KeyWindow {len(self)} of {self._count_max} keys, {len(self._unsaved)} unsaved>"

    def __len__(self) -> int:
        return len(self._lsns)

    def find(self, lane_key: LaneKey, now_wall_ns: int) -> int | None:
        """The LSN of the operation that used the key within the window. Forgets what is old."""
        self.prune(now_wall_ns)
        return self._lsns.get(lane_key)

    def add(self, lane: str, key: bytes, lsn: int, wall_ns: int, *, is_saved: bool = False) -> None:
        """The operation `lsn` has used the key at `wall_ns`. Nothing happens if it is known, or a later one has used the key."""
        lane_key = (lane, key)
        if self._lsns.get(lane_key, 0) >= lsn:
            return
        self._append(self._look(wall_ns), 1)
        self._lsns[lane_key] = lsn
        self._order.append((lane_key, lsn))
        if not is_saved:
            self._unsaved.append(KeyUse(key=key, lane=lane, lsn=lsn, used_wall_ns=wall_ns))
        while len(self._order) > self._count_max:
            self.evicted += self._forget_oldest()

    def prune(self, now_wall_ns: int) -> int:
        """Forget what is old. Returns how many keys."""
        self._look(now_wall_ns)
        count = 0
        while self._runs and self._runs[0][0] + self._age_ns <= now_wall_ns:
            count += self._forget_oldest()
        return count

    def unsaved(self, up_to_lsn: int = LSN_MAX) -> list[KeyUse]:
        """Uses by operations up to `up_to_lsn` that were not saved yet and still count, in their order.

        Only a durable operation's use may be saved: were the operation lost, its key would answer for nothing.
        """
        return [use for use in self._unsaved if use.lsn <= up_to_lsn and self._counts(use)]

    def saved(self, up_to_lsn: int) -> None:
        """Uses by operations up to `up_to_lsn` have been saved."""
        self._unsaved = deque(use for use in self._unsaved if use.lsn > up_to_lsn and self._counts(use))

    def _counts(self, use: KeyUse) -> bool:
        return self._lsns.get((use.lane, use.key)) == use.lsn

    def _look(self, wall_ns: int) -> int:
        """It is `wall_ns`: no use so far was later. Returns that time as it is kept."""
        time_ns = -(-wall_ns // self._step_ns) * self._step_ns
        count = 0
        while self._runs and self._runs[-1][0] > time_ns:
            count += self._runs.pop()[1]
        if count:
            self._append(time_ns, count)
        return time_ns

    def _append(self, time_ns: int, count: int) -> None:
        if self._runs and self._runs[-1][0] == time_ns:
            self._runs[-1][1] += count
        else:
            self._runs.append([time_ns, count])

    def _forget_oldest(self) -> int:
        """Take the oldest use away. Returns how many keys are forgotten with it: none if the key was used again."""
        run = self._runs[0]
        run[1] -= 1
        if not run[1]:
            self._runs.popleft()
        lane_key, lsn = self._order.popleft()
        if self._lsns[lane_key] != lsn:
            return 0
        del self._lsns[lane_key]
        return 1
