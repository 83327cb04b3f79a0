"""Compaction under a straggler, cut off at every point, in every way that the simulated disk allows, twice, and judged."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import pytest

from tools.modes.prediction import predict
from tools.modes.workloads import WORKLOADS
from tools.mutants.watched import open_stale
from tools.mutants.workloads import WORKLOADS as OWN
from walbatch.storage.layout import Layout
from walbatch.testing.shipped import open_engine
from walbatch.testing.simulation import Explorer, Plan, Process, Report, Workload, sweep_faults
from walbatch.testing.simulation.looks import STORE, file_bytes

SECONDS: Final = 30.0
STRAGGLERS: Final = ("compaction", "merge")


def scene(name: str) -> Workload:
    return replace({**OWN, **WORKLOADS}[name], predict=predict)


def check(report: Report) -> None:
    print(report)
    assert not report.failures, "\n".join(map(str, report.failures))


def steps_of(name: str, lanes: Mapping[str, Any] | None = None) -> list[tuple[int, ...]]:
    """The segments that each step of compaction made one of, in one life of a workload that nothing cuts off."""
    made: list[tuple[int, ...]] = []

    def watched(process: Process, lanes: Any, settings: Any) -> Any:
        engine = open_engine(process, lanes, settings)
        replaced = engine._assembly.log._replace

        def note(run: Any, rewritten: Any) -> bool:
            made.append(tuple(segment.header.number for segment in run))
            return replaced(run, rewritten)

        engine._assembly.log._replace = note  # type: ignore[method-assign]
        return engine

    check(Explorer(watched, scene(name), Plan(cuts=())).run())
    return made


@pytest.mark.parametrize(
    "name", [*STRAGGLERS, "compacted_backlog", "compacted_without_state", "half_settled"]
)
def test_the_workload_compacts_and_merges(name: str) -> None:
    """Else the tests below would say nothing."""
    made = steps_of(name)
    assert made
    assert name not in STRAGGLERS or any(len(run) > 1 for run in made), made


@pytest.mark.parametrize("strict", [False, True], ids=["prefix", "strict"])
@pytest.mark.parametrize("name", STRAGGLERS)
def test_no_crash_inside_a_compaction_breaks_a_guarantee(name: str, strict: bool) -> None:
    check(Explorer(open_engine, scene(name), Plan(strict=strict, seconds=SECONDS)).run())


@pytest.mark.parametrize("name", STRAGGLERS)
def test_no_second_crash_inside_the_recovery_breaks_a_guarantee(name: str) -> None:
    plan = Plan(depth=2, strict=True, bound=16, samples=6, inner_bound=8, inner_samples=2, seconds=SECONDS)
    check(Explorer(open_engine, scene(name), plan).run())


@pytest.mark.parametrize("name", STRAGGLERS)
def test_the_older_generation_of_the_checkpoint_expects_nothing_that_was_dropped(name: str) -> None:
    """After each crash, and at each opening, the newest generation is not usable."""
    plan = Plan(strict=True, bound=16, samples=8, seconds=SECONDS)
    check(Explorer(open_stale, WORKLOADS[name], plan).run())


def test_a_shard_that_was_reading_back_goes_on_in_what_was_compacted_meanwhile() -> None:
    check(Explorer(open_engine, scene("compacted_backlog"), Plan(bound=4, samples=2, seconds=SECONDS)).run())


def test_without_state_an_old_operation_does_not_undo_a_newer_one_that_was_dropped() -> None:
    check(
        Explorer(open_engine, OWN["compacted_without_state"], Plan(bound=4, samples=2, seconds=SECONDS)).run()
    )


@pytest.mark.parametrize("call", ["rename", "unlink", "create", "sync_directory", "datasync"])
def test_no_failing_call_inside_a_compaction_breaks_a_guarantee(call: str) -> None:
    plan = Plan(bound=4, samples=2, from_first_submit=True, seconds=2)
    visited = 0
    for fault, report in sweep_faults(
        open_engine, scene("merge"), [errno.EIO, errno.ENOSPC], plan, calls={call}, every=3
    ):
        visited += 1
        assert not report.failures, f"{fault}: {report.failures[0]}"
    assert visited >= 4


def test_what_was_dropped_is_noted_in_the_log_of_a_simulated_store() -> None:
    noted: list[bytes] = []

    def run(session: Any) -> None:
        WORKLOADS["compaction"].run(session)
        noted.append(file_bytes(session.process.machine, Layout(STORE).dropped))

    check(Explorer(open_engine, replace(scene("compaction"), run=run), Plan(cuts=())).run())
    assert noted[0].startswith(b"WBst")
