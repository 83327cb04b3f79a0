"""The README's example is run as it stands, and its limits are the code's."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest

import walbatch as wb
from tests.cli.program import walbatch
from walbatch import limits

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_example_runs_as_it_stands(tmp_path: Path) -> None:
    example = EXAMPLES[0]
    assert len(example.strip().splitlines()) <= 24
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", example],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "durable: 1 and range(2, 27)" in done.stdout
    assert done.stdout.count("notify: ") >= 3
    assert (tmp_path / "blocks" / "shard-003").is_dir()


@pytest.mark.parametrize("number", range(1, len(EXAMPLES)))
def test_a_snippet_runs_as_it_stands_and_prints_what_it_says(tmp_path: Path, number: int) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", EXAMPLES[number]], cwd=tmp_path, capture_output=True, text=True, check=False,
        timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == re.findall(r"^ *print\(.*\)  # (.+)$", EXAMPLES[number], re.MULTILINE)
    assert done.stdout


def test_the_limits_are_the_codes() -> None:
    text = " ".join(README.split())
    assert limits.IDEMPOTENCY_KEY_BYTES_MAX == 256
    assert "Idempotency key 256 bytes, a million in a window" in text
    assert limits.IDEMPOTENCY_KEYS_MAX == 1_000_000
    assert f"{limits.DEAD_LETTERS_MAX:,} dead letters of 256 MiB" in text
    assert limits.DEAD_LETTER_BYTES_MAX == 256 * 2**20
    assert f"({wb.Settings().dead_letters_max:,} and 64 MiB unless set)" in text
    assert wb.Settings().dead_letter_bytes_max == 64 * 2**20
    assert limits.KEY_BYTES_MAX == 4 * 1024
    assert "Key 4 KiB" in text
    assert limits.PAYLOAD_BYTES_MAX == 16 * 2**20
    assert "payload 16 MiB" in text
    assert f"{limits.FRAME_COUNT_MAX:,} operations or 64 MiB" in text
    assert limits.FRAME_RAW_BYTES_MAX == 64 * 2**20
    assert f"{limits.KINDS_MAX} lanes" in text
    assert f"{limits.SHARDS_MAX} shards" in text


def _down(batch: wb.Batch) -> None:
    raise OSError("down")


def _warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.levelno >= logging.WARNING and "closed" in record.getMessage()
    ]


def test_operations_that_remain_at_the_close_are_told_in_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    slow = wb.RetryPolicy(base_s=30, ceiling_s=30)
    engine = wb.Engine.open(tmp_path / "q", lanes={"put": wb.Lane(_down, retry=slow)})
    engine.submit("put", key=b"k")
    engine.close(timeout=0.1)
    engine.close()
    assert _warnings(caplog) == [
        f"{tmp_path / 'q'} closed with 1 operation undelivered (timeout); it is in the log and will be replayed by the next open"
    ]


def test_a_close_that_leaves_nothing_or_was_not_to_deliver_warns_of_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for lane, drain in ((wb.Lane(lambda batch: None), True), (wb.Lane(_down), False)):
        engine = wb.Engine.open(tmp_path / str(drain), lanes={"put": lane})
        engine.submit("put", key=b"k")
        engine.close(drain=drain)
    assert _warnings(caplog) == []


def test_an_exception_leaves_the_block_without_waiting(tmp_path: Path) -> None:
    engine = wb.Engine.open(tmp_path / "q", lanes={"put": wb.Lane(_down)})
    engine.submit("put", key=b"k")
    with pytest.raises(KeyError), engine:
        raise KeyError
    assert engine.close().reason == "not drained"


def test_its_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#\s]+)\)", README)
    assert {"docs/guarantees.md", "docs/crash-testing.md", "CONTRIBUTING.md", "CHANGELOG.md"} <= set(links)
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_dump_of_the_command_line_can_be_loaded_as_it_is_written(tmp_path: Path) -> None:
    dump = re.search(r"^\$ walbatch (dump [^>]*)> left.jsonl", README, re.MULTILINE)
    load = re.search(r"^\$ walbatch (load .*)$", README, re.MULTILINE)
    assert dump
    assert load
    with wb.Engine.open(tmp_path / "queue", lanes={"put": wb.Lane(), "notify": wb.Lane()}) as engine:
        for kind in ("notify", "put", "notify", "put"):
            engine.submit(kind, key=b"k", payload=kind.encode())
    (tmp_path / "left.jsonl").write_text(walbatch(*dump[1].split(), cwd=tmp_path).output)
    here = load[1].replace("lmdb:///var/lib/app/blocks", "lmdb:blocks").split()
    loaded = walbatch(*here, cwd=tmp_path)
    assert (loaded.code, loaded.output) == (0, "loaded 2 operations, all durable; 0 wait to be delivered\n")
