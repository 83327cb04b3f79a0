"""w10: four lanes, each with its own producer and its own backend, one of which is sick: the other three must not notice.

The idea needed to read it: a producer submits groups as fast as its backend takes them. That of the sick lane submits as much as it
does while all are well, and no more, so that the others have the same company; its operations stay in the log.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import walbatch as wb
from walbatch.bench import payloads
from walbatch.bench.results import Sample

WORKLOAD: Final = "w10"
HEALTHY: Final = ("a", "b", "c")
SICK: Final = "d"
GROUP_COUNT: Final = 100
GROUPS: Final = 100
"""That a producer submits over and over."""
PAYLOAD_BYTES: Final = 256
AHEAD_MAX: Final = 5_000
"""Operations that a producer is ahead of its backend."""
MEMORY_BYTES_MAX: Final = 16 * 2**20
"""Of the engine: so little that what the sick lane cannot deliver exceeds it, and must not take room from the others."""
HANG_S: Final = 0.25
WARM_UP: Final = 0.25
"""Part of the window that passes before anything is counted."""
WAIT_S: Final = 0.01


class _Backend:
    """Counts, or is sick."""

    def __init__(self, ail: Callable[[], None] | None) -> None:
        self.applied = 0
        self._ail = ail
        self.progress = threading.Condition()

    def apply(self, batch: wb.Batch) -> None:
        if self._ail is not None:
            self._ail()
        with self.progress:
            self.applied += len(batch)
            self.progress.notify()


class _Trial:
    """One store, open for one window."""

    def __init__(self, ail: Callable[[threading.Event], None] | None, pace: float | None) -> None:
        self._stop = threading.Event()
        self._pace = pace
        self._backends = {kind: _Backend(None) for kind in HEALTHY}
        self._backends[SICK] = _Backend(None if ail is None else lambda: ail(self._stop))
        self.submitted = dict.fromkeys(self._backends, 0)
        self._errors: list[BaseException] = []

    def run(self, folder: Path, window_s: float) -> tuple[float, float]:
        """Operations a second of the three lanes, and those that were submitted to the fourth."""
        lanes = {kind: wb.Lane(backend) for kind, backend in self._backends.items()}
        settings = wb.Settings(memory_bytes_max=MEMORY_BYTES_MAX)
        engine = wb.Engine.open(folder / "store", lanes=lanes, settings=settings)
        threads = [
            threading.Thread(target=self._produce, args=(engine, kind), name=f"bench-{kind}")
            for kind in lanes
        ]
        try:
            for thread in threads:
                thread.start()
            self._stop.wait(window_s * WARM_UP)
            began, before, sick_before = time.perf_counter(), self._applied(), self.submitted[SICK]
            self._stop.wait(window_s)
            seconds = time.perf_counter() - began
            applied, sick = self._applied() - before, self.submitted[SICK] - sick_before
        finally:
            self._stop.set()
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
            engine.close(drain=False)
        if self._errors:
            raise self._errors[0]
        return applied / seconds, sick / seconds

    def _applied(self) -> int:
        return sum(self._backends[kind].applied for kind in HEALTHY)

    def _produce(self, engine: wb.Engine, kind: str) -> None:
        values = payloads.random_payloads(GROUPS * GROUP_COUNT, PAYLOAD_BYTES)
        groups = [
            list(zip(payloads.keys(GROUP_COUNT, at), values[at : at + GROUP_COUNT], strict=True))
            for at in range(0, len(values), GROUP_COUNT)
        ]
        is_paced = kind == SICK and self._pace is not None
        started = time.perf_counter()
        try:
            for group in itertools.cycle(groups):
                while not self._stop.is_set() and self._is_ahead(kind, started, is_paced=is_paced):
                    pass
                if self._stop.is_set():
                    return
                engine.submit_many(kind, group)
                self.submitted[kind] += GROUP_COUNT
        except BaseException as error:  # noqa: BLE001 - raised again in `run`
            self._errors.append(error)
            self._stop.set()

    def _is_ahead(self, kind: str, started: float, *, is_paced: bool) -> bool:
        """Whether a producer must wait; waits a little if so."""
        if is_paced:
            assert self._pace is not None
            ahead_s = self.submitted[kind] / self._pace - (time.perf_counter() - started)
            return ahead_s > 0 and not self._stop.wait(min(ahead_s, WAIT_S))
        backend = self._backends[kind]
        with backend.progress:
            if self.submitted[kind] - backend.applied < AHEAD_MAX:
                return False
            backend.progress.wait(WAIT_S)
            return True


def _hang(stop: threading.Event) -> None:
    stop.wait(HANG_S)
    raise TimeoutError("the backend did not answer in time")


def _fail(_stop: threading.Event) -> None:
    raise ConnectionError("the backend is down")


AILMENTS: Final[dict[str, Callable[[threading.Event], None] | None]] = {
    "healthy": None,
    "hanging": _hang,
    "failing": _fail,
}


def measure(
    new_folder: Callable[[], Path], rounds: int, window_s: float, progress: Callable[[str], object]
) -> list[Sample]:
    """Each ailment once a round. How much the sick lane is given, the last run in which it was well says."""
    progress("warm-up")
    _, pace = _Trial(None, None).run(new_folder(), window_s)
    samples = []
    names = list(AILMENTS)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            progress(f"round {turn + 1} of {rounds}, {name}")
            trial = _Trial(AILMENTS[name], None if name == "healthy" else max(1.0, pace))
            rate, sick_rate = trial.run(new_folder(), window_s)
            if name == "healthy":
                pace = sick_rate
            samples.append(
                Sample(workload=WORKLOAD, subject=name, round=turn, figures={"rate": rate, "sick_rate": sick_rate})
            )  # fmt: skip
    return samples
