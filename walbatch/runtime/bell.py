"""What a thread of the engine sleeps on, and how the others wake it.

What is not here: the lock under which state changes. Whoever rings has changed something before; whoever was woken looks at
everything.

The idea needed to read it: a bell that is rung while nobody sleeps is heard by the next sleep. So it needs no common lock with what
has changed, ringing it again costs nothing, and a busy dispatcher holds up nobody who rings.
"""

from __future__ import annotations

from walbatch.ports import Condition, Threads


class Bell:
    """For one sleeper. `ring` from any thread."""

    __slots__ = ("_cond", "_rung")

    def __init__(self, threads: Threads) -> None:
        self._cond = threads.condition()
        self._rung = False

    def __repr__(self) -> str:
        return f"<Bell {'rung' if self._rung else 'silent'}>"

    def ring(self) -> None:
        """Wake the sleeper, or let its next sleep end at once."""
        if self._rung:
            return  # whoever hears it looks after this
        with self._cond:
            # In this order: where a signal handler's exception comes between the two, it can be rung again.
            self._cond.notify_all()
            self._rung = True

    def sleep(self, timeout_ns: int | None) -> None:
        """Until it is rung, or was rung since the last sleep, or the time has passed."""
        with self._cond:
            if not self._rung:
                self._cond.wait(timeout_ns)
            self._rung = False


class Bells:
    """The timer's and the reader's, and the condition on which everybody else waits."""

    __slots__ = ("_cond", "reader", "timer")

    def __init__(self, threads: Threads, cond: Condition) -> None:
        self._cond = cond
        self.timer = Bell(threads)
        self.reader = Bell(threads)

    def __repr__(self) -> str:
        return f"<Bells timer {self.timer!r}, reader {self.reader!r}>"

    def everybody(self) -> None:
        """Wake all who wait. With the condition's lock held."""
        self._cond.notify_all()
        self.timer.ring()
        self.reader.ring()
