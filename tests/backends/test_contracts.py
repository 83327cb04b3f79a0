"""Our own backends keep the contracts, and each mistake that is planted in one of them breaks a test of the suite."""

from __future__ import annotations

import re
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar
from unittest import SkipTest

import pytest

from walbatch.backends.lmdb import LmdbBackend
from walbatch.errors import WalbatchError
from walbatch.runtime.clock import RealClock, RealThreads
from walbatch.testing.contracts import BackendContract, Pair, TransactionalBackendContract
from walbatch.testing.simulation.backend import BackendDisk, ModelBackend, TransactionalModelBackend
from walbatch.types import Answer, Applied, Batch, Mark

# --- LMDB ---


class TestLmdb(TransactionalBackendContract):
    def make_backend(self, path: Path) -> Any:
        return LmdbBackend(path / "blocks")

    def content(self, path: Path) -> Iterable[Pair]:
        backend = LmdbBackend(path / "blocks")
        try:
            return list(backend.items())
        finally:
            backend.close()


# --- functions: every operation appends a line to a file ---

_writing = threading.Lock()


class TestFunction(BackendContract):
    replaces: ClassVar[bool] = False
    idempotent: ClassVar[bool] = False

    def make_backend(self, path: Path) -> Any:
        def append(batch: Batch) -> None:
            lines = [
                b"%s %s\n" % (key.hex().encode(), payload.hex().encode())
                for key, payload in zip(batch.keys, batch.payloads, strict=True)
            ]
            with _writing, (path / "lines").open("ab") as file:
                file.writelines(lines)

        return append

    def content(self, path: Path) -> Iterable[Pair]:
        for line in (path / "lines").read_bytes().splitlines():
            key, payload = line.split(b" ")
            yield bytes.fromhex(key.decode()), bytes.fromhex(payload.decode())


class TestAsyncFunction(TestFunction):
    def make_backend(self, path: Path) -> Any:
        append = super().make_backend(path)

        async def append_async(batch: Batch) -> None:
            append(batch)

        return append_async


# --- the model backends of the simulation ---


class TestModel(BackendContract):
    survives_kill: ClassVar[bool] = False
    kind: ClassVar[type[ModelBackend]] = ModelBackend
    disks: ClassVar[dict[Path, BackendDisk]] = defaultdict(BackendDisk)

    def make_backend(self, path: Path) -> Any:
        return self.kind(
            self.disks[path], clock=RealClock(), threads=RealThreads(), on_call=lambda call, lane: None,
            on_applied=lambda batch, operation: None,
        )  # fmt: skip

    def content(self, path: Path) -> Iterable[Pair]:
        return list(self.disks[path].content.items())


class TestTransactionalModel(TestModel, TransactionalBackendContract):
    kind: ClassVar[type[ModelBackend]] = TransactionalModelBackend


# --- planted mistakes ---


GAP_S = 0.002
"""What a planted mistake leaves between two transactions: long enough for one kill in a hundred to fall into it."""


class MarkInASecondTransaction(LmdbBackend):
    def apply(self, batch: Batch) -> Answer:
        super().apply(replace(batch, mark=None))
        time.sleep(GAP_S)
        empty = replace(batch, lsns=(), keys=(), payloads=(), priorities=())
        return super().apply(empty)


class MarkFirst(LmdbBackend):
    def apply(self, batch: Batch) -> Answer:
        super().apply(replace(batch, lsns=(), keys=(), payloads=(), priorities=()))
        time.sleep(GAP_S)
        return super().apply(replace(batch, mark=None))


class Waiting(LmdbBackend):
    """Keeps batches in memory until it is closed."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._waiting: list[Batch] = []

    def apply(self, batch: Batch) -> Answer:
        self._waiting.append(batch)
        return None

    def close(self) -> None:
        waiting, self._waiting = self._waiting, []
        for batch in waiting:
            super().apply(batch)
        super().close()


class Reversed(LmdbBackend):
    def apply(self, batch: Batch) -> Answer:
        return super().apply(
            replace(batch, lsns=batch.lsns[::-1], keys=batch.keys[::-1], payloads=batch.payloads[::-1])
        )


class Forgetful(LmdbBackend):
    """Leaves the last operation of a batch out."""

    def apply(self, batch: Batch) -> Answer:
        return super().apply(
            replace(batch, lsns=batch.lsns[:-1], keys=batch.keys[:-1], payloads=batch.payloads[:-1])
        )


class ShortAnswer(LmdbBackend):
    def apply(self, batch: Batch) -> Answer:
        super().apply(batch)
        return [Applied()] * (len(batch) - 1)


class TextKeys(LmdbBackend):
    """Takes keys for text."""

    def apply(self, batch: Batch) -> Answer:
        keys = [key.decode("utf-8", "replace").encode() for key in batch.keys]
        return super().apply(replace(batch, keys=keys))


class LongKeys(LmdbBackend):
    """Declares longer keys than it keeps."""

    key_bytes_max = 4096  # type: ignore[misc]


class ClosesOnce(LmdbBackend):
    _is_closed = False

    def close(self) -> None:
        if self._is_closed:
            raise RuntimeError("it is closed already")
        self._is_closed = True
        super().close()


class LastMark(TransactionalModelBackend):
    """Stores the mark it was given instead of the union."""

    def take_in(self, batch: Batch, count: int) -> int:
        taken = super().take_in(batch, count)
        if batch.mark is not None:
            self.disk.marks[batch.store, batch.lane, batch.shard] = batch.mark
        return taken


class NoFence(TransactionalModelBackend):
    def take_in(self, batch: Batch, count: int) -> int:
        mark = batch.mark and replace(batch.mark, epoch=99)
        return super().take_in(replace(batch, mark=mark), count)


class AppliesAgain(TransactionalModelBackend):
    """Stores the mark, and never looks at it."""

    def take_in(self, batch: Batch, count: int) -> int:
        for operation in batch:
            self.disk.apply(batch.store, operation)
        return super().take_in(batch, count)


class AllOrNothing(TransactionalModelBackend):
    """Leaves a batch out as a whole where any of it is covered."""

    def take_in(self, batch: Batch, count: int) -> int:
        held = self.applied_mark(batch.shard)
        if any(held.covers(lsn) for lsn in batch.lsns):
            return count
        return super().take_in(batch, count)


class OneMark(TransactionalModelBackend):
    """One mark for all shards."""

    def applied_mark(self, shard: int) -> Mark:
        marks = [mark for (store, _, _), mark in self.disk.marks.items() if store == self._scope[0]]
        return max(marks, key=lambda mark: mark.ranges, default=Mark())


class MarksOfAnyStore(TransactionalModelBackend):
    def open(self, lane: str, shards: int, store: bytes) -> None:
        super().open(lane, shards, b"always the same.")

    def take_in(self, batch: Batch, count: int) -> int:
        return super().take_in(replace(batch, store=b"always the same."), count)


class WithLmdb(TestLmdb):
    """The suite on an LMDB backend with a mistake."""

    __test__ = False
    backend: ClassVar[type[LmdbBackend]] = LmdbBackend

    def make_backend(self, path: Path) -> Any:
        return self.backend(path / "blocks")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mistake:
    """A backend, the test that it fails, and what that says."""

    backend: type[Any]
    test: str
    says: str


MISTAKES = {
    "the mark in a second transaction": Mistake(
        backend=MarkInASecondTransaction, test="test_a_kill_leaves_a_batch_with_its_mark_or_neither", says="too much: Counter",
    ),
    "the mark in a transaction before": Mistake(
        backend=MarkFirst, test="test_a_kill_leaves_a_batch_with_its_mark_or_neither", says="missing: Counter",
    ),
    "batches wait in memory": Mistake(
        backend=Waiting, test="test_what_was_applied_survives_a_kill", says="missing: Counter",
    ),
    "the order is turned round": Mistake(
        backend=Reversed, test="test_operations_with_one_key_are_applied_in_their_order", says="missing: Counter",
    ),
    "the last operation is forgotten": Mistake(
        backend=Forgetful, test="test_each_operation_of_a_batch_takes_effect", says="missing: Counter",
    ),
    "the answer is too short": Mistake(
        backend=ShortAnswer, test="test_an_answer_is_one_that_the_engine_understands", says="0 outcomes for 1 operations",
    ),
    "keys are taken for text": Mistake(
        backend=TextKeys, test="test_keys_and_payloads_are_any_bytes", says="missing: Counter",
    ),
    "longer keys are declared than kept": Mistake(
        backend=LongKeys, test="test_keys_and_payloads_at_the_declared_limits_are_kept", says="key",
    ),
    "closing twice fails": Mistake(
        backend=ClosesOnce, test="test_closing_twice_is_the_same_as_once", says="closed already",
    ),
    "the last mark replaces all": Mistake(
        backend=LastMark, test="test_the_mark_is_the_union_of_all", says="the mark is Mark",
    ),
    "no fencing": Mistake(
        backend=NoFence, test="test_an_older_engine_is_refused_and_changes_nothing", says="not refused with Fenced",
    ),
    "the mark is never looked at": Mistake(
        backend=AppliesAgain, test="test_a_batch_that_comes_again_has_no_second_effect", says="missing: Counter",
    ),
    "a batch is left out as a whole": Mistake(
        backend=AllOrNothing, test="test_of_a_batch_that_comes_in_another_cut_only_the_rest_takes_effect", says="missing: Counter",
    ),
    "one mark for all shards": Mistake(
        backend=OneMark, test="test_each_shard_has_a_mark_of_its_own", says="the mark is Mark",
    ),
    "marks of any store": Mistake(
        backend=MarksOfAnyStore, test="test_each_store_has_marks_of_its_own", says="the mark is Mark",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_a_planted_mistake_breaks_its_test(mistake: Mistake, tmp_path: Path) -> None:
    suite: Any
    if issubclass(mistake.backend, LmdbBackend):
        suite = type("Suite", (WithLmdb,), {"backend": mistake.backend, "kills": 100})()
    else:
        suite = type("Suite", (TestTransactionalModel,), {"kind": mistake.backend})()
    check: Callable[[Path], None] = getattr(suite, mistake.test)
    with pytest.raises((AssertionError, ValueError, RuntimeError, WalbatchError), match=mistake.says):
        check(tmp_path)


# --- suites that describe another backend ---


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """What a suite says of a backend, the test that shows it is wrong, and the attribute that the failure names."""

    suite: type[BackendContract]
    attributes: dict[str, object]
    test: str
    advice: str


ORDER = "test_operations_with_one_key_are_applied_in_their_order"

DESCRIPTIONS = {
    "it adds": Description(
        suite=TestFunction, attributes={"replaces": True}, test=ORDER, advice="replaces = False",
    ),
    "it replaces": Description(
        suite=TestLmdb, attributes={"replaces": False}, test=ORDER, advice="replaces = True",
    ),
    "it takes effect again": Description(
        suite=TestFunction, attributes={"idempotent": True}, test="test_a_batch_that_comes_again_loses_nothing",
        advice="idempotent = False",
    ),
    "it is a stand-in in memory": Description(
        suite=TestModel, attributes={"survives_kill": True}, test="test_what_was_applied_survives_a_kill",
        advice="survives_kill = False",
    ),
}  # fmt: skip


@pytest.mark.parametrize("description", DESCRIPTIONS.values(), ids=DESCRIPTIONS.keys())
def test_a_wrong_description_is_answered_with_the_right_one(description: Description, tmp_path: Path) -> None:
    suite = type("Suite", (description.suite,), description.attributes)()
    with pytest.raises(AssertionError, match=description.advice):
        getattr(suite, description.test)(tmp_path)


def test_of_a_plain_backend_one_test_says_that_it_is_not_transactional(tmp_path: Path) -> None:
    suite = type("Suite", (TestFunction, TransactionalBackendContract), {})()
    outcomes: dict[str, str] = {}
    for name in dir(suite):
        if name.startswith("test_"):
            (tmp_path / name).mkdir()
            try:
                getattr(suite, name)(tmp_path / name)
            except (AssertionError, SkipTest) as error:
                outcomes[name] = f"{type(error).__name__}: {error}"
            else:
                outcomes[name] = "passed"
    said = outcomes.pop("test_it_is_a_transactional_backend")
    assert re.search(
        r"AssertionError: .* has no applied_mark: give it one, or test it with BackendContract", said
    )
    assert len(outcomes) > 20
    assert {
        name: said for name, said in outcomes.items() if not said.startswith("SkipTest: not a trans")
    } == {}


def test_a_suite_without_its_methods_says_what_to_write(tmp_path: Path) -> None:
    with pytest.raises(NotImplementedError, match="def make_backend"):
        BackendContract().test_a_batch_of_one_takes_effect(tmp_path)
