"""walbatch: an embedded, durable batch engine.

Operations that `submit` has returned for are on disk, reach their shard's backend in batches, and survive a kill.

What is not here: anything that takes time to import. A name is looked up in its module when it is first used, so that a program
which imports this and opens no engine does not pay for LMDB, and one without coroutines not for asyncio.
"""

TYPE_CHECKING = False  # as `typing` has it, whose import would take longer than all of this
if TYPE_CHECKING:
    from walbatch.aio import AsyncEngine, AsyncTicket
    from walbatch.backends.files.jsonlines import JsonLinesBackend
    from walbatch.backends.files.parquet import (
        ParquetBackend as ParquetBackend,  # not in __all__: it may not be installed
    )
    from walbatch.backends.http import HttpBackend as HttpBackend  # not in __all__: it may not be installed
    from walbatch.backends.lmdb import LmdbBackend
    from walbatch.backends.postgres import (
        PostgresBackend as PostgresBackend,  # not in __all__: may be missing
    )
    from walbatch.backends.redis import (
        RedisBackend as RedisBackend,  # not in __all__: it may not be installed
    )
    from walbatch.backends.redis import RedisKeys as RedisKeys
    from walbatch.backends.sql.table import Table
    from walbatch.backends.sqlite import SqliteBackend
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
    from walbatch.metrics import (
        BatchStats,
        CloseReport,
        EngineStats,
        Health,
        HealthReason,
        LaneStats,
        ShardStats,
    )
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
    "JsonLinesBackend",
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

_HOMES = {
    "walbatch.aio": ("AsyncEngine", "AsyncTicket"),
    "walbatch.backends.files.jsonlines": ("JsonLinesBackend",),
    "walbatch.backends.files.parquet": ("ParquetBackend",),
    "walbatch.backends.http": ("HttpBackend",),
    "walbatch.backends.lmdb": ("LmdbBackend",),
    "walbatch.backends.postgres": ("PostgresBackend",),
    "walbatch.backends.redis": ("RedisBackend", "RedisKeys"),
    "walbatch.backends.sql.table": ("Table",),
    "walbatch.backends.sqlite": ("SqliteBackend",),
    "walbatch.backends.vectorized": ("decode_array", "encode_array", "vectorized"),
    "walbatch.config": ("Adaptive", "Aimd", "Cost", "Fixed", "Lane", "RetryPolicy", "Settings", "Trigger"),
    "walbatch.core.mark": ("check_epoch", "decode_mark", "encode_mark", "fresh_indexes", "leave_out"),
    "walbatch.engine": ("Engine", "Environment"),
    "walbatch.errors": (
        "BackendBroken", "BackendError", "BatchFailure", "BatchRejected", "BatchTooLarge", "ConfigError",
        "CorruptionError", "DurabilityUnknown", "EngineClosed", "Fenced", "OperationCancelled", "OperationDead",
        "OperationTooLarge", "Overloaded", "ResultTimeout", "RetryBatch", "StorageError", "StoreLocked", "Throttled",
        "UnsupportedFormat", "WalbatchError",
    ),
    "walbatch.metrics": (
        "BatchStats", "CloseReport", "EngineStats", "Health", "HealthReason", "LaneStats", "ShardStats",
    ),
    "walbatch.ports": ("Backend", "TransactionalBackend"),
    "walbatch.runtime.ticket": ("Ticket",),
    "walbatch.types": (
        "PRIORITY_CRITICAL", "PRIORITY_HIGH", "PRIORITY_LOW", "PRIORITY_NORMAL", "PRIORITY_URGENT", "Applied",
        "Batch", "CutReason", "DeadLetter", "DeathReason", "Durability", "FailureOrder", "Failures", "Mark",
        "Operation", "OperationStatus", "Options", "Order", "Overdue", "Rejected", "Retry", "Strategy", "TriggerMode",
    ),
}  # fmt: skip
"""In which module a name is looked up. The imports above say the same to those who read types."""

_MODULES = (
    "aio", "backends", "config", "core", "engine", "errors", "lanes", "limits", "metrics", "ports", "runtime", "storage", "types",
)  # fmt: skip
"""What is an attribute without an import of its own."""

if not TYPE_CHECKING:  # where types are read, a name that is not imported above is a mistake

    def __getattr__(name):  # noqa: ANN001, ANN202 - nobody reads its types
        """Import what has this name. From then on it is an attribute like any other."""
        from importlib import import_module  # noqa: PLC0415 - for what is looked up, and no earlier

        if name in _MODULES:
            return import_module(f"{__name__}.{name}")
        for home, names in _HOMES.items():
            if name in names:
                value = globals()[name] = getattr(import_module(home), name)
                return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__():  # noqa: ANN202 - the same
        """All names, also those that nobody has used yet."""
        return sorted({*globals(), *__all__, *_MODULES} - {"TYPE_CHECKING"})
