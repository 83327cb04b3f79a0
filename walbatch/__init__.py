"""walbatch: an embedded, durable batch engine.

Operations that `submit` has returned for are on disk, reach their shard's backend in batches, and survive a kill.
"""

from typing import TYPE_CHECKING, Any

from walbatch import backends
from walbatch.aio import AsyncEngine, AsyncTicket
from walbatch.backends.lmdb import LmdbBackend
from walbatch.backends.vectorized import decode_array, encode_array, vectorized
from walbatch.config import Adaptive, Aimd, Cost, Fixed, Lane, RetryPolicy, Settings, Trigger
from walbatch.core.mark import check_epoch, decode_mark, encode_mark, fresh_indexes, leave_out
from walbatch.engine import Engine, Environment
from walbatch.errors import (
    BackendBroken,
    BackendError,
    BatchFailure,
    BatchRejected,
    BatchTooLarge,
    ConfigError,
    CorruptionError,
    DurabilityUnknown,
    EngineClosed,
    Fenced,
    OperationCancelled,
    OperationDead,
    OperationTooLarge,
    Overloaded,
    ResultTimeout,
    RetryBatch,
    StorageError,
    StoreLocked,
    Throttled,
    UnsupportedFormat,
    WalbatchError,
)
from walbatch.metrics import BatchStats, CloseReport, EngineStats, Health, HealthReason, LaneStats, ShardStats
from walbatch.ports import Backend, TransactionalBackend
from walbatch.runtime.ticket import Ticket
from walbatch.types import (
    PRIORITY_CRITICAL,
    PRIORITY_HIGH,
    PRIORITY_LOW,
    PRIORITY_NORMAL,
    PRIORITY_URGENT,
    Applied,
    Batch,
    CutReason,
    DeadLetter,
    DeathReason,
    Durability,
    FailureOrder,
    Failures,
    Mark,
    Operation,
    OperationStatus,
    Options,
    Order,
    Overdue,
    Rejected,
    Retry,
    Strategy,
    TriggerMode,
)

if TYPE_CHECKING:
    from walbatch.backends.postgres import (
        PostgresBackend as PostgresBackend,
    )  # not in __all__: it may not be installed
    from walbatch.backends.sql.table import Table
    from walbatch.backends.sqlite import SqliteBackend

__all__ = [
    "PRIORITY_CRITICAL",
    "PRIORITY_HIGH",
    "PRIORITY_LOW",
    "PRIORITY_NORMAL",
    "PRIORITY_URGENT",
    "Adaptive",
    "Aimd",
    "Applied",
    "AsyncEngine",
    "AsyncTicket",
    "Backend",
    "BackendBroken",
    "BackendError",
    "Batch",
    "BatchFailure",
    "BatchRejected",
    "BatchStats",
    "BatchTooLarge",
    "CloseReport",
    "ConfigError",
    "CorruptionError",
    "Cost",
    "CutReason",
    "DeadLetter",
    "DeathReason",
    "Durability",
    "DurabilityUnknown",
    "Engine",
    "EngineClosed",
    "EngineStats",
    "Environment",
    "FailureOrder",
    "Failures",
    "Fenced",
    "Fixed",
    "Health",
    "HealthReason",
    "Lane",
    "LaneStats",
    "LmdbBackend",
    "Mark",
    "Operation",
    "OperationCancelled",
    "OperationDead",
    "OperationStatus",
    "OperationTooLarge",
    "Options",
    "Order",
    "Overdue",
    "Overloaded",
    "Rejected",
    "ResultTimeout",
    "Retry",
    "RetryBatch",
    "RetryPolicy",
    "Settings",
    "ShardStats",
    "SqliteBackend",
    "StorageError",
    "StoreLocked",
    "Strategy",
    "Table",
    "Throttled",
    "Ticket",
    "TransactionalBackend",
    "Trigger",
    "TriggerMode",
    "UnsupportedFormat",
    "WalbatchError",
    "check_epoch",
    "decode_array",
    "decode_mark",
    "encode_array",
    "encode_mark",
    "fresh_indexes",
    "leave_out",
    "vectorized",
]


def __getattr__(name: str) -> Any:
    # Backends of databases that not everybody uses are imported when they are asked for.
    if name in backends.LATER:
        return getattr(backends, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
