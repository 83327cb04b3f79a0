"""The workloads that every subject can do: putting one by one, from threads, in groups, from tasks; and draining.

What is not here: who does it (`subject`), how often (`rounds`), and what only an engine can be asked (`backlog`, `sick`).

The idea needed to read it: everything is prepared before the clock starts, and the clock stops when the last operation is durable.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol, Self

from walbatch.bench import payloads
from walbatch.bench.endtoend import LmdbPutmulti, WalbatchIntoLmdb
from walbatch.bench.profile import Profile
from walbatch.bench.results import quantile
from walbatch.bench.subject import Role, Subject

PAYLOAD_BYTES: Final = 256
LARGE_BYTES: Final = 16 * 1024
MIB: Final = 2**20

Figures = dict[str, float]


class Measure(Protocol):
    """Does `count` operations with a subject in an empty folder."""

    def __call__(self, subject: Subject, folder: Path, count: int, profile: Profile, /) -> Figures:
        """Returns the figures of the sample."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One line of the comparison."""

    name: str
    title: str
    measure: Measure
    unit: str = "op/s"
    patience: int = 1
    """How many times the time of another a measurement of it may take: filling counts for w5, too."""
    subjects: tuple[type[Subject], ...] = ()
    """Those that do it in a way of their own; else all of the catalogue that name the workload."""

    def step(self, profile: Profile) -> int:
        """A measurement does a multiple of so many operations."""
        match self.name:
            case "w2":
                return profile.threads
            case "w4" | "w4c":
                return profile.large_group_count
            case "w6":
                return profile.tasks
            case "w1":
                return 1
            case _:
                return profile.group_count


@dataclass(slots=True)
class Watch:
    """Time and CPU time of a block."""

    seconds: float = 0.0
    cpu_s: float = 0.0

    def __enter__(self) -> Self:
        gc.collect()
        self.cpu_s = time.process_time()
        self.seconds = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self.seconds
        self.cpu_s = time.process_time() - self.cpu_s

    def figures(self, count: int, work: float | None = None) -> Figures:
        """Of `count` operations; the rate is that of `work`, if it is counted otherwise."""
        seconds = max(self.seconds, 1e-9)
        rate = (count if work is None else work) / seconds
        return {"rate": rate, "count": count, "seconds": seconds, "cpu_us": self.cpu_s / count * 1e6}


def one_producer(subject: Subject, folder: Path, count: int, _profile: Profile) -> Figures:
    """w1: each operation durable before the next."""
    items = _items(subject, count)
    latencies: list[float] = []
    subject.open(folder)
    with Watch() as watch:
        _put_all(subject.put, items, latencies, [])
    return watch.figures(count) | _latencies(latencies)


def many_threads(subject: Subject, folder: Path, count: int, profile: Profile) -> Figures:
    """w2: each operation durable before its thread's next."""
    items = _items(subject, count)
    latencies: list[float] = []
    stop: list[BaseException] = []

    def run(own: Sequence[Any]) -> None:
        start.wait()
        times: list[float] = []
        try:
            _put_all(subject.put, own, times, stop)
        except BaseException as error:  # noqa: BLE001 - raised again where the threads are joined
            stop.append(error)
        latencies.extend(times)

    start = threading.Barrier(profile.threads + 1)
    threads = [
        threading.Thread(target=run, args=(items[number :: profile.threads],), name=f"bench-{number}")
        for number in range(profile.threads)
    ]
    subject.open(folder)
    for thread in threads:
        thread.start()
    watch = Watch()
    try:
        with watch:
            start.wait()
            for thread in threads:
                thread.join()
    except BaseException as error:
        stop.append(error)  # Ctrl-C: the threads end before what they use does
        for thread in threads:
            thread.join()
        raise
    if stop:
        raise stop[0]
    assert len(latencies) == count
    return watch.figures(count) | _latencies(latencies)


def _put_all(
    put: Callable[[Any], object], items: Sequence[Any], latencies: list[float], stop: Sequence[object]
) -> None:
    clock = time.perf_counter
    for item in items:
        before = clock()
        put(item)
        latencies.append(clock() - before)
        if stop:
            return


def groups(subject: Subject, folder: Path, count: int, profile: Profile) -> Figures:
    """w3: a thousand operations in a call."""
    prepared = _groups(subject, payloads.random_payloads(count, PAYLOAD_BYTES), profile.group_count)
    return _put_groups(subject, folder, count, prepared)


def large_groups(subject: Subject, folder: Path, count: int, profile: Profile) -> Figures:
    """w4: 64 operations of 16 KiB in a call, which nothing compresses."""
    prepared = _groups(subject, payloads.random_payloads(count, LARGE_BYTES), profile.large_group_count)
    return _put_groups(subject, folder, count, prepared, work=count * LARGE_BYTES / MIB)


def text_groups(subject: Subject, folder: Path, count: int, profile: Profile) -> Figures:
    """w4c: the same of text."""
    prepared = _groups(subject, payloads.text_payloads(count, LARGE_BYTES), profile.large_group_count)
    return _put_groups(subject, folder, count, prepared, work=count * LARGE_BYTES / MIB)


def _put_groups(
    subject: Subject, folder: Path, count: int, prepared: Sequence[Any], work: float | None = None
) -> Figures:
    subject.open(folder)
    with Watch() as watch:
        for group in prepared:
            subject.put_group(group)
    return watch.figures(count, work)


def drain(subject: Subject, folder: Path, count: int, profile: Profile) -> Figures:
    """w5: read back what was put in groups, hand it to something that does nothing, settle it durably."""
    size = profile.group_count
    values = payloads.random_payloads(count, PAYLOAD_BYTES)
    subject.open(folder)
    before = time.perf_counter()
    for at in range(0, count, size):
        part = values[at : at + size]
        subject.put_group(subject.group(payloads.keys(len(part), at), part))
    filled_s = time.perf_counter() - before
    del values
    with Watch() as watch:
        drained = subject.drain(count, len)
    if drained != count:
        raise RuntimeError(f"{drained:,} of {count:,} operations came out")
    return watch.figures(count) | {"fill_seconds": filled_s} | subject.extra


def tasks(subject: Subject, folder: Path, count: int, profile: Profile) -> Figures:
    """w6: a thousand tasks, each operation durable before its task's next. The raw disk writes groups, as in w3."""
    if subject.role is Role.LIMIT:
        return groups(subject, folder, count, profile)
    items = _items(subject, count)

    async def produce(own: Sequence[Any]) -> None:
        put = subject.put_in_loop
        for item in own:
            await put(item)

    async def run() -> Watch:
        try:
            await subject.open_in_loop(folder)
            with Watch() as watch:
                await asyncio.gather(
                    *(produce(items[number :: profile.tasks]) for number in range(profile.tasks))
                )
            return watch
        finally:
            await subject.close_in_loop()

    return asyncio.run(run()).figures(count)


def end_to_end(subject: Subject, folder: Path, count: int, profile: Profile) -> Figures:
    """w7: groups of a thousand into LMDB, until all of it is there."""
    prepared = _groups(subject, payloads.random_payloads(count, PAYLOAD_BYTES), profile.group_count)
    return settle_groups(subject, folder, count, prepared)


def settle_groups(subject: Subject, folder: Path, count: int, prepared: Sequence[Any]) -> Figures:
    """Put groups, and wait until they are where they belong."""
    subject.open(folder)
    with Watch() as watch:
        for group in prepared:
            subject.put_group(group)
        subject.settle()
    return watch.figures(count)


def _items(subject: Subject, count: int) -> list[Any]:
    made = zip(payloads.keys(count), payloads.random_payloads(count, PAYLOAD_BYTES), strict=True)
    return list(itertools.starmap(subject.item, made))


def _groups(subject: Subject, values: Sequence[bytes], size: int) -> list[Any]:
    keys = payloads.keys(len(values))
    return [subject.group(keys[at : at + size], values[at : at + size]) for at in range(0, len(values), size)]


def _latencies(times: list[float]) -> Figures:
    times.sort()
    return {"p50_us": quantile(times, 0.5) * 1e6, "p99_us": quantile(times, 0.99) * 1e6}


WORKLOADS: Final = (
    Workload(name="w1", title="one producer, each durable before the next", measure=one_producer),
    Workload(name="w2", title="32 threads, each durable before its thread's next", measure=many_threads),
    Workload(name="w3", title="groups of 1,000", measure=groups),
    Workload(name="w4", title="groups of 64 x 16 KiB, incompressible", measure=large_groups, unit="MiB/s"),
    Workload(name="w4c", title="groups of 64 x 16 KiB, text", measure=text_groups, unit="MiB/s"),
    Workload(name="w5", title="drain: read back, deliver to nobody, settle durably", measure=drain, patience=3),
    Workload(name="w6", title="1,000 asyncio tasks", measure=tasks),
    Workload(
        name="w7", title="end to end into LMDB, groups of 1,000", measure=end_to_end,
        subjects=(WalbatchIntoLmdb, LmdbPutmulti),
    ),
)  # fmt: skip
