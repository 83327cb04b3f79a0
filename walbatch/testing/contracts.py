"""Conformance suites for implementations of the Backend protocol: subclass one in your tests, and say how yours is made.

```python
from walbatch.testing.contracts import BackendContract


class TestMyBackend(BackendContract):
    def make_backend(self, path):
        return MyBackend(path / "data")

    def content(self, path):
        return MyReader(path / "data").items()
```

What is not here: pytest. The suites are classes of plain methods that take a folder (pytest's `tmp_path`); a method that does not
apply raises `unittest.SkipTest`, which pytest understands.

The idea needed to read it: a backend is judged by what a fresh reader finds after it, never by what it says of itself.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, Final
from unittest import SkipTest

from walbatch import limits
from walbatch.backends.function import as_backend
from walbatch.core.delivery import judge
from walbatch.core.routing import shard_of
from walbatch.errors import Fenced
from walbatch.ports import TransactionalBackend
from walbatch.types import PRIORITY_NORMAL, Batch, CutReason, Mark, Operation, Order, merge_ranges, ranges_of

STORE: Final = b"a store's uuid.."
OTHER_STORE: Final = b"another's uuid.."
WAIT_S: Final = 30.0

Pair = tuple[bytes, bytes]
"""Key, payload."""


class BackendContract:
    """What every backend must do. Subclass it; implement `make_backend` and `content`; set what is different."""

    replaces: ClassVar[bool] = True
    """An operation replaces what an earlier one with its key left behind. False: every operation adds to the content."""
    idempotent: ClassVar[bool] = True
    """A batch that comes again at once leaves the content as it was. False: it may take effect again."""
    survives_kill: ClassVar[bool] = True
    """What it applied outlives its process. False for a stand-in in memory: what needs a second process is skipped."""
    lane: ClassVar[str] = "put"
    shards: ClassVar[int] = 2
    kills: ClassVar[int] = 20
    """How often a process that applies batches is killed."""

    def make_backend(self, path: Path) -> Any:
        """A new backend (an object, or a function of a batch) on the data in `path`, an empty folder at first."""
        raise NotImplementedError("say how your backend is made: def make_backend(self, path)")

    def content(self, path: Path) -> Iterable[Pair]:
        """Everything that a fresh reader finds in `path`, as (key, payload), while no backend is open."""
        raise NotImplementedError("say how its content is read: def content(self, path)")

    # --- what the tests are made of ---

    @contextlib.contextmanager
    def opened(self, path: Path, *, store: bytes = STORE) -> Iterator[Any]:
        """A backend as an engine uses it: adapted, opened, and closed at the end."""
        backend = as_backend(self.make_backend(path))
        opener = getattr(backend, "open", None)
        if callable(opener):
            opener(self.lane, self.shards, store)
        try:
            yield backend
        finally:
            closer = getattr(backend, "close", None)
            if callable(closer):
                closer()

    def batch(
        self, pairs: Sequence[Pair], *, first_lsn: int = 1, lsns: Sequence[int] = (), shard: int = 0, store: bytes = STORE,
        mark: Mark | None = None, epoch: int = 1, logged: bool = True,
    ) -> Batch:  # fmt: skip
        """A batch as an engine cuts it; its mark covers what is in it."""
        numbers = list(lsns or range(first_lsn, first_lsn + len(pairs))) if logged else []
        own = Mark(epoch=epoch, ranges=merge_ranges(ranges_of(sorted(numbers)), 0))
        return Batch(
            lane=self.lane, shard=shard, store=store, lsns=numbers, keys=[key for key, _ in pairs],
            payloads=[payload for _, payload in pairs], priorities=[PRIORITY_NORMAL] * len(pairs), attempt=1,
            reason=CutReason.COUNT, mark=(mark or own) if logged else None,
        )  # fmt: skip

    def key(self, number: int, shard: int = 0) -> bytes:
        """A key that belongs to `shard`."""
        return next(
            key for salt in range(10_000) if shard_of(key := b"key %d.%d" % (number, salt), self.shards) == shard
        )  # fmt: skip

    def pairs(self, count: int, *, shard: int = 0, start: int = 0) -> list[Pair]:
        """Operations with distinct keys of one shard."""
        return [(self.key(number, shard), b"payload %d" % number) for number in range(start, start + count)]

    def apply(self, backend: Any, batch: Batch) -> None:
        """Apply a batch, which must be applied as a whole."""
        verdict = judge(batch, backend.apply(batch), Order.KEY)
        assert not verdict.retry, f"it was asked to apply a sound batch, and wants a retry: {verdict.error}"

    def expected(self, pairs: Iterable[Pair]) -> Counter[Pair]:
        """The content after these operations."""
        return Counter(dict(pairs).items() if self.replaces else pairs)

    def check_content(self, path: Path, pairs: Iterable[Pair]) -> None:
        """The content is what these operations leave."""
        operations = list(pairs)
        found, expected = Counter(self.content(path)), self.expected(operations)
        assert found == expected, (
            f"missing: {expected - found}, too much: {found - expected}{self._advice(found, operations)}"
        )

    def _advice(self, found: Counter[Pair], operations: Sequence[Pair]) -> str:
        """The attribute that describes a backend which leaves this behind."""
        if self.replaces and found == Counter(operations):
            return ". Every operation is there: if yours adds to the content, say so with replaces = False"
        if not self.replaces and found == Counter(dict(operations).items()):
            return ". The last operation of each key is there: if yours replaces the others, say so with replaces = True"
        return ""

    # --- the contract ---

    def test_each_operation_of_a_batch_takes_effect(self, tmp_path: Path) -> None:
        """All of it, and nothing else."""
        pairs = self.pairs(20)
        with self.opened(tmp_path) as backend:
            self.apply(backend, self.batch(pairs))
        self.check_content(tmp_path, pairs)

    def test_a_batch_of_one_takes_effect(self, tmp_path: Path) -> None:
        """The smallest one."""
        with self.opened(tmp_path) as backend:
            self.apply(backend, self.batch(self.pairs(1)))
        self.check_content(tmp_path, self.pairs(1))

    def test_an_answer_is_one_that_the_engine_understands(self, tmp_path: Path) -> None:
        """None, one outcome for each operation, or Failures."""
        for count in (1, 3):
            batch = self.batch(self.pairs(count, start=count), first_lsn=10 * count)
            with self.opened(tmp_path) as backend:
                answer = backend.apply(batch)
            judge(batch, answer, Order.KEY)

    def test_operations_with_one_key_are_applied_in_their_order(self, tmp_path: Path) -> None:
        """The last one of a batch wins, and a later batch wins over it."""
        key, other = self.key(1), self.key(2)
        first = [(key, b"1"), (other, b"x"), (key, b"2"), (key, b"3")]
        with self.opened(tmp_path) as backend:
            self.apply(backend, self.batch(first))
        self.check_content(tmp_path, first)
        second = [(key, b"4"), (key, b"0")]
        with self.opened(tmp_path) as backend:
            self.apply(backend, self.batch(second, first_lsn=5))
        self.check_content(tmp_path, [*first, *second])

    def test_keys_and_payloads_are_any_bytes(self, tmp_path: Path) -> None:
        """Zeros, invalid UTF-8, what looks like SQL, nothing at all."""
        everything = bytes(range(256))
        pairs = [
            (b"\0", b"\0"), (b"a\0b", b"\0\0"), (b"\xff\xfe", everything), (b"'; DROP TABLE x; --", b"%s"), (b"empty", b""),
        ]  # fmt: skip
        with self.opened(tmp_path) as backend:
            low = getattr(backend, "key_bytes_min", 0)
            high = getattr(backend, "key_bytes_max", limits.KEY_BYTES_MAX)
            fitting = [(key, payload) for key, payload in pairs if low <= len(key) <= high]
            self.apply(backend, self.batch(fitting))
        self.check_content(tmp_path, fitting)

    def test_keys_and_payloads_at_the_declared_limits_are_kept(self, tmp_path: Path) -> None:
        """`key_bytes_min`, `key_bytes_max` and `payload_bytes_max`: what it declares, it keeps."""
        with self.opened(tmp_path) as backend:
            low = getattr(backend, "key_bytes_min", 0)
            high = min(getattr(backend, "key_bytes_max", limits.KEY_BYTES_MAX), limits.KEY_BYTES_MAX)
            most = min(
                getattr(backend, "payload_bytes_max", limits.PAYLOAD_BYTES_MAX), limits.PAYLOAD_BYTES_MAX
            )
            pairs = [(b"s" * low, b"short"), (b"l" * high, b"long"), (b"m" * max(low, 1), b"p" * most)]
            self.apply(backend, self.batch(pairs))
        self.check_content(tmp_path, pairs)

    def test_what_was_applied_is_there_for_the_next_one(self, tmp_path: Path) -> None:
        """Closed and made anew: nothing is lost, and more can be applied."""
        pairs = self.pairs(12)
        for start in range(0, 12, 4):
            with self.opened(tmp_path) as backend:
                self.apply(backend, self.batch(pairs[start : start + 4], first_lsn=start + 1))
            self.check_content(tmp_path, pairs[: start + 4])

    def test_what_was_applied_survives_a_kill(self, tmp_path: Path) -> None:
        """The engine forgets an operation once it is told that it was applied: nothing of it may wait in memory."""
        pairs = self.pairs(10)

        def life(tell: Callable[[int], None]) -> None:
            with self.opened(tmp_path) as backend:
                for number, pair in enumerate(pairs):
                    self.apply(backend, self.batch([pair], first_lsn=number + 1))
                    tell(number)
                os.kill(os.getpid(), signal.SIGKILL)

        self._need_processes(tmp_path)
        told = Child(life).wait()
        assert len(told) == len(pairs), "its process ended before everything was applied"
        assert Counter(self.content(tmp_path)), (
            f"nothing is left. missing: {self.expected(pairs)}. For a stand-in in memory, say survives_kill = False"
        )
        self.check_content(tmp_path, pairs)

    def test_a_batch_that_comes_again_loses_nothing(self, tmp_path: Path) -> None:
        """It does when an answer was lost, or the engine was killed. At least once is what everybody gets."""
        pairs = self.pairs(5)
        for _ in range(2):
            with self.opened(tmp_path) as backend:
                self.apply(backend, self.batch(pairs))
        found = Counter(self.content(tmp_path))
        expected = self.expected(pairs)
        assert not expected - found, f"missing: {expected - found}"
        assert found.keys() == expected.keys(), f"invented: {found.keys() - expected.keys()}"
        if self.idempotent:
            again = found - expected
            assert not again, (
                f"it took effect again: {again}. If yours may do so, say so with idempotent = False"
            )

    def test_an_unlogged_batch_is_applied(self, tmp_path: Path) -> None:
        """A lane with durability "none" has no LSNs, and no mark."""
        pairs = self.pairs(3)
        with self.opened(tmp_path) as backend:
            self.apply(backend, self.batch(pairs, logged=False))
        self.check_content(tmp_path, pairs)

    def test_shards_are_applied_at_the_same_time(self, tmp_path: Path) -> None:
        """Each in a thread of its own, one call at a time for each."""
        rounds = 5
        wanted = {shard: self.pairs(4 * rounds, shard=shard) for shard in range(self.shards)}
        together = threading.Barrier(self.shards)

        def work(shard: int) -> None:
            together.wait(WAIT_S)
            for start in range(0, 4 * rounds, 4):
                part = wanted[shard][start : start + 4]
                lsns = [1 + shard + self.shards * (start + index) for index in range(4)]
                self.apply(backend, self.batch(part, lsns=lsns, shard=shard))

        with self.opened(tmp_path) as backend, ThreadPoolExecutor(self.shards) as threads:
            for done in [threads.submit(work, shard) for shard in range(self.shards)]:
                done.result(WAIT_S)
        self.check_content(tmp_path, [pair for shard in range(self.shards) for pair in wanted[shard]])

    def test_closing_twice_is_the_same_as_once(self, tmp_path: Path) -> None:
        """An engine that fails while it opens may close what it has closed."""
        with self.opened(tmp_path) as backend:
            self.apply(backend, self.batch(self.pairs(1)))
            if callable(getattr(backend, "close", None)):
                backend.close()
        self.check_content(tmp_path, self.pairs(1))

    def _need_processes(self, path: Path) -> None:
        """Skip where processes say nothing of the backend in `path`."""
        if not self.survives_kill:
            raise SkipTest("the backend says that its content does not outlive its process")
        if not hasattr(os, "fork"):  # pragma: no cover - not on Linux
            raise SkipTest("killing a backend needs os.fork, which this system does not have")


class TransactionalBackendContract(BackendContract):
    """What a backend must do in addition that commits the batch and its mark in one transaction: exactly once in effect."""

    @contextlib.contextmanager
    def opened(self, path: Path, *, store: bytes = STORE) -> Iterator[Any]:
        """As in `BackendContract`. Of a plain backend one test says that it is one; the others are skipped."""
        with super().opened(path, store=store) as backend:
            if not isinstance(backend, TransactionalBackend):
                raise SkipTest("not a transactional backend: see test_it_is_a_transactional_backend")
            yield backend

    def _need_processes(self, path: Path) -> None:
        super()._need_processes(path)
        with self.opened(path):
            pass  # skips a plain backend here, where the test sees it

    def applied_mark(self, path: Path, shard: int = 0, *, store: bytes = STORE) -> Mark:
        """The mark that a new backend finds."""
        with self.opened(path, store=store) as backend:
            mark = backend.applied_mark(shard)
        assert isinstance(mark, Mark)
        return mark

    def check_mark(self, found: Mark, expected: Mark | None) -> None:
        """The mark is this one."""
        assert found == expected, f"the mark is {found!r}, and should be {expected!r}"

    def test_it_is_a_transactional_backend(self, tmp_path: Path) -> None:
        """It has `apply` and `applied_mark`."""
        with super().opened(tmp_path) as backend:
            assert isinstance(backend, TransactionalBackend), (
                f"{backend!r} has no applied_mark: give it one, or test it with BackendContract"
            )

    def test_there_is_no_mark_before_the_first_batch(self, tmp_path: Path) -> None:
        """`Mark()`, for each shard."""
        with self.opened(tmp_path) as backend:
            for shard in range(self.shards):
                self.check_mark(backend.applied_mark(shard), Mark())

    def test_the_mark_is_there_at_once_and_for_the_next_one(self, tmp_path: Path) -> None:
        """Durable with the batch."""
        batch = self.batch(self.pairs(3), first_lsn=7, epoch=4)
        with self.opened(tmp_path) as backend:
            self.apply(backend, batch)
            self.check_mark(backend.applied_mark(0), batch.mark)
        self.check_mark(self.applied_mark(tmp_path), batch.mark)

    def test_the_mark_is_the_union_of_all(self, tmp_path: Path) -> None:
        """Batches come in any order, and each mark knows only what the engine had heard of."""
        held = Mark()
        for number, lsns in enumerate([(5, 6), (1, 2), (3,), (9,), (4,)]):
            mark = Mark(epoch=1, watermark=0, ranges=merge_ranges(ranges_of(lsns), 0))
            pairs = self.pairs(len(lsns), start=10 * number)
            with self.opened(tmp_path) as backend:
                self.apply(backend, self.batch(pairs, lsns=lsns, mark=mark))
            held = held.union(mark)
            self.check_mark(self.applied_mark(tmp_path), held)
        mark = Mark(epoch=2, watermark=6, ranges=((8, 8),))
        with self.opened(tmp_path) as backend:
            self.apply(backend, self.batch(self.pairs(1, start=90), lsns=(8,), mark=mark))
        self.check_mark(self.applied_mark(tmp_path), held.union(mark))

    def test_a_batch_that_comes_again_has_no_second_effect(self, tmp_path: Path) -> None:
        """Also when what it wrote has been written over since."""
        key = self.key(1)
        first, second = [(key, b"old"), *self.pairs(3, start=10)], [(key, b"new")]
        with self.opened(tmp_path) as backend:
            self.apply(backend, self.batch(first))
            self.apply(backend, self.batch(second, first_lsn=5))
            self.apply(backend, self.batch(first))
        self.check_content(tmp_path, [*first, *second])
        with self.opened(tmp_path) as backend:
            self.apply(backend, self.batch(first, epoch=2))
        self.check_content(tmp_path, [*first, *second])

    def test_of_a_batch_that_comes_in_another_cut_only_the_rest_takes_effect(self, tmp_path: Path) -> None:
        """After a restart the engine cuts anew: some operations are covered, some are not."""
        key = self.key(1)
        pairs = [(key, b"1"), *self.pairs(1, start=10), (key, b"3"), *self.pairs(1, start=11)]
        with self.opened(tmp_path) as backend:
            self.apply(backend, self.batch([pairs[1], pairs[2]], lsns=(2, 3)))
            self.apply(backend, self.batch([pairs[0], pairs[1], pairs[3]], lsns=(1, 2, 4)))
        self.check_content(tmp_path, [pairs[1], pairs[2], pairs[0], pairs[3]])
        assert self.applied_mark(tmp_path).covers(4), "its mark does not cover what it has applied"

    def test_an_older_engine_is_refused_and_changes_nothing(self, tmp_path: Path) -> None:
        """A newer incarnation of the store has written: what is late of the old one must not land."""
        with self.opened(tmp_path) as backend:
            self.apply(backend, self.batch(self.pairs(2), epoch=5))
            held = backend.applied_mark(0)
            try:
                backend.apply(self.batch(self.pairs(2, start=50), first_lsn=50, epoch=4))
            except Fenced:
                pass
            else:
                raise AssertionError("the batch of an older epoch was not refused with Fenced")
        self.check_content(tmp_path, self.pairs(2))
        self.check_mark(self.applied_mark(tmp_path), held)

    def test_each_shard_has_a_mark_of_its_own(self, tmp_path: Path) -> None:
        """The mark of one says nothing of another."""
        batches = [
            self.batch(self.pairs(shard + 1, shard=shard), first_lsn=10 * shard + 1, shard=shard)
            for shard in range(self.shards)
        ]
        with self.opened(tmp_path) as backend:
            for batch in batches:
                self.apply(backend, batch)
        for shard, batch in enumerate(batches):
            self.check_mark(self.applied_mark(tmp_path, shard), batch.mark)

    def test_each_store_has_marks_of_its_own(self, tmp_path: Path) -> None:
        """LSNs of two stores are different operations."""
        mine, theirs = self.pairs(2), self.pairs(2, start=50)
        with self.opened(tmp_path) as backend:
            self.apply(backend, self.batch(mine, epoch=9))
        self.check_mark(self.applied_mark(tmp_path, store=OTHER_STORE), Mark())
        with self.opened(tmp_path, store=OTHER_STORE) as backend:
            self.apply(backend, self.batch(theirs, store=OTHER_STORE, epoch=1))
        self.check_content(tmp_path, [*mine, *theirs])
        self.check_mark(self.applied_mark(tmp_path), Mark(epoch=9, ranges=((1, 2),)))

    def test_a_kill_leaves_a_batch_with_its_mark_or_neither(self, tmp_path: Path) -> None:
        """Killed at random moments, again and again; the next process goes on where the mark says."""
        self._need_processes(tmp_path)
        chance = random.Random(11)
        operations = [
            Operation(lsn=number + 1, key=self.key(number % 50), payload=b"%d" % number)
            for number in range(200 * self.kills)
        ]
        applied = 0
        for _ in range(self.kills):
            child = Child(self._deliver(tmp_path, operations, chance.randrange(1, 5)))
            child.kill_after(chance.randrange(2, 12), chance.random())
            mark = self.applied_mark(tmp_path)
            covered = [operation for operation in operations if operation.lsn and mark.covers(operation.lsn)]
            assert len(covered) == (covered[-1].lsn if covered else 0), "the mark has holes"
            assert len(covered) >= applied, "the mark went back"
            applied = len(covered)
            self.check_content(tmp_path, [(operation.key, operation.payload) for operation in covered])
        assert applied, "no process lived long enough to apply anything"

    def _deliver(
        self, path: Path, operations: Sequence[Operation], size: int
    ) -> Callable[[Callable[[int], None]], None]:
        """What an engine does: ask for the mark, and deliver from there on in batches."""

        def life(tell: Callable[[int], None]) -> None:
            with self.opened(path) as backend:
                mark = backend.applied_mark(0)
                rest = [
                    operation for operation in operations if operation.lsn and not mark.covers(operation.lsn)
                ]
                for start in range(0, len(rest), size):
                    part = rest[start : start + size]
                    pairs = [(operation.key, operation.payload) for operation in part]
                    lsns = [operation.lsn for operation in part if operation.lsn]
                    known = Mark(epoch=1, watermark=lsns[-1])
                    self.apply(backend, self.batch(pairs, lsns=lsns, mark=known))
                    tell(start)

        return life


class Child:
    """A forked process that tells of what it has done, and is killed."""

    def __init__(self, life: Callable[[Callable[[int], None]], None]) -> None:
        reading, writing = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", DeprecationWarning
            )  # of forking beside threads: the child uses none of them
            self._pid = os.fork()
        if self._pid == 0:
            try:
                os.close(reading)
                life(lambda number: _tell(writing, number))
            except BaseException as error:  # noqa: BLE001 - said to the parent, who has the test
                os.write(writing, f"! {type(error).__name__}: {error}\n".encode())
            finally:
                os._exit(0)
        os.close(writing)
        self._answers = os.fdopen(reading, encoding="utf-8")

    def kill_after(self, count: int, part: float) -> None:
        """Let it tell of that much, and kill it in the next one: after this part of the time that the last one took."""
        told, took = time.monotonic(), 0.0
        for _ in range(count):
            if not self._answer():
                break
            now = time.monotonic()
            told, took = now, now - told
        time.sleep(part * took)
        os.kill(self._pid, signal.SIGKILL)
        self.wait()

    def wait(self) -> list[str]:
        """What it still had to tell; it has ended then."""
        told = []
        while line := self._answer():
            told.append(line)
        self._answers.close()
        os.waitpid(self._pid, 0)
        return told

    def _answer(self) -> str:
        line = self._answers.readline()
        assert not line.startswith("!"), f"the process that applies batches failed: {line[2:].strip()}"
        return line


def _tell(writing: int, number: int) -> None:
    os.write(writing, b"%d\n" % number)
