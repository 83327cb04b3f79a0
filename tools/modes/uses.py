"""Random calls on an open store: what a user does in one life of a seeded run.

What is not here: what happens to the store meanwhile, and to the machine (`seeded`).
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from tools.modes.workloads import HASTY, HOUR_NS, STRICT
from walbatch.config import Trigger
from walbatch.errors import WalbatchError
from walbatch.limits import MIB
from walbatch.testing.simulation import Process, Session

ACTIONS_MAX: Final = 9


def has_dropped_names(process: Process) -> bool:
    """Whether there are names which no sync will ever make durable, although it says so.

    Whoever opens the store next cannot know of them, and would build on them: no engine survives that. So the power goes first.
    """
    return process.machine.fs.failed_sync_drops_names and process.faults.sync_failed


def some_trigger(chance: random.Random) -> Trigger:
    """Of any kind: with sizes that are fixed or adapt, lingers that are fixed or adapt, in any mode."""
    linger_ms = chance.choice((0, 0, 1, 1, 10, None))
    mode = "any" if linger_ms == 0 else chance.choice(("any", "any", "any", "all", "size", "timeout"))
    return Trigger(
        count=chance.choice((1, 2, 4, 50, None)), bytes=chance.choice((MIB, MIB, 500)), linger_ms=linger_ms, mode=mode
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Use:
    """Random calls on a store. What the engine refuses because something fails, or is at a bound, is no breach."""

    chance: random.Random
    lanes: Sequence[str]
    is_timed: bool
    """Operations have times; then the wall clock does not jump by hours."""
    is_deadly: bool = False
    """Much is rejected: then there are letters to look at, those of earlier lives first."""

    def __call__(self, session: Session) -> None:
        """Use it."""
        for _ in range(self.chance.choice((1, 1, 1, 2, 3))):
            if has_dropped_names(session.process):
                return
            try:
                session.open()
            except WalbatchError:
                if not session.may_fail:
                    raise
                return
            actions = [self.chance.choice(_ACTIONS) for _ in range(self.chance.randrange(ACTIONS_MAX))]
            if self.is_deadly:
                actions = [
                    Use.look_at_letters,
                    *self.chance.sample((*actions, *_DEADLY), len(actions) + len(_DEADLY)),
                ]
            for action in actions:
                with contextlib.suppress(WalbatchError):
                    action(self, session)
            session.close(drain=self.chance.random() < 0.5)

    def _key(self) -> bytes:
        return self.chance.choice((b"a", b"b", b"c", b"d"))

    def _size(self) -> int:
        return self.chance.choice((0, 0, 30, 300, 900, 2000))

    def submit(self, session: Session) -> None:
        """One."""
        session.submit(self._key(), self.chance.choice(self.lanes), size=self._size())

    def submit_with_options(self, session: Session) -> None:
        """One with a priority, times, or an idempotency key."""
        chance = self.chance
        options: dict[str, Any] = {}
        if chance.random() < 0.5:
            options["priority"] = chance.randrange(11)
        if chance.random() < 0.3:
            options["idempotency_key"] = chance.choice((b"1", b"2", b"3"))
        if self.is_timed and chance.random() < 0.4:
            options["not_before_s"] = chance.choice((0.001, 0.02, 0.2))
        if self.is_timed and chance.random() < 0.4:
            options["deadline_s"] = chance.choice((0.003, 0.03, 0.3, 3600.0))
        session.submit(self._key(), chance.choice(self.lanes), size=self._size(), **options)

    def cancel(self, session: Session) -> None:
        """One of those that were submitted last."""
        lsns = session.submitted_lsns[-5:]
        if lsns:
            session.cancel(self.chance.choice(lsns))

    def ask(self, session: Session) -> None:
        """Where some of them are."""
        for lsn in session.submitted_lsns[-self.chance.randrange(1, 7) :]:
            session.ask(lsn)

    def configure(self, session: Session) -> None:
        """Change what may change."""
        lane = self.chance.choice(self.lanes)
        session.engine.configure(
            lane, trigger=some_trigger(self.chance), retry=self.chance.choice((HASTY, STRICT))
        )

    def look_at_letters(self, session: Session) -> None:
        """And requeue or drop some."""
        lsns = [letter.lsn for letter in session.look_at_letters()]
        chosen = [lsn for lsn in lsns if self.chance.random() < 0.5]
        if chosen:
            (session.requeue if self.chance.random() < 0.7 else session.drop)(chosen)

    def bury(self, session: Session) -> None:
        """Submit some, and look at what has died of them."""
        self.submit_many(session)
        session.pause(0.03)
        self.look_at_letters(session)

    def submit_many(self, session: Session) -> None:
        """A group."""
        keys = [self._key() for _ in range(self.chance.randrange(1, 6))]
        session.submit_many(keys, self.chance.choice(self.lanes), size=self._size())

    def submit_nowait(self, session: Session) -> None:
        """Without waiting, or only in the end."""
        waits = [
            session.submit_nowait(self._key(), self.chance.choice(self.lanes), size=self._size())
            for _ in range(self.chance.randrange(1, 4))
        ]
        for wait in waits[: self.chance.randrange(4)]:
            wait()

    def threads(self, session: Session) -> None:
        """Several at once."""
        actions = [self.chance.choice(_ALONE) for _ in range(self.chance.choice((2, 2, 3)))]
        session.together(*[_bound(action, self, session) for action in actions])

    def wait(self, session: Session) -> None:
        """Virtual time passes."""
        session.pause(self.chance.choice((0.001, 0.02, 0.1, 0.3)))

    def pause(self, session: Session) -> None:
        """Pause a lane, or let it go on."""
        lane = self.chance.choice(self.lanes)
        (session.pause_lane if self.chance.random() < 0.5 else session.resume_lane)(lane)

    def flush(self, session: Session) -> None:
        """Flush one lane."""
        session.engine.flush(self.chance.choice(self.lanes), timeout=self.chance.choice((0.0, 0.05, 5.0)))

    def jump(self, session: Session) -> None:
        """The wall clock jumps."""
        if not self.is_timed:
            session.process.clock.jump_wall(self.chance.randrange(-50, 50) * HOUR_NS)

    def close_inside(self, session: Session) -> None:
        """Somebody else closes the engine, while it is used."""
        session.engine.close(drain=self.chance.random() < 0.5, timeout=60)


_Action = Callable[[Use, Session], None]
_ALONE: Final[tuple[_Action, ...]] = (
    Use.submit, Use.submit, Use.submit, Use.submit_many, Use.submit_nowait, Use.flush, Use.pause, Use.close_inside,
    Use.submit_with_options, Use.cancel, Use.ask,
)  # fmt: skip
_ACTIONS: Final[tuple[_Action, ...]] = (
    Use.submit, Use.submit, Use.submit, Use.submit, Use.submit_many, Use.submit_many, Use.submit_nowait, Use.submit_nowait,
    Use.threads, Use.threads, Use.wait, Use.wait, Use.pause, Use.flush, Use.jump, Use.submit_with_options,
    Use.submit_with_options, Use.submit_with_options, Use.cancel, Use.cancel, Use.look_at_letters, Use.ask,
    Use.configure,
)  # fmt: skip


_DEADLY: Final[tuple[_Action, ...]] = (Use.bury, Use.bury, Use.look_at_letters)


def _bound(action: _Action, use: Use, session: Session) -> Callable[[], None]:
    return lambda: action(use, session)
