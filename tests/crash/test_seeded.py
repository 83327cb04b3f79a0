"""Random lives: they repeat, they vary in all they are meant to vary in, and nothing breaks."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tools.modes import seeded
from tools.modes.tally import Job, Tally
from walbatch.testing.simulation.explore import quiet
from walbatch.testing.simulation.machine import Process


def told(seed: int) -> seeded.Story:
    with quiet():
        return seeded.tell(seed)


@pytest.mark.parametrize("seed", [3, 17, 2**40])
def test_the_same_seed_tells_the_same_story(seed: int) -> None:
    one, other = told(seed), told(seed)
    assert (one.trace, one.steps, one.virtual_ns) == (other.trace, other.steps, other.virtual_ns)


def test_other_seeds_tell_other_stories() -> None:
    assert len({told(seed).trace for seed in range(30)}) == 30


@pytest.fixture(scope="module")
def tally(tmp_path_factory: pytest.TempPathFactory) -> Tally:
    return seeded.run(Job(seed=0, count=400, scratch=tmp_path_factory.mktemp("seeded")), lambda tally: None)


def test_no_story_breaks_a_guarantee(tally: Tally) -> None:
    assert not tally.failures, tally.failures[0]
    assert tally.complete
    assert tally.figures["seeded runs"] == 400


@pytest.mark.parametrize(
    "figure",
    [
        "crashes: power in the middle", "crashes: power behind the end", "crashes: kill in the middle", "faults injected: EIO",
        "faults injected: ENOSPC", "faults injected: EDQUOT", "faults injected: EROFS", "faults injected: EMFILE",
        "virtual seconds", "state silently stale", "one generation damaged", "both generations damaged", "state lost",
        "lies of backends", "burials", "requeues", "cancellations",
    ],
)  # fmt: skip
def test_stories_vary_in_everything(tally: Tally, figure: str) -> None:
    assert tally.figures[figure] > 0


def test_what_has_died_is_requeued_in_many_stories(tally: Tally) -> None:
    assert tally.figures["requeues"] * 4 > tally.figures["seeded runs"]


def test_parts_tell_different_stories(tmp_path: Path) -> None:
    lines = []
    for part in range(2):
        job = Job(seed=5, part=part, parts=2, count=3, scratch=tmp_path)
        tally = seeded.run(job, lambda tally: None)
        lines.append(tally.figures["steps"])
    assert lines[0] != lines[1]


def test_an_engine_without_its_syncs_does_not_survive_the_stories(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The stories can fail: an engine whose syncs of files do nothing is found, and its line replays."""
    make = Process.__init__

    class Unsynced:
        def __init__(self, wrapped: object) -> None:
            self.wrapped = wrapped

        def __getattr__(self, name: str) -> object:
            return getattr(self.wrapped, name)

        def datasync(self) -> None:
            pass

    class Fs(Unsynced):
        def create(self, path: str) -> Unsynced:
            return Unsynced(self.wrapped.create(path))  # type: ignore[attr-defined]

    def made(self: Process, *arguments: object, **settings: object) -> None:
        make(self, *arguments, **settings)  # type: ignore[arg-type]
        self.fs = Fs(self.fs)  # type: ignore[assignment]

    monkeypatch.setattr(Process, "__init__", made)
    tally = seeded.run(Job(seed=0, count=60, scratch=tmp_path), lambda tally: None)
    problems = Counter("no sync has succeeded" in failure.problem for failure in tally.failures)
    assert problems[True]
    assert problems[False], "and something was lost"
    failure = tally.failures[0]
    assert failure.problem in seeded.replay(failure.replay, tmp_path)
