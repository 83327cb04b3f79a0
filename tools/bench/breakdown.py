"""Where the time of one operation goes: `python tools/bench/breakdown.py w1 w3 w5 w6`.

Two ways, which answer two questions:

- by layer (needs `py-spy` on the PATH, and the right to look into a process of one's own): samples of the caller's thread tell what
  it does and waits for; samples of whatever thread holds the interpreter's lock what bounds all of them together. A table for each
  workload, as Markdown.
- `--instructions` (needs `valgrind`): instructions for an operation, all threads together, as the difference of a run with many
  operations and one with few. They are the same from run to run to within a percent, whatever else the machine does, so two
  versions of the code can be compared by them: `--runs 2` shows how well they repeat.

For one question a profile by lines is better made by hand: `py-spy record -- python tools/bench/breakdown.py --work w1`, or with
`python -m cProfile` instead.
"""

from __future__ import annotations

import argparse
import asyncio
import linecache
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

PAYLOAD_BYTES: Final = 256
GROUP: Final = 1_000
TASKS: Final = 1_000
RATE: Final = 400
"""Samples a second."""

LAYERS: Final = tuple(
    (layer, re.compile(pattern))
    for layer, pattern in (
        ("sync call", r"storage/filesystem\.py:\S*(datasync|sync_directory)$"),
        ("write call", r"storage/filesystem\.py:\S*write$"),
        ("read call", r"storage/filesystem\.py:\S*read$"),
        ("encode and decode frames", r"core/(columns|frame|compression|scanner)\.py:"),
        ("segment and its index", r"storage/"),
        ("commit group", r"core/commit_group\.py:"),
        ("route to a shard", r"core/routing\.py:"),
        ("checks of arguments", r"(engine/submission|engine/engine|lanes|aio|config)\.py:"),
        ("lead, queue and wake", r"runtime/(committer|clock|promises|ticket|interruption)\.py:"),
        ("take in, cut, settle", r"core/"),
        (
            "dispatch and read back",
            r"runtime/(bell|dispatcher|lane|reader|readback|express|flushing|overview|watch|workers|flow)\.py:",
        ),
        ("deliver", r"runtime/|backends/"),
        ("asyncio", r"asyncio/"),
        ("locks of the interpreter", r"threading\.py:"),
    )
)
"""The first whose pattern matches the innermost frame of ours, or of these libraries, has the sample."""
CHECKSUM: Final = re.compile(r"\bcrc32c\(|\bcrc\(")
"""A line of ours that is at a checksum."""
REST: Final = "the program itself"


# --- the workloads ---------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Timed:
    """What the measured part took."""

    wall_s: float = 0.0
    cpu_s: float = 0.0

    def __enter__(self) -> Self:
        self.wall_s, self.cpu_s = -time.perf_counter(), -time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall_s += time.perf_counter()
        self.cpu_s += time.process_time()


def the_measured_part(work: Callable[[], Any]) -> Timed:
    """Do it. Of the caller's samples those count that have this on their stack."""
    with Timed() as timed:
        work()
    return timed


def _groups(count: int) -> list[list[tuple[bytes, bytes]]]:
    """The same group again and again, which takes no time to make."""
    group = [(b"key-%d" % row, os.urandom(PAYLOAD_BYTES)) for row in range(GROUP)]
    return [group] * (count // GROUP)


def run(name: str, count: int, folder: Path, *, still: bool = False) -> Timed:
    """A workload in this process. The lane is paused while operations are submitted. `still`: nothing is done because of time."""
    import walbatch as wb  # noqa: PLC0415 - the process that starts the others does without

    lanes = {"put": wb.Lane(lambda _: None)}
    times = (
        {"timer_ms": 60_000.0, "checkpoint_ms": 3_600_000.0, "idle_stamp_ms": 3_600_000.0} if still else {}
    )
    settings = wb.Settings(compress_bytes_min=None, **times)  # type: ignore[arg-type]
    if name == "w6":
        return asyncio.run(_run_tasks(wb, folder, lanes, settings, count))
    if name == "w5":  # by another process, so that no sample of this one belongs to that
        subprocess.run(_child("w3", count, folder), check=True, capture_output=True)
    with wb.Engine.open(folder / "store", lanes, settings=settings) as engine:
        engine.pause("put")
        payload = os.urandom(PAYLOAD_BYTES)
        groups = _groups(count) if name == "w3" else []

        def submit_alone() -> None:
            for number in range(count):
                engine.submit("put", key=b"key-%d" % number, payload=payload)

        def submit_groups() -> None:
            for group in groups:
                engine.submit_many("put", group)

        def deliver() -> None:
            engine.resume("put")
            engine.flush("put")

        timed = the_measured_part({"w1": submit_alone, "w3": submit_groups, "w5": deliver}[name])
        engine.close(drain=False)
    return timed


async def _run_tasks(wb: Any, folder: Path, lanes: Any, settings: Any, count: int) -> Timed:
    payload = os.urandom(PAYLOAD_BYTES)
    engine = await wb.AsyncEngine.open(folder / "store", lanes, settings=settings)
    engine.pause("put")

    async def submit(own: int) -> None:
        for number in range(own, count, TASKS):
            await engine.submit("put", key=b"key-%d" % number, payload=payload)

    with Timed() as timed:
        await asyncio.gather(*(submit(own) for own in range(TASKS)))
    await engine.close(drain=False)
    return timed


MEASURED: Final = frozenset(("the_measured_part", "_run_tasks.<locals>.submit", "BaseEventLoop.run_forever"))
"""Functions that are on the stack of the caller while it does what is measured, and not before."""
COUNTS: Final = {"w1": 20_000, "w3": 1_500_000, "w5": 1_000_000, "w6": 100_000}
"""Some seconds each."""
FEW: Final = {"w1": (200, 1_200), "w3": (4_000, 24_000), "w5": (4_000, 24_000), "w6": (2_000, 7_000)}
"""For instructions, which valgrind counts some fifty times slower than they run."""


# --- by layer --------------------------------------------------------------------------------------------------------


def by_layer(name: str, count: int, folder: Path) -> None:
    """Print where the time goes: what the caller's thread does and waits for, and who has the interpreter (its lock, the GIL)."""
    waited, timed = _sampled(name, count, folder, which="--idle")
    computed, timed_again = _sampled(name, count, folder, which="--gil")
    caller = {layer: hits for (thread, layer), hits in waited.items() if thread == "caller"}
    everybody: Counter[str] = Counter()
    for (_, layer), hits in computed.items():
        everybody[layer] += hits
    wall_us, cpu_us = timed.wall_s * 1e6 / count, timed_again.cpu_s * 1e6 / count
    held_us = sum(everybody.values()) * 1e6 / RATE / count
    print(
        f"\n{name}: {count:,} operations. Each takes {wall_us:.2f} us of the caller's time, {cpu_us:.2f} us of CPU time in all "
        f"threads, and {held_us:.2f} us of the interpreter\n"
    )
    print("| layer | caller, us | share | interpreter, us | share |\n|---|---:|---:|---:|---:|")
    sums = sum(caller.values()) or 1, sum(everybody.values()) or 1
    for layer in sorted(
        {*caller, *everybody}, key=lambda one: -caller.get(one, 0) / sums[0] - everybody[one] / sums[1]
    ):
        shares = caller.get(layer, 0) / sums[0], everybody[layer] / sums[1]
        print(
            f"| {layer} | {wall_us * shares[0]:.2f} | {shares[0]:.0%} | {held_us * shares[1]:.2f} | {shares[1]:.0%} |"
        )


def _sampled(name: str, count: int, folder: Path, *, which: str) -> tuple[Counter[tuple[str, str]], Timed]:
    """Hits by thread ("caller", "others") and layer."""
    with tempfile.TemporaryDirectory(dir=folder) as own:
        stacks = Path(own) / "stacks"
        command = [
            "py-spy",
            "record",
            "--rate",
            str(RATE),
            "--format",
            "raw",
            "--threads",
            "--full-filenames",
        ]
        command += [which, "--output", str(stacks), "--", *_child(name, count, Path(own))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = re.search(r"took (\S+) (\S+)", done.stdout)
        if found is None or not stacks.exists():
            sys.exit(f"py-spy did not measure {name}:\n{done.stdout}{done.stderr}")
        hits: Counter[tuple[str, str]] = Counter()
        for line in stacks.read_text(encoding="utf-8").splitlines():
            stack, _, hit = line.rpartition(" ")
            for key in _attributed(stack.split(";")):
                hits[key] += int(hit)
        return hits, Timed(float(found[1]), float(found[2]))


FRAME: Final = re.compile(r"(?P<function>.+) \((?P<file>.+):(?P<line>\d+)\)$")


def _attributed(stack: list[str]) -> Iterator[tuple[str, str]]:
    """The thread and the layer of a sample, if it belongs to the measured part."""
    frames = [found for frame in stack if (found := FRAME.match(frame))]
    functions = [found["function"] for found in frames]
    is_caller = "MainThread" in stack[0] or "<module>" in functions
    if is_caller and not MEASURED.intersection(functions):
        return
    thread = "caller" if is_caller else "others"
    for found in reversed(frames):
        place = f"{found['file']}:{found['function']}"
        if "walbatch/" not in place and "asyncio/" not in place and "threading.py" not in place:
            continue
        if "/walbatch/" in place and CHECKSUM.search(linecache.getline(found["file"], int(found["line"]))):
            yield thread, "checksums"
            return
        yield thread, next((layer for layer, pattern in LAYERS if pattern.search(place)), REST)
        return
    if frames:
        yield thread, REST


# --- instructions ----------------------------------------------------------------------------------------------------


def instructions(name: str, runs: int, folder: Path) -> None:
    """Print what an operation costs in instructions, by where the interpreter spends them."""
    counts = FEW[name]
    for run_ in range(runs):
        few, many = (_counted(name, count, folder) for count in counts)
        spread = counts[1] - counts[0]
        total = sum(many.values()) - sum(few.values())
        print(f"\n{name}, run {run_ + 1}: {total / spread:,.0f} instructions an operation")
        if run_ == 0:
            growth = {where: (many[where] - few[where]) / spread for where in many}
            for where, grown in sorted(growth.items(), key=lambda item: -item[1])[:12]:
                print(f"  {grown:>10,.0f}  {where}")


def _counted(name: str, count: int, folder: Path) -> Counter[str]:
    """Instructions of a whole process by function of the interpreter and its libraries."""
    with tempfile.TemporaryDirectory(dir=folder) as own:
        out = Path(own) / "callgrind"
        command = [
            "valgrind",
            "--tool=callgrind",
            f"--callgrind-out-file={out}",
            *_child(name, count, Path(own)),
            "--still",
        ]
        environment = {
            **os.environ,
            "PYTHONHASHSEED": "0",
        }  # or the order of sets would differ from run to run
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode or not out.exists():
            sys.exit(f"valgrind did not measure {name}:\n{done.stdout}{done.stderr}")
        return _read_callgrind(out.read_text(encoding="utf-8"))


def _read_callgrind(text: str) -> Counter[str]:
    """Self cost by function, from callgrind's own format: names are given once, with a number, and then by that number."""
    names: dict[str, str] = {}
    found: Counter[str] = Counter()
    function = ""
    is_call = False
    for line in text.splitlines():
        if line.startswith("fn="):
            number, _, name = line[3:].partition(" ")
            function = names.setdefault(number, name) if name else names.get(number, number)
        elif line.startswith("cfn="):
            number, _, name = line[4:].partition(" ")
            if name:
                names.setdefault(number, name)
        elif line.startswith("calls="):
            is_call = True
        elif line[:1].isdigit() or line[:1] in {"+", "-", "*"}:
            if is_call:  # what the called function took: it is counted there
                is_call = False
                continue
            found[function] += int(line.split()[-1])
    return found


def _child(name: str, count: int, folder: Path) -> list[str]:
    return [sys.executable, __file__, "--work", name, "--count", str(count), "--dir", str(folder)]


# --- the command -----------------------------------------------------------------------------------------------------


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "workloads",
        nargs="*",
        choices=[*COUNTS, []],
        help="w1 one by one, w3 groups of 1,000, w5 delivery, w6 tasks",
    )
    parser.add_argument(
        "--instructions", action="store_true", help="count instructions instead (needs valgrind)"
    )
    parser.add_argument("--runs", type=int, default=1, help="how often instructions are counted")
    parser.add_argument(
        "--dir", type=Path, default=Path(tempfile.gettempdir()), help="where the stores stand"
    )
    parser.add_argument("--count", type=int, default=None, help="operations")
    parser.add_argument(
        "--work", choices=list(COUNTS), default=None, help="run this workload and nothing else"
    )
    parser.add_argument("--still", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args(None if arguments is None else list(arguments))
    if chosen.work:
        timed = run(chosen.work, chosen.count or COUNTS[chosen.work], chosen.dir, still=chosen.still)
        print(f"took {timed.wall_s} {timed.cpu_s}")
        return
    os.environ["PATH"] += os.pathsep + str(Path(sys.executable).parent)  # where pip puts py-spy
    tool = "valgrind" if chosen.instructions else "py-spy"
    if shutil.which(tool) is None:
        sys.exit(f"{tool} is not on the PATH: install it first")
    for name in chosen.workloads or COUNTS:
        if chosen.instructions:
            instructions(name, chosen.runs, chosen.dir)
        else:
            by_layer(name, chosen.count or COUNTS[name], chosen.dir)


if __name__ == "__main__":
    main()
