"""Random lives of random stores on random machines: everything that the other modes vary one at a time, at once.

The unit is a seeded run: a store with random lanes and settings is used by random calls, while calls fail, backends misbehave, the
wall clock jumps and the machine crashes up to three times, also inside recovery. Then all of that stops; the backlog must
drain, and the oracle judges all of it. The seed decides everything: the same seed gives the same trace.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import itertools
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tools.modes.lives import Life, live
from tools.modes.prediction import predict
from tools.modes.tally import Job, Progress, Tally
from tools.modes.uses import Use, has_dropped_names, some_trigger
from tools.modes.workloads import HASTY, STRICT, remove_file
from walbatch.config import Settings
from walbatch.errors import BackendBroken, BatchRejected, BatchTooLarge, RetryBatch, Throttled
from walbatch.testing.simulation import (
    Cut,
    FailedSync,
    Fault,
    FaultPlan,
    LanePlan,
    Machine,
    Manner,
    Room,
    Session,
    Workload,
)  # fmt: skip
from walbatch.testing.simulation.backend import Manners, Poison, Reaction
from walbatch.testing.simulation.clock import START_NS
from walbatch.testing.simulation.explore import quiet
from walbatch.testing.simulation.history import (
    Blamed,
    Buried,
    Cancelled,
    Ended,
    Event,
    Lied,
    RequeueAsked,
    StateLost,
)
from walbatch.testing.simulation.looks import STORE, names_in
from walbatch.testing.simulation.verify import verify_by_use
from walbatch.types import Applied, Batch, Checkpoint, Outcome, Rejected, Retry

MODE: Final = "seeded"
SMALL_BYTES: Final = 2**20
"""A log with a smaller bound may be full when it is opened again."""

STATE: Final = f"{STORE}/state"

CALLS: Final = (
    "write", "write", "write", "datasync", "datasync", "sync_directory", "create", "rename", "unlink", "preallocate", "truncate",
    "read", "open_read", "list_directory", "size", "make_directory", "lock", "save checkpoint", "save checkpoint",
    "save lanes", "load checkpoint", "load lanes", "bury", "bury", "unbury", "cancel", "cancel", "save keys", "load letters",
    "load given up", "load keys",
)  # fmt: skip
ERRORS: Final = (errno.EIO, errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE)
MISBEHAVIOUR: Final = (
    Manner.FAIL, Manner.PART, Manner.ANSWER_PART, Manner.TIMEOUT, Manner.SLOW, Manner.HANG, "answers", "answers", "answers",
    "poison", "raises",
)  # fmt: skip

PROBLEMS_MAX: Final = 2
"""Of one story: they are mostly the same."""

STEP_MAX: Final = 420
"""Most lives have fewer steps, and then end by themselves."""

DEADLY: Final = 0.35
"""Of the stories: backends that reject much, and users who submit again, or drop, what has died."""
DEADLY_STEP_MAX: Final = 900


@dataclass(slots=True, kw_only=True)
class Story:
    """What a seed has made of itself, and what came of it."""

    seed: int
    problems: list[str] = field(default_factory=list)
    lives: int = 0
    crashes: Counter[str] = field(default_factory=Counter)
    steps: int = 0
    virtual_ns: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    damage: Counter[str] = field(default_factory=Counter)
    lies: int = 0
    fates: Counter[str] = field(default_factory=Counter)
    trace: str = ""


def tell(seed: int) -> Story:
    """Live through it."""
    story = Story(seed=seed)
    chance = random.Random(f"story {seed}")
    workload = _workload(chance)
    machine = _machine(chance)
    history: list[Event] = []
    oracle = workload.oracle()
    hashed = hashlib.blake2b(digest_size=8)
    strict = chance.random() < 0.3
    crashes = chance.choice((0, 1, 1, 2, 2, 3))
    lying = chance.random() < 0.05
    is_timed, is_deadly = chance.random() < 0.5, chance.random() < DEADLY
    for number in range(crashes + 1):
        last = number == crashes
        if last:
            machine.fs.capacity_bytes = machine.fs.files_max = None
        elif number:
            _damage(machine, chance, story, history)
        life = live(
            machine, history, workload, seed=seed, name=str(number),
            use=verify_by_use if last and number else Use(
                random.Random(chance.random()), tuple(workload.lanes), is_timed=is_timed, is_deadly=is_deadly
            ),
            faults=FaultPlan(() if last else _faults(chance)),
            manners=None if last and number else _manners(
                chance, workload, history, story, lying=lying and not last, is_deadly=is_deadly
            ),
            crash_at=None if last else chance.randrange(1, DEADLY_STEP_MAX if is_deadly else STEP_MAX),
        )  # fmt: skip
        _note(story, life)
        hashed.update(life.process.threads.trace.encode())
        if life.error:
            story.problems.append(life.error)
        if last:
            break
        machine = _crash(life, history, chance, story, strict=strict)
    if not story.problems and crashes == 0:
        # The first life was the last; somebody else drains what it has left.
        life = live(machine, history, workload, seed=seed, name="end")
        _note(story, life)
        story.problems += [life.error] if life.error else []
    story.problems += oracle.judge(history)
    story.fates.update(_FATES[type(event)] for event in history if type(event) in _FATES)
    hashed.update(repr(len(history)).encode())
    story.trace = hashed.hexdigest()
    return story


def _note(story: Story, life: Life) -> None:
    story.lives += 1
    story.steps += life.process.threads.steps
    story.virtual_ns += life.process.clock.now_ns - START_NS
    for fault, count in life.faults.struck.items():
        story.faults[errno.errorcode[fault]] += count


def _crash(life: Life, history: list[Event], chance: random.Random, story: Story, *, strict: bool) -> Machine:
    """End the process: by a kill, by a loss of power, or by one after the other."""
    machine = life.process.machine
    cut = Cut.KILL if chance.random() < 0.3 and not has_dropped_names(life.process) else Cut.POWER
    story.crashes[f"{cut} {'in the middle' if life.killed else 'behind the end'}"] += 1
    history.append(Ended(cut=cut, at_ns=life.process.clock.now_ns))
    found = machine.images(cut, bound=8, samples=6, seed=chance.randrange(2**32), strict=strict)
    kept = list(itertools.islice(found, chance.randrange(8) + 1))
    return kept[-1][1].clone()


# --- what a seed decides ---


def _workload(chance: random.Random) -> Workload:
    """Lanes and settings."""
    lanes: dict[str, LanePlan] = {}
    for name in ("put", "log", "web")[: chance.choice((1, 1, 2, 3))]:
        durability = chance.choice(("sync", "sync", "sync", "interval", "none"))
        lanes[name] = LanePlan(
            transactional=chance.random() < 0.4, shards=chance.choice((1, 1, 2, 5)),
            order=chance.choice(("key", "key", "shard", "none")), durability=durability,
            interval_ms=chance.choice((2, 20)), retry=chance.choice((HASTY, STRICT)), timeout_s=chance.choice((0.02, 0.2, 30.0)),
            strategy=chance.choice(("parallel", "parallel", "serial")),
            trigger=some_trigger(chance),
        )  # fmt: skip
    settings = Settings(
        segment_bytes=chance.choice((4096, 4096, 8192)), disk_bytes_max=chance.choice((4 * 8192, 2**24)),
        timer_ms=chance.choice((1, 5)),
        checkpoint_ms=chance.choice((4, 20, 60)), idle_stamp_ms=chance.choice((2, 30, 500)), in_flight_max=chance.choice((1, 2, 8)),
        compress_bytes_min=chance.choice((None, 64, 1024)), submit_timeout_s=chance.choice((0.05, 1)),
        disk_full_wait_s=chance.choice((0, 0.2)), idempotency_window_s=10**9,
    )  # fmt: skip
    return Workload(
        name="seeded", run=verify_by_use, lanes=lanes, settings=settings, predict=predict if chance.random() < 0.2 else None,
        verify=_verify if settings.disk_bytes_max < SMALL_BYTES else None,
    )  # fmt: skip


def _verify(session: Session) -> None:
    """Make room where the log is at its limit, before the end is verified."""
    session.open()
    for lane, plan in session.workload.lanes.items():
        if plan.durability != "none":
            session.engine.flush(lane, timeout=60)
    session.pause(0.2)
    session.close()
    verify_by_use(session)


def _machine(chance: random.Random) -> Machine:
    machine = Machine()
    fs = machine.fs
    fs.failed_sync = chance.choice((FailedSync.DROP, FailedSync.REVERT))
    fs.failed_sync_drops_names = chance.random() < 0.3
    fs.room = chance.choice(tuple(Room))
    if chance.random() < 0.1:
        fs.capacity_bytes = chance.choice((6_000, 12_000, 30_000))
    if chance.random() < 0.07:
        fs.files_max = chance.choice((2, 3, 4, 6))
    return machine


def _faults(chance: random.Random) -> tuple[Fault, ...]:
    if chance.random() < 0.55:
        return ()
    return tuple(
        Fault(
            call=chance.choice(CALLS), number=min(40, int(chance.expovariate(1 / 8)) + 1), error=chance.choice(ERRORS),
            forever=chance.random() < 0.3,
        )
        for _ in range(chance.choice((1, 1, 2, 3)))
    )  # fmt: skip


def _manners(
    chance: random.Random, workload: Workload, history: list[Event], story: Story, *, lying: bool, is_deadly: bool
) -> Manners | None:  # fmt: skip
    """How often which backend misbehaves."""
    how_often = chance.choice((0, 0, 0, 0.2, 0.6))
    mood = random.Random(chance.random())
    if not how_often and not lying and not is_deadly:
        return None

    def behave(batch: Batch, _call: int) -> Reaction:
        if lying and mood.random() < 0.3:
            story.lies += 1
            history.extend(Lied(payload=operation.payload, lsn=operation.lsn) for operation in batch)
            return Manner.LIE
        if is_deadly and mood.random() < 0.7:
            return [Rejected("no") if mood.random() < 0.4 else Applied() for _ in batch]
        if mood.random() >= how_often:
            return Manner.APPLY
        chosen = mood.choice(MISBEHAVIOUR)
        if isinstance(chosen, Manner):
            return chosen
        match chosen:
            case "answers":
                return _answers(mood, batch, workload.lanes[batch.lane].order)
            case "poison":
                culprits = [payload for payload in batch.payloads if payload[-1:] in b"37"]
                return Poison(culprits) if culprits else Manner.APPLY
            case _:
                return mood.choice(_RAISED)()

    return behave


_RAISED: Final[tuple[Callable[[], Exception], ...]] = (
    functools.partial(RetryBatch, after=0.01), functools.partial(Throttled, after=0.02),
    functools.partial(BatchTooLarge, count=1), BatchTooLarge, BatchRejected, BackendBroken,
    functools.partial(ValueError, "for no stated reason"),
)  # fmt: skip


def _answers(mood: random.Random, batch: Batch, order: str) -> list[Outcome]:
    """Any that keep the order of the lane: nothing is applied behind what it must not overtake."""
    waiting = {key for key in sorted(set(batch.keys)) if mood.random() < 0.3} if order == "key" else set()
    first = mood.randrange(len(batch) + 1) if order == "shard" else len(batch)
    outcomes: list[Outcome] = []
    for index, key in enumerate(batch.keys):
        if key in waiting or index >= first or (order == "none" and mood.random() < 0.3):
            outcomes.append(Retry(after=mood.choice((0, 0, 0.01)), error="locked"))
        else:
            outcomes.append(Rejected("no") if mood.random() < 0.2 else Applied())
    return outcomes


def _damage(machine: Machine, chance: random.Random, story: Story, history: list[Event]) -> None:
    """While the store is closed: its state is silently older, damaged in one generation or in both, or lost."""
    disk = machine.states.get(STATE)
    segments = [name for name in names_in(machine, f"{STORE}/wal") if name.endswith(".seg")]
    if disk is None or not segments or "data.mdb" not in names_in(machine, STATE):
        return
    held = disk.generations()
    luck = chance.random()
    # Two generations are kept: with another loss, what is left may be older than what was trimmed, and is refused.
    if luck < 0.16 and any(story.damage[what] for what in _LOSSES):
        return
    if luck < 0.08 and disk.commits and isinstance(disk.commits[-1], Checkpoint):
        disk.stale_commits = 1
        story.damage["state silently stale"] += 1
    elif luck < 0.16 and held:
        disk.garbled |= {chance.choice(held).generation}
        story.damage["one generation damaged"] += 1
    elif luck < 0.18 and held:
        disk.garbled |= {one.generation for one in held}
        # What both have covered is not remembered as given up.
        history.append(StateLost())
        story.damage["both generations damaged"] += 1
    elif luck < 0.2:
        remove_file(machine, f"{STATE}/data.mdb")
        history.append(StateLost())
        story.damage["state lost"] += 1


_LOSSES: Final = ("state silently stale", "one generation damaged", "both generations damaged")
_FATES: Final = {Buried: "burials", Cancelled: "cancellations", RequeueAsked: "requeues", Blamed: "blames"}


# --- the mode ---


def run(job: Job, progress: Progress) -> Tally:
    """Tell this part's stories."""
    started = time.monotonic()
    tally = Tally(mode=MODE)
    with quiet():
        for done in itertools.count():
            if job.is_over(done) or tally.is_full:
                break
            _take(tally, tell((job.seed << 32) + done * job.parts + job.part))
            if done % 200 == 0:
                progress(tally)
    tally.complete = job.count is None or tally.figures["seeded runs"] >= job.count
    tally.seconds = time.monotonic() - started
    return tally


def _take(tally: Tally, story: Story) -> None:
    figures = tally.figures
    figures["seeded runs"] += 1
    figures["lives"] += story.lives
    figures["steps"] += story.steps
    figures["virtual seconds"] += round(story.virtual_ns / 1e9)
    figures["lies of backends"] += story.lies
    figures.update(story.fates)
    for cut, count in story.crashes.items():
        figures["crashes"] += count
        figures[f"crashes: {cut}"] += count
    for error, count in story.faults.items():
        figures["faults injected"] += count
        figures[f"faults injected: {error}"] += count
    figures.update(story.damage)
    for problem in story.problems[:PROBLEMS_MAX]:
        tally.fail(problem, f"{MODE} seed={story.seed}")


def replay(line: str, _scratch: Path) -> list[str]:
    """Tell a story again."""
    words = dict(word.partition("=")[::2] for word in line.split()[1:])
    with quiet():
        return tell(int(words["seed"])).problems
