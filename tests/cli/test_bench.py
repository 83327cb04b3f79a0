"""`walbatch bench`: its options, what it shows, what it writes, and that it leaves nothing behind."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
from pathlib import Path

import pytest

from tests.cli.program import assert_one_line, command, environment, walbatch
from tests.support import wait_until
from walbatch.bench.place import file_system
from walbatch.bench.results import Results

TINY = ("--quick", "--rounds", "2", "--scale", "0.01", "--anyway")


def test_it_shows_a_table_with_ratios_and_targets(tmp_path: Path) -> None:
    ended = walbatch("bench", *TINY, "--dir", tmp_path, "--only", "w1", "--subjects", "raw,walbatch,sqlite")
    assert ended.code == 0
    assert "w1  one producer, each durable before the next" in ended.output
    assert "raw pwrite + fdatasync" in ended.output
    assert "p50 latency to a raw append" in ended.output
    assert "not measured" in ended.output
    assert ended.error == "measuring w1\n"
    assert list(tmp_path.iterdir()) == []


def test_its_json_holds_every_sample_and_can_be_written_to_a_file(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    arguments = ("--only", "w1,w3", "--subjects", "raw,walbatch", "--json", "--json-file", file)
    ended = walbatch("bench", *TINY, "--dir", tmp_path, *arguments)
    assert ended.code == 0
    assert ended.error == ""
    results = Results.of_document(ended.document)
    assert results == Results.of_document(json.loads(file.read_text()))
    found = {(sample.workload, sample.subject, sample.round) for sample in results.samples}
    assert found == {(w, s, turn) for w in ("w1", "w3") for s in ("raw", "walbatch") for turn in (0, 1)}
    assert set(ended.document["medians"]["w1"]["walbatch"]) >= {"rate", "p50_us", "p99_us", "cpu_us"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--quick", "--full"), ("give one of them",)),
        (("--only", "w99"), ("no workload is named 'w99'", "w10")),
        (("--subjects", "oracle"), ("no subject is named 'oracle'", "sqlite")),
        (("--only", ","), ("an empty list",)),
        (("--dir", "/no/such/place"), ("/no/such/place is no directory",)),
    ],
)
def test_wrong_usage_is_told_in_a_line(arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    ended = walbatch("bench", "--anyway", *arguments)
    assert ended.code == 2
    assert_one_line(ended, words)


def test_it_refuses_memory_unless_told() -> None:
    memory = Path("/dev/shm")
    if not memory.is_dir() or file_system(memory) != "tmpfs":
        pytest.skip("/dev/shm is no tmpfs here")
    ended = walbatch("bench", "--quick", "--dir", memory, "--only", "w1")
    assert ended.code == 2
    assert_one_line(ended, ("in memory", "--anyway"))


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_it_draws(tmp_path: Path) -> None:
    arguments = ("--only", "w3", "--subjects", "raw,walbatch", "--plots", tmp_path / "pictures")
    ended = walbatch("bench", *TINY, "--dir", tmp_path, *arguments)
    assert ended.code == 0
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {
        "walbatch-bench.png",
        "walbatch-bench.svg",
    }


def test_an_interruption_deletes_what_it_made(tmp_path: Path) -> None:
    arguments = ("--full", "--anyway", "--dir", tmp_path, "--only", "w1", "--subjects", "raw,walbatch")
    started = subprocess.Popen(
        command("bench", *arguments), env=environment(), stderr=subprocess.PIPE, text=True
    )
    with started as running:
        wait_until(lambda: any(tmp_path.glob("walbatch-bench-*/*/*")), what="it measures")
        running.send_signal(signal.SIGINT)
        _, error = running.communicate(timeout=30)
    assert running.returncode == 130
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []
