"""Damage at rest: a store of the simulated machine, changed from outside, and opened again.

What is not here: every bit of a larger store (that is a mode of its own). Here is as much as tells mutants apart.

The idea needed to read it: a store is taken while its engine lives, so that its end is as nasty as a kill leaves it, and its
lane is paused, so that all that was acknowledged is still owed. Whatever is done to it, opening may refuse, or the oracle is
content.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

from walbatch.errors import WalbatchError
from walbatch.testing.shipped import open_engine
from walbatch.testing.simulation import (
    Cut,
    Fault,
    FaultPlan,
    LanePlan,
    Machine,
    Oracle,
    Process,
    Session,
    Workload,
)
from walbatch.testing.simulation.history import Acknowledged, Drained, Ended, Event
from walbatch.testing.simulation.looks import STORE
from walbatch.testing.simulation.workload import QUICK

SECTOR: Final = 512
WAL: Final = f"{STORE}/wal"
IDENTITY: Final = f"{STORE}/identity"
NEVER_MS: Final = 100_000.0
RAW: Final = replace(QUICK, compress_bytes_min=None)
BLIND: Final = replace(RAW, checkpoint_ms=NEVER_MS, idle_stamp_ms=NEVER_MS)
"""No checkpoint but the first, and no stamps: the log alone must prove what it holds."""


@dataclass(frozen=True, slots=True)
class Taken:
    """A store at rest, and the history that led to it."""

    machine: Machine
    history: tuple[Event, ...]


@dataclass(slots=True)
class _Camera:
    """What a workload takes along."""

    taken: Taken | None = None

    def take(self, session: Session, *, proven: bool = False) -> None:
        """Note how it is now. Without proof behind it, nobody can tell damage to the last frame from a torn write."""
        process = session.process
        ended = Ended(cut=Cut.KILL, at_ns=process.clock.now_ns)
        _, machine = next(iter(process.machine.clone().images(Cut.KILL)))
        events = list(process.history)
        if not proven and isinstance(events[-1], Acknowledged):
            events.pop()
        self.taken = Taken(machine, (*events, ended))


Story = Callable[[Session, _Camera], None]


def killed(session: Session, camera: _Camera) -> None:
    """Five frames, the last one without proof."""
    session.open()
    session.engine.pause("put")
    for key, size in ((b"a", 0), (b"b", 0), (b"a", 600), (b"c", 0), (b"a", 0)):
        session.submit(key, size=size)
    camera.take(session)
    session.close(drain=False)


def quiet(session: Session, camera: _Camera) -> None:
    """The same, some time later."""
    session.open()
    session.engine.pause("put")
    for key in (b"a", b"b", b"a"):
        session.submit(key)
    session.pause(0.1)
    camera.take(session, proven=True)
    session.close(drain=False)


def one(session: Session, camera: _Camera) -> None:
    """A single frame."""
    session.open()
    session.engine.pause("put")
    session.submit(b"a")
    camera.take(session, proven=True)
    session.close(drain=False)


def backlog(session: Session, camera: _Camera) -> None:
    """Three segments that are needed."""
    session.open()
    session.engine.pause("put")
    for number in range(8):
        session.submit(b"k%d" % (number % 2), size=900)
    session.pause(0.05)
    camera.take(session, proven=True)
    session.close(drain=False)


def sealed(session: Session, camera: _Camera) -> None:
    """A segment that was sealed, and no next one yet."""
    session.open()
    session.engine.pause("put")
    while len(session.process.machine.fs.list_directory(WAL)) < 2:
        camera.take(session, proven=True)
        session.submit(b"a", size=900)
    before = camera.taken
    camera.take(session)
    assert camera.taken is not None
    assert before is not None
    camera.taken = Taken(camera.taken.machine, before.history)
    camera.taken.machine.fs.unlink(max(segments(camera.taken.machine)))
    session.close(drain=False)


def second_life(session: Session, camera: _Camera) -> None:
    """A clean end, and a new segment whose operations no checkpoint knows."""
    session.open()
    session.submit(b"a")
    session.close()
    session.open()
    session.engine.pause("put")
    session.submit(b"a")
    session.submit(b"b")
    camera.take(session)
    session.close(drain=False)


READS_MAX: Final = 40

STORIES: Final[dict[str, tuple[Story, Any]]] = {
    "killed": (killed, BLIND),
    "one": (one, BLIND),
    "quiet": (quiet, replace(BLIND, idle_stamp_ms=QUICK.idle_stamp_ms)),
    "held": (quiet, replace(BLIND, checkpoint_ms=QUICK.checkpoint_ms)),
    "backlog": (backlog, RAW),
    "sealed": (sealed, BLIND),
    "second_life": (second_life, BLIND),
}


def told(name: str, *, machine: Machine | None = None, seed: int = 0, life: str = "0") -> Taken:
    """The store of a story."""
    story, settings = STORIES[name]
    camera = _Camera()
    workload = Workload(
        name=name, run=lambda session: story(session, camera), settings=settings, lanes={"put": LanePlan()}
    )
    process = Process(machine or Machine(), [], seed=seed, life=life)
    session = Session(process, open_engine, workload, life)
    process.run(lambda: session.run(workload.run))
    assert camera.taken is not None
    return camera.taken


def segments(machine: Machine) -> list[str]:
    """Paths of the segments, ascending."""
    return [f"{WAL}/{name}" for name in machine.fs.list_directory(WAL) if name.endswith(".seg")]


def content(machine: Machine, path: str) -> bytes:
    """The bytes of a file."""
    file = machine.fs.open_read(path)
    try:
        return file.read(file.size(), 0)
    finally:
        file.close()


def put(machine: Machine, path: str, data: bytes) -> None:
    """Let a file have these bytes, durably."""
    fs = machine.fs
    if fs.exists(path):
        fs.unlink(path)
    file = fs.create(path)
    file.write([data], 0)
    file.datasync()
    file.close()
    fs.sync_directory(path.rpartition("/")[0])


Damage = Iterator[tuple[str, Taken]]
"""What was done, and the store as it is then."""


def with_file(taken: Taken, path: str, data: bytes) -> Taken:
    """The store with another content of one file."""
    machine = taken.machine.clone()
    put(machine, path, data)
    return Taken(machine, taken.history)


def bits(taken: Taken, name: str) -> Damage:
    """Single bits: every byte of headers and of the beginnings of frames, a sample of the rest."""
    chance = random.Random(f"bits {name}")
    for path in segments(taken.machine):
        data = content(taken.machine, path)
        used = len(data.rstrip(b"\0"))
        places = [at for at in range(used) if at < 120 or (at >= SECTOR and at % SECTOR < 120)]
        places += chance.sample(range(used), min(used, 40))
        for at in places:
            bit = chance.randrange(8)
            damaged = bytearray(data)
            damaged[at] ^= 1 << bit
            yield f"{path} bit {8 * at + bit}", with_file(taken, path, bytes(damaged))


def zeros(taken: Taken, _name: str) -> Damage:
    """Every sector as zeros."""
    for path in segments(taken.machine):
        data = content(taken.machine, path)
        for at in range(0, len(data.rstrip(b"\0")), SECTOR):
            yield (
                f"{path} sector {at // SECTOR}",
                with_file(taken, path, data[:at] + bytes(SECTOR) + data[at + SECTOR :]),
            )


def cuts(taken: Taken, _name: str) -> Damage:
    """Segments that are followed by others, cut at every sector."""
    for path in segments(taken.machine)[:-1]:
        data = content(taken.machine, path)
        for at in range(SECTOR, len(data.rstrip(b"\0")), SECTOR):
            yield f"{path} ends at sector {at // SECTOR}", with_file(taken, path, data[:at])


def splice(_taken: Taken, name: str) -> Damage:
    """Sectors of another life of the same store, and of other places of the same segment."""
    base = Machine()
    process = Process(base, [], seed=1, life="base")
    workload = Workload(name="base", run=_open_and_close, settings=STORIES[name][1])
    session = Session(process, open_engine, workload, "base")
    process.run(lambda: session.run(workload.run))
    _, one = next(iter(base.images(Cut.KILL)))
    other = one.clone()
    first = told(name, machine=one, seed=2, life="one")
    second = told(name, machine=other, seed=3, life="two")
    path = segments(first.machine)[-1]
    mine, others = content(first.machine, path), content(second.machine, segments(second.machine)[-1])
    used = len(mine.rstrip(b"\0"))
    for at in range(SECTOR, used, SECTOR):
        for size in (SECTOR, 2 * SECTOR):
            if size > SECTOR and at + size >= used:
                continue  # the proof would be gone with what it proves
            data = mine[:at] + others[at : at + size] + mine[at + size :]
            yield f"{path} sector {at // SECTOR} of another life", with_file(first, path, data)
        for source in range(SECTOR, used, SECTOR):
            if source != at:
                data = mine[:at] + mine[source : source + SECTOR] + mine[at + SECTOR :]
                yield (
                    f"{path} sector {at // SECTOR} from {source // SECTOR}",
                    with_file(first, path, data),
                )


def _open_and_close(session: Session) -> None:
    session.open()
    session.close()


def loss(taken: Taken, name: str) -> Damage:
    """Files that are gone, or stand where another one belongs, or come from another store."""
    paths = segments(taken.machine)
    for path in (*paths, IDENTITY):
        machine = taken.machine.clone()
        machine.fs.unlink(path)
        yield f"{path} gone", Taken(machine, taken.history)
    machine = taken.machine.clone()
    for path in paths:
        machine.fs.unlink(path)
    yield "all segments gone", Taken(machine, taken.history)
    stranger = told(name, seed=9, life="stranger")
    for path in paths:
        if stranger.machine.fs.exists(path):
            yield f"{path} of another store", with_file(taken, path, content(stranger.machine, path))
        for place in paths:
            if place != path:
                yield f"{path} in the place of {place}", with_file(taken, place, content(taken.machine, path))


DAMAGES: Final = {"bits": bits, "zeros": zeros, "cuts": cuts, "splice": splice, "loss": loss}


def verdict(taken: Taken, settings: Any) -> str:
    """What is wrong when the damaged store is opened and used; "" if it refuses, or nothing is lost."""
    events: list[Event] = []
    workload = Workload(name="damaged", run=_open_and_close, settings=settings)
    history = taken.history
    process = Process(taken.machine, events, seed=0, life="after")
    session = Session(process, open_engine, workload, "after")
    session.is_damaged = True
    told = False

    def use(session: Session) -> None:
        nonlocal told
        session.open()
        session.submit(b"after")
        engine = session.engine
        session.close()
        told = engine.stats().state == "failed"

    try:
        process.run(lambda: session.run(use))
    except WalbatchError:
        return next((problem for problem in _problems(history, events) if problem.startswith("invented")), "")
    except Exception as error:  # noqa: BLE001 - whatever damage makes the engine raise is a finding
        return f"{type(error).__name__}: {error}"
    problems = _problems(history, events)
    if told:
        problems = [problem for problem in problems if problem.startswith("invented")]
    elif not problems and not any(isinstance(event, Drained) for event in events):
        problems = ["not all was delivered, and nobody says why"]
    return next(iter(problems), "")


def _problems(history: tuple[Event, ...], events: list[Event]) -> list[str]:
    return list(Oracle().judge([*history, *events]))


def after_failing_reads(taken: Taken, settings: Any) -> Iterator[tuple[str, str]]:
    """A call that reads fails while the undamaged store is recovered, and then it is recovered again: what, and what is wrong."""
    for call in ("read", "size", "open_read", "list_directory"):
        for number in range(1, READS_MAX + 1):
            plan = FaultPlan((Fault(call=call, number=number),))
            machine = taken.machine.clone()
            events: list[Event] = []
            process = Process(machine, events, seed=0, life="failing", faults=plan)
            session = Session(
                process,
                open_engine,
                Workload(name="failing", run=_open_and_close, settings=settings),
                "failing",
            )
            with contextlib.suppress(WalbatchError):
                process.run(lambda session=session: session.run(_open_and_close))  # type: ignore[misc]
            if not plan.hits:
                break
            ended = Ended(cut=Cut.KILL, at_ns=process.clock.now_ns)
            _, machine = next(iter(machine.images(Cut.KILL)))
            yield f"{call} {number}", verdict(Taken(machine, (*taken.history, *events, ended)), settings)
