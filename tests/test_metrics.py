"""Values that report: they compare, they do not change, and the engine's account balances."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest

from walbatch.metrics import (
    BatchStats,
    EngineStats,
    Health,
    HealthReason,
    HealthVerdict,
    LaneStats,
    ShardStats,
)

STATS = EngineStats(
    state="open", submitted_lsn=0, durable_lsn=0, settled_lsn=0, checkpointed_lsn=0, pending=0, commits=0, syncs=0, committed=0,
    disk_bytes=0,
)  # fmt: skip


def test_what_entered_is_settled_or_pending() -> None:
    balanced = replace(STATS, submitted=70, pending_at_open=30, applied=80, dead=5, cancelled=4, pending=11)
    assert STATS.unaccounted == balanced.unaccounted == 0


@pytest.mark.parametrize(
    ("name", "lost"), [("submitted", 1), ("pending_at_open", 1), ("applied", -1), ("dead", -1), ("cancelled", -1), ("pending", -1)]
)  # fmt: skip
def test_one_operation_that_is_miscounted_shows(name: str, lost: int) -> None:
    changed: dict[str, Any] = {name: 1}
    assert replace(STATS, **changed).unaccounted == lost


@pytest.mark.parametrize(
    "value", [STATS, BatchStats(), ShardStats(shard=0), Health()], ids=lambda value: type(value).__name__
)
def test_a_report_does_not_change(value: object) -> None:
    with pytest.raises((FrozenInstanceError, TypeError)):
        value.batches = 1  # type: ignore[attr-defined]


def test_a_reason_belongs_to_the_engine_unless_it_names_a_lane() -> None:
    fields = HealthReason.__dataclass_fields__
    assert (fields["lane"].default, fields["shard"].default) == (None, None)
    assert Health().verdict is HealthVerdict.OK
    assert LaneStats.__dataclass_fields__["breaker"].default == "closed"
