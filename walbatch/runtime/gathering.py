"""What the tasks of one event loop submit at once: gathered in columns, handed over once per iteration of the loop.

What is not here: checking what is submitted (`aio`), and committing it (`committer`).

The idea needed to read it: operations of the same lane, with the same priority and timeout, make a *sheaf*. A sheaf is one
addition to a commit group and one wake-up of the loop, whatever it holds. What finds no room waits in front, tried again and again
until it has, in smaller parts if need be, or until its timeout.
"""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from walbatch import limits
from walbatch.core.routing import shards_of
from walbatch.errors import DurabilityUnknown, Overloaded, WalbatchError
from walbatch.runtime.committer import Committer
from walbatch.runtime.ticket import Fate, Issuer
from walbatch.types import Durability

COUNT_MAX: Final = 1024
"""Operations of a sheaf: more are handed over at once, so that the disk works while the loop goes on."""
BYTES_MAX: Final = limits.GROUP_BYTES_MAX
"""Bytes of keys and payloads that a loop may have gathered and not handed over: as much as a commit group takes company for. Beyond
it come the sheaf that is being made and one operation."""
SMALL_BYTES_MAX: Final = BYTES_MAX // COUNT_MAX - limits.KEY_BYTES_MAX
"""A payload up to this size need not be counted: a sheaf of such is never more than BYTES_MAX."""
ROOM_POLL_S: Final = 0.005
"""How often what finds no room is tried again: room is made by other threads, which know of no loop."""

WIDTH: Final = 3
"""Items of a sheaf's row for each operation."""
ROW_MAX: Final = WIDTH * COUNT_MAX

Future = asyncio.Future[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Desk:
    """Where operations of one lane are taken in as they come. What does not pass here is looked at more closely."""

    kind: str
    issuer: Issuer
    index: int
    shards: int
    key_bytes_min: int
    key_bytes_max: int
    payload_bytes_max: int


class Sheaf:
    """Operations that are handed over together: `row` has key, payload and the future of who waits, one after the other for each.

    A future becomes the operation's LSN. One list for all three, so that they are added in one step; and no object for each
    operation, since the garbage collector would look at a thousand of them again and again.

    `timeout_s` (None: for ever) bounds the wait for room, which began at `since_s` on the loop's clock; `timeout` is what was asked
    for. It holds up to COUNT_MAX operations, and the payloads above SMALL_BYTES_MAX that there is room for.

    The first `gone` have their answer, or will have it. Those up to `tried` may be in the log: their handing over was begun.
    """

    __slots__ = (
        "_fates", "_sizes", "desk", "fate", "gone", "key_bytes_max", "key_bytes_min", "kind", "loop", "priority", "row", "since_s",
        "small_bytes_max", "timeout", "timeout_s", "tried",
    )  # fmt: skip

    def __init__(
        self, loop: asyncio.AbstractEventLoop, desk: Desk, priority: int, timeout: float | None, timeout_s: float | None,
        since_s: float,
    ) -> None:  # fmt: skip
        self.loop = loop
        self.desk = desk
        self.kind = desk.kind
        self.key_bytes_min = desk.key_bytes_min
        self.key_bytes_max = desk.key_bytes_max
        self.small_bytes_max = min(desk.payload_bytes_max, SMALL_BYTES_MAX)
        self.priority = priority
        self.timeout = timeout
        self.timeout_s = timeout_s
        self.since_s = since_s
        self.row: list[Any] = []
        self.gone = 0
        self.tried = 0
        self.fate: Fate | None = None
        """Of all of it, once it is handed over; None where it went in parts."""
        self._fates: list[Fate] = []
        self._sizes: tuple[int, int, int] = (0, 0, 0)

    def __repr__(self) -> str:
        return f"<Sheaf of {len(self)} for lane {self.kind!r}>"

    def __len__(self) -> int:
        return self.count - self.gone

    @property
    def count(self) -> int:
        """All that was added."""
        return len(self.row) // WIDTH

    def columns(self, first: int, last: int) -> tuple[list[bytes], list[bytes], list[Future]]:
        """Keys, payloads and futures of the operations from `first` up to `last`."""
        row = self.row if (first, last) == (0, self.count) else self.row[first * WIDTH : last * WIDTH]
        return row[::WIDTH], row[1::WIDTH], row[2::WIDTH]

    @property
    def bytes(self) -> int:
        """Of the keys and payloads that have not gone. Added up once for each change of what is there."""
        if self._sizes[:2] != (self.gone, self.count):
            keys, payloads, _ = self.columns(self.gone, self.count)
            self._sizes = self.gone, self.count, sum(map(len, keys)) + sum(map(len, payloads))
        return self._sizes[2]

    def went(self, last: int, fate: Fate) -> None:
        """Its operations up to `last` are in a commit group."""
        if self.gone == 0 and last == self.count:
            self.fate = fate
        self._fates.append(fate)

    def fate_of(self, lsn: int) -> Fate:
        """The fate of one of its operations, which was handed over."""
        return self.fate or next(fate for fate in self._fates if fate.first <= lsn <= fate.last)

    def refuse(self, last: int, error: BaseException) -> None:
        """Tell everybody up to `last` of an error. Their operations do not go any more."""
        _tell(self.columns(self.gone, last)[2], error)
        self.gone = last


def _tell(futures: Sequence[Future], error: BaseException) -> None:
    for future in futures:
        if not future.done():
            future.set_exception(error)


class Gathering:
    """The sheaves of one loop. Only for its thread, but for what is called when a group is committed."""

    def __init__(self, loop: asyncio.AbstractEventLoop, committer: Committer) -> None:
        self.loop = weakref.ref(loop)
        self._committer = committer
        self.sheaf: Sheaf | None = None
        """The one that takes more: the last of `_sheaves`. Whoever fills it to COUNT_MAX calls `hand_over`."""
        self._sheaves: deque[Sheaf] = deque()
        self._bytes = 0
        self._refusal: Overloaded | None = None
        self._poll: asyncio.TimerHandle | None = None
        # Those whose group is done. Appended to by the threads that commit.
        self._done: deque[tuple[Sequence[Future], int, Fate]] = deque()

    def __repr__(self) -> str:
        return f"<Gathering of {sum(map(len, self._sheaves))} in {len(self._sheaves)} sheaves>"

    @property
    def refusal(self) -> Overloaded | None:
        """Why nothing more is gathered for now: what there is finds no room, and it is as much as may wait."""
        if self._refusal is None:
            return None
        count = sum(map(len, self._sheaves))
        return self._refusal if self._bytes >= BYTES_MAX or count >= limits.FRAME_COUNT_MAX else None

    def check(self) -> None:
        """Raise the refusal, if there is one."""
        if (refusal := self.refusal) is not None:
            raise refusal

    @property
    def shortage(self) -> Overloaded | None:
        """Why something that was to be handed over waits for room; None where nothing waits."""
        return self._refusal if self._sheaves else None

    def make_room(self) -> None:
        """Hand over what there is, if it is as much as may wait and was not refused of late."""
        if self._bytes >= BYTES_MAX and self._refusal is None:
            self.hand_over()

    def begin(
        self, loop: asyncio.AbstractEventLoop, desk: Desk, priority: int, timeout: float | None, timeout_s: float | None, size: int
    ) -> Sheaf:  # fmt: skip
        """The sheaf for what comes next, with a payload of `size`. It is handed over in the loop's next iteration."""
        sheaf = self.sheaf
        if sheaf is None or sheaf.desk is not desk or sheaf.priority != priority or sheaf.timeout != timeout:
            if self._poll is None:  # else it is to be tried again anyway
                loop.call_soon(self.hand_over)
            self.sheaf = sheaf = Sheaf(loop, desk, priority, timeout, timeout_s, loop.time())
            self._sheaves.append(sheaf)
        if size > SMALL_BYTES_MAX:
            self._bytes += size
        return sheaf

    # --- handing over ---

    def hand_over(self) -> None:
        """Everything goes into a commit group, as far as there is room. What has waited for room long enough is refused.

        An exception of a signal handler may cut this off anywhere. So it is to be called again before it begins; and what it was
        about then may have been accepted: it is not submitted twice.
        """
        loop = self.loop()
        if not self._sheaves or loop is None:
            return
        self.sheaf = None
        if self._poll is not None:
            self._poll.cancel()
        self._poll = loop.call_later(ROOM_POLL_S, self.hand_over)
        self._refusal = None
        while self._sheaves:
            sheaf = self._sheaves[0]
            if sheaf.tried > sheaf.gone:
                sheaf.refuse(sheaf.tried, DurabilityUnknown(_CUT_OFF))
            refusal = self._try(sheaf)
            if refusal is not None:
                self._refusal = refusal
                self._drop_expired(loop.time())
                break
            self._sheaves.popleft()
            sheaf.row = []
        self._bytes = sum(sheaf.bytes for sheaf in self._sheaves)
        if not self._sheaves:
            self._poll.cancel()
            self._poll = None

    def _try(self, sheaf: Sheaf) -> Overloaded | None:
        """Hand a sheaf over, part by part where there is not room for all. Returns why the rest of it was refused."""
        count = len(sheaf)
        while len(sheaf):
            refusal = self._submit(sheaf, min(count, len(sheaf)))
            if refusal is not None:
                if count == 1:
                    return refusal
                count //= 2
        return None

    def _submit(self, sheaf: Sheaf, count: int) -> Overloaded | None:
        """Hand over the next `count` operations of a sheaf, unless there is no room for them."""
        desk, first = sheaf.desk, sheaf.gone
        last = first + count
        keys, payloads, futures = sheaf.columns(first, last)
        size = sum(map(len, keys)) + sum(map(len, payloads))
        sheaf.tried = last
        try:
            lsn, fate = self._committer.submit(
                desk.index, shards_of(keys, desk.shards) if desk.shards > 1 else 0, keys, payloads,
                sheaf.priority, size, needs_sync=desk.issuer.durability is Durability.SYNC, timeout_ns=0, wait=False,
            )  # fmt: skip
        except Overloaded as error:
            sheaf.tried = first
            return error
        except WalbatchError as error:  # it is raised where the operations were submitted
            sheaf.refuse(last, error)
            return None
        assert fate.durable is not None
        sheaf.went(last, fate)
        fate.durable.listen(lambda: self._wake(futures, lsn, fate))
        sheaf.gone = last
        return None

    def _drop_expired(self, now_s: float) -> None:
        """Refuse what has waited for room as long as it may.

        What stands behind nothing that goes on waiting has a last look, one by one, whether there is room for just that.
        """
        waiting: deque[Sheaf] = deque()
        for sheaf in self._sheaves:
            if sheaf.timeout_s is None or now_s < sheaf.since_s + sheaf.timeout_s:
                waiting.append(sheaf)
                continue
            while len(sheaf):
                refusal = self._refusal if waiting else self._submit(sheaf, 1)
                if refusal is not None:
                    sheaf.refuse(sheaf.count if waiting else sheaf.gone + 1, refusal)
        self._sheaves = waiting

    # --- answers ---

    def _wake(self, futures: Sequence[Future], lsn: int, fate: Fate) -> None:
        """The group of these operations is committed, or never will be. From any thread, perhaps twice."""
        self._done.append((futures, lsn, fate))
        loop = self.loop()
        try:
            if loop is None:
                self._done.clear()
            else:
                loop.call_soon_threadsafe(self._answer)
        except (
            RuntimeError
        ):  # the loop was closed: nobody waits any more, and what is kept here would keep it
            self._done.clear()

    def _answer(self) -> None:
        """Tell those who wait. If this is cut off, it is done again: who was told is passed over."""
        while self._done:
            futures, lsn, fate = self._done[0]
            try:
                self._answer_all(futures, lsn, fate)
            except BaseException:
                loop = self.loop()
                if loop is not None:
                    loop.call_soon(self._answer)
                raise
            self._done.popleft()

    @staticmethod
    def _answer_all(futures: Sequence[Future], lsn: int, fate: Fate) -> None:
        assert fate.durable is not None
        error = fate.durable.error
        if error is not None:
            _tell(futures, error)
            return
        for number, future in enumerate(futures, lsn):
            if not future.done():
                future.set_result(number)


_CUT_OFF: Final = (
    "the submission was cut off by an exception of a signal handler: it may or may not have been accepted"
)
