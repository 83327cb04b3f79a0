"""The README's example is run as it stands, and its limits are the code's."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from walbatch import limits

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_the_example_runs_as_it_stands(tmp_path: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
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


def test_the_limits_are_the_codes() -> None:
    text = " ".join(README.split())
    assert limits.KEY_BYTES_MAX == 4 * 1024
    assert "Key 4 KiB" in text
    assert limits.PAYLOAD_BYTES_MAX == 16 * 2**20
    assert "payload 16 MiB" in text
    assert f"{limits.FRAME_COUNT_MAX:,} operations or 64 MiB" in text
    assert limits.FRAME_RAW_BYTES_MAX == 64 * 2**20
    assert f"{limits.KINDS_MAX} lanes" in text
    assert f"{limits.SHARDS_MAX} shards" in text
