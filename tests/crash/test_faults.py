"""The faults mode: every place that calls a port is reached, its cells are visited, and nothing breaks.

Behind it: what it and its neighbours have found in the engine, each with its smallest test.
"""

from __future__ import annotations

import errno
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import walbatch as wb
from tests.support import FAST, SMALL, Recorder
from tools.modes import faults
from tools.modes.lives import images_of, live
from tools.modes.tally import Job
from tools.modes.workloads import INCOMPRESSIBLE, remove_file
from walbatch.testing.simulation import Cut, Fault, FaultPlan, LanePlan, Machine, Manner, Session, Workload
from walbatch.testing.simulation.backend import Reaction
from walbatch.testing.simulation.explore import quiet
from walbatch.testing.simulation.faults import CallSite
from walbatch.testing.simulation.history import Acknowledged, Drained, Ended, Event
from walbatch.testing.simulation.looks import STORE, names_in, tree_bytes


@pytest.fixture(scope="module")
def scenarios() -> list[faults.Scenario]:
    with quiet():
        return faults.scenarios()


def test_every_place_in_the_source_that_calls_a_port_is_reached(scenarios: list[faults.Scenario]) -> None:
    reached = {site for scenario in scenarios for _, _, site in scenario.calls}
    assert faults.call_sites() - reached == faults.UNREACHED.keys()
    assert reached <= faults.call_sites()
    assert CallSite("write", "storage/segment.py", "SegmentWriter.append") in reached
    assert CallSite("open state", "engine/opening.py", "open_assembly") in reached


def test_every_cell_is_visited_in_the_first_turn(scenarios: list[faults.Scenario]) -> None:
    visits = list(faults.visits(scenarios))
    first = {visit.cell for visit in visits if visit.turn == 0}
    assert first == {visit.cell for visit in visits}
    reached = {site for scenario in scenarios for _, _, site in scenario.calls}
    assert {cell.partition("|")[0] for cell in first} == {str(site) for site in reached}
    for site in reached:
        for error in ("EIO", "ENOSPC", "EDQUOT", "EROFS"):
            assert {f"{site}|{error}|once", f"{site}|{error}|forever"} <= first
    assert any("EMFILE" in cell for cell in first)


def test_a_part_of_the_matrix_breaks_no_guarantee(tmp_path: Path) -> None:
    job = Job(seed=0, part=0, parts=25, scratch=tmp_path)
    tally = faults.run(job, lambda tally: None)
    assert not tally.failures, tally.failures[0]
    assert tally.complete
    assert tally.figures["runs"] >= len(tally.cells) >= 50
    assert tally.figures["crash states"] > 100
    assert tally.figures["faults injected"] >= tally.figures["runs"]


def test_a_line_replays_the_run_that_it_names(tmp_path: Path) -> None:
    line = "faults scenario=single call=save_checkpoint number=2 errno=EIO forever=1 turn=0"
    assert faults.replay(line, tmp_path) == []
    gone = "faults scenario=single call=write number=4000 errno=EIO forever=0 turn=0"
    assert faults.replay(gone, tmp_path) == ["replay: the fault did not strike"]


# --- what was found ---


def submit_to(session: Session, *keys: bytes, lane: str = "put") -> None:
    for key in keys:
        session.submit(key, lane, size=1800)


def test_a_store_that_lost_its_state_and_then_crashed_opens_again() -> None:
    """The checkpoint that follows the loss knows nothing of what was trimmed: the log has to tell."""
    workload = Workload(name="lost", run=lambda session: None, settings=INCOMPRESSIBLE)
    machine, history = Machine(), list[Event]()

    def fill(session: Session) -> None:
        session.open()
        submit_to(session, b"a", b"b", b"c", b"d")
        session.close()

    assert live(machine, history, workload, seed=1, name="0", use=fill).error == ""
    assert "0000000000000000001.seg" not in names_in(machine, f"{STORE}/wal")
    remove_file(machine, f"{STORE}/state/data.mdb")
    history.append(Ended(cut=Cut.KILL, at_ns=0))

    def open_and_die(session: Session) -> None:
        session.open()
        session.process.threads.kill()

    live(machine, history, workload, seed=1, name="1", use=open_and_die)
    history.append(Ended(cut=Cut.KILL, at_ns=0))
    assert live(machine.clone(), history, workload, seed=1, name="2").error == ""
    assert workload.oracle().judge(history) == []


@pytest.mark.parametrize("call", ["read", "open_read", "size"])
def test_a_log_that_cannot_be_read_when_the_state_is_lost_is_a_storage_error(call: str) -> None:
    workload = Workload(name="lost", run=lambda session: None)
    machine, history = Machine(), list[Event]()

    def fill(session: Session) -> None:
        session.open()
        session.submit(b"a")
        session.close()

    live(machine, history, workload, seed=1, name="0", use=fill)
    remove_file(machine, f"{STORE}/state/data.mdb")
    for number in range(1, 8):
        plan = FaultPlan((Fault(call=call, number=number, error=errno.EIO),))
        life = live(machine.clone(), [*history], workload, seed=1, name="1", faults=plan)
        assert life.error == "", "an OSError gets through"


def test_what_an_interval_lane_acknowledged_is_synced_also_when_the_engine_stops_for_another_reason() -> None:
    """A full disk ends the engine; nobody opens the store for hours; then the power goes."""
    plans = {"put": LanePlan(durability="interval", interval_ms=5)}
    workload = Workload(name="stopped", run=lambda session: None, lanes=plans)
    machine, history = Machine(), list[Event]()

    def use(session: Session) -> None:
        session.open()
        session.submit(b"a")
        with pytest.raises(wb.StorageError):
            session.submit(b"b")
        session.pause(60)
        session.close()

    fault = FaultPlan((Fault(call="write", number=4, error=errno.EIO),))
    life = live(machine, history, workload, seed=1, name="0", use=use, faults=fault)
    assert life.error == ""
    history.append(Ended(cut=Cut.POWER, at_ns=life.process.clock.now_ns))
    assert sum(isinstance(event, Acknowledged) for event in history) == 1
    for label, image in machine.images(Cut.POWER):
        after: list[Event] = []
        assert live(image.clone(), after, workload, seed=1, name="1").error == ""
        assert isinstance(after[-1], Drained)
        assert workload.oracle().judge([*history, *after]) == [], label


def test_two_flushes_of_a_lane_that_does_not_move_wait_and_do_not_spin() -> None:
    away = True

    def manners(_batch: wb.Batch, _call: int) -> Reaction:
        return ConnectionRefusedError("nobody listens") if away else Manner.APPLY

    workload = Workload(name="flushes", run=lambda session: None)

    def use(session: Session) -> None:
        nonlocal away
        session.open()
        session.submit(b"a")
        before = session.process.threads.steps
        session.together(*[lambda: session.engine.flush("put", timeout=5.0)] * 2)
        assert session.process.threads.steps - before < 20_000, "they wake one another for ever"
        away = False
        session.close()

    assert live(Machine(), [], workload, seed=1, name="0", use=use, manners=manners).error == ""


def test_closing_says_so_when_unlogged_operations_of_a_paused_lane_are_dropped() -> None:
    reports = []
    workload = Workload(name="dropped", run=lambda session: None, lanes={"put": LanePlan(durability="none")})

    def use(session: Session) -> None:
        session.open()
        session.engine.pause("put")
        session.submit(b"a")
        reports.append(session.engine.close(timeout=5.0))

    assert live(Machine(), [], workload, seed=1, name="0", use=use).error == ""
    assert reports[0].reason.startswith("drained, except for what is delayed, paused")


def test_a_lost_log_is_refused_again_and_again_although_its_state_is_damaged_too(tmp_path: Path) -> None:
    """Moving the damaged state aside would make the second opening take the store for a new one."""
    store = tmp_path / "q"
    with wb.Engine.open(store, {"put": wb.Lane(Recorder(), trigger=FAST)}, settings=SMALL) as engine:
        engine.submit("put", key=b"k", payload=b"v")
    shutil.rmtree(store / "wal")
    data = bytearray((store / "state" / "data.mdb").read_bytes())
    data[: 2 * 4096] = b"\xff" * (2 * 4096)
    (store / "state" / "data.mdb").write_bytes(data)
    for _ in range(2):
        with pytest.raises(wb.CorruptionError):
            wb.Engine.open(store, {"put": wb.Lane(Recorder())}, settings=SMALL)
    assert (store / "state" / "data.mdb").read_bytes() == bytes(data)
    assert not list((store / "quarantine").iterdir())


@pytest.mark.parametrize("cut", Cut, ids=str)
def test_recovery_that_dies_again_and_again_does_not_fill_the_quarantine(
    cut: Cut, scenarios: list[faults.Scenario]
) -> None:
    torn = next(scenario for scenario in scenarios if scenario.name.count("@") == 2)  # one crash, a torn tail
    machine = torn.start()
    whole = torn.start()
    assert live(whole, [*torn.past], torn.workload, seed=torn.seed, name="once").error == ""
    expected = tree_bytes(whole, f"{STORE}/quarantine")
    assert expected > 0
    rounds = 0
    for step in range(20, 120):
        life = live(machine, [*torn.past], torn.workload, seed=torn.seed, name=f"try{step}", crash_at=step)
        if not life.killed or sum(name.endswith(".seg") for name in names_in(machine, f"{STORE}/wal")) > 1:
            break  # the new segment is there: what follows is another recovery
        machine = images_of(machine, cut, seed=step)[0][1].clone()
        rounds += 1
    assert rounds > 10
    held = names_in(machine, f"{STORE}/quarantine")
    assert len(held) <= 3, "one copy, its note, and what the last try was writing"
    assert tree_bytes(machine, f"{STORE}/quarantine") <= 2 * expected


def test_an_interval_passes_also_while_somebody_waits_for_room_on_a_full_disk() -> None:
    plans = {"put": LanePlan(durability="interval", interval_ms=5)}
    settings = replace(INCOMPRESSIBLE, disk_full_wait_s=5)
    workload = Workload(name="full", run=lambda session: None, lanes=plans, settings=settings)
    machine, history = Machine(), list[Event]()
    machine.fs.capacity_bytes = 3_000  # less than a segment, so that it is not preallocated

    def use(session: Session) -> None:
        session.open()
        session.submit(b"a")

        def die() -> None:
            session.pause(1)
            session.process.threads.kill()

        session.together(lambda: session.submit(b"b", size=2_500), die)

    life = live(machine, history, workload, seed=1, name="0", use=use)
    assert life.killed
    history.append(Ended(cut=Cut.POWER, at_ns=life.process.clock.now_ns))
    for label, image in machine.images(Cut.POWER):
        after: list[Event] = []
        twin = image.clone()
        twin.fs.capacity_bytes = None
        assert live(twin, after, workload, seed=1, name="1").error == ""
        assert workload.oracle().judge([*history, *after]) == [], label
