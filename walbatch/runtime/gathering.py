"""What the tasks of one event loop submit at once: gathered in columns, handed over once per iteration of the loop.

What is not here: checking what is submitted (`aio`), and committing it (`committer`).

The idea needed to read it: operations of the same lane, with the same priority and timeout, make a *sheaf*. A sheaf is one
addition to a commit group and one wake-up of the loop, whatever it holds. What finds no room waits in front, tried again and again
until it has, in smaller parts if need be, or until its timeout.
"""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections import deque
from dataclasses import dataclass
from typing import Final

from walbatch import limits
from walbatch.core.routing import shards_of
from walbatch.errors import DurabilityUnknown, Overloaded
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
    """Operations that are handed over together, and the futures of those who wait: each becomes the LSN of its operation.

    `timeout_s` (None: for ever) bounds the wait for room, which began at `since_s` on the loop's clock; `timeout` is what was asked
    for. It holds up to COUNT_MAX operations, and the payloads above SMALL_BYTES_MAX that there is room for.
    """

    __slots__ = (
        "_fates", "desk", "fate", "futures", "key_bytes_max", "key_bytes_min", "keys", "kind", "loop", "origin", "payloads",
        "priority", "since_s", "small_bytes_max", "timeout", "timeout_s",
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
        self.keys: list[bytes] = []
        self.payloads: list[bytes] = []
        self.futures: list[Future] = []
        self.origin = self
        """The sheaf that it is a part of."""
        self.fate: Fate | None = None
        """Of all of it, once it is handed over; None where it went in parts."""
        self._fates: list[Fate] = []

    def __repr__(self) -> str:
        return f"<Sheaf of {len(self.futures)} for lane {self.kind!r}>"

    @property
    def bytes(self) -> int:
        """Of its keys and payloads."""
        return sum(map(len, self.keys)) + sum(map(len, self.payloads))

    def part(self, first: int, last: int) -> Sheaf:
        """The operations from `first` up to `last` as a sheaf of their own."""
        part = Sheaf(self.loop, self.desk, self.priority, self.timeout, self.timeout_s, self.since_s)
        part.keys, part.payloads = self.keys[first:last], self.payloads[first:last]
        part.futures = self.futures[first:last]
        part.origin = self.origin
        return part

    def has_gone(self, fate: Fate) -> None:
        """It is in a commit group."""
        if self.origin is self:
            self.fate = fate
        else:
            self.origin._fates.append(fate)  # noqa: SLF001 - of the same class

    def fate_of(self, lsn: int) -> Fate:
        """The fate of one of its operations, which was handed over."""
        return self.fate or next(fate for fate in self._fates if fate.first <= lsn <= fate.last)

    def refuse(self, error: BaseException) -> None:
        """Tell everybody of an error."""
        for future in self.futures:
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
        self._done: deque[tuple[Sheaf, int, Fate]] = deque()

    def __repr__(self) -> str:
        return f"<Gathering of {sum(len(sheaf.futures) for sheaf in self._sheaves)} in {len(self._sheaves)} sheaves>"

    @property
    def refusal(self) -> Overloaded | None:
        """Why nothing more is gathered for now: what there is finds no room, and it is as much as may wait."""
        if self._refusal is None:
            return None
        count = sum(len(sheaf.futures) for sheaf in self._sheaves)
        return self._refusal if self._bytes >= BYTES_MAX or count >= limits.FRAME_COUNT_MAX else None

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
            if not self._sheaves:
                loop.call_soon(self.hand_over)
            self.sheaf = sheaf = Sheaf(loop, desk, priority, timeout, timeout_s, loop.time())
            self._sheaves.append(sheaf)
        if size > SMALL_BYTES_MAX:
            self._bytes += size
        return sheaf

    # --- handing over ---

    def hand_over(self) -> None:
        """Everything goes into a commit group, as far as there is room. What has waited for room long enough is refused."""
        if not self._sheaves:
            return
        self.sheaf = None
        if self._poll is not None:
            self._poll.cancel()
            self._poll = None
        self._refusal = None
        while self._sheaves:
            refusal = self._try(self._sheaves[0])
            if refusal is not None:
                self._refusal = refusal
                self._drop_expired()
                break
            self._sheaves.popleft()
        self._bytes = sum(sheaf.bytes for sheaf in self._sheaves)
        loop = self.loop()
        if self._sheaves and loop is not None:
            self._poll = loop.call_later(ROOM_POLL_S, self.hand_over)

    def _try(self, sheaf: Sheaf) -> Overloaded | None:
        """Hand a sheaf over, part by part where there is not room for all. Returns why the rest of it was refused."""
        done, count = 0, len(sheaf.futures)
        refusal: Overloaded | None = None
        while done < len(sheaf.futures):
            part = sheaf if count == len(sheaf.futures) else sheaf.part(done, done + count)
            refusal = self._submit(part)
            if refusal is None:
                done += len(part.futures)
            elif count > 1:
                count //= 2
            else:
                break
        if refusal is not None and done:
            self._sheaves[0] = sheaf.part(done, len(sheaf.futures))
        return refusal

    def _submit(self, sheaf: Sheaf) -> Overloaded | None:
        """Hand a sheaf over as a whole, unless there is no room for it."""
        desk = sheaf.desk
        try:
            lsn, fate = self._committer.submit(
                desk.index, shards_of(sheaf.keys, desk.shards) if desk.shards > 1 else 0, sheaf.keys, sheaf.payloads,
                sheaf.priority, sheaf.bytes, needs_sync=desk.issuer.durability is Durability.SYNC, timeout_ns=0, wait=False,
            )  # fmt: skip
        except Overloaded as error:
            return error
        except Exception as error:  # noqa: BLE001 - it is raised where the operations were submitted
            sheaf.refuse(error)
            return None
        except BaseException:
            sheaf.refuse(
                DurabilityUnknown("the submission was interrupted: it may or may not have been accepted")
            )
            raise
        assert fate.durable is not None
        sheaf.has_gone(fate)
        fate.durable.listen(lambda: self._wake(sheaf, lsn, fate))
        return None

    def _drop_expired(self) -> None:
        """Refuse what has waited for room as long as it may, after a last look for each whether there is room for just that."""
        loop = self.loop()
        now_s = 0.0 if loop is None else loop.time()
        waiting: deque[Sheaf] = deque()
        for sheaf in self._sheaves:
            if sheaf.timeout_s is None or now_s < sheaf.since_s + sheaf.timeout_s:
                waiting.append(sheaf)
                continue
            for index in range(len(sheaf.futures)):
                one = sheaf.part(index, index + 1)
                refusal = self._submit(one)
                if refusal is not None:
                    one.refuse(refusal)
        self._sheaves = waiting

    # --- answers ---

    def _wake(self, sheaf: Sheaf, lsn: int, fate: Fate) -> None:
        """The group of a sheaf is committed, or never will be. From any thread, perhaps twice."""
        self._done.append((sheaf, lsn, fate))
        loop = self.loop()
        if loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits any more
                loop.call_soon_threadsafe(self._answer)

    def _answer(self) -> None:
        """Tell those who wait."""
        while self._done:
            sheaf, lsn, fate = self._done.popleft()
            assert fate.durable is not None
            error = fate.durable.error
            if error is not None:
                sheaf.refuse(error)
                continue
            for number, future in enumerate(sheaf.futures, lsn):
                if not future.done():
                    future.set_result(number)
