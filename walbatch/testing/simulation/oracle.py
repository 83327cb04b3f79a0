"""The oracle: whether what happened to a store keeps the guarantees. It takes a history event by event.

What is not here: how the history came about. It knows nothing of the engine's inside.

The idea needed to read it: each rule (`rules`) belongs to the event that can break it, and says in one sentence what is wrong. What
rules remember stands in a record that can be forked: a history with many ends is judged once up to where they part.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Final

from walbatch.testing.simulation.history import Event
from walbatch.testing.simulation.record import Record, Rule
from walbatch.testing.simulation.rules import answers, fates, lives, operations, settled

RULES: Final[Mapping[type, Rule]] = {
    **lives.RULES,
    **operations.RULES,
    **fates.RULES,
    **answers.RULES,
    **settled.RULES,
}


class Oracle:
    """Judges a history: `take` each event, or `judge` all of them; `problems` are the breaches so far.

    `exactly_once`: lanes with a transactional backend. `unordered`: lanes that promise no order. `by_shard`: lanes that
    keep the order of a whole shard. `shards`: the number of each lane, 1 where it is not named.
    """

    __slots__ = ("_record",)

    def __init__(
        self, *, exactly_once: Collection[str] = (), unordered: Collection[str] = (), by_shard: Collection[str] = (),
        shards: Mapping[str, int] | None = None,
    ) -> None:  # fmt: skip
        self._record = Record(
            exactly_once=exactly_once, unordered=unordered, by_shard=by_shard, shards=shards or {}
        )

    def __repr__(self) -> str:
        return f"<Oracle of {self._record!r}>"

    @property
    def problems(self) -> list[str]:
        """Every breach of a guarantee so far, in the order of the events."""
        return self._record.problems

    def fork(self) -> Oracle:
        """A twin that has taken the same events, and goes its own way from here. O(operations), a few microseconds."""
        twin = Oracle.__new__(Oracle)
        twin._record = self._record.fork()  # noqa: SLF001 - its own kind
        return twin

    def judge(self, events: Iterable[Event]) -> list[str]:
        """Take all of them. Every breach of a guarantee so far, in the order of the events."""
        record = self._record
        for event in events:
            RULES[type(event)](record, event)
        return record.problems

    def take(self, event: Event) -> None:
        """What happened next."""
        RULES[type(event)](self._record, event)
