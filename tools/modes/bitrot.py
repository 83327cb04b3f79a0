"""Bit rot: every bit of a store of 64 KiB flipped, and everything else that a disk may do to bytes at rest.

Unit: damages. The stores are made by the shipped engine (`tools.bitrot.store`), each damage (`tools.bitrot.damages`) is
recovered on a copy by the shipped recovery, which reads everything back, and is judged (`tools.bitrot.verdict`). A part of them
is done again without the shortcut that makes this affordable, and a few by a whole engine. state/ is real: bits of real LMDB
files are flipped and opened in a child process (`tools.bitrot.state`).

A damage is *detected*, *harmless*, *acknowledged and given up with a report* (it looks like a torn write, and no later byte
vouched for what it took), *acknowledged and given up, nothing could tell* (nothing but zeros, or nothing at all, is left of
such an end; or the oldest segments are gone together with state/, which would know whether they were trimmed) or *silent*,
which is the failure that this mode looks for. The two that are given up are losses, too: the design does not promise otherwise.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from tools.bitrot import state
from tools.bitrot.damages import ENDINGS, Catalogue, Damage
from tools.bitrot.store import make_stores
from tools.bitrot.verdict import Bench, Outcome, Verdict
from tools.modes.tally import Job, Progress, Tally
from walbatch.testing.simulation.explore import quiet

MODE: Final = "bitrot"
PROGRESS_EVERY: Final = 500
AGAIN_EVERY: Final = 199
"""Of the damages, those that are recovered again without the shortcut, and with every segment read at opening."""
ENGINE_EVERY: Final = 1_999
"""Of the damages, those that are recovered again by a whole engine."""
STATE_SHARE: Final = 50
"""One flip in state/ for so many damages of the log."""
STATE_FLIPS_MAX: Final = 4_000
"""Flips in state/, over all parts."""

_FIGURES: Final = {
    "bit": "bits flipped", "zero": "sectors zeroed", "ones": "sectors overwritten", "magic": "sectors overwritten",
    "swap": "sectors swapped", "cut": "ends cut", "splice": "frames spliced", "exchange": "segments exchanged",
    "older": "segments replaced by older ones", "foreign": "segments replaced by others", "lost": "files lost",
    "state": "files lost",
}  # fmt: skip


def run(job: Job, progress: Progress) -> Tally:
    """Do this part of all damages, then of the flips in state/."""
    tally = Tally(mode=MODE)
    started = time.monotonic()
    done = 0
    with quiet():
        stores = make_stores(job.seed)
        catalogue = Catalogue.of(stores, job.seed)
        benches = {ending: Bench(stores.get(ending)) for ending in ENDINGS}
        for damage in catalogue.part(job.part, job.parts):
            if job.is_over(done) or tally.is_full:
                tally.complete = job.count is not None and done >= job.count
                break
            _do(tally, benches[damage.store], damage, catalogue, seed=job.seed, number=done)
            done += 1
            if done % PROGRESS_EVERY == 0:
                tally.seconds = time.monotonic() - started
                progress(tally)
        flips = min(STATE_FLIPS_MAX // job.parts, max(1, done // STATE_SHARE))
        _flip_state(tally, job, flips)
    tally.seconds = time.monotonic() - started
    return tally


def _do(tally: Tally, bench: Bench, damage: Damage, catalogue: Catalogue, *, seed: int, number: int) -> None:
    """One damage."""
    verdict = _verdict(bench, damage, catalogue)
    tally.figures["damages"] += 1
    tally.figures[_FIGURES[damage.kind]] += 1
    tally.figures[verdict.outcome] += 1
    tally.cells[f"{damage.store} {damage.kind}|{verdict.outcome}"] += 1
    line = f"{MODE} seed={seed} {damage}"
    if verdict.problem:
        tally.fail(f"{damage.kind}: {verdict.problem}", line)
    if number % AGAIN_EVERY == 0:
        tally.figures["done again without the shortcut"] += 1
        for problem in _again(bench, damage, catalogue, verdict):
            tally.fail(f"{damage.kind}: {problem}", line)
    if number % ENGINE_EVERY == 0:
        tally.figures["done again by a whole engine"] += 1
        by_engine = _by_engine(bench, damage, catalogue)
        if by_engine.problem:
            tally.fail(f"{damage.kind}, by an engine: {by_engine.problem}", line)


def _verdict(
    bench: Bench, damage: Damage, catalogue: Catalogue, *, full: bool = False, remember: bool = True
) -> Verdict:
    changes = damage.changes(catalogue.stores)
    checkpoint = None if damage.stateless else bench.store.checkpoint
    return bench.judge(changes, checkpoint, bench.open(changes, checkpoint, full=full, remember=remember))


def _by_engine(bench: Bench, damage: Damage, catalogue: Catalogue) -> Verdict:
    changes = damage.changes(catalogue.stores)
    checkpoint = None if damage.stateless else bench.store.checkpoint
    return bench.judge(changes, checkpoint, bench.open_by_engine(changes, checkpoint))


def _again(bench: Bench, damage: Damage, catalogue: Catalogue, before: Verdict) -> Iterator[str]:
    """The same without the shortcut, and with a full survey, which may find at opening what is read back later otherwise."""
    verdict = _verdict(bench, damage, catalogue, remember=False)
    if verdict != before:
        yield f"{before} with the shortcut, {verdict} without"
    full = _verdict(bench, damage, catalogue, full=True, remember=False)
    if full.problem:
        yield f"with a full survey: {full.problem}"
    elif before.outcome is Outcome.DETECTED and full.outcome is not Outcome.DETECTED:
        yield f"a full survey finds it {full.outcome}, and reading back {before.outcome}"


def _flip_state(tally: Tally, job: Job, flips: int) -> None:
    """Flip bits of a real LMDB file."""
    for flip, outcome, problem in state.flips(
        job.scratch / "bitrot", seed=job.seed, part=job.part, count=flips
    ):
        tally.figures["damages"] += 1
        tally.figures["bits of state/ flipped"] += 1
        tally.figures[outcome] += 1
        tally.cells[f"state bit|{outcome}"] += 1
        if problem:
            tally.fail(f"state: {problem}", f"{MODE} seed={job.seed} store=state at={flip}")


def replay(line: str, scratch: Path) -> list[str]:
    """Do one damage again; what is wrong."""
    words = dict(word.partition("=")[::2] for word in line.split()[1:])
    seed = int(words.get("seed", 0))
    with quiet():
        if words["store"] == "state":
            found = state.flips(scratch / "bitrot", seed=seed, part=0, count=1, only=int(words["at"]))
            return [problem for _, _, problem in found if problem]
        stores = make_stores(seed)
        damage = Damage.parse(words)
        catalogue = Catalogue(stores, (damage,), ())
        bench = Bench(stores.get(damage.store))
        verdict = _verdict(bench, damage, catalogue)
        problems = [
            verdict.problem,
            *_again(bench, damage, catalogue, verdict),
            _by_engine(bench, damage, catalogue).problem,
        ]
        return [problem for problem in problems if problem]
