"""Hypothesis drives the shipped engine through lives on the simulated machine, and shrinks what it finds.

The rules are those of the explorer's workloads; what they do not do is try everything. A life is a list of steps, which runs when
the rule that ends it is drawn: cut off there, or at a port call in the middle. Then one of the images that the crash may
leave is drawn, a copy of it is recovered and drained, the oracle judges the whole history, and the next life begins on it.
"""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from tests.testing.engines import Mistake, ToyEngine
from tests.testing.test_explore import WithoutDirectorySync, WithoutSync
from walbatch.config import Trigger
from walbatch.errors import CorruptionError, WalbatchError
from walbatch.testing.shipped import open_engine
from walbatch.testing.simulation import (
    Cut,
    FailedSync,
    Fault,
    LanePlan,
    Machine,
    Process,
    ProcessKilled,
    Session,
    Workload,
)
from walbatch.testing.simulation.history import Ended, Event
from walbatch.testing.simulation.verify import verify_by_use
from walbatch.testing.simulation.workload import OpenEngine

EXAMPLES = 2 * settings().max_examples
STEPS = 16
BOUND, SAMPLES = 24, 8
STEPS_INTO_LIFE_MAX = 600
"""A crash in the middle of a life falls at a port call up to this one; a shorter life ends where its steps do."""

Use = Callable[[Session], object]


class Step(NamedTuple):
    """One thing that is done in a life; what needs no engine is done also where none could be opened."""

    do: Use
    needs_engine: bool = True


LANES = {
    "put": LanePlan(shards=2),
    "exact": LanePlan(transactional=True, shards=2),
    "interval": LanePlan(durability="interval"),
    "free": LanePlan(order="none", trigger=Trigger(count=2, linger_ms=0)),
}
some_lane = st.sampled_from(sorted(LANES))
some_key = st.sampled_from([b"a", b"b", b"c"])
some_size = st.sampled_from([0, 40, 600, 2_000])
some_image = st.integers(0, BOUND + 2 * SAMPLES)
some_moment = st.none() | st.integers(1, STEPS_INTO_LIFE_MAX)


@pytest.fixture(autouse=True, scope="module")
def quiet() -> Iterator[None]:
    """The engine logs each failure that the rules cause."""
    logger = logging.getLogger("walbatch")
    before, logger.disabled = logger.disabled, True
    yield
    logger.disabled = before


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is under test."""

    open_engine: OpenEngine = open_engine
    wrap_fs: Callable[[Any], Any] | None = None

    @property
    def is_shipped(self) -> bool:
        """The toy can do less."""
        return self.open_engine is open_engine


class Lives(RuleBasedStateMachine):
    """One store through many lives."""

    subject: ClassVar[Subject] = Subject()
    plans: ClassVar[dict[str, LanePlan]] = LANES
    failed: ClassVar[list[list[str]]] = []
    """The steps of each run that failed, the shrunk one last."""

    def __init__(self) -> None:
        super().__init__()
        self.machine = Machine()
        self.history: list[Event] = []
        self.steps: list[Step] = []
        self.log: list[str] = []
        self.lives = 0
        self.seed = 0
        self.strict = False
        self.was_full = False
        self.workload = Workload(name="lives", run=lambda session: None, lanes=self.plans)

    # --- knobs ---

    @initialize(
        seed=st.integers(0, 3),
        strict=st.booleans(),
        failed_sync=st.sampled_from([FailedSync.DROP, FailedSync.REVERT]),
    )
    def begin(self, seed: int, strict: bool, failed_sync: FailedSync) -> None:
        self.seed, self.strict = seed, strict
        self.machine.fs.failed_sync = failed_sync

    # --- what a user does ---

    def step(self, name: str, do: Use, *, needs_engine: bool = True) -> None:
        self.log.append(name)
        self.steps.append(Step(do, needs_engine))

    @rule(lane=some_lane, key=some_key, size=some_size)
    def submit(self, lane: str, key: bytes, size: int) -> None:
        lane = lane if lane in self.plans else "put"
        self.step("submit", lambda session: session.submit(key, lane, size=size))

    @rule(lane=some_lane, some=st.lists(some_key, min_size=1, max_size=5), size=some_size)
    def submit_many(self, lane: str, some: list[bytes], size: int) -> None:
        if lane in self.plans and self.subject.is_shipped:
            self.step("submit_many", lambda session: session.submit_many(some, lane, size=size))

    @rule(key=some_key, count=st.integers(1, 3), wait=st.booleans())
    def submit_nowait(self, key: bytes, count: int, wait: bool) -> None:
        def do(session: Session) -> None:
            waits = [session.submit_nowait(key) for _ in range(count)]
            for ticket in waits if wait else ():
                ticket()

        if self.subject.is_shipped:
            self.step("submit_nowait", do)

    @rule(first=some_key, second=some_key)
    def together(self, first: bytes, second: bytes) -> None:
        if self.subject.is_shipped:
            self.step(
                "together",
                lambda session: session.together(
                    lambda: session.submit(first), lambda: session.submit(second)
                ),
            )

    @rule(seconds=st.sampled_from([0.001, 0.05, 1.0]))
    def pause(self, seconds: float) -> None:
        self.step("pause", lambda session: session.pause(seconds))

    @rule()
    def flush(self) -> None:
        if self.subject.is_shipped:
            self.step("flush", lambda session: session.engine.flush(timeout=60))

    # --- what happens to it ---

    @rule(
        call=st.sampled_from(["datasync", "sync_directory", "write", "create", "save checkpoint"]),
        error=st.sampled_from([errno.EIO, errno.ENOSPC]), number=st.integers(1, 3), forever=st.booleans(),
    )  # fmt: skip
    def fail_a_call(self, call: str, error: int, number: int, forever: bool) -> None:
        def do(session: Session) -> None:
            plan = session.process.faults
            plan.faults = (*plan.faults, Fault(call=call, number=number, error=error, forever=forever))

        self.step(f"fail {call}", do, needs_engine=False)

    @rule(room=st.sampled_from([0, 700, 5_000]))
    def fill_the_disk(self, room: int) -> None:
        def do(session: Session) -> None:
            fs = session.process.machine.fs
            fs.capacity_bytes = sum(inode.size for inode in fs.inodes(fs.root)) + room

        self.step("fill the disk", do, needs_engine=False)

    @rule()
    def make_room(self) -> None:
        def do(session: Session) -> None:
            session.process.machine.fs.capacity_bytes = None

        self.step("make room", do, needs_engine=False)

    @rule(hours=st.sampled_from([-5, -1, 1, 1_000]))
    def jump_the_wall_clock(self, hours: int) -> None:
        self.step("jump", lambda session: session.process.clock.jump_wall(hours * 3_600 * 10**9))

    # --- how a life ends ---

    @rule(cut=st.sampled_from(Cut), image=some_image, at=some_moment)
    def crash(self, cut: Cut, image: int, at: int | None) -> None:
        self.log.append(f"crash by {cut}")
        self.live(lambda session: session.process.threads.kill(), crash_at=at)
        self.left(cut, image)

    @rule(drain=st.booleans())
    def close(self, drain: bool) -> None:
        self.log.append("close")
        self.live(lambda session: session.close(drain=drain))
        self.left(Cut.KILL, 0)

    def live(self, end: Use, crash_at: int | None = None) -> None:
        """Run the steps of this life, then `end`."""
        life = str(self.lives)
        steps, self.steps = self.steps, []
        self.lives += 1
        self.was_full = False
        process = Process(
            self.machine,
            self.history,
            seed=self.seed,
            life=life,
            crash_at=crash_at,
            wrap_fs=self.subject.wrap_fs,
        )
        session = Session(process, self.subject.open_engine, self.workload, life)

        def run() -> None:
            self.quietly(session, lambda session: session.open())
            for step in steps:
                if session.engine is not None or not step.needs_engine:
                    self.quietly(session, step.do)
            if session.engine is not None:
                self.quietly(session, end)

        with contextlib.suppress(ProcessKilled):
            self.run(process, run)
        self.now_ns = process.clock.now_ns

    def run(self, process: Process, main: Callable[[], None]) -> None:
        """Run a process. Where `main` fails, it ends at once: the engine's threads would go on for ever."""
        problems: list[Exception] = []

        def guarded() -> None:
            try:
                main()
            except Exception as error:  # noqa: BLE001 - raised below
                problems.append(error)
                process.threads.kill()

        try:
            process.run(guarded)
        except Exception as error:  # noqa: BLE001 - as above
            problems.append(error)
        finally:
            if problems:
                self.failed.append(self.log)
                raise problems[0]

    def quietly(self, session: Session, use: Use) -> None:
        """Take a step. The engine may refuse it where a call has failed or the disk was full in this life."""
        self.was_full = self.was_full or self.machine.fs.capacity_bytes is not None
        try:
            use(session)
        except WalbatchError:
            if not session.process.faults.hits and not self.was_full:
                raise

    def left(self, cut: Cut, image: int) -> None:
        """Go on with one of the machines that the end of this life may leave, after a look at a copy of it."""
        self.history.append(Ended(cut=cut, at_ns=self.now_ns))
        found = self.machine.images(cut, bound=BOUND, samples=SAMPLES, seed=self.seed, strict=self.strict)
        machines = [machine for _, machine in found]
        self.machine = machines[image % len(machines)].clone()
        self.judge()

    def judge(self) -> None:
        """Recover a copy, drain it, and ask the oracle about everything so far."""
        copy, history = self.machine.clone(), self.history.copy()
        copy.fs.capacity_bytes = None
        life = f"look {self.lives}"
        process = Process(copy, history, seed=self.seed, life=life, wrap_fs=self.subject.wrap_fs)
        session = Session(process, self.subject.open_engine, self.workload, life)
        oracle = self.workload.oracle()
        self.run(process, lambda: session.run(verify_by_use))
        problems = oracle.judge(history)
        if problems:
            self.failed.append(self.log)
        assert not problems, problems

    def teardown(self) -> None:
        if self.steps:
            self.crash(Cut.POWER, 0, None)


def test_no_sequence_of_lives_breaks_a_guarantee() -> None:
    run_state_machine_as_test(
        Lives, settings=settings(max_examples=EXAMPLES, stateful_step_count=STEPS, deadline=None)
    )


# --- what it finds, and how small ---


class WithoutNames(Lives):
    """The shipped engine, on a file system whose directory syncs do nothing."""

    subject = Subject(wrap_fs=WithoutDirectorySync)
    failed: ClassVar[list[list[str]]] = []


class WithoutSyncs(Lives):
    """The shipped engine, on a file system whose syncs of files do nothing."""

    subject = Subject(wrap_fs=WithoutSync)
    failed: ClassVar[list[list[str]]] = []


class Toy(Lives):
    """The toy, which appends behind a torn tail."""

    plans: ClassVar[dict[str, LanePlan]] = {"put": LanePlan()}
    subject = Subject(
        open_engine=lambda process, lanes, settings: ToyEngine(process, lanes, (Mistake.APPENDS_BEHIND_TEAR,))
    )
    failed: ClassVar[list[list[str]]] = []


@pytest.mark.parametrize("lives", [WithoutNames, WithoutSyncs, Toy], ids=lambda lives: lives.__name__)
def test_a_planted_mistake_is_found_and_shrunk_to_its_cause(lives: type[Lives]) -> None:
    with pytest.raises((AssertionError, CorruptionError), match=r"is lost|no sync has succeeded"):
        run_state_machine_as_test(
            lives,
            settings=settings(
                max_examples=100, stateful_step_count=STEPS, deadline=None, derandomize=True, database=None,
                phases=(Phase.generate, Phase.shrink), report_multiple_bugs=False, print_blob=False,
            ),
        )  # fmt: skip
    smallest = lives.failed[-1]
    assert len(smallest) <= 5, smallest
    assert len(smallest) < len(max(lives.failed, key=len)), "it was longer when it was found"
    assert smallest[-1] == "crash by power"
