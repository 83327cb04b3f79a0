"""One part of one mode, in a process of its own: `python -m tools.modes.part MODE JOB`, where JOB is JSON.

Writes its tally as a line of JSON every few seconds, and at its end. Started by `runner`.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
import traceback
from pathlib import Path
from types import ModuleType

from tools.modes.tally import Job, Tally

REPORT_S = 2.0


def mode_of(name: str) -> ModuleType:
    """The module of a mode."""
    return importlib.import_module(f"tools.modes.{name}")


def main() -> None:
    mode, wanted = sys.argv[1], json.loads(sys.argv[2])
    job = Job(
        seed=wanted["seed"], part=wanted["part"], parts=wanted["parts"], count=wanted["count"], seconds=wanted["seconds"],
        scratch=Path(wanted["scratch"]),
    )  # fmt: skip
    # What a mode prints must not stand among the tallies.
    out, sys.stdout = sys.stdout, sys.stderr
    said = time.monotonic()
    started = said

    def progress(tally: Tally) -> None:
        nonlocal said
        if time.monotonic() - said >= REPORT_S:
            said = time.monotonic()
            print(tally.to_json(), file=out, flush=True)

    try:
        tally: Tally = mode_of(mode).run(job, progress)
    except Exception as error:  # noqa: BLE001 - a mode that breaks is a failure of the run, told as such
        traceback.print_exc()
        tally = Tally(mode=mode, complete=False)
        tally.fail(
            f"the mode broke: {type(error).__name__}: {error}", f"{mode} seed={job.seed} part={job.part}"
        )
    tally.seconds = time.monotonic() - started
    print(tally.to_json(), file=out, flush=True)


if __name__ == "__main__":
    main()
