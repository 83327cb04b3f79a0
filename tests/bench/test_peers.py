"""Each subject does what it is measured for: what was put is drained, in order, and nothing is left running."""

from __future__ import annotations

import os
import threading
import tomllib
from pathlib import Path
from typing import Any

import pytest

import walbatch as wb
from tests.bench.tiny import ALWAYS, TINY, bench
from walbatch.bench import payloads, servers
from walbatch.bench.catalogue import SUBJECTS, describe
from walbatch.bench.own import LANE, Walbatch
from walbatch.bench.servers import NatsJetStream, RedisStream, Server
from walbatch.bench.subject import Subject

COUNT = 40
KEYS = payloads.keys(COUNT)
PAYLOADS = payloads.random_payloads(COUNT, 256)
QUEUES = [subject for subject in SUBJECTS if "w5" in subject.workloads]
SERVERS: list[type[Subject]] = [RedisStream, NatsJetStream]

pytestmark = [
    # Of the peers' own: what they leave open, and what they still call.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(params=QUEUES, ids=lambda subject: subject.name)
def queue(request: pytest.FixtureRequest) -> type[Subject]:
    return installed(request.param)


def installed(subject: type[Subject]) -> type[Subject]:
    missing = subject.missing()
    if missing:
        pytest.skip(f"{subject.title} is not installed: {missing}")
    return subject


def drained(subject: Subject) -> list[bytes]:
    came: list[bytes] = []
    assert subject.drain(COUNT, came.extend) == COUNT
    return came


def test_what_was_put_one_by_one_is_drained_in_order(queue: type[Subject], tmp_path: Path) -> None:
    subject = queue()
    try:
        subject.open(tmp_path)
        for key, payload in zip(KEYS, PAYLOADS, strict=True):
            subject.put(subject.item(key, payload))
        assert drained(subject) == PAYLOADS
    finally:
        subject.close()


def test_what_was_put_in_groups_is_drained_in_order(queue: type[Subject], tmp_path: Path) -> None:
    subject = queue()
    try:
        subject.open(tmp_path)
        for at in range(0, COUNT, 10):
            subject.put_group(subject.group(KEYS[at : at + 10], PAYLOADS[at : at + 10]))
        assert drained(subject) == PAYLOADS
    finally:
        subject.close()


def test_what_threads_put_is_drained_once(queue: type[Subject], tmp_path: Path) -> None:
    if "w2" not in queue.workloads:
        pytest.skip(f"{queue.title} is not measured with threads")
    subject = queue()

    def put(first: int) -> None:
        for at in range(first, COUNT, 4):
            subject.put(subject.item(KEYS[at], PAYLOADS[at]))

    try:
        subject.open(tmp_path)
        threads = [threading.Thread(target=put, args=(first,)) for first in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(drained(subject)) == sorted(PAYLOADS)
    finally:
        subject.close()


def test_all_workloads_of_a_peer_can_be_measured(queue: type[Subject], tmp_path: Path) -> None:
    if queue.name in ALWAYS:
        pytest.skip(f"{queue.title} is measured in test_rounds")
    once = TINY.with_rounds(1)
    results = bench(tmp_path, once).run(["w1", "w2", "w3", "w4", "w4c", "w5", "w6"], [queue.name])
    assert results.problems == []
    assert {sample.workload for sample in results.samples} == queue.workloads & {
        "w1", "w2", "w3", "w4", "w4c", "w5", "w6",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["raw", "raw-over", "threads-bound", "tasks-bound"])
def test_limits_and_bounds_can_be_measured(name: str, tmp_path: Path) -> None:
    results = bench(tmp_path).run(["w1", "w2", "w3", "w4", "w6"], [name])
    assert results.problems == []
    assert results.samples != []


def test_what_tasks_submit_to_walbatch_is_in_its_log(tmp_path: Path) -> None:
    import asyncio  # noqa: PLC0415 - only here

    subject = Walbatch()

    async def run() -> None:
        await subject.open_in_loop(tmp_path)
        await asyncio.gather(*map(subject.put_in_loop, zip(KEYS, PAYLOADS, strict=True)))
        await subject.close_in_loop()

    asyncio.run(run())
    came: list[bytes] = []
    lanes = {LANE: wb.Lane(lambda batch: came.extend(batch.payloads))}
    with wb.Engine.open(tmp_path / "store", lanes=lanes) as engine:
        engine.flush()
    assert came == PAYLOADS


# --- servers ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Server]:
    """Every server that is started."""
    found: list[Server] = []

    class Noted(Server):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            found.append(self)

    monkeypatch.setattr(servers, "Server", Noted)
    return found


def is_running(server: Server) -> bool:
    try:
        os.kill(server.pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("subject", SERVERS, ids=lambda subject: subject.name)
def test_a_server_is_stopped_when_its_subject_is_closed(
    subject: type[Subject], started: list[Server], tmp_path: Path
) -> None:
    opened = installed(subject)()
    opened.open(tmp_path)
    (server,) = started
    assert is_running(server)
    opened.close()
    assert not is_running(server)
    opened.close()


@pytest.mark.parametrize("subject", SERVERS, ids=lambda subject: subject.name)
def test_a_server_is_stopped_when_its_client_fails(
    subject: type[Subject], started: list[Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(subject)

    def refuse(module: str) -> None:
        raise ConnectionError(f"no {module} today")

    monkeypatch.setattr(servers, "load", refuse)
    results = bench(tmp_path).run(["w1", "w6"], [subject.name])
    assert [problem.split(" failed: ")[1][:15] for problem in results.problems] == ["ConnectionError"] * 2
    assert len(started) == 2
    assert not any(map(is_running, started))


def test_a_server_that_does_not_start_is_told_with_its_last_words(tmp_path: Path) -> None:
    server = Server(["sh", "-c", "echo the port is taken; exit 1"], tmp_path)
    with pytest.raises(RuntimeError, match="the port is taken"):
        server.await_port(servers.free_port())
    server.stop()


def test_a_server_listens_on_loopback_only(tmp_path: Path) -> None:
    opened = installed(RedisStream)()
    try:
        opened.open(tmp_path)
        assert isinstance(opened, RedisStream)
        assert opened._client.config_get("bind") == {"bind": "127.0.0.1"}
        assert opened._client.config_get("appendfsync") == {"appendfsync": "always"}
    finally:
        opened.close()


# --- what is not there -----------------------------------------------------------------------------------------------


def test_a_peer_that_is_not_installed_is_left_out_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leveldb = next(subject for subject in SUBJECTS if subject.name == "leveldb")
    monkeypatch.setattr(leveldb, "modules", ("no_such_module",))
    assert describe(leveldb).missing == "pip install plyvel"
    results = bench(tmp_path).run(["w1"], ["leveldb", "sqlite"])
    assert results.problems == []
    assert results.measured("w1") == ["sqlite"]
    monkeypatch.setattr(RedisStream, "modules", ())
    monkeypatch.setattr(RedisStream, "program", "no-such-server")
    assert describe(RedisStream).missing == "no-such-server on the PATH"


def test_the_extra_holds_every_peer_that_can_be_installed() -> None:
    project = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text())["project"]
    names = {
        requirement.partition(">")[0]
        for requirement in (*project["optional-dependencies"]["bench"], *project["dependencies"])
    }
    assert {subject.package for subject in SUBJECTS if subject.package} <= names


def test_no_peer_is_imported_before_it_is_measured() -> None:
    import subprocess  # noqa: PLC0415 - only here
    import sys  # noqa: PLC0415 - the same

    code = (
        "import sys, walbatch.bench.rounds, walbatch.bench.table\n"
        "print(*{'rocksdict', 'plyvel', 'persistqueue', 'diskcache', 'litequeue', 'redis', 'nats', 'matplotlib'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
