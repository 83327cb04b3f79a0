"""A disk that is full under a working engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.modes import fulldisk
from tools.modes.tally import Job


def test_an_engine_on_a_full_disk_refuses_and_loses_nothing(tmp_path: Path) -> None:
    tally = fulldisk.run(Job(seed=1, count=8, scratch=tmp_path), lambda _: None)
    if tally.skipped:
        pytest.skip(tally.skipped)
    assert not tally.failures, tally.failures[0]
    assert tally.complete
    assert tally.figures["full checks"] == 8
    assert tally.figures["runs that were told of it"] > 0
    assert list(tmp_path.iterdir()) == [tmp_path / "elsewhere"], "nothing is left mounted"
