"""A lane's shard without an engine."""

from __future__ import annotations

from tests.runtime.fakes import StillClock
from walbatch.backends.function import FunctionBackend
from walbatch.config import Lane as LaneSettings
from walbatch.config import Trigger
from walbatch.runtime.lane import Lane, LaneSetup, Shard
from walbatch.types import Batch, Mark, Order

PLENTY = 1 << 30
NOTHING_KNOWN = Mark()


def lane_of_one(*, order: Order = Order.KEY, memory_bytes_max: int = PLENTY) -> Lane:
    """A lane "put" of one shard, which cuts large batches and remembers nothing."""
    return lane_of_shards(1, order=order, memory_bytes_max=memory_bytes_max)


def lane_of_shards(
    shards: int, *, order: Order = Order.KEY, memory_bytes_max: int = PLENTY, known: Mark = NOTHING_KNOWN
) -> Lane:
    """The same with several; `known`: what was settled before this run."""

    def apply(batch: Batch) -> None:
        raise NotImplementedError("these tests look at queues, and deliver nothing")

    settings = LaneSettings(apply, order=order.value, trigger=Trigger(count=1_000), shards=shards)
    setup = LaneSetup(
        name="put", backend=FunctionBackend(apply), transactional=False, interruptible=False, settings=settings,
        initial=(known,) * shards, counted=(known,) * shards,
    )  # fmt: skip
    return Lane(setup, 0, shard_bytes_max=memory_bytes_max, now_ns=StillClock().monotonic_ns())


def shard_of_one(*, order: Order = Order.KEY, memory_bytes_max: int = PLENTY) -> Shard:
    """Its shard."""
    return lane_of_one(order=order, memory_bytes_max=memory_bytes_max).shards[0]
