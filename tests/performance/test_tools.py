"""The tools that show how costs grow and where the time goes: what they compute of what they measure."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools.bench import breakdown, growth
from tools.bench.growth import Found, Load, Measured

ONE = Measured(submit_cpu_us=2.0, submit_rate=5e5, drain_cpu_us=1.0, drain_rate=1e6, peak_mib=30.0)


def found_with(costs: dict[int, float]) -> Found:
    """A curve whose submits cost that much, measured once."""
    return {
        "operations": {
            x: [Measured(submit_cpu_us=cost, submit_rate=1.0, drain_cpu_us=1.0, drain_rate=1.0, peak_mib=1.0)]
            for x, cost in costs.items()
        }
    }


# --- growth ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("load", [
    Load(count=300, group=100), Load(count=40, threads=4, shards=3), Load(count=40, threads=2, flows=True),
    Load(count=5, payload_bytes=100_000, group=2, keys=2),
], ids=["groups", "threads", "delivered meanwhile", "large"])  # fmt: skip
def test_a_point_is_measured(tmp_path: Path, load: Load) -> None:
    found = growth.measure(load, tmp_path)
    assert found.submit_cpu_us > 0
    assert found.submit_rate > 0
    assert (found.drain_rate == 0) == load.flows
    assert found.peak_mib > 10


def test_every_point_of_a_curve_submits_what_it_says() -> None:
    for curve in growth.curves(quick=False).values():
        for load in curve.points.values():
            if load.threads or load.count > 10_000:
                continue
            operations = [pair for group in growth.groups_of(load) for pair in group]
            assert len(operations) == load.count
            assert {len(payload) for _, payload in operations} == {load.payload_bytes}
            assert len({key for key, _ in operations}) == min(load.keys or load.count, load.count)


@pytest.mark.parametrize(("costs", "expected"), [
    ({10: 2.0, 100: 2.0}, [None, pytest.approx(0.0)]),
    ({10: 2.0, 100: 20.0, 1_000: 200.0}, [None, pytest.approx(1.0), pytest.approx(1.0)]),
    ({10: 2.0, 1_000: 0.2}, [None, pytest.approx(-0.5)]),
    ({10: 0.0, 100: 2.0}, [None, None]),
])  # fmt: skip
def test_the_exponent_of_a_growth_leads_from_one_point_to_the_next(
    costs: dict[int, float], expected: list[float | None]
) -> None:
    assert growth.exponents(found_with(costs)["operations"], "submit_cpu_us") == expected


def test_what_grows_faster_than_linear_is_marked() -> None:
    wanted = growth.curves(quick=False)
    lines = list(growth.table(found_with({10: 1.0, 100: 1.0, 1_000: 10.0}), wanted))
    assert ["!" in line for line in lines[2:]] == [False, False, True]
    of_payloads = {"payloads": found_with({10: 1.0, 100: 10.0, 1_000: 1_000.0})["operations"]}
    assert ["!" in line for line in growth.table(of_payloads, wanted)][2:] == [False, False, True]


def test_the_page_has_a_place_for_the_tables_and_keeps_all_else() -> None:
    page = growth.DOCUMENT.read_text(encoding="utf-8")
    once = growth.filled(page, ["", "a table"])
    assert once.count("```text\na table\n```\n<!-- end of growth -->") == 1
    assert growth.filled(once, ["", "a table"]) == once
    before, _, rest = page.partition("<!-- growth -->")
    assert once.startswith(before)
    assert once.endswith(rest.partition("<!-- end of growth -->")[2])


def test_measurements_survive_their_json() -> None:
    found: Found = {"keys": {1: [ONE, ONE], 10: [ONE]}}
    assert growth.from_json(growth.as_json(found, quick=True)) == found


def test_a_round_that_does_not_fit_leaves_points_out_but_never_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(growth, "in_a_process", lambda load, folder: ONE)
    wanted = growth.curves(quick=True)
    found = growth.measure_all(wanted, rounds=3, budget_s=0.0, folder=tmp_path)
    assert {len(measured) for points in found.values() for measured in points.values()} == {1}
    assert found.keys() == wanted.keys()
    found = growth.measure_all(wanted, rounds=3, budget_s=60.0, folder=tmp_path)
    assert {len(measured) for points in found.values() for measured in points.values()} == {3}


def test_an_unknown_curve_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        growth.main(["--only", "colour"])
    assert ended.value.code == 2
    assert "no curve is named colour: there are operations" in capsys.readouterr().err


def test_the_process_of_a_point_tells_its_measurement_as_json(tmp_path: Path) -> None:
    load = json.dumps({"count": 50, "group": 25})
    done = subprocess.run(
        [sys.executable, growth.__file__, "--point", load, "--dir", str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert Measured(**json.loads(done.stdout)).submit_rate > 0


# --- breakdown -------------------------------------------------------------------------------------------------------

FOLDER = "/somewhere/walbatch"
CALLER = ("thread (1): MainThread", "the_measured_part (/tools/breakdown.py:80)")


@pytest.mark.parametrize(("frames", "layer"), [
    ([f"RealFile.datasync ({FOLDER}/storage/filesystem.py:62)"], "sync call"),
    ([f"RealFile.write ({FOLDER}/storage/filesystem.py:33)"], "write call"),
    ([f"SegmentWriter.append ({FOLDER}/storage/segment.py:184)"], "segment and its index"),
    ([f"encode_body ({FOLDER}/core/columns.py:90)"], "encode and decode frames"),
    ([f"CommitGroup.add ({FOLDER}/core/commit_group.py:70)"], "commit group"),
    ([f"Committer._lead ({FOLDER}/runtime/committer.py:7)", "Condition.wait (/python/threading.py:3)"], "locks of the interpreter"),
    ([f"AsyncEngine.submit ({FOLDER}/aio.py:7)"], "checks of arguments"),
    ([f"ShardQueue.cut ({FOLDER}/core/batcher.py:7)"], "take in, cut, settle"),
    ([f"Committer._lead ({FOLDER}/runtime/committer.py:7)", "accumulate (/elsewhere/library.py:3)"], "lead, queue and wake"),
    (["run.<locals>.submit_alone (/tools/breakdown.py:90)"], "the program itself"),
])  # fmt: skip
def test_a_sample_belongs_to_the_layer_of_its_innermost_frame(frames: list[str], layer: str) -> None:
    assert list(breakdown._attributed([*CALLER, *frames])) == [("caller", layer)]


def test_a_sample_before_the_measured_part_belongs_to_none() -> None:
    stack = ["thread (1): MainThread", f"Engine.open ({FOLDER}/engine/engine.py:60)"]
    assert list(breakdown._attributed(stack)) == []


def test_the_samples_of_other_threads_are_told_apart() -> None:
    stack = ["thread (2): walbatch-timer", f"Dispatcher._run_timer ({FOLDER}/runtime/dispatcher.py:60)"]
    assert list(breakdown._attributed(stack)) == [("others", "dispatch and read back")]


def test_every_layer_has_a_module_that_there_is() -> None:
    root = Path(breakdown.__file__).parents[2] / "walbatch"
    places = [f"{path}:one" for path in root.rglob("*.py")] + [
        "storage/filesystem.py:RealFile.datasync", "storage/filesystem.py:RealFile.write", "storage/filesystem.py:RealFile.read",
        "asyncio/events.py:one", "threading.py:one",
    ]  # fmt: skip
    for layer, pattern in breakdown.LAYERS:
        assert any(pattern.search(place) for place in places), layer


def test_instructions_are_read_as_the_own_cost_of_each_function() -> None:
    text = "events: Ir\nfn=(1) main\n3 10\ncfn=(2) work\ncalls=2 5\n3 700\n+1 5\nfn=(2)\n5 350\n* 350\nfn=(1)\n9 1\n"
    assert breakdown._read_callgrind(text) == {"main": 16, "work": 700}


@pytest.mark.parametrize("name", breakdown.COUNTS)
def test_every_workload_runs(tmp_path: Path, name: str) -> None:
    timed = breakdown.run(name, 2_000 if name != "w1" else 20, tmp_path, still=name != "w5")
    assert timed.wall_s > 0
    assert timed.cpu_s > 0


@pytest.mark.parametrize(("arguments", "tool"), [(["w1"], "py-spy"), (["--instructions", "w1"], "valgrind")])
def test_a_tool_that_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], tool: str
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setenv("PATH", os.environ["PATH"])
    with pytest.raises(SystemExit, match=f"{tool} is not on the PATH: install it first"):
        breakdown.main(arguments)
