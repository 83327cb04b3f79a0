"""Redis as a backend: a batch and its mark in one step, which a script makes of them. Exactly once, as far as Redis keeps its word.

What is not here: the script (`script`), keys (`keys`), connections (`connections`), what errors mean (`meaning`).

The idea needed to read it: the client says which mark it takes for the held one. If that is still so, the script applies what
is fresh and stores the new mark; if not, it does nothing, and answers the mark that is there. So a call that was given up, a
connection that was lost, or an older engine can be late, but never apply anything a second time.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import redis

from walbatch.backends.redis import script
from walbatch.backends.redis.connections import Connections
from walbatch.backends.redis.keys import Command, RedisKeys
from walbatch.backends.redis.meaning import at_opening, for_batch, for_text
from walbatch.backends.redis.url import PERSISTENCES, parse
from walbatch.backends.sql.table import UnreadableError
from walbatch.core.mark import check_epoch, decode_mark, encode_mark, fresh_indexes, leave_out
from walbatch.errors import (
    BackendBroken,
    BatchTooLarge,
    ConfigError,
    CorruptionError,
    EngineClosed,
    RetryBatch,
)
from walbatch.limits import LSN_MAX
from walbatch.types import Answer, Applied, Batch, Failures, Mark, Operation, Outcome, Rejected

_logger = logging.getLogger("walbatch")

CALL_S: Final = 30.0
"""How long a call may take where nobody said: what a lane's `timeout_s` is by default."""

STALE_MAX: Final = 8
"""How often a batch is sent again at once because another call has moved the mark meanwhile. There is hardly ever one."""

PARTLY: Final = (
    "it was applied in part: what Redis refused came behind other commands of this operation, "
    "which have taken effect and do not run again"
)

Write = Callable[[Any, Operation], Any]
"""What a user does for an operation, with a pipeline of redis-py."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What Redis holds for a shard: the mark's bytes, the LSNs that are left out of it, and what follows from both."""

    raw: bytes = b""
    out: bytes = b""
    mark: Mark = field(default_factory=Mark)
    torn: frozenset[int] = frozenset()
    """LSNs that are left out of it although some of their commands have taken effect."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A batch as commands. `indexes`: the places in the batch of `operations`; `refused`: why others can do nothing, by place."""

    indexes: Sequence[int]
    operations: Sequence[Sequence[Command]]
    options: Sequence[Sequence[tuple[str, dict[str, Any]]]]
    refused: dict[int, str]


class RedisBackend:
    """A transactional backend in the Redis that `url` names: `redis://host:6379/0`, `rediss://...`, `redis+unix:///path/of/socket`.

    `keys` is a RedisKeys, or their prefix, or stands in the URL; it says how an operation becomes a command. `write(pipeline,
    operation)`, instead of it, queues any commands that a script may run; the list of what Redis answers to them is the ticket's
    result. They run once in effect for each operation, in order; `write` itself may be called again.

    `persistence="synced"` takes only a Redis that syncs what it acknowledges (appendonly yes, appendfsync always), and looks
    at that with each connection; "any" takes every Redis, and says in the log what may be lost. A password may stand in the
    URL, which is then not remembered, or in REDISCLI_AUTH. Safe from any thread.
    """

    key_bytes_min: int = 0

    def __init__(
        self, url: str, keys: RedisKeys | str | bytes | None = None, *, write: Write | None = None, persistence: str | None = None
    ) -> None:  # fmt: skip
        parsed = parse(url)
        if keys is not None and parsed.keys is not None:
            raise ConfigError("the keys stand in the URL and beside it: say once what they are")
        if isinstance(keys, (str, bytes)):
            keys = RedisKeys(keys)
        keys = keys if keys is not None else parsed.keys
        if keys is not None and not isinstance(keys, RedisKeys):
            raise ConfigError(f"keys must be RedisKeys or their prefix, not {type(keys).__name__}")
        if keys is not None and write is not None:
            raise ConfigError("say what to do with an operation: either keys=, or write=, not both")
        if write is not None and not callable(write):
            raise ConfigError(
                f"write must be a function of a pipeline and an operation, not {type(write).__name__}"
            )
        self.persistence: Final = persistence or parsed.persistence or "synced"
        if self.persistence not in PERSISTENCES:
            raise ConfigError(
                f"persistence is {self.persistence!r}, but must be one of {', '.join(PERSISTENCES)}"
            )
        self.keys: Final = keys if keys is not None or write is not None else RedisKeys()
        self._write = write
        self._address = parsed.address
        self._connections = Connections(parsed.address, self.persistence)
        self._limit_s: float | None = CALL_S
        # Guards the rest: opening, closing, and what was last seen of the marks.
        self._lock = threading.Lock()
        self._client: redis.Redis | None = None
        self._lane: str | None = None
        self._store = b""
        self._held: dict[int, Held] = {}
        self._pid = os.getpid()

    def __repr__(self) -> str:
        use = f"lane {self._lane!r}" if self._lane is not None else "closed"
        what = f"{self.keys.type}s {self.keys.prefix!r}" if self.keys is not None else "a write function"
        return f"<RedisBackend {self._address.place} {what}, {use}>"

    @property
    def url(self) -> str | None:
        """`redis://...` without a password, from which the command line makes it again; None with `write`, which no URL names."""
        return None if self.keys is None else self._address.url(self.keys, self.persistence)

    def limit_time(self, timeout_s: float | None) -> None:
        """How long a call may take, from now on: what the lane allows. None: for ever."""
        with self._lock:
            if timeout_s == self._limit_s:
                return
            self._limit_s = timeout_s
            if self._lane is not None:
                self._client = self._connections.client(timeout_s)  # calls under way keep the other one

    # --- opening and closing --------------------------------------------------------------------------------------

    def open(self, lane: str, shards: int, store: bytes) -> None:
        """Connect, and look whether the server is one that can be used.

        What can be read afterwards is durable, if anything is: a mark is read together with a write, which Redis syncs, with all
        that came before, before it answers.
        Raises ConfigError for a server that does not fit, and says what to do; StorageError where it cannot be reached;
        ConfigError for a second lane.
        """
        with self._lock:
            if self._lane is not None:
                raise ConfigError(
                    f"{self!r} cannot be the backend of lane {lane!r} too: give each lane one of its own"
                )
            client = self._connections.client(self._limit_s)
            try:
                client.ping()
            except redis.RedisError as error:
                client.connection_pool.disconnect()
                raise at_opening(error, self._address.place) from error
            self._client, self._lane, self._store, self._held = client, lane, store, {}
            self._pid = os.getpid()

    def close(self) -> None:
        """Release the connections. Idempotent. One that a call still uses is closed with it."""
        with self._lock:
            client, self._client, self._lane = self._client, None, None
            if client is not None and self._pid == os.getpid():
                client.connection_pool.disconnect(inuse_connections=False)

    def _opened(self) -> redis.Redis:
        client = self._client
        if client is None or self._pid != os.getpid():
            raise EngineClosed(f"{self!r} is not open in this process: open it with an engine")
        return client

    # --- batches --------------------------------------------------------------------------------------------------

    def apply(self, batch: Batch) -> Answer:
        """Apply what the held mark does not cover of the batch, and store the union of both marks, in one step.

        Crash story: Redis writes what a script has done as one transaction of its file, and answers when that is synced.
        Before it nothing of the batch is there, after it all of it with its mark. An engine that was killed before it heard
        of it, or lost the connection, offers the batch again, in other cuts perhaps, and the mark leaves out what took
        effect.

        Returns None, Failures with the operations that were refused, or with `write` an outcome for each operation. Raises
        Fenced for the batch of an engine that a newer one replaced, and a BatchFailure that says what to do. Where that is
        raised because Redis stopped in the middle (a missing permission), what took effect before stands in the mark, and is
        left out when it comes again; an operation that took effect in part is remembered beside the mark, and refused then.
        """
        client = self._opened()
        try:
            for _ in range(STALE_MAX):
                answer = self._try(client, batch)
                if answer is not _STALE:
                    return answer  # type: ignore[return-value]  # it is one, then
        except redis.RedisError as error:
            raise for_batch(error, self._address.place) from error
        except CorruptionError as error:
            raise BackendBroken(str(error)) from error
        raise RetryBatch(f"{self._address.place}: others move the mark of shard {batch.shard} all the time")

    def applied_mark(self, shard: int) -> Mark:
        """The mark of this lane and store; `Mark()` where there is none. Raises CorruptionError, StorageError."""
        client = self._opened()
        try:
            return self._read(client, shard).mark
        except redis.RedisError as error:
            raise at_opening(error, self._address.place) from error

    def _try(self, client: redis.Redis, batch: Batch) -> object:
        """The answer; `_STALE` where the held mark was another one than was thought, and is known now."""
        held, new = Held(), b""
        fresh: Sequence[int] | None = None
        union = Mark()
        if batch.mark is not None:
            held = self._held.get(batch.shard) or self._read(client, batch.shard)
            check_epoch(batch, held.mark)
            fresh = fresh_indexes(batch, held.mark)
        wanted = range(len(batch)) if fresh is None else fresh
        if self.keys is not None and self.keys.is_plain:
            plan = None
            values = self._put_values(batch, fresh)
            refused: dict[int, str] = {}
        else:
            plan = self._plan(client, batch, wanted, held.torn)
            refused, values = plan.refused, []
        if batch.mark is not None:
            union = held.mark.union(leave_out(batch.mark, [batch.lsns[index] for index in refused]))
            new = encode_mark(union)
        if plan is not None:
            lsns = [batch.lsns[index] if batch.lsns else None for index in plan.indexes]
            torn = b" ".join(b"%d!" % lsn for lsn in sorted(held.torn) if not union.covers(lsn))
            values = script.pack_run(
                lsns, plan.operations, wants_answers=self._write is not None, left_out=torn
            )
        if len(values) > script.VALUES_MAX and len(batch) > 1:
            raise BatchTooLarge(
                f"the batch becomes {len(values):,} values, Redis takes {script.VALUES_MAX:,} at once"
            )
        code = script.PUT if plan is None else script.RUN
        answer = self._run(client, code, self._mark_key(batch.shard), [held.raw, held.out, new, *values])
        if answer[0] == script.STALE:
            self._see(batch.shard, self._decode(batch.shard, answer[1], answer[2]), held)
            return _STALE
        return self._conclude(client, batch, plan, answer, (held, union, new), wanted)

    def _put_values(self, batch: Batch, fresh: Sequence[int] | None) -> list[bytes]:
        assert self.keys is not None
        assert isinstance(self.keys.prefix, bytes)
        keys, payloads, lsns = batch.keys, batch.payloads, batch.lsns
        if fresh is not None:
            keys, payloads = [keys[index] for index in fresh], [payloads[index] for index in fresh]
            lsns = [lsns[index] for index in fresh]
        return script.pack_put(self.keys.prefix, keys, payloads, lsns)

    def _conclude(
        self, client: redis.Redis, batch: Batch, plan: Plan | None, answer: list[Any], marks: tuple[Held, Mark, bytes],
        wanted: Sequence[int],
    ) -> Answer:  # fmt: skip
        """What the engine is told, once the script has done its work. Raises what speaks for the rest of a batch that it left."""
        failed, stopped, stopped_at = answer[1], _text(answer[2]), int(answer[3])
        indexes = wanted if plan is None else plan.indexes
        refused = dict(plan.refused) if plan is not None else {}
        refused.update(zip([indexes[at] for at in failed[::2]], map(_text, failed[1::2]), strict=True))
        if batch.mark is not None:
            held, union, new = marks
            now = self._decode(batch.shard, new, answer[5]) if answer[5] else Held(raw=new, mark=union)
            self._see(batch.shard, now, held)
            if stopped and (lsn := batch.lsns[indexes[stopped_at]]) in now.torn:
                stopped += f" (the operation with LSN {lsn} was applied in part, and becomes a dead letter)"
        if stopped:
            raise for_text(stopped, self._address.place)
        if self._write is None:
            return Failures({index: Rejected(why) for index, why in refused.items()}) if refused else None
        assert plan is not None
        outcomes: list[Outcome] = [Applied(None) for _ in range(len(batch))]
        for at, index in enumerate(indexes):
            if index not in refused:
                outcomes[index] = Applied(_results(client, plan.options[at], answer[4][at]))
        for index, why in refused.items():
            outcomes[index] = Rejected(why)
        return outcomes

    def _plan(self, client: redis.Redis, batch: Batch, wanted: Sequence[int], torn: frozenset[int]) -> Plan:
        """The commands of each operation that is wanted, and was not applied in part before."""
        indexes: list[int] = []
        operations: list[Sequence[Command]] = []
        refused: dict[int, str] = {}
        options: list[Sequence[tuple[str, dict[str, Any]]]] = []
        entire = list(batch) if self._write is not None else []
        queue = _Queue(client.connection_pool, client.response_callbacks, False, None)
        encode = client.get_encoder().encode
        for index in wanted:
            try:
                if torn and batch.lsns[index] in torn:
                    raise UnreadableError(PARTLY)
                if self.keys is not None:
                    commands = self.keys.commands(batch.keys[index], batch.payloads[index])
                else:
                    commands, names = self._written(queue, encode, entire[index])
                    options.append(names)
                if any(len(command) > script.ARGUMENTS_MAX for command in commands):
                    raise UnreadableError(
                        f"it becomes a command of more than {script.ARGUMENTS_MAX:,} values"
                    )
            except UnreadableError as error:
                refused[index] = str(error)
                del options[len(operations) :]
                continue
            indexes.append(index)
            operations.append(commands)
        return Plan(indexes=indexes, operations=operations, options=options, refused=refused)

    def _written(
        self, queue: _Queue, encode: Callable[[Any], Any], operation: Operation
    ) -> tuple[list[Command], list[tuple[str, dict[str, Any]]]]:
        """The commands that `write` queues for an operation, and how the library reads their answers."""
        assert self._write is not None
        queue.command_stack.clear()
        self._write(queue, operation)
        commands, names = [], []
        for arguments, options in queue.command_stack:
            # A name of two words ("XGROUP CREATE") is two values.
            words = str(arguments[0]).encode().split()
            commands.append((*words, *map(bytes, map(encode, arguments[1:]))))
            names.append(
                (str(arguments[0]), {name: value for name, value in options.items() if name != "keys"})
            )
        return commands, names

    def _run(self, client: redis.Redis, code: str, key: bytes, values: Sequence[bytes]) -> list[Any]:
        """Run a script. Redis may have lost it since the last time."""
        try:
            return self._send(client, "EVALSHA", _SHA1[code], 1, key, *values)
        except redis.exceptions.NoScriptError:
            return self._send(client, "EVAL", code, 1, key, *values)

    def _send(self, client: redis.Redis, *command: Any) -> list[Any]:
        """Send a command, and now and then look in the same round trip whether what is asked of the server still holds.

        Crash story: what was applied before somebody has switched the file off is in it. Between then and the next look Redis may
        lose what it acknowledges: that is as short as the looks are apart. Where one shows it, nothing is acknowledged, also not
        what was applied in that very round trip; it stands in the mark, and counts once the server is right again.
        """
        questions = self._connections.questions()
        if not questions:
            answer: list[Any] = client.execute_command(*command)  # type: ignore[no-untyped-call]
            return answer
        pipeline = redis.client.Pipeline(client.connection_pool, {}, False, None)
        for asked in (command, *questions):
            pipeline.execute_command(*asked)  # type: ignore[no-untyped-call]
        first, *answers = pipeline.execute(raise_on_error=False)
        if isinstance(first, Exception) and not isinstance(first, redis.exceptions.NoScriptError):
            raise first
        self._connections.judge(answers)
        if isinstance(first, Exception):
            raise first
        found: list[Any] = first
        return found

    # --- marks ----------------------------------------------------------------------------------------------------

    def _mark_key(self, shard: int) -> bytes:
        return f"walbatch:mark:{self._store.hex()}:{self._lane}:{shard}".encode()

    def _read(self, client: redis.Redis, shard: int) -> Held:
        known = self._held.get(shard)
        raw, out = self._run(client, script.READ, self._mark_key(shard), [b"%d" % time.time()])
        held = self._decode(shard, raw or b"", out or b"")
        self._see(shard, held, known)
        return held

    def _see(self, shard: int, held: Held, known: Held | None) -> None:
        """Remember what Redis holds. If that is less than it has held before, it has lost what it had acknowledged.

        `known` is what was remembered before Redis was asked. Where that has changed meanwhile, another call has asked later.
        """
        with self._lock:
            if self._held.get(shard) is not known:
                return
            self._held[shard] = held
        before = known.mark if known is not None else Mark()
        both = before.union(held.mark)
        if (both.watermark, both.ranges) != (held.mark.watermark, held.mark.ranges):
            _logger.error(
                "%s: the mark of lane %r, shard %d has gone back, from LSN %d to %d: Redis was restored, emptied, or has lost what "
                "it had acknowledged. What it has lost is not delivered again; the rest goes on from here",
                self._address.place, self._lane, shard, _last(before), _last(held.mark),
            )  # fmt: skip

    def _decode(self, shard: int, raw: bytes, out: bytes) -> Held:
        """Raises CorruptionError for a damaged mark: taking it for empty would apply everything again."""
        if not raw:
            return Held(out=out)
        try:
            words = out.split()
            lsns = [int(word.removesuffix(b"!")) for word in words]
            torn = frozenset(lsn for lsn, word in zip(lsns, words, strict=True) if word.endswith(b"!"))
            if not all(0 < lsn <= LSN_MAX for lsn in lsns):
                raise ValueError("what is left out of it is no LSN")
            return Held(raw=raw, out=out, mark=leave_out(decode_mark(raw), lsns), torn=torn)
        except ValueError as error:
            key = self._mark_key(shard).decode()
            raise CorruptionError(
                f"{self._address.place}: the mark at {key!r} is damaged ({error}); which operations took effect cannot be told any "
                "more: restore Redis from a backup",
                path=key, expected="a mark",
            ) from error  # fmt: skip


_STALE: Final = object()
_SHA1: Final = {
    code: hashlib.sha1(code.encode()).hexdigest()  # noqa: S324 - Redis' name
    for code in (script.PUT, script.READ, script.RUN)
}


class _Queue(redis.client.Pipeline):
    """What `write` is given: it queues commands, and sends none."""

    def execute(self, raise_on_error: bool = True) -> Any:  # noqa: FBT001, FBT002 - as the library has it
        """Not for a `write` function."""
        raise BackendBroken(
            "the write function has called execute: it must only queue commands, which are sent for it"
        )

    def immediate_execute_command(self, *args: Any, **options: Any) -> Any:
        """Not for a `write` function."""
        raise BackendBroken(
            f"the write function has called {args[0]}: it must only queue commands, which are sent for it"
        )


def _results(
    client: redis.Redis, options: Sequence[tuple[str, dict[str, Any]]], answers: Sequence[Any]
) -> list[Any]:
    """What Redis answered to the commands of an operation, as the library reads it."""
    readers = client.response_callbacks
    return [
        readers[name](answer, **more) if name in readers else answer
        for (name, more), answer in zip(options, answers, strict=True)
    ]


def _last(mark: Mark) -> int:
    return mark.ranges[-1][1] if mark.ranges else mark.watermark


def _text(value: bytes | str) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
