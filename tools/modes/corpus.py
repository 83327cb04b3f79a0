"""The corpus: every failure that any run has found, done again.

The lines stand in fixtures/failures.txt: a replay line, `#`, and what it found; what stands behind `#` is for people. Code
changes, so that a line may crash a little elsewhere than it did; it stays a case near one that has failed.
"""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Final

from tools.modes.part import mode_of
from tools.modes.profiles import FULL
from tools.modes.tally import Failure, Job, Progress, Tally

ROOT: Final = Path(__file__).resolve().parents[2]
CORPUS: Final = ROOT / "fixtures" / "failures.txt"
PACKAGE: Final = f"{ROOT / 'walbatch'}/"
MODES: Final = tuple(mode for mode in FULL.shares if mode != "corpus")
"""The modes whose failures have replay lines."""


class NoReplayLineError(ValueError):
    """The text names no failure that could be done again."""

    def __init__(self, line: str, why: str) -> None:
        super().__init__(f"not a replay line: {line!r} ({why}); copy one from a failure")


def lines() -> list[str]:
    """All replay lines."""
    if not CORPUS.exists():
        return []
    found = [line.partition("#")[0].strip() for line in CORPUS.read_text(encoding="utf-8").splitlines()]
    return [line for line in found if line]


def keep(failures: list[Failure]) -> int:
    """Add new failures; returns how many."""
    known = set(lines())
    new = [failure for failure in failures if failure.replay not in known]
    with CORPUS.open("a", encoding="utf-8") as file:
        file.writelines(f"{failure.replay}  # {' '.join(failure.problem.split())}\n" for failure in new)
    return len(new)


def replay(line: str, scratch: Path) -> list[str]:
    """What is wrong when this line is done again, by the mode that its first word names.

    Raises NoReplayLineError where the mode cannot read the line: it fails before any code of the package runs.
    """
    mode, _, rest = line.partition("#")[0].strip().partition(" ")
    if mode not in MODES:
        raise NoReplayLineError(line, f"it must begin with one of {', '.join(MODES)}")
    scratch.mkdir(parents=True, exist_ok=True)
    try:
        problems: list[str] = mode_of(mode).replay(f"{mode} {rest}", scratch)
    except (LookupError, ValueError, AttributeError, StopIteration) as error:
        if any(frame.filename.startswith(PACKAGE) for frame in traceback.extract_tb(error.__traceback__)):
            raise
        raise NoReplayLineError(
            line, f"{mode} cannot read it: {type(error).__name__} {error}".strip()
        ) from error
    return problems


def run(job: Job, progress: Progress) -> Tally:
    """Replay every line."""
    tally = Tally(mode="corpus")
    for number, line in enumerate(lines()):
        if job.is_over(number):
            tally.complete = False
            break
        for problem in replay(line, job.scratch / f"line{number}"):
            tally.fail(problem, line)
        tally.figures["failures replayed"] += 1
        progress(tally)
    return tally
