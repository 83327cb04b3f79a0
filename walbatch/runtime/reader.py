"""The thread that reads the log back: it fills shards that could not hold everything, and looks for urgent operations.

What is not here: which shards to read for and what goes to which (`readback`), and the search (`express`).

The idea needed to read it: one frame at a time, so that its memory is one frame. How far it is, is told by LSNs alone: while a
frame is read, its segment may be merged into a later one, and then positions of before and after cannot be compared.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Final

from walbatch.ports import Condition, Log
from walbatch.runtime.bell import Bells
from walbatch.runtime.express import Express
from walbatch.runtime.flow import Flow
from walbatch.runtime.lane import Shard
from walbatch.runtime.overview import Overview
from walbatch.runtime.promises import LOGGED, Promises
from walbatch.runtime.readback import NOTHING_FED, ReadBack
from walbatch.types import Position

_logger = logging.getLogger("walbatch")

SEARCHED_FRAMES: Final = 16
"""Frames of the search for urgent operations to each one that fills shards: it must gain on them."""
PRESSED_WAIT_NS: Final = 100_000_000
"""How often to look whether memory is not short any more: nothing else may happen meanwhile."""


class Reader:
    """Reads back. `run` is what its thread does."""

    def __init__(
        self, *, cond: Condition, reading: Condition, flow: Flow, log: Log, read_back: ReadBack, express: Express,
        promises: Promises, overview: Overview, is_pressed: Callable[[], bool], look_around: Callable[[], None],
        bells: Bells,
    ) -> None:  # fmt: skip
        """`is_pressed`: whether memory is short, as was seen when somebody last looked around."""
        # The dispatcher's: it guards the flow, the shards, and the search.
        self._cond = cond
        # Held while the log is read.
        self._reading = reading
        self._flow = flow
        self._log = log
        self._read_back = read_back
        self._express = express
        self._promises = promises
        self._overview = overview
        self._is_pressed = is_pressed
        self._look_around = look_around
        self._bells = bells

    def __repr__(self) -> str:
        return f"<Reader of {self._read_back!r}>"

    def run(self) -> None:
        """Fill shards that are reading back, oldest first. One frame at a time, so its memory is one frame.

        In turns with the search for urgent operations, while there is one.
        """
        while True:
            self._look_around()
            with self._cond:
                if self._flow.stopping:
                    return
                cohort = self._read_back.cohort(self._flow.end_lsn, sparing=self._is_pressed())
                wish = None if self._is_pressed() else self._express.step(self._flow.end_lsn)
            if not cohort and not wish:
                self._bells.reader.sleep(PRESSED_WAIT_NS if self._is_pressed() else None)
                continue
            for _ in range(SEARCHED_FRAMES):
                if wish is None:
                    break
                self._search(*wish)
                with self._cond:
                    wish = (
                        None
                        if self._flow.stopping or self._is_pressed()
                        else self._express.step(self._flow.end_lsn)
                    )
            if cohort:
                self._refill(cohort)

    def _search(self, position: Position, next_lsn: int, wanted: frozenset[str], priority_min: int) -> None:
        """One step of the search for urgent operations."""
        with self._reading:
            frame = self._log.read_frame(
                position, next_lsn=next_lsn, wanted=wanted, priority_min=priority_min
            )
        with self._cond:
            if self._express.take(frame):
                self._bells.timer.ring()

    def _refill(self, cohort: Sequence[Shard]) -> None:
        """Read one frame for shards that are at the same place of the log."""
        with self._cond:
            cohort = [shard for shard in cohort if shard.cursor is not None]
            cursors = [shard.cursor for shard in cohort if shard.cursor is not None]
            position = cursors[0].position
            next_lsn = min(cursor.next_lsn for cursor in cursors)
            end, end_lsn = self._flow.end, self._flow.end_lsn
        wanted = frozenset(shard.lane.setup.name for shard in cohort)
        frame = None
        if next_lsn <= end_lsn:
            with self._reading:
                frame = self._log.read_frame(position, next_lsn=next_lsn, wanted=wanted)
        hands = None if frame is None else self._read_back.deal(frame)
        with self._cond:
            if frame is None or frame.lsns[0] > end_lsn:
                self._read_back.catch_up(cohort, end, end_lsn, grown=self._flow.end_lsn != end_lsn)
                fed = NOTHING_FED
            else:
                fed = self._read_back.feed(cohort, frame, hands, end_lsn=self._flow.end_lsn)
            self._flow.settled += fed.applied + fed.dead + fed.cancelled
            self._flow.found_applied += fed.applied
            self._flow.found_dead += fed.dead
            self._flow.found_cancelled += fed.cancelled
            self._overview.note_memory()
            # Whoever brings a batch back looks for the next one.
            if any(len(shard.queue.flights) < shard.queue.flights_max for shard in cohort):
                self._bells.timer.ring()
            if fed is not NOTHING_FED or any(shard.cursor is None or shard.has_news for shard in cohort):
                self._cond.notify_all()
        for lsn in fed.passed_over:
            self._promises.resolve(LOGGED, lsn)
        for name, lsn in fed.waiting:  # not under the lock: a handler may call the engine
            _logger.warning(
                "lane %r has no backend: its operations wait in the log from lsn %d on", name, lsn
            )
