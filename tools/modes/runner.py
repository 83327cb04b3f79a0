"""Runs the parts of a profile in processes, as many at once as there are cores, and adds up what they say.

What is not here: what a mode does, and how the figures are shown (`report`).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tools.modes.profiles import EXTRA, OPEN_ENDED, Profile, Share
from tools.modes.tally import Failure, Tally

ROOT: Final = Path(__file__).resolve().parents[2]
SILENCE_S: Final = 900.0
"""A part that has said nothing for so long hangs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One process to start."""

    mode: str
    seed: int
    part: int
    parts: int
    count: int | None
    seconds: float | None


@dataclass(slots=True)
class Run:
    """A run of a profile: `tallies` by mode grow until `run` returns."""

    profile: Profile
    seed: int
    modes: Sequence[str]
    """In the order in which they start."""
    scale: float = 1.0
    """Part of each count to do."""
    slots: int = os.cpu_count() or 1
    show: Callable[[str], None] = print
    tallies: dict[str, Tally] = field(default_factory=dict)
    seconds: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _running: dict[Part, Tally] = field(default_factory=dict)
    _processes: set[subprocess.Popen[str]] = field(default_factory=set)

    def run(self) -> None:
        """Start every part, as slots get free; end them all when interrupted."""
        started = time.monotonic()
        parts = self._parts(started)
        workers = [
            threading.Thread(target=self._work, args=(parts,), name=f"slot-{number}")
            for number in range(self.slots)
        ]
        try:
            for worker in workers:
                worker.start()
            while any(worker.is_alive() for worker in workers):
                workers[0].join(10)
                workers[-1].join(0.1)
                self.seconds = time.monotonic() - started
                self.show(self.line())
        except KeyboardInterrupt:
            self.modes = ()
            for process in list(self._processes):
                process.send_signal(signal.SIGTERM)
            raise
        finally:
            self.seconds = time.monotonic() - started

    def line(self) -> str:
        """Where it stands, in a line."""
        with self._lock:
            total = self._total()
        figures = {name: tally.figures for name, tally in total.items()}
        words = [
            f"{figures['images']['crash states']:,} states" if "images" in figures else "",
            f"{figures['seeded']['seeded runs']:,} seeded" if "seeded" in figures else "",
            f"{figures['kill']['cycles']:,} kills" if "kill" in figures else "",
            f"{figures['powercut']['power cuts']:,} power cuts" if "powercut" in figures else "",
            f"{sum(tally.figures['failures'] for tally in total.values()):,} failures",
        ]
        running = ", ".join(f"{part.mode} {part.part + 1}/{part.parts}" for part in self._running)
        return f"{self.seconds / 60:5.1f} min  {', '.join(filter(None, words))}  [{running}]"

    def _total(self) -> dict[str, Tally]:
        total: dict[str, Tally] = {}
        for tally in [*self.tallies.values(), *self._running.values()]:
            total.setdefault(tally.mode, Tally(mode=tally.mode)).add(tally)
        return total

    def _parts(self, started: float) -> Iterator[Part]:
        """All parts of the profile; then, until its time is over, helpings of what has no end."""
        for mode in self.modes:
            share = self.profile.shares[mode] if mode in self.profile.shares else Share()
            for part in range(share.parts):
                count = None if share.count is None else -(-int(share.count * self.scale) // share.parts)
                yield Part(
                    mode=mode,
                    seed=self.seed,
                    part=part,
                    parts=share.parts,
                    count=count,
                    seconds=share.seconds,
                )
        extra = [mode for mode in OPEN_ENDED if mode in self.modes]
        helping = 0
        while extra and time.monotonic() - started < self.profile.minutes * 60:
            helping += 1
            for mode in extra:
                share = EXTRA[mode]
                yield Part(
                    mode=mode, seed=self.seed + 1_000_000 * helping, part=0, parts=1, count=share.count, seconds=share.seconds,
                )  # fmt: skip

    def _work(self, parts: Iterator[Part]) -> None:
        while True:
            with self._lock:
                part = next(parts, None)
                if part is None or not self.modes:
                    return
                self._running[part] = Tally(mode=part.mode)
            try:
                tally = self._run_part(part)
            except Exception as error:  # noqa: BLE001 - a part that nobody could run must not look like one without failures
                tally = Tally(mode=part.mode, complete=False)
                tally.fail(
                    f"a part could not be run: {error!r}", f"{part.mode} seed={part.seed} part={part.part}"
                )
            with self._lock:
                del self._running[part]
                self.tallies.setdefault(part.mode, Tally(mode=part.mode)).add(tally)
            for failure in tally.failures:
                self.show(
                    f"FAILED {failure.problem}\n  replay: python3 tools/torture.py --replay '{failure.replay}'"
                )

    def _run_part(self, part: Part) -> Tally:
        scratch = tempfile.mkdtemp(prefix=f"walbatch-{part.mode}-")
        job = {
            "seed": part.seed, "part": part.part, "parts": part.parts, "count": part.count, "seconds": part.seconds,
            "scratch": scratch,
        }  # fmt: skip
        command = [sys.executable, "-m", "tools.modes.part", part.mode, json.dumps(job)]
        errors = Path(scratch + ".log")
        tally = Tally(mode=part.mode)
        with (
            errors.open("w", encoding="utf-8") as log,
            subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True) as process,
        ):
            self._processes.add(process)
            assert process.stdout is not None
            watch = threading.Timer(SILENCE_S, process.kill)
            watch.start()
            for line in process.stdout:
                watch.cancel()
                tally = Tally.from_json(line)
                with self._lock:
                    self._running[part] = tally
                watch = threading.Timer(SILENCE_S, process.kill)
                watch.start()
            watch.cancel()
            code = process.wait()
            self._processes.discard(process)
        if code != 0:
            last = errors.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            tally.complete = False
            tally.failures.append(
                Failure(
                    problem=f"a part of {part.mode} ended with code {code}: {' '.join(last)}",
                    replay=f"{part.mode} seed={part.seed} part={part.part} parts={part.parts}",
                )
            )
            tally.figures["failures"] += 1
        errors.unlink(missing_ok=True)
        shutil.rmtree(scratch, ignore_errors=True)
        return tally
