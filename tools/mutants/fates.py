"""Mistakes about operations that are given up, wait for their time, go first, or were submitted before."""

from __future__ import annotations

from typing import Final

from tools.mutants.mutant import Edit, Mutant

DELIVERY: Final = "walbatch/runtime/delivery.py"
DISPATCHER: Final = "walbatch/runtime/dispatcher.py"
ASSEMBLY: Final = "walbatch/engine/assembly.py"
EXPRESS: Final = "walbatch/runtime/express.py"
FINDING: Final = "walbatch/runtime/finding.py"
LANE: Final = "walbatch/runtime/lane.py"
LETTERS: Final = "walbatch/runtime/letters.py"
OPENING: Final = "walbatch/engine/opening.py"
PLACES: Final = "walbatch/core/places.py"
READBACK: Final = "walbatch/runtime/readback.py"
REQUEUEING: Final = "walbatch/engine/requeueing.py"

MUTANTS: Final = (
    Mutant(
        name="a dead operation is settled, and its letter is nowhere but in memory",
        row="dead letters durable before the checkpoint passes them",
        edits=(Edit(LETTERS, "            self._state.bury(letters)\n", ""),),
        hint="images:poison",
    ),
    Mutant(
        name="a letter has the payload of another operation of its batch",
        row="dead letters durable before the checkpoint passes them",
        edits=(
            Edit(
                DELIVERY,
                "{index: entries[index] for index in deaths}",
                "{index: entries[index - 1] for index in deaths}",
            ),
        ),
        hint="images:requeue",
    ),
    Mutant(
        name="what was given up is not known when the store is opened again",
        row="dead letters durable before the checkpoint passes them",
        edits=(
            Edit(
                OPENING,
                "    given_up, given_up_findings = state.load_given_up()\n",
                "    given_up, given_up_findings = frozenset[int](), list[str]()\n",
            ),
        ),
        hint="images:drop",
    ),
    Mutant(
        name="a dead letter is dropped before its operation is submitted again",
        row="dead letters durable before the checkpoint passes them",
        edits=(
            Edit(
                REQUEUEING,
                "    options = replace(\n        letter.options, origin=",
                "    letters.remove_claimed(letter.lsn)\n    options = replace(\n        letter.options, origin=",
            ),
        ),
        hint="images:requeue",
    ),
    Mutant(
        name="a dead letter is dropped before its operation is synced",
        row="dead letters durable before the checkpoint passes them",
        edits=(Edit(REQUEUEING, "wait=True, synced=True", "wait=True"),),
        hint="images:requeue_to_an_interval_lane",
    ),
    Mutant(
        name="an operation is requeued without the key that names its letter",
        row="double replay where exactly-once was promised",
        edits=(Edit(REQUEUEING, "idempotency_key=requeue_key(letter.lsn),", 'idempotency_key=b"",'),),
        hint="images:requeue",
    ),
    Mutant(
        name="a cancellation is acknowledged and not durable",
        row="ack before sync",
        edits=(Edit(FINDING, "            self._state.cancel([entry[0]])\n", "            pass\n"),),
        hint="images:cancel",
    ),
    Mutant(
        name="a cancellation of what nobody has read yet is acknowledged and not durable",
        row="ack before sync",
        edits=(Edit(FINDING, "            self._state.cancel([lsn])\n", ""),),
        hint="images:cancel",
    ),
    Mutant(
        name="whoever waits for what was cancelled in the log waits on",
        row="no thread waits for ever",
        edits=(Edit(FINDING, "        self._delivery.burial.tell_cancelled(lsn)\n", ""),),
        hint="schedules:cancel",
    ),
    Mutant(
        name="what was cancelled is not counted when it is passed over",
        row="the identity of what was submitted and what became of it",
        edits=(
            Edit(
                READBACK,
                "cancelled += shard.ledger.pass_over(lsn)",
                "shard.ledger.pass_over(lsn)",
            ),
        ),
        hint="images:cancel",
    ),
    Mutant(
        name="what is durable and not yet taken over for delivery counts as applied",
        row="the identity of what was submitted and what became of it",
        edits=(
            Edit(
                FINDING,
                "            if known is None and lsn > self._flow.end_lsn:\n",
                "            if known is None and lsn < 0:\n",
            ),
        ),
        hint="schedules:asked",
    ),
    Mutant(
        name="a letter is shown although its burial failed",
        row="dead letters durable before the checkpoint passes them",
        edits=(
            Edit(
                LETTERS,
                "for letter in self._state.load_letters()[0] if letter.lsn in self._sizes]",
                "for letter in self._state.load_letters()[0]]",
            ),
        ),
        hint="schedules:rejected",
    ),
    Mutant(
        name="an elder whose burial waits for room is overtaken",
        row="order broken by the retry of an earlier batch",
        edits=(
            Edit(
                PLACES,
                "        if self._order is Order.NONE:\n            return\n        self.plain",
                "        if entries:\n            return\n        self.plain",
            ),
            Edit(
                PLACES,
                "        if self._order is not Order.NONE:\n            self._make",
                "        if not entry:\n            self._make",
            ),
        ),
        hint="images:missed",
    ),
    Mutant(
        name="idempotency keys are not saved before the checkpoint that trims their operations",
        row="a checkpoint behind trimmed segments",
        edits=(
            Edit(
                ASSEMBLY,
                "        kept_lsn = self.keys.save(",
                "        kept_lsn = (lambda *_, **__: None)(",
            ),
        ),
        hint="images:repeat",
    ),
    Mutant(
        name="an urgent operation is fetched from the log without its elders",
        row="order broken by the retry of an earlier batch",
        edits=(
            Edit(
                EXPRESS,
                "if not self._for_elders and any(found.keys",
                "if self._for_elders and any(found.keys",
            ),
        ),
        hint="schedules:urgent",
    ),
    Mutant(
        name="a delay is forgotten when the operation is taken in",
        row="delayed operations",
        edits=(
            Edit(LANE, "not_before_ns=_monotonic(options.not_before_ns, now_ns, wall_ns)", "not_before_ns=0"),
        ),
        hint="schedules:delayed",
    ),
    Mutant(
        name="a deadline that has passed is not looked at",
        row="deadlines",
        edits=(
            Edit(
                DISPATCHER,
                "            missed = shard.queue.expire(now)\n",
                "            missed: list[Entry] = []\n",
            ),
        ),
        hint="schedules:deadlines",
    ),
    Mutant(
        name="a deadline in the backlog is forgotten when the operation goes first",
        row="deadlines",
        edits=(
            Edit(
                LANE,
                "                _monotonic(entry[5].deadline_ns, now_ns, wall_ns),\n",
                "                0,\n",
            ),
        ),
        hint="schedules:urgent_until",
    ),
)
