"""What LmdbState makes of damaged files, each looked at in a child process, since a damaged file can kill its reader.

Run as `python -m tests.storage.state_probe FOLDER KIND SEED COUNT`; prints how often each outcome was seen, as JSON:

- sound: everything is there, nothing was found wrong;
- reported: something is missing, and was reported;
- stale: the checkpoint before the newest, without a finding (costs that operations are delivered again);
- harmless: everything is there, and something was reported;
- anything else is a bug: invented, silent, killed by a signal, an exception, or a reader that predicts otherwise.
"""

from __future__ import annotations

import collections
import json
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from walbatch.storage.checkpoint import LmdbState
from walbatch.types import Checkpoint, LaneMark, LaneMemory, Mark

STORE = b"the-store-itself"
NEWEST = 20
PAGE = 4096


def checkpoint(generation: int) -> Checkpoint:
    """A checkpoint that grows and shrinks with its generation, so that LMDB moves pages about."""
    ranges = tuple((1_000 + 3 * index, 1_001 + 3 * index) for index in range(generation * 37 % 600))
    mark = Mark(epoch=3, watermark=generation, ranges=ranges)
    return Checkpoint(
        generation=generation,
        epoch=3,
        watermark=generation,
        durable_lsn=5_000,
        segment=2,
        settled_count=generation,
        lanes={"put": LaneMark(shards=(mark, Mark(watermark=generation)))},
    )


LANES = {
    f"lane-{number}": LaneMemory(name=f"lane-{number}", shards=4, url="lmdb:///data") for number in range(9)
}


def make(path: Path) -> None:
    """A state that has been saved a number of times."""
    state = LmdbState.open(str(path), STORE)
    state.save_lanes(LANES)
    for generation in range(1, NEWEST + 1):
        state.save_checkpoint(checkpoint(generation))
    state.close()


def damaged(data: bytes, kind: str, chance: random.Random, count: int) -> Iterator[bytes]:
    """`count` damaged copies of a file."""
    used = data.rstrip(b"\0")
    pages = -(-len(used) // PAGE)
    match kind:
        case "cut":
            sizes = [
                *range(0, pages * PAGE, PAGE),
                *(chance.randrange(1, pages * PAGE) for _ in range(count)),
            ]
            yield from (data[:size] for size in sizes)
        case "bit in the first pages" | "bit in the heads of pages" | "bit anywhere":
            page_max, offset_max = {
                "bit in the first pages": (2, 160),
                "bit in the heads of pages": (pages, 200),
            }.get(kind, (pages, PAGE))
            for _ in range(count):
                copy = bytearray(data)
                copy[PAGE * chance.randrange(page_max) + chance.randrange(offset_max)] ^= (
                    1 << chance.randrange(8)
                )
                yield bytes(copy)
        case "page":
            for _ in range(count):
                copy = bytearray(data)
                first, second = chance.randrange(pages), chance.randrange(pages)
                fills = (bytes(PAGE), chance.randbytes(PAGE), data[PAGE * second : PAGE * second + PAGE])
                copy[PAGE * first : PAGE * first + PAGE] = chance.choice(fills)
                yield bytes(copy)
        case _:
            raise ValueError(kind)


def look(path: Path) -> str:
    """The outcome for one damaged state, as `module` documents it. Leaves a state that was used."""
    reader = LmdbState.open(str(path), STORE, readonly=True)
    predicted, predicted_findings = reader.load_checkpoint()
    predicted_lanes, _ = reader.load_lanes()
    reader.close()
    state = LmdbState.open(str(path), STORE, quarantine=str(path.parent / "quarantine"))
    found, findings = state.load_checkpoint()
    lanes, lane_findings = state.load_lanes()
    if (found, bool(findings), lanes) != (predicted, bool(predicted_findings), predicted_lanes):
        return f"the reader predicts otherwise: {predicted_findings} {findings}"
    following = checkpoint(NEWEST + 1)
    state.save_checkpoint(following)
    state.save_lanes(LANES)
    if state.load_checkpoint()[0] != following or state.load_lanes()[0] != LANES:
        return "what was saved is not there"
    state.close()
    if found is not None and found != checkpoint(found.generation):
        return "invented"
    if any(memory != LANES.get(name) for name, memory in lanes.items()):
        return "invented"
    if findings or lane_findings:
        return "harmless" if found == checkpoint(NEWEST) and lanes == LANES else "reported"
    if lanes != LANES:
        return "silent"
    match found.generation if found is not None else None:
        case 20:
            return "sound"
        case 19:
            return "stale"
        case _:
            return "silent"


def outcome(folder: Path, data: bytes, look: Callable[[Path], str]) -> str:
    """The outcome for these bytes, found out in a child."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "state").mkdir(parents=True)
    (folder / "state" / "data.mdb").write_bytes(data)
    if not data:
        return "sound"  # a file that was never written
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            answer = look(folder / "state")
        except BaseException as error:  # noqa: BLE001 - any exception is an outcome
            answer = f"raised {error!r}"
        os.write(writable, answer.encode()[:PAGE])
        os._exit(0)
    os.close(writable)
    with os.fdopen(readable, "rb") as answers:
        text = answers.read().decode()
    _, status = os.waitpid(child, 0)
    return f"killed by signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else text


def main(folder: str, kind: str, seed: str, count: str) -> None:
    root = Path(folder)
    make(root / "sound")
    data = (root / "sound" / "data.mdb").read_bytes()
    outcomes: collections.Counter[str] = collections.Counter()
    for copy in damaged(data, kind, random.Random(int(seed)), int(count)):
        outcomes[outcome(root / "damaged", copy, look)] += 1
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main(*sys.argv[1:])
