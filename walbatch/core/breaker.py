"""Whether a shard may call its backend: a circuit breaker.

What is not here: which failures count (`delivery.Recourse.outage`), and the wait of a single batch.

The idea needed to read it: *closed*, all goes; after too many failures it is *open*, and nothing goes until its time has
passed; then it is *half open*: one small batch at a time goes as a probe, until two in a row were applied (closed)
or one failed (open again, for twice as long).
"""

from __future__ import annotations

import enum
from collections import deque
from itertools import repeat
from typing import Final, Literal

RECENT_COUNT: Final = 20
"""Batches that are remembered: half of them failing opens it."""
PROBES_TO_CLOSE: Final = 2
SETTLED_COUNT: Final = 100
"""Settled operations that are remembered."""
SETTLED_COUNT_MIN: Final = 20
"""Fewer say nothing about a share."""
DEATHS_SHARE_MAX: Final = 0.2
"""The part of them that may die, unless somebody says otherwise."""


class BreakerState(enum.StrEnum):
    """What it lets through."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half open"


class Breaker:
    """Opens after `failures_max` failures in a row, for `open_ns` at first, doubling to `open_ns_max`, less up to half as jitter.

    Not thread-safe: its owner locks.
    """

    __slots__ = (
        "_deaths", "_deaths_share_max", "_failures_max", "_in_a_row", "_open_ns", "_open_ns_max", "_opened", "_probe_away",
        "_recent", "_successes", "_times_opened", "fruitless", "opened_at_ns", "reopens_at_ns",
    )  # fmt: skip

    def __init__(
        self, *, failures_max: int, open_ns: int, open_ns_max: int, deaths_share_max: float = DEATHS_SHARE_MAX
    ) -> None:
        self.adjust(
            failures_max=failures_max,
            open_ns=open_ns,
            open_ns_max=open_ns_max,
            deaths_share_max=deaths_share_max,
        )
        self._recent: deque[bool] = deque(maxlen=RECENT_COUNT)
        self._deaths: deque[bool] = deque(maxlen=SETTLED_COUNT)
        self._in_a_row = 0
        self._opened = False
        self._times_opened = 0
        self._successes = 0
        self._probe_away = False
        self.reopens_at_ns: int | None = None
        """When the next probe may go; None while it is closed, or half open."""
        self.opened_at_ns: int | None = None
        """Since when it has been open, or half open; None while it is closed."""
        self.fruitless = 0
        """Batches in a row that came back without anything that speaks for the backend, whoever is to blame."""

    def adjust(self, *, failures_max: int, open_ns: int, open_ns_max: int, deaths_share_max: float) -> None:
        """Go by other limits from the next batch on. What it has seen stays seen, and it stays open if it is."""
        self._deaths_share_max = deaths_share_max
        self._failures_max = failures_max
        self._open_ns = open_ns
        self._open_ns_max = open_ns_max

    def __repr__(self) -> str:
        return f"<Breaker {self.state}, {self._in_a_row} failures in a row>"

    @property
    def state(self) -> BreakerState:
        """What it lets through, as of the last `allows`."""
        if not self._opened:
            return BreakerState.CLOSED
        return BreakerState.HALF_OPEN if self.reopens_at_ns is None else BreakerState.OPEN

    def allows(self, now_ns: int) -> Literal["normal", "probe"] | None:
        """Which batch may be cut now. Asking changes nothing but that an open one whose time has come is half open."""
        if not self._opened:
            return "normal"
        if self.reopens_at_ns is not None and now_ns >= self.reopens_at_ns:
            self.reopens_at_ns = None
        return None if self.reopens_at_ns is not None or self._probe_away else "probe"

    def probe_cut(self) -> None:
        """A probe was cut: until it is recorded, there is no other."""
        self._probe_away = True

    def record(self, now_ns: int, *, ok: bool | None, chance: float) -> None:
        """A batch came back: `ok`, the backend works; not `ok`, it does not; None, the batch does not tell.

        `chance` is uniform in [0, 1).
        """
        self._probe_away = False
        self.fruitless = 0 if ok else self.fruitless + 1
        if ok is None:
            return
        state = self.state
        if state is BreakerState.OPEN:
            return  # the batch was cut before: what it says is known
        if state is BreakerState.CLOSED:
            self._recent.append(ok)
            self._in_a_row = 0 if ok else self._in_a_row + 1
            if self._in_a_row >= self._failures_max or self._recent.count(False) * 2 >= RECENT_COUNT:
                self.open(now_ns, chance=chance)
        elif not ok:
            self.open(now_ns, chance=chance)
        else:
            self._successes += 1
            if self._successes >= PROBES_TO_CLOSE:
                self._close()

    def open(self, now_ns: int, *, chance: float) -> None:
        """Let nothing through for a while."""
        open_ns = min(self._open_ns * 2 ** min(self._times_opened, 60), self._open_ns_max)
        self.reopens_at_ns = now_ns + int(open_ns * (1 - chance / 2))
        if self.opened_at_ns is None:
            self.opened_at_ns = now_ns
        self._opened = True
        self._times_opened += 1
        self._successes = 0

    def _close(self) -> None:
        self._opened = False
        self.opened_at_ns = None
        self._times_opened = self._in_a_row = 0
        self._recent.clear()

    def settled(self, *, applied: int, dead: int) -> None:
        """So many operations of the shard were applied, and so many became dead letters."""
        self._deaths.extend(repeat(False, min(applied, SETTLED_COUNT)))
        self._deaths.extend(repeat(True, min(dead, SETTLED_COUNT)))

    def too_many_deaths(self, dying: int, *, applied: int = 0, guessed: bool = False) -> bool:
        """Whether these would make more than `deaths_share_max` of the last hundred settled operations dead ones.

        To be asked before they are given up: if so, open it and try them again. `applied` goes with them. Of fewer than twenty
        settled ones a share says nothing: then a backend that says itself what to give up is believed. Where that is `guessed`
        from errors that name nobody, the share is one of twenty all the same: it may as well be an outage.
        """
        window = deque(self._deaths, maxlen=SETTLED_COUNT)
        window.extend(repeat(False, min(applied, SETTLED_COUNT)))
        window.extend(repeat(True, min(dying, SETTLED_COUNT)))
        believed = not guessed and len(window) < SETTLED_COUNT_MIN
        return not believed and window.count(True) > self._deaths_share_max * max(
            len(window), SETTLED_COUNT_MIN
        )
