"""Whether the caller has cut into a call of the engine: a signal handler runs between any two bytecodes of the main thread.

What is not here: what follows from it (`engine.closing`).

The idea needed to read it: what the interrupted call holds, its own locks, those of the state and of libraries, and its lead of a
commit group, nobody gets before it goes on, and it goes on when the handler returns. Only the stack knows of all of them. A call
that waits in a condition has given up all that it held, and one that waits for an event holds nothing: it can be waited beside,
unless it leads.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import Final

from walbatch.runtime import ticket
from walbatch.runtime.clock import RealCondition, RealEvent
from walbatch.runtime.committer import Committer

_PACKAGE: Final = __name__.partition(".")[0]
_WAITING: Final = RealCondition.wait.__code__
_AWAITING: Final = RealEvent.wait.__code__
_LEADING: Final = Committer._lead.__code__  # noqa: SLF001 - who leads has no lock to be seen by, only this call


def cuts_in(engine: object) -> bool:
    """Whether this thread is in the middle of a call of `engine`, or of a ticket, which must not be held up.

    `engine` is the object whose methods users call. The call that asks does not count.
    """
    frame: FrameType | None = sys._getframe()  # noqa: SLF001 - there is no public way to read the stack so cheaply
    while frame is not None and _is_ours(frame):
        frame = frame.f_back
    below: list[FrameType] = []
    while frame is not None:
        if _is_ours(frame):
            below.append(frame)
        frame = frame.f_back
    if not any(_is_call_of(frame, engine) for frame in below):
        return False
    innermost = below[0]
    is_parked = innermost.f_code is _AWAITING or (
        innermost.f_code is _WAITING and not innermost.f_locals["self"].is_held()
    )
    return not is_parked or any(frame.f_code is _LEADING for frame in below)


def _is_ours(frame: FrameType) -> bool:
    name = frame.f_globals.get("__name__")
    return isinstance(name, str) and name.partition(".")[0] == _PACKAGE


def _is_call_of(frame: FrameType, engine: object) -> bool:
    """Whether it is a method of the engine, or of some ticket: whose, nobody knows."""
    return frame.f_globals is vars(ticket) or frame.f_locals.get("self") is engine
