"""One mutant in a process of its own: installed, probed until a probe finds it, and reported in one line of JSON.

What is not here: which mutants, and how many at the same time (`tools.modes.mutants`).

The idea needed to read it: a server that has imported everything but walbatch forks for each mutant, which saves the half
second that importing takes. A fork says which probe it begins with; one that then says nothing for long is hanging, and that
is a find, too.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Final, NoReturn

from tools.mutants.catalogue import mutant_named
from tools.mutants.mutant import Edit, Mutant

HANGING_S: Final = 60.0
"""Real time for one probe of a mutant: more than twice what a probe allows itself."""

HUNT_S: Final = 240.0
"""Real time for a mutant that its hint has not found. What then lives is a survivor."""

IMPATIENT: Final = Edit(
    "walbatch/testing/simulation/scheduler.py",
    "STEPS_MAX: Final = 2_000_000\n",
    "STEPS_MAX: Final = 400_000\n",
)
"""A mutant that makes threads spin is found sooner."""

_THIRD_PARTY: Final = (
    "crc32c",
    "crcmod.predefined",
    "greenlet",
    "lmdb",
    "zstandard",
    "asyncio",
    "tempfile",
    "unittest.mock",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """What became of a mutant. `probe`: who found it; "" if nobody did."""

    mutant: str
    probe: str
    states: int
    """Crash images and runs that were tried until then."""
    problem: str
    replay: str
    seconds: float


def probed(mutant: Mutant, wanted: Sequence[str], say: int) -> Kill:
    """Install the mutant in this process, and try probes until one finds it. `say`: where each is announced."""
    started = time.monotonic()
    states = 0
    replace(mutant, edits=(*mutant.edits, IMPATIENT)).install()
    logging.getLogger("walbatch").setLevel(logging.CRITICAL + 1)
    from tools.mutants import probes  # noqa: PLC0415 - walbatch may be imported only now

    for name in wanted or list(dict.fromkeys(filter(None, [mutant.hint, *probes.all_probes()]))):
        if time.monotonic() - started > HUNT_S:
            break
        os.write(say, name.encode() + b"\n")
        try:
            found = probes.probe_named(name)()
        except Exception as error:  # noqa: BLE001 - the harness itself runs on mutated code
            where = traceback.extract_tb(error.__traceback__)[-1]
            found = probes.Found(states=1, problem=f"{error!r} at {where.name}:{where.lineno}")
        states += found.states
        if found.problem:
            return Kill(
                mutant=mutant.word, probe=name, states=states, problem=found.problem, replay=found.replay,
                seconds=time.monotonic() - started,
            )  # fmt: skip
    return Kill(
        mutant=mutant.word, probe="", states=states, problem="", replay="", seconds=time.monotonic() - started
    )


def warm_up() -> None:
    """Import what is no part of walbatch, so that forks have it."""
    for name in _THIRD_PARTY:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def forked(mutant: Mutant, wanted: Sequence[str] = ()) -> Kill:
    """`probed` in a fork: these probes, or the hint and then all. This process must not have imported walbatch."""
    started = time.monotonic()
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        _answer(writing, mutant, wanted)
    os.close(writing)
    probe, answer = "", ""
    for line in _lines(reading):
        probe, answer = (probe, line) if line.startswith("{") else (line, "")
    os.close(reading)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if answer:
        return Kill(**json.loads(answer))
    if not probe:
        raise RuntimeError(f"{mutant.name}: it cannot even be imported")
    died = os.WIFEXITED(status)
    return Kill(
        mutant=mutant.word, probe=probe if died else f"deadlock:{probe}", states=1,
        problem="the process died" if died else f"no answer within {HANGING_S:.0f} s", replay="",
        seconds=time.monotonic() - started,
    )  # fmt: skip


def _answer(fd: int, mutant: Mutant, wanted: Sequence[str]) -> NoReturn:
    code = 1
    try:
        kill = probed(mutant, wanted, fd)
        os.write(fd, json.dumps(asdict(kill)).encode() + b"\n")
        code = 0
    except BaseException:  # noqa: BLE001 - the fork must not go on as its parent
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _lines(fd: int) -> Iterator[str]:
    """What the fork says, until its end, or until it says nothing for long."""
    rest = b""
    while select.select([fd], [], [], HANGING_S)[0]:
        data = os.read(fd, 65_536)
        if not data:
            return
        *lines, rest = (rest + data).split(b"\n")
        yield from (line.decode() for line in lines)


def main() -> None:
    """`python -m tools.mutants.child MUTANT[@PROBE]...`: a line of JSON for each. Without a probe, until one finds it."""
    warm_up()
    for wanted in sys.argv[1:]:
        word, _, probe = wanted.partition("@")
        kill = forked(mutant_named(word), [probe] if probe else [])
        print(json.dumps(asdict(kill)), flush=True)


if __name__ == "__main__":
    main()
