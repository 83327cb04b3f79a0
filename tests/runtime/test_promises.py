"""Who waits for which operation."""

from __future__ import annotations

import gc
import threading

import pytest

from walbatch.runtime.clock import RealThreads
from walbatch.runtime.promises import LOGGED, Promises
from walbatch.runtime.ticket import Promise


def test_everybody_who_waits_for_an_operation_has_one_promise_which_is_resolved() -> None:
    promises, threads = Promises(), RealThreads()
    go = threading.Barrier(8)
    kept: list[Promise] = []

    def wait_for_it() -> None:
        mine = Promise(threads)
        go.wait(30)
        kept.append(promises.register_or_get(LOGGED, 7, mine))

    callers = [threading.Thread(target=wait_for_it) for _ in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(30)
    promises.resolve(LOGGED, 7, "done")
    assert [promise.done and promise.take() for promise in kept] == ["done"] * 8
    assert len(set(kept)) == 1


def test_a_second_promise_of_a_new_operation_is_a_mistake_of_ours_and_one_that_nobody_keeps_is_none() -> None:
    promises, threads = Promises(), RealThreads()
    first = Promise(threads)
    promises.register(LOGGED, 7, first)
    with pytest.raises(AssertionError, match="two promises of one operation"):
        promises.register(LOGGED, 7, Promise(threads))
    del first
    gc.collect()
    again = Promise(threads)
    promises.register(LOGGED, 7, again)
    assert repr(promises) == "<Promises 1 waiting>"
