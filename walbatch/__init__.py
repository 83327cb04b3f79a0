"""walbatch: an embedded, durable batch engine.

Operations that `submit` has returned for are on disk, reach their shard's backend in batches, and survive a kill.
"""

from walbatch.aio import AsyncEngine, AsyncTicket
from walbatch.backends.lmdb import LmdbBackend
from walbatch.config import Lane, RetryPolicy, Settings, Trigger
from walbatch.core.mark import check_epoch, decode_mark, encode_mark, fresh_indexes
from walbatch.engine import Engine, Environment
from walbatch.errors import (
    BackendError,
    ConfigError,
    CorruptionError,
    DurabilityUnknown,
    EngineClosed,
    Fenced,
    OperationTooLarge,
    Overloaded,
    ResultTimeout,
    StorageError,
    StoreLocked,
    UnsupportedFormat,
    WalbatchError,
)
from walbatch.metrics import CloseReport, EngineStats, LaneStats
from walbatch.ports import Backend, TransactionalBackend
from walbatch.runtime.ticket import Ticket
from walbatch.types import Applied, Batch, CutReason, Durability, Failures, Mark, Operation, Order, Retry

__all__ = [
    "Applied",
    "AsyncEngine",
    "AsyncTicket",
    "Backend",
    "BackendError",
    "Batch",
    "CloseReport",
    "ConfigError",
    "CorruptionError",
    "CutReason",
    "Durability",
    "DurabilityUnknown",
    "Engine",
    "EngineClosed",
    "EngineStats",
    "Environment",
    "Failures",
    "Fenced",
    "Lane",
    "LaneStats",
    "LmdbBackend",
    "Mark",
    "Operation",
    "OperationTooLarge",
    "Order",
    "Overloaded",
    "ResultTimeout",
    "Retry",
    "RetryPolicy",
    "Settings",
    "StorageError",
    "StoreLocked",
    "Ticket",
    "TransactionalBackend",
    "Trigger",
    "UnsupportedFormat",
    "WalbatchError",
    "check_epoch",
    "decode_mark",
    "encode_mark",
    "fresh_indexes",
]
