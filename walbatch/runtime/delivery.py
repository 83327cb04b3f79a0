"""What becomes of a batch: the call of the backend, its time limit, its answer, retries, splits and deaths.

What is not here: the rules (`core.delivery`, `core.batcher`), and when a batch is cut (`dispatcher`).

The idea needed to read it: a worker calls the backend without any lock; then, under the dispatcher's lock, the batch is
settled, waits again, or is split. What is given up is buried, durably, before it counts as settled. A call that has not returned
in time may be given up: its batch goes on without it, and what it answers later counts for nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from walbatch import limits
from walbatch.config import NS_PER_S
from walbatch.core.batcher import Flight
from walbatch.core.controller import BatchResult, Observation
from walbatch.core.delivery import (
    Failure,
    FailureKind,
    Overran,
    Step,
    Verdict,
    backoff_ns,
    classify,
    judge,
    overtaken,
    recourse,
    results_of,
)
from walbatch.core.history import History
from walbatch.errors import (
    BackendError,
    Fenced,
    WalbatchError,
)
from walbatch.ports import Clock, Condition, Entropy
from walbatch.runtime.bell import Bells
from walbatch.runtime.burial import Burial
from walbatch.runtime.calls import Calls, Job
from walbatch.runtime.flow import Flow
from walbatch.runtime.lane import Doomed, Shard
from walbatch.runtime.letters import DeadLetters
from walbatch.runtime.promises import LOGGED, Promises
from walbatch.types import Batch, DeathReason, Mark, Overdue

_logger = logging.getLogger("walbatch")

RESULTS: Mapping[FailureKind, BatchResult] = {
    FailureKind.TOO_LARGE: BatchResult.TOO_LARGE,
    FailureKind.TIMED_OUT: BatchResult.TIMED_OUT,
    FailureKind.THROTTLED: BatchResult.THROTTLED,
    FailureKind.CONNECTION: BatchResult.UNAVAILABLE,
    FailureKind.RETRY: BatchResult.UNAVAILABLE,
    FailureKind.BROKEN: BatchResult.UNAVAILABLE,
}
"""What a failure says to the size controller. The others fail for reasons of their operations."""


MISSED: Final = DeathReason.DEADLINE, "its deadline passed before it was applied"


class Delivery:
    """Applies batches. `deliver` and `expire` make jobs for workers; the other methods are for the dispatcher's lock."""

    def __init__(
        self, *, cond: Condition, flow: Flow, clock: Clock, entropy: Entropy, promises: Promises, letters: DeadLetters,
        store: bytes, epoch: int, history: History, given_up: set[int], on_failure: Callable[[WalbatchError], None], bells: Bells,
        run_on: Callable[[Shard, int], Job | None],
    ) -> None:  # fmt: skip
        """`run_on`: the next batch of a shard, if the worker that has brought one back may take it along. With the lock held."""
        # The dispatcher's: it guards the shards, the flow, _given_up and the calls.
        self._cond = cond
        self._flow = flow
        self.calls = Calls()
        self._clock = clock
        self._entropy = entropy
        self._promises = promises
        self.burial = Burial(clock=clock, promises=promises, letters=letters, on_failure=on_failure)
        self._history = history
        self._given_up = given_up
        self._store = store
        self._epoch = epoch
        self._on_failure = on_failure
        self._bells = bells
        self._run_on = run_on

    def __repr__(self) -> str:
        return f"<Delivery {len(self.calls)} calls under way, {self._flow.abandoned} given up>"

    # --- making jobs (with the lock held) -----------------------------------------------------------------------------

    def job(self, shard: Shard, flight: Flight, *, now_ns: int, end_lsn: int) -> Job:
        """The batch of a flight, with the mark that holds once it is applied."""
        lane = shard.lane
        lsns, keys, payloads, priorities, options = flight.columns()
        mark = None
        if lane.logged and lane.setup.transactional:
            if shard.cursor is None:
                shard.ledger.advance(end_lsn)
            mark = shard.ledger.mark(epoch=self._epoch, settling=lsns)
        lane.batches += 1
        arrivals = flight.arrivals_ns
        mean_ns = sum(time * count for time, count in arrivals) // flight.count
        shard.tally.cut(
            flight.reason, flight.count, flight.size, oldest_ns=now_ns - min(arrivals)[0], mean_ns=now_ns - mean_ns,
            target_count=shard.target, now_ns=now_ns,
        )  # fmt: skip
        batch = Batch(
            lane=lane.setup.name, shard=shard.index, store=self._store, lsns=tuple(lsns) if lane.logged else (), keys=keys,
            attempt=1 + max(flight.tries, shard.queue.most_attempts(lsns)),
            payloads=payloads, priorities=priorities, reason=flight.reason, mark=mark, options=options,
        )  # fmt: skip
        teaches = shard.teaches(flight)
        shard.aim()
        return Job(shard=shard, flight=flight, batch=batch, teaches=teaches)

    def deliver(self, job: Job) -> Callable[[], None]:
        """What a worker does with a batch, and with those that are due in its shard when it has brought one back."""

        def run() -> None:
            following: Job | None = job
            while following is not None:
                following = self._apply(following)

        return run

    def give_up(self, shard: Shard, doomed: Doomed) -> Callable[[], None]:
        """What a worker does with operations that were taken out of the queue to be buried."""
        return lambda: self._bury_doomed(shard, doomed)

    def _seconds(self, job: Job) -> float:
        """How long its call has taken so far."""
        return (self._clock.monotonic_ns() - job.began_ns) / NS_PER_S

    def interrupt(self) -> bool:
        """End the calls that can be ended, whatever their time limits. Returns whether there are any."""
        jobs = [job for job in self.calls if job.shard.lane.setup.interruptible]
        for job in jobs:
            job.interrupted = True
            job.shard.lane.setup.backend.interrupt(job.batch)  # type: ignore[union-attr]  # as its setup says
        return bool(jobs)

    def look_at_time_limits(self, now_ns: int) -> None:
        """Give up calls that have taken too long, as far as their lanes allow."""
        for job in self.calls.late(now_ns):
            self._overrun(job, now_ns)

    def _overrun(self, job: Job, now_ns: int) -> None:
        """A call has taken too long: interrupt it, give it up, or wait and say so."""
        lane = job.shard.lane
        if lane.setup.interruptible:
            was_interrupted, job.interrupted = job.interrupted, True
            lane.setup.backend.interrupt(job.batch)  # type: ignore[union-attr]  # as its setup says; heard once
            if not was_interrupted:
                job.limit_ns = now_ns + (job.timeout_ns or 0)  # it has this long to end by itself
                return
        if lane.overdue is Overdue.WAIT or self._flow.abandoned >= limits.ABANDONED_MAX:
            # Looked at again: others may return, and the lane may be configured otherwise.
            job.limit_ns = now_ns + OVERDUE_LOOK_NS
            if not job.is_overdue:
                job.is_overdue = True
                lane.last_error = f"apply has not returned within {job.timeout_s:g} s; the shard waits for it"
                _logger.warning("%r: %s", job.batch, lane.last_error)
            return
        job.given_up = True
        job.limit_ns = None
        self._flow.abandoned += 1
        _logger.warning(
            "%r has not returned within %g s: the call is given up, and the batch tried again", job.batch, job.timeout_s
        )  # fmt: skip
        failure = classify(Overran(f"apply has not returned within {job.timeout_s:g} s"))
        self._fail(job, failure, seconds=(now_ns - job.began_ns) / NS_PER_S)

    # --- the call -----------------------------------------------------------------------------------------------------

    def _apply(self, job: Job) -> Job | None:
        """One call of a backend. Whatever it does, the batch ends settled or queued again. Returns what to do next."""
        if job.began_ns:
            job.began_ns = (
                self._clock.monotonic_ns()
            )  # it came with the lock, before others were told of the last batch
        else:
            with self._cond:
                self.calls.begin(job, self._clock.monotonic_ns())
        answer, error = self._call(job)
        results = results_of(answer, job.flight.count) if error is None else None
        if error is None and (answer is None or results is not None):
            following = self._applied(job, results)
            if not job.given_up:
                return following
        self._answered(job, answer, error)
        return None

    def _call(self, job: Job) -> tuple[object, BaseException | None]:
        """What the backend answers, or raises."""
        backend = job.shard.lane.setup.backend
        assert backend is not None
        token = self.calls.enter(job)
        try:
            return backend.apply(job.batch), None
        except BaseException as error:  # noqa: BLE001 - a backend may raise anything
            return None, error
        finally:
            self.calls.leave(token)

    def _answered(self, job: Job, answer: object, error: BaseException | None) -> None:
        """The backend has answered, or raised `error`: find out what becomes of the batch."""
        shard, lane = job.shard, job.shard.lane
        verdict: Verdict | None = None
        failure: Failure | None = None
        fatal: WalbatchError | None = None
        is_nonsense = False
        if isinstance(error, (Fenced, BackendError)):
            fatal = error
        elif error is not None:
            failure = _understand(
                Overran(f"apply was interrupted after {self._seconds(job):.3g} s")
                if job.interrupted
                else error
            )
        else:
            try:
                verdict = judge(job.batch, answer, lane.order)  # type: ignore[arg-type]  # wrapped backends answer synchronously
                self._check_mark(job, verdict)
            except ValueError as nonsense:
                # Nobody's fault but the backend's: as an outage, so that nothing dies of it.
                failure = Failure(kind=FailureKind.RETRY, text=str(nonsense))
                is_nonsense = True
            except (Fenced, BackendError) as found:
                fatal = found
            except BaseException as raised:  # noqa: BLE001 - the mark was asked for
                failure = _understand(raised)
        with self._cond:
            now_ns = self._clock.monotonic_ns()
            shard.nonsense = shard.nonsense + 1 if is_nonsense else 0
            self.calls.end(job)
            if job.given_up:
                self._flow.abandoned -= 1
                self._bells.everybody()
        seconds = (now_ns - job.began_ns) / NS_PER_S
        if job.given_up:
            _logger.warning(
                "%r returned after %g s; it had been given up, and its answer counts for nothing",
                job.batch,
                seconds,
            )
        elif fatal is not None:
            with self._cond:
                lane.last_error = str(fatal)
                self._wait_again(job, delay_ns=0, result=BatchResult.FAILED)
            self._on_failure(fatal)
        elif verdict is not None:
            self._settle(job, verdict, seconds)
        else:
            assert failure is not None
            self._recover(job, failure, seconds)

    def _applied(self, job: Job, results: Sequence[object] | None) -> Job | None:
        """The backend says that it has applied all of a batch, with these results. Returns what to do next.

        Nothing is done with one that was given up. The lock is taken once: most batches are applied, and many are small.
        """
        shard, lane, flight = job.shard, job.shard.lane, job.flight
        count = flight.count
        with self._cond:
            if job.given_up:
                return None
            now_ns = self._clock.monotonic_ns()
            self.calls.end(job)
            shard.nonsense = 0
            self._observe(job, BatchResult.DELIVERED, (now_ns - job.began_ns) / NS_PER_S)
            shard.breaker.record(now_ns, ok=True, chance=0.0)  # nothing opens on it
            lane.budget.succeeded()
            shard.queue.finish(flight.number)
            self._count(shard, flight.lsns, ())
            shard.tally.done(
                flight.reason, count, (now_ns - job.began_ns) / NS_PER_S, applied=count, retried=0, dead=0, failed=False,
                result=BatchResult.DELIVERED.value, now_ns=now_ns,
            )  # fmt: skip
            lane.in_flight -= 1
            self._flow.in_flight -= 1
            following = None
            since_ns = job.since_ns or job.began_ns
            if now_ns - since_ns >= RUN_ON_NS_MAX:
                self._bells.timer.ring()
            else:
                following = self._run_on(shard, now_ns)
            if following is not None:
                following.since_ns = since_ns
                self.calls.begin(following, now_ns)
            if shard.has_news or not lane.logged:
                self._cond.notify_all()
            if shard.wants_refill:
                self._bells.reader.ring()
        self._promises.resolve_applied(LOGGED if lane.logged else lane.index, flight.lsns, results)
        return following

    def _check_mark(self, job: Job, verdict: Verdict) -> None:
        """A transactional backend may leave operations out only if the mark that it stored leaves them out, too.

        Otherwise it would take them for applied when they come again, and they would be lost; and so would one that it rejects, if
        power failed before that was buried. So the engine stops; what the backend names becomes dead letters first, since the mark
        passes it over from now on.
        """
        setup = job.shard.lane.setup
        left_out = [*verdict.retry, *verdict.rejected]
        if not left_out or job.batch.mark is None:
            return
        stored: Mark = setup.backend.applied_mark(job.shard.index)  # type: ignore[union-attr]  # it is transactional
        covered = [index for index in left_out if stored.covers(job.batch.lsns[index])]
        if not covered:
            return
        death = DeathReason.LEFT_OUT, "the backend did not apply it, and stored a mark that says it did"
        named = {index: death for index in covered if index in verdict.errors or index in verdict.rejected}
        entries = job.flight.entries
        kept = not named or self.burial.bury(job.shard, {index: entries[index] for index in named}, named)
        with self._cond:
            self._given_up.update(entries[index][0] for index in named if kept)
        raise BackendError(
            f"the backend of lane {setup.name!r} did not apply operation {job.batch.lsns[covered[0]]}, but the mark it stored says "
            "that it is applied: it would be lost. Correct the backend (raise to undo the whole batch, or leave such operations, "
            "and those that come behind them in their key, out of the mark); "
            + (
                "then requeue the dead letters that were made of them"
                if kept
                else "there was no room to keep dead letters of them"
            )
        )

    # --- a batch that failed --------------------------------------------------------------------------------------------

    def _recover(self, job: Job, failure: Failure, seconds: float) -> None:
        """The whole batch failed: try it again, split it, or give up the operation that it consists of."""
        _logger.warning("%r failed and will be tried again: %s", job.batch, failure.text)
        with self._cond:
            doomed = self._fail(job, failure, seconds=seconds)
        if doomed is not None:
            self._bury_and_settle(job, applied={}, retry={}, deaths={0: doomed})

    def _fail(self, job: Job, failure: Failure, *, seconds: float) -> tuple[DeathReason, str] | None:
        """Take the recourse that a failure asks for. With the lock held.

        Returns reason and error if the batch is one operation which is to be buried; it is still in flight then.
        """
        shard, lane, number = job.shard, job.shard.lane, job.flight.number
        retry = lane.settings.retry
        now_ns = self._clock.monotonic_ns()
        count = job.flight.count
        lane.last_error = failure.text
        result = RESULTS.get(failure.kind, BatchResult.FAILED)
        self._observe(job, result, seconds)
        course = recourse(
            failure, tries=job.flight.tries, count=count, searching=shard.queue.is_search(number),
            batch_retries=retry.batch_retries, bytes=job.flight.size,
        )  # fmt: skip
        shard.breaker.record(now_ns, ok=course.ok, chance=self._entropy.uniform())
        if course.outage:
            shard.after_gap = True
        match course.step:
            case Step.SPLIT:
                shard.queue.split(number)
                self._land(job, retried=count, result=result)
            case Step.BLAME | Step.BURY:
                exhausted = shard.queue.blame(number, [0])
                dies = course.step is Step.BURY or bool(exhausted)
                guessed = course.step is Step.BLAME
                if dies and not shard.breaker.too_many_deaths(1, guessed=guessed):
                    reason = DeathReason.ATTEMPTS if guessed else DeathReason.REJECTED
                    return reason, failure.text
                if dies:
                    shard.breaker.open(now_ns, chance=self._entropy.uniform())
                self._alone_again(job, delay_ns=self._delay_ns(job, course.after_s), result=result)
            case Step.SHRINK:
                shard.queue.shrink(number, course.count, retry_at_ns=now_ns)
                self._land(job, retried=count, result=result)
            case Step.STOP:
                shard.broken = failure.text
                _logger.error("%r: the shard stops and keeps its work: %s", job.batch, failure.text)
                self._wait_again(job, delay_ns=0, result=result)
            case Step.REPEAT:
                self._wait_again(job, delay_ns=self._delay_ns(job, course.after_s), result=result)
        return None

    def _delay_ns(self, job: Job, after_s: float) -> int:
        """How long a failed batch waits: full jitter, never less than the backend asks for."""
        shard = job.shard
        retry = shard.lane.settings.retry
        draining = (
            self._flow.draining
        )  # then nobody waits longer than for a first retry, unless the backend asks for it
        delay = backoff_ns(
            shard.queue.failures,
            base_s=retry.base_s,
            ceiling_s=min(retry.base_s, retry.ceiling_s) if draining else retry.ceiling_s,
            chance=self._entropy.uniform(),
        )
        shard.lane.retries_waiting = 0 if shard.lane.budget.take() else shard.lane.retries_waiting + 1
        if shard.lane.retries_waiting and not draining:
            delay = int(retry.ceiling_s * NS_PER_S)
        return max(delay, int(after_s * NS_PER_S))

    def _alone_again(self, job: Job, *, delay_ns: int, result: BatchResult) -> None:
        """The only operation of a batch waits for another attempt. With the lock held."""
        at_ns = self._clock.monotonic_ns() + delay_ns
        job.shard.queue.partly(job.flight.number, settled=(), retry_at_ns={0: at_ns})
        self._land(job, retried=1, result=result)

    def _wait_again(self, job: Job, *, delay_ns: int, result: BatchResult) -> None:
        """The whole batch goes back in front of its shard. With the lock held."""
        queue, number = job.shard.queue, job.flight.number
        at_ns = self._clock.monotonic_ns() + delay_ns
        if queue.is_search(number):
            queue.unsplit(number, retry_at_ns=at_ns)
        else:
            queue.fail(number, retry_at_ns=at_ns)
        self._land(job, retried=job.flight.count, result=result)

    def _land(
        self, job: Job, *, retried: int, applied: int = 0, dead: int = 0, result: BatchResult = BatchResult.DELIVERED,
        failed: bool = True,
    ) -> None:  # fmt: skip
        """The batch is not in flight any more. With the lock held."""
        lane = job.shard.lane
        now_ns = self._clock.monotonic_ns()
        job.shard.tally.done(
            job.flight.reason, job.flight.count, (now_ns - (job.began_ns or now_ns)) / NS_PER_S, applied=applied,
            retried=retried, dead=dead, failed=failed, result=result.value, now_ns=now_ns,
        )  # fmt: skip
        lane.in_flight -= 1
        self._flow.in_flight -= 1
        if retried:
            lane.failed_batches += 1
            lane.retried += retried
        self._bells.everybody()

    def _observe(self, job: Job, result: BatchResult, seconds: float) -> None:
        """Tell the controllers. With the lock held."""
        shard, lane = job.shard, job.shard.lane
        count = job.flight.count
        predicted = shard.controller.predict_s(count)
        observation = Observation(
            count=count, bytes=job.flight.size, seconds=seconds, result=result,
            learnable=job.teaches, concurrency=max(1, lane.in_flight),
        )  # fmt: skip
        shard.controller.observe(observation)
        if result is BatchResult.DELIVERED:
            self._history.observe(lane.setup.name, self._clock.wall_ns(), count, observation.bytes, seconds)
        shard.queue.observe_duration(seconds)
        if lane.concurrency is not None:
            lane.concurrency.observe(observation, predicted_s=predicted)

    # --- a batch that was answered ----------------------------------------------------------------------------------------

    def _settle(self, job: Job, verdict: Verdict, seconds: float) -> None:
        """Operations are final; the others wait."""
        shard, lane = job.shard, job.shard.lane
        deaths: dict[int, tuple[DeathReason, str]] = {}
        retry = dict(verdict.retry)
        with self._cond:
            now_ns = self._clock.monotonic_ns()
            self._observe(job, BatchResult.DELIVERED, seconds)
            exhausted = shard.queue.blame(job.flight.number, list(verdict.errors)) if verdict.errors else []
            dying = {index: (DeathReason.REJECTED, text) for index, text in verdict.rejected.items()}
            dying |= {index: (DeathReason.ATTEMPTS, verdict.errors[index]) for index in exhausted}
            if dying and shard.breaker.too_many_deaths(len(dying), applied=len(verdict.applied)):
                # The backend is more likely to be wrong than all of these operations.
                shard.breaker.open(now_ns, chance=self._entropy.uniform())
                final = overtaken(dying, verdict.applied, job.batch.keys, lane.order)
                deaths = {index: death for index, death in dying.items() if index in final}
                retry |= dict.fromkeys(dying.keys() - final, 0.0)
            else:
                deaths = dying
                retry = {index: after for index, after in retry.items() if index not in deaths}
            # It answered: what it says of single operations does not speak against it.
            shard.breaker.record(now_ns, ok=True, chance=self._entropy.uniform())
            if not retry:
                lane.budget.succeeded()
        if retry:
            _logger.warning("%r: %d operations will be tried again: %s", job.batch, len(retry), verdict.error)
        self._bury_and_settle(job, applied=verdict.applied, retry=retry, deaths=deaths, error=verdict.error)

    def _bury_and_settle(
        self, job: Job, *, applied: Mapping[int, object], retry: Mapping[int, float], deaths: Mapping[int, tuple[DeathReason, str]],
        error: str | None = None,
    ) -> None:  # fmt: skip
        """Bury what is given up, then settle it with what was applied; the rest waits.

        Crash story: until the burial is durable, and the applied ones are durable in the backend as they are, nothing here is on
        disk; the checkpoint follows later. A crash in between repeats the batch without those that are buried.
        """
        shard, lane = job.shard, job.shard.lane
        entries = job.flight.entries
        retry = dict(retry)
        unburied_ns = 0
        out: Sequence[int] = ()
        doomed: Doomed | None = None
        if deaths and not self.burial.bury(shard, {index: entries[index] for index in deaths}, deaths):
            out = sorted(overtaken(deaths, applied, job.batch.keys, lane.order))
            doomed = Doomed(
                entries=[entries[index] for index in out], deaths=[deaths[index] for index in out]
            )
            retry |= dict.fromkeys(deaths.keys() - set(out), lane.settings.retry.ceiling_s)
            deaths = {}
            unburied_ns = self._clock.monotonic_ns() + int(lane.settings.retry.ceiling_s * NS_PER_S)
        with self._cond:
            shard.refused_until_ns = max(shard.refused_until_ns, unburied_ns)
            if not retry and not out:
                shard.queue.finish(job.flight.number)
            else:
                now_ns = self._clock.monotonic_ns()
                delay = self._delay_ns(job, 0.0)
                times = {index: now_ns + max(delay, int(after * NS_PER_S)) for index, after in retry.items()}
                shard.queue.partly(job.flight.number, settled=[*applied, *deaths], retry_at_ns=times, out=out)
                if doomed is not None and out:
                    self._bury_later(shard, doomed)
                lane.last_error = error or lane.last_error
            self._count(
                shard, [entries[index][0] for index in applied], [entries[index][0] for index in deaths]
            )
            self._land(job, retried=len(retry), applied=len(applied), dead=len(deaths), failed=False)
        scope = LOGGED if lane.logged else lane.index
        self._promises.resolve_applied(
            scope, [entries[index][0] for index in applied], list(applied.values())
        )
        self.burial.tell_dead(shard, {entries[index][0]: death for index, death in deaths.items()})

    def _count(self, shard: Shard, applied: Sequence[int], dead: Sequence[int]) -> None:
        """These are settled. With the lock held."""
        lane = shard.lane
        shard.ledger.settle([*applied, *dead] if dead else applied)
        shard.breaker.settled(applied=len(applied), dead=len(dead))
        lane.applied += len(applied)
        lane.dead += len(dead)
        if lane.logged:
            self._flow.settled += len(applied) + len(dead)
            self._given_up.update(dead)

    # --- what is given up ----------------------------------------------------------------------------------------------

    def _bury_doomed(self, shard: Shard, doomed: Doomed) -> None:
        """Operations were taken out of the queue, and nobody has them in flight."""
        entries, deaths = dict(enumerate(doomed.entries)), dict(enumerate(doomed.deaths))
        buried = self.burial.bury(shard, entries, deaths)
        lsns = [entry[0] for entry in doomed.entries]
        with self._cond:
            if buried:
                shard.queue.drop(lsns)
                self._count(shard, [], lsns)
            else:
                self._bury_later(shard, doomed)
            self._bells.everybody()
        if buried:
            self.burial.tell_dead(shard, dict(zip(lsns, doomed.deaths, strict=True)))

    def _bury_later(self, shard: Shard, doomed: Doomed) -> None:
        """There was no room for these dead letters. With the lock held."""
        shard.refused_until_ns = self._clock.monotonic_ns() + UNBURIED_RETRY_NS
        shard.unburied.append((shard.refused_until_ns, doomed))

    # --- what is cancelled ---------------------------------------------------------------------------------------------

    def cancelled(self, shard: Shard, lsn: int) -> None:
        """An operation was taken out of the queue, and that is durable."""
        lane = shard.lane
        with self._cond:
            shard.queue.drop([lsn])
            shard.ledger.settle([lsn])
            lane.cancelled += 1
            self._flow.settled += lane.logged
            self._bells.everybody()
        self.burial.tell_cancelled(lsn)


RUN_ON_NS_MAX = 10_000_000
"""How long a worker goes on with the batches of one shard: it takes the lock again before anybody who waits for it has woken, and
the others have to have their turn."""
OVERDUE_LOOK_NS = 1_000_000_000
"""How often a call that should have returned, and could not be given up, is looked at again."""
UNBURIED_RETRY_NS = 1_000_000_000
"""Pause before an operation that must be buried, whatever comes, is buried again, where there was no room."""


def _understand(error: BaseException) -> Failure:
    """What an exception of a backend means. A class that cannot even be looked at must not cost us the thread."""
    try:
        return classify(error)
    except BaseException:  # noqa: BLE001 - what a property of the backend's own class raises
        return Failure(kind=FailureKind.UNKNOWN, text=type(error).__name__)
