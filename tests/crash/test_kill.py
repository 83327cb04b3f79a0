"""kill -9 through the public API, with several threads. The thousand-cycle run is `tools/kill_cycles.py`."""

from __future__ import annotations

from pathlib import Path

from tools import kill_cycles


def test_no_kill_loses_invents_repeats_or_reorders_anything(tmp_path: Path) -> None:
    judge = kill_cycles.run(tmp_path, cycles=30, seed=7, check_every=10, show=False)
    assert judge.cycles == 30
    assert judge.checks == 3
    assert judge.in_recovery > 0, "some kills must fall into recovery"
    assert all(len(names) > 100 for names in judge.acknowledged.values())
