"""What follows each crash: the store is used once more, and must then be empty.

What is not here: what else must hold (`oracle`).
"""

from __future__ import annotations

from walbatch.testing.simulation.history import Drained
from walbatch.testing.simulation.workload import Session

DELAY_S = 0.3
"""Virtual time between two looks at whether anything is still delayed, at the end of a life that must leave nothing."""
DELAYS_MAX = 20


def await_delayed(session: Session) -> None:
    """Let time pass until nothing is delayed any more."""
    stats = getattr(session.engine, "stats", None)
    if stats is None:
        return
    for _ in range(DELAYS_MAX):
        lanes = [lane for lane in stats().lanes.values() if not (lane.paused or lane.held)]
        if not any(getattr(lane, "delayed", 0) or lane.reading_back for lane in lanes):
            return
        session.pause(DELAY_S)


def verify_by_use(session: Session) -> None:
    """What follows each crash: open, look at dead letters, submit one more to every lane, wait until all is delivered, close."""
    if session.workload.verify is not None and not session.is_verifying:
        session.is_verifying = True
        session.workload.verify(session)
        return
    session.open()
    session.look_at_letters()
    for name in session.workload.lanes:
        session.submit(b"after", name)
    await_delayed(session)
    session.close()
    if not session.process.faults.faults and not isinstance(session.process.history[-1], Drained):
        raise AssertionError("the engine closed without having drained, and nothing had failed")
