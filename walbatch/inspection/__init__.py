"""A read-only look at a store: what recovery would do, every segment's health, the operations in the log, what lies beside it.

What is not here: anything that writes. All functions work on a live store.
"""

from walbatch.core.history import Expectation
from walbatch.core.idempotency import OWN_PREFIX, requeue_key
from walbatch.inspection.kept import damaged_letters, dead_letters, kept, passes_over
from walbatch.inspection.logged import operations
from walbatch.inspection.looking import find_store, list_names, look, remembered_lanes
from walbatch.inspection.reports import (
    Count,
    KeptReport,
    LaneReport,
    LoggedOperation,
    SegmentReport,
    StoreReport,
    VerifyReport,
)
from walbatch.inspection.tally import Tally

__all__ = [
    "OWN_PREFIX",
    "Count",
    "Expectation",
    "KeptReport",
    "LaneReport",
    "LoggedOperation",
    "SegmentReport",
    "StoreReport",
    "Tally",
    "VerifyReport",
    "damaged_letters",
    "dead_letters",
    "find_store",
    "kept",
    "list_names",
    "look",
    "operations",
    "passes_over",
    "remembered_lanes",
    "requeue_key",
]
