"""The threads that call backends: as many as batches may be in flight, started when there is work for them.

What is not here: what a job does. A job that raises is a mistake of ours, and stops the engine.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from walbatch.ports import Thread, Threads

Job = Callable[[], None]


class Workers:
    """A pool of threads. `hand_out` is for one thread at a time, everything else is safe from any."""

    def __init__(
        self, threads: Threads, *, count_max: Callable[[], int], guarded: Callable[[Job], Job]
    ) -> None:
        """`count_max` may grow: a call that is given up keeps its thread."""
        self._threads = threads
        self._count_max = count_max
        self._guarded = guarded
        # Guards _jobs, _free and _stopping: workers wait here.
        self._work = threads.condition()
        self._jobs: deque[Job] = deque()
        self._free = 0
        self._stopping = False
        self._workers: list[Thread] = []

    def __repr__(self) -> str:
        return f"<Workers {len(self._workers)} threads, {len(self._jobs)} jobs waiting>"

    def __len__(self) -> int:
        return len(self._workers)

    def hand_out(self, jobs: Sequence[Job]) -> None:
        """Give jobs to workers, and start as many as are missing."""
        with self._work:
            self._jobs.extend(jobs)
            missing = min(len(self._jobs) - self._free, self._count_max() - len(self._workers))
            self._work.notify_all()
        for _ in range(missing):
            number = len(self._workers) + 1
            self._workers.append(self._threads.spawn(f"walbatch-flush-{number}", self._guarded(self._run)))

    def _run(self) -> None:
        """Do jobs until told to stop."""
        while True:
            with self._work:
                while not self._jobs and not self._stopping:
                    self._free += 1
                    self._work.wait()
                    self._free -= 1
                if self._stopping:
                    return  # a job that nobody took stays in the log
                job = self._jobs.popleft()
            job()

    def stop(self) -> Sequence[Thread]:
        """Begin no further job. Returns the threads to wait for."""
        with self._work:
            self._stopping = True
            self._work.notify_all()
        return self._workers

    def is_current(self) -> bool:
        """Whether the caller runs in one of them: a backend, for example."""
        return any(thread.is_current() for thread in self._workers)
