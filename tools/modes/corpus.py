"""The corpus: every failure that any run has found, done again.

The lines stand in fixtures/failures.txt: a replay line, `#`, and what it found. Code changes, so that a line may crash a little
elsewhere than it did; it stays a case near one that has failed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from tools.modes.part import mode_of
from tools.modes.tally import Failure, Job, Progress, Tally

CORPUS: Final = Path(__file__).resolve().parents[2] / "fixtures" / "failures.txt"


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
    """What is wrong when this line is done again, by the mode that its first word names."""
    mode, _, rest = line.strip().partition(" ")
    scratch.mkdir(parents=True, exist_ok=True)
    problems: list[str] = mode_of(mode).replay(f"{mode} {rest}", scratch)
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
