"""The whole in a few operations: everything that goes in comes out, whatever fails is told, nothing is left behind."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest

import walbatch as wb
from tests.bench.tiny import ALWAYS, COUNTS, TINY, bench
from walbatch.bench import catalogue, payloads
from walbatch.bench import place as places
from walbatch.bench.embedded import Sqlite
from walbatch.bench.place import Place, check_disk, file_system, work_place
from walbatch.bench.profile import FULL, QUICK, Profile
from walbatch.bench.results import Results
from walbatch.bench.rounds import NAMES, check_names
from walbatch.bench.subject import Subject, Take
from walbatch.bench.trace import GROUP_COUNT, TRACE, _groups, read_writes
from walbatch.bench.workloads import Workload


def test_every_workload_counts_every_operation_in_every_round(tmp_path: Path) -> None:
    results = bench(tmp_path).run([*COUNTS], ALWAYS)
    assert results.problems == []
    expected = {
        (workload, subject)
        for subject in ALWAYS
        for workload in next(found for found in catalogue.SUBJECTS if found.name == subject).workloads & {*COUNTS}
    } | {("w7", "walbatch"), ("w7", "lmdb")}  # fmt: skip
    found = Counter((sample.workload, sample.subject) for sample in results.samples)
    assert found == dict.fromkeys(expected, TINY.rounds)
    for sample in results.samples:
        assert sample.figures["count"] == COUNTS[sample.workload]
        assert sample.figures["rate"] > 0
    assert list(tmp_path.iterdir()) == []


def test_another_subject_comes_first_in_each_round(tmp_path: Path) -> None:
    results = bench(tmp_path).run(["w1"], ALWAYS)
    by_round = {
        turn: [sample.subject for sample in results.samples if sample.round == turn] for turn in (0, 1)
    }
    assert by_round[0] == ["walbatch", "raw", "sqlite", "lmdb"]
    assert by_round[1] == ["raw", "sqlite", "lmdb", "walbatch"]


def test_backlogs_are_opened_and_drained_whole(tmp_path: Path) -> None:
    results = bench(tmp_path).run(["w8"], None)
    assert results.problems == []
    found = Counter(sample.subject for sample in results.samples)
    assert found == {"200 pending": 2, "400 pending": 2, "200 drained": 1, "400 drained": 1}
    assert results.spread("w8", "400 drained", "drain_rss_mib") is not None


def test_lanes_beside_a_sick_one_are_counted(tmp_path: Path) -> None:
    results = bench(tmp_path).run(["w10"], None)
    assert results.problems == []
    found = Counter(sample.subject for sample in results.samples)
    assert found == {"healthy": 2, "hanging": 2, "failing": 2}


def test_the_log_is_weighed_and_starts_are_timed(tmp_path: Path) -> None:
    results = bench(tmp_path).run(["disk", "start"], None)
    assert results.problems == []
    (weight,) = results.values("disk", "walbatch", "written_ratio").values()
    assert weight > 1
    assert results.measured("start") == ["bare", "import", "engine", "help"]
    (bare,), (imported,), (over,) = (
        results.values("start", subject, figure).values()
        for subject, figure in (("bare", "ms"), ("import", "ms"), ("import", "over_bare_ms"))
    )
    assert over == pytest.approx(imported - bare)


# --- the trace -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not TRACE.exists(), reason="the trace stands in a source checkout only")
def test_the_trace_is_replayed_in_groups_that_no_read_divides(tmp_path: Path) -> None:
    results = bench(tmp_path).run(["w9"], ALWAYS)
    assert results.problems == []
    writes = read_writes(TRACE, TINY.trace_bytes)
    assert sum(write.size for write in writes) <= TINY.trace_bytes
    counts = {sample.figures["count"] for sample in results.samples}
    assert counts == {float(len(writes))}
    groups = [group for _, group in _groups(writes)]
    assert list(itertools.chain.from_iterable(groups)) == writes
    assert all(len({write.run for write in group}) == 1 and len(group) <= GROUP_COUNT for group in groups)


def test_a_trace_that_is_not_there_is_told(tmp_path: Path) -> None:
    results = bench(tmp_path, trace=tmp_path / "none.zst").run(["w9"], ALWAYS)
    assert results.samples == []
    (problem,) = results.problems
    assert problem.startswith("w9: left out:")


# --- what goes wrong -------------------------------------------------------------------------------------------------


class _Failing(Sqlite):
    name: ClassVar[str] = "failing"

    def put_group(self, group: object) -> None:
        raise OSError(28, "No space left on device")


class _Forgetful(Sqlite):
    name: ClassVar[str] = "forgetful"

    def drain(self, count: int, take: Take) -> int:
        return count - 1


def test_a_subject_that_fails_is_told_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subjects: tuple[type[Subject], ...] = (_Failing, _Forgetful, Sqlite)
    monkeypatch.setattr(catalogue, "SUBJECTS", subjects)
    results = bench(tmp_path).run(["w3", "w5"], None)
    assert results.problems == [
        "w3: failing failed: OSError: [Errno 28] No space left on device",
        "w5: failing failed: OSError: [Errno 28] No space left on device",
        "w5: forgetful failed: RuntimeError: 0 of 1 operations came out",
    ]
    assert results.measured("w3") == ["forgetful", "sqlite"]
    assert results.measured("w5") == ["sqlite"]


def test_a_thread_that_fails_ends_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Breaking(Sqlite):
        name: ClassVar[str] = "breaking"

        def put(self, item: tuple[int, bytes]) -> None:
            if item[0]:
                raise TimeoutError("the disk is gone")
            super().put(item)

    monkeypatch.setattr(catalogue, "SUBJECTS", (Breaking,))
    results = bench(tmp_path).run(["w2"], None)
    assert results.problems == ["w2: breaking failed: TimeoutError: the disk is gone"]


@pytest.mark.parametrize(
    ("seconds_max", "start_s", "counts"),
    [
        (60.0, 0.0, [1, 5, 20, 20]), (0.13, 0.0, [1, 5, 10, 10]), (0.039, 0.0, [1, 4, 4]), (0.001, 0.0, [1, 1, 1]),
        (1.2, 1.0, [1, 1, 1]), (4.1, 1.0, [1, 5, 20, 20]),
    ],
    ids=["all", "whole groups that fit", "part of a group", "one at least", "slow to start", "slow to start, and more time"],
)  # fmt: skip
def test_a_slow_subject_does_what_fits_into_its_time(
    tmp_path: Path, seconds_max: float, start_s: float, counts: list[int]
) -> None:
    asked: list[int] = []

    def measure(subject: Subject, folder: Path, count: int, profile: Profile) -> dict[str, float]:
        asked.append(count)
        return {"rate": 100.0, "seconds": start_s + count * 0.01, "count": count}

    results = Results(profile="tiny")
    run = bench(tmp_path, replace(TINY, seconds_max=seconds_max))
    run._compare(results, Workload(name="w3", title="", measure=measure), [Sqlite], 20)
    assert asked == counts
    assert [sample.figures["count"] for sample in results.samples] == counts[-TINY.rounds :]


def test_a_name_that_there_is_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(wb.ConfigError, match="no workload is named 'w99'"):
        check_names(["w1", "w99"])
    with pytest.raises(wb.ConfigError, match="no subject is named 'oracle'"):
        bench(tmp_path).run(["w1"], ["oracle"])
    assert check_names(None) == {*NAMES}


def test_memory_is_no_disk() -> None:
    memory = Path("/dev/shm")
    if not memory.is_dir() or file_system(memory) != "tmpfs":
        pytest.skip("/dev/shm is no tmpfs here")
    with pytest.raises(wb.ConfigError, match="a sync means nothing"):
        check_disk(memory, anyway=False)
    check_disk(memory, anyway=True)


def test_the_file_system_is_that_of_the_nearest_mount() -> None:
    assert file_system(Path("/proc/self")) == "proc"


def test_an_interruption_leaves_nothing_behind(tmp_path: Path) -> None:
    def be_interrupted() -> None:
        with work_place(tmp_path) as place, place.passing() as folder:
            (folder / "file").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        be_interrupted()
    assert list(tmp_path.iterdir()) == []


# --- sizes -----------------------------------------------------------------------------------------------------------


def test_payloads_are_all_different_and_of_their_size() -> None:
    makers = [
        (payloads.random_payloads, 16),
        (payloads.random_payloads, 256),
        (payloads.random_payloads, 16_384),
    ]
    for make, size in [*makers, (payloads.text_payloads, 16_384)]:
        made = make(2_000, size)
        assert {len(payload) for payload in made} == {size}
        assert len({*made}) == len(made)
    assert payloads.keys(3, 254) == [b"\0" * 7 + b"\xfe", b"\0" * 7 + b"\xff", b"\0" * 6 + b"\x01\0"]


def test_a_scaled_profile_has_so_many_times_the_operations() -> None:
    half, double = QUICK.scaled(0.5), QUICK.scaled(2)
    assert half.counts["w3"] * 2 == QUICK.counts["w3"]
    assert (half.group_count, half.threads) == (500, 16)
    assert double.counts["w3"] == QUICK.counts["w3"] * 2
    assert (double.group_count, double.threads) == (1_000, 32)
    assert FULL.with_rounds(3).rounds == 3


@pytest.mark.parametrize(("free_mib", "expected_mib"), [(100, 3), (8, 2)])
def test_memory_is_touched_before_and_the_disk_is_not_filled_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free_mib: int, expected_mib: int
) -> None:
    sizes: list[int] = []
    real = places.remove

    def seen(folder: Path) -> None:
        sizes.extend(file.stat().st_size for file in folder.iterdir())
        real(folder)

    monkeypatch.setattr(places, "remove", seen)
    monkeypatch.setattr(Place, "free_bytes", lambda _: free_mib * 2**20)
    Place(tmp_path).warm_page_cache(3 * 2**20)
    assert sizes == [expected_mib * 2**20]
    assert list(tmp_path.iterdir()) == []
