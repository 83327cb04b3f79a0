"""What is read of memory, from folders that look like a machine's /proc and /sys; and from this machine's own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from walbatch.ports import Memory
from walbatch.storage.memory import RealMemory

KIB = 1024
STATUS = (
    "Name:\tpython\nVmHWM:\t  900 kB\nVmRSS:\t  700 kB\nRssAnon:\t  300 kB\n"
    "RssFile:\t  350 kB\nRssShmem:\t   50 kB\nThreads:\t4\n"
)
MACHINE = {"proc/self/status": STATUS, "proc/meminfo": "MemTotal:       4000 kB\nMemFree:         100 kB\n"}
V2 = "sys/fs/cgroup"
V1 = "sys/fs/cgroup/memory"


def machine(root: Path, files: Mapping[str, str]) -> RealMemory:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return RealMemory(root=str(root))


def group_2(path: str, *, limit: str, usage: int, inactive: int = 0, active: int = 0) -> dict[str, str]:
    folder = f"{V2}{path}".rstrip("/")
    return {
        f"{folder}/memory.max": f"{limit}\n", f"{folder}/memory.current": f"{usage}\n",
        f"{folder}/memory.stat": f"anon 1\nfile 2\ninactive_file {inactive}\nactive_file {active}\n",
    }  # fmt: skip


def group_1(path: str, *, limit: int, usage: int, inactive: int = 0, active: int = 0) -> dict[str, str]:
    folder = f"{V1}{path}".rstrip("/")
    return {
        f"{folder}/memory.limit_in_bytes": f"{limit}\n", f"{folder}/memory.usage_in_bytes": f"{usage}\n",
        f"{folder}/memory.stat": f"cache 2\ninactive_file 7\ntotal_inactive_file {inactive}\ntotal_active_file {active}\n",
    }  # fmt: skip


IN_2 = {"proc/self/cgroup": "0::/app.slice/db\n"}
IN_1 = {"proc/self/cgroup": "12:cpu,cpuacct:/other\n4:memory:/docker/abc\n1:name=systemd:/x\n0::/unified\n"}
NO_LIMIT_1 = 9223372036854771712

TABLE = {
    "no control group: the process and the machine": (MACHINE, (350 * KIB, 4000 * KIB)),
    "an old kernel tells only the whole resident size": (
        MACHINE | {"proc/self/status": "VmRSS:\t  700 kB\n"}, (700 * KIB, 4000 * KIB),
    ),
    "no proc at all": ({}, (0, 0)),
    "a status that says nothing": (MACHINE | {"proc/self/status": "?\n"}, (0, 4000 * KIB)),
    "a group of version 2, less its file cache": (
        MACHINE | IN_2 | group_2("/app.slice/db", limit="1000000", usage=600_000, inactive=150_000, active=50_000),
        (400_000, 1_000_000),
    ),
    "a group without a limit": (
        MACHINE | IN_2 | group_2("/app.slice/db", limit="max", usage=3_900_000), (350 * KIB, 4000 * KIB),
    ),
    "of nested groups that with the least room": (
        MACHINE | IN_2 | group_2("/app.slice/db", limit="1000000", usage=100_000)
        | group_2("/app.slice", limit="1500000", usage=1_400_000), (1_400_000, 1_500_000),
    ),
    "the same with the inner one tighter": (
        MACHINE | IN_2 | group_2("/app.slice/db", limit="1000000", usage=900_001)
        | group_2("/app.slice", limit="1500000", usage=1_400_000), (900_001, 1_000_000),
    ),
    "a limit above the machine's memory": (
        MACHINE | IN_2 | group_2("/app.slice/db", limit="8000000", usage=500_000), (350 * KIB, 4000 * KIB),
    ),
    "in a container, whose own path only its host can see": (
        MACHINE | IN_2 | group_2("", limit="1000000", usage=700_000), (700_000, 1_000_000),
    ),
    "more cache than usage, read at different moments": (
        MACHINE | IN_2 | group_2("/app.slice/db", limit="1000000", usage=1_000, inactive=2_000), (0, 1_000_000),
    ),
    "a group whose usage cannot be read": (
        MACHINE | IN_2 | {f"{V2}/app.slice/db/memory.max": "1000\n"}, (350 * KIB, 4000 * KIB),
    ),
    "a group of version 1": (
        MACHINE | IN_1 | group_1("/docker/abc", limit=1_000_000, usage=600_000, inactive=150_000, active=50_000),
        (400_000, 1_000_000),
    ),
    "a group of version 1 without a limit": (
        MACHINE | IN_1 | group_1("/docker/abc", limit=NO_LIMIT_1, usage=600_000), (350 * KIB, 4000 * KIB),
    ),
    "version 1 in a container": (
        MACHINE | IN_1 | group_1("", limit=1_000_000, usage=600_000), (600_000, 1_000_000),
    ),
    "a path that leads out of the groups": (
        MACHINE | {"proc/self/cgroup": "0::/../../etc\n"} | group_2("/etc", limit="1000000", usage=600_000),
        (600_000, 1_000_000),
    ),
    "lines that are none": (MACHINE | {"proc/self/cgroup": "\n::\nmemory\n7\n"}, (350 * KIB, 4000 * KIB)),
    "a limit that is no number": (
        MACHINE | IN_2 | group_2("/app.slice/db", limit="-1", usage=10), (350 * KIB, 4000 * KIB),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("files", "expected"), TABLE.values(), ids=TABLE)
def test_the_tightest_count_is_taken(
    tmp_path: Path, files: Mapping[str, str], expected: tuple[int, int]
) -> None:
    memory: Memory = machine(tmp_path, files)
    assert memory.look() == expected


def test_a_limit_that_changes_is_seen(tmp_path: Path) -> None:
    files = MACHINE | IN_2 | group_2("/app.slice/db", limit="1000000", usage=600_000)
    memory = machine(tmp_path, files)
    assert memory.look() == (600_000, 1_000_000)
    (tmp_path / V2 / "app.slice/db/memory.max").write_text("700000\n")
    (tmp_path / V2 / "app.slice/db/memory.current").write_text("650000\n")
    assert memory.look() == (650_000, 700_000)
    assert repr(memory) == "<RealMemory 650,000 of 700,000 bytes>"


def test_a_group_that_goes_away_no_longer_counts(tmp_path: Path) -> None:
    files = MACHINE | IN_2 | group_2("/app.slice/db", limit="1000000", usage=600_000)
    memory = machine(tmp_path, files)
    (tmp_path / V2 / "app.slice/db/memory.max").unlink()
    assert memory.look() == (350 * KIB, 4000 * KIB)


def test_a_file_that_cannot_be_read_counts_for_nothing(tmp_path: Path) -> None:
    files = MACHINE | IN_2 | group_2("/app.slice/db", limit="1000000", usage=600_000)
    machine(tmp_path, files)
    (tmp_path / V2 / "app.slice/db/memory.max").unlink()
    (tmp_path / V2 / "app.slice/db/memory.max").mkdir()  # opens, and then refuses to be read
    assert RealMemory(root=str(tmp_path)).look() == (350 * KIB, 4000 * KIB)


def test_nesting_without_end_is_looked_at_in_part(tmp_path: Path) -> None:
    files = (
        MACHINE | {"proc/self/cgroup": "0::" + "/a" * 10_000 + "\n"} | group_2("", limit="1000000", usage=1)
    )
    assert machine(tmp_path, files).look() == (1, 1_000_000)


def test_this_machine_says_how_much_is_in_use() -> None:
    used, limit = RealMemory().look()
    assert 0 < used < limit


def test_this_process_sees_what_it_takes() -> None:
    memory = RealMemory()
    memory._groups = ()  # what others in the group take and give back meanwhile is no matter here
    used, _ = memory.look()
    held = bytearray(64 * 2**20)
    held[:: 4 * KIB] = b"x" * (len(held) // (4 * KIB))
    assert memory.look()[0] - used > 48 * 2**20
    del held
