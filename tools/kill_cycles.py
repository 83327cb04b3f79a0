"""Kills a working engine with SIGKILL again and again, and checks that nothing is lost, invented, repeated or out of order.

`python tools/kill_cycles.py --cycles 1000` in the project's environment. Each cycle starts a process that recovers the store of
the cycle before, submits from several threads through the public API (one by one, without waiting, in groups) to a lane with
LMDB behind it (exactly once in effect) and to a lane with a function behind it (at least once), and is killed at a random
moment, inside recovery included. Every so often the store is drained and everything is compared with what was acknowledged.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import walbatch as wb

THREADS = 4
KEYS = 7
SETTINGS = wb.Settings(segment_bytes=128 * 1024, timer_ms=5, checkpoint_ms=20, idle_stamp_ms=30)
TRIGGER = wb.Trigger(count=50, linger_ms=2)
COUNT_PREFIX, LAST_PREFIX, WRONG_KEY = b"n:", b"k:", b"wrong"


def payload_of(name: str) -> bytes:
    """A payload that says which operation it is, and whose other bytes follow from that."""
    stamp = name.encode()
    return stamp + b"=" + hashlib.shake_128(stamp).digest(len(stamp) * 13 % 300)


def name_of(payload: bytes) -> str:
    """The operation that a payload belongs to; "" for bytes that nobody submitted."""
    name = payload.partition(b"=")[0].decode(errors="replace")
    return name if payload_of(name) == payload else ""


# --- the process that is killed -----------------------------------------------------------------------------------------


def count_once(txn: Any, operation: wb.Operation) -> None:
    """The write of the LMDB lane: counts each operation's applications and checks the order of its key."""
    name = name_of(operation.payload).encode()
    last_key = LAST_PREFIX + operation.key
    last = int(txn.get(last_key) or b"0")
    if not name or operation.lsn is None or operation.lsn <= last:
        txn.put(WRONG_KEY, b"lsn %d of key %r after lsn %d" % (operation.lsn or 0, operation.key, last))
    txn.put(last_key, b"%d" % (operation.lsn or 0))
    counted = COUNT_PREFIX + name
    txn.put(counted, b"%d" % (int(txn.get(counted) or b"0") + 1))


class Appender:
    """The function lane: appends a line per operation to a file and syncs it before it answers."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def __call__(self, batch: wb.Batch) -> None:
        """Append and sync."""
        lines = [f"{op.lsn} {op.key.decode()} {name_of(op.payload) or 'WRONG'}\n" for op in batch]
        os.write(self._fd, "".join(lines).encode())
        os.fdatasync(self._fd)


def work(directory: Path, cycle: int, *, drain: bool) -> None:
    """Recover, then submit until killed; or drain and end. Says "ready" and every acknowledged operation's name."""
    lanes = {
        "once": wb.Lane(wb.LmdbBackend(directory / "lmdb", write=count_once), shards=3, trigger=TRIGGER),
        "least": wb.Lane(Appender(directory / "applied.log"), shards=2, trigger=TRIGGER),
    }
    engine = wb.Engine.open(directory / "store", lanes=lanes, settings=SETTINGS)
    say("ready")
    if drain:
        engine.flush(timeout=60)
        sys.exit(0 if engine.close().reason == "drained" else 1)
    for number in range(THREADS):
        threading.Thread(target=submit_for_ever, args=(engine, cycle, number), daemon=True).start()
    threading.Event().wait(60)


def submit_for_ever(engine: wb.Engine, cycle: int, thread: int) -> None:
    """One producer. Its keys are its own, so that the order of a key is the order of its names."""
    chance = random.Random(f"{cycle} {thread}")
    number = 0
    while True:
        lane = chance.choice(["once", "least"])
        many = chance.choice([1, 1, 1, 20])
        names = [f"{cycle}.{thread}.{number + n}" for n in range(many)]
        number += many
        pairs = [(b"%d.%d" % (thread, chance.randrange(KEYS)), payload_of(name)) for name in names]
        if many > 1:
            engine.submit_many(lane, pairs)
        elif thread % 2:
            engine.submit(lane, key=pairs[0][0], payload=pairs[0][1])
        else:
            tickets = [engine.submit_nowait(lane, key=key, payload=payload) for key, payload in pairs]
            for ticket in tickets:
                ticket.wait_durable()
        say("".join(f"a {lane} {name}\n" for name in names).rstrip())


def say(text: str) -> None:
    """To the parent, in one write."""
    os.write(1, text.encode() + b"\n")


# --- the judge -------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Judge:
    """Everything that was acknowledged, and the figures of the run."""

    acknowledged: dict[str, set[str]] = field(default_factory=lambda: {"once": set(), "least": set()})
    cycles: int = 0
    in_recovery: int = 0
    checks: int = 0

    def hear(self, output: bytes) -> bool:
        """Take in what a process said before it died. Returns whether it had recovered."""
        lines = output.split(b"\n")[:-1]  # a last line without its end was cut off by the kill
        for line in lines:
            word, *fields = line.decode().split()
            if word == "a":
                self.acknowledged[fields[0]].add(fields[1])
        return b"ready" in lines

    def check(self, directory: Path) -> None:
        """Compare a drained store with what was acknowledged. Raises AssertionError."""
        self.checks += 1
        once: Counter[str] = Counter()
        backend = wb.LmdbBackend(directory / "lmdb")
        try:
            for key, value in backend.items():
                assert key != WRONG_KEY, f"wrong in LMDB: {value!r}"
                if key.startswith(COUNT_PREFIX):
                    once[key.removeprefix(COUNT_PREFIX).decode()] += int(value)
        finally:
            backend.close()
        repeated = [name for name, count in once.items() if count != 1]
        assert not repeated, f"applied more than once: {repeated[:5]}"
        least = self._check_appended(directory / "applied.log")
        for lane, applied in (("once", set(once)), ("least", least)):
            lost = self.acknowledged[lane] - applied
            assert not lost, f"LOST from lane {lane}: {sorted(lost)[:5]}, {len(lost)} in all"
        both = set(once) & least
        assert not both, f"applied by both lanes: {sorted(both)[:5]}"

    @staticmethod
    def _check_appended(path: Path) -> set[str]:
        """The names in the file; first applications of a key are in LSN order."""
        first_seen: dict[int, str] = {}
        last_of_key: dict[str, int] = {}
        for line in path.read_text().splitlines():
            lsn_text, key, name = line.split()
            lsn = int(lsn_text)
            assert name != "WRONG", f"lsn {lsn}: bytes that nobody submitted"
            if lsn in first_seen:
                assert first_seen[lsn] == name, f"lsn {lsn} names two operations"
                continue
            first_seen[lsn] = name
            assert last_of_key.get(key, 0) < lsn, (
                f"key {key}: lsn {lsn} first applied after {last_of_key[key]}"
            )
            last_of_key[key] = lsn
        return set(first_seen.values())


def run_cycle(directory: Path, cycle: int, chance: random.Random, judge: Judge) -> None:
    """Start the worker and kill it, once it works or while it starts and recovers."""
    early = chance.random() < 0.3
    command = [sys.executable, __file__, "--work", str(directory), "--cycle", str(cycle)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        output = bytearray()
        kill_at = time.monotonic() + (chance.uniform(0.05, 0.4) if early else 30.0)
        armed = early
        while time.monotonic() < kill_at:
            readable, _, _ = select.select([process.stdout], [], [], max(0.0, kill_at - time.monotonic()))
            if readable:
                data = os.read(process.stdout.fileno(), 1 << 16)
                if not data:
                    break
                output += data
                if not armed and b"ready\n" in output:
                    armed = True
                    kill_at = time.monotonic() + chance.uniform(0.002, 0.1)
        process.send_signal(signal.SIGKILL)
        output += process.stdout.read()
        code = process.wait()
    assert code == -signal.SIGKILL, f"cycle {cycle}: the worker ended by itself with {code}"
    if not judge.hear(bytes(output)):
        judge.in_recovery += 1
    judge.cycles += 1


def run(directory: Path, cycles: int, seed: int, *, check_every: int, show: bool) -> Judge:
    """All cycles, with a drain and a check every so often. Raises AssertionError at the first finding."""
    chance = random.Random(seed)
    judge = Judge()
    for cycle in range(cycles):
        run_cycle(directory, cycle, chance, judge)
        if (cycle + 1) % check_every == 0 or cycle + 1 == cycles:
            drain = [sys.executable, __file__, "--work", str(directory), "--cycle", str(cycle), "--drain"]
            subprocess.run(drain, check=True, stdout=subprocess.DEVNULL, timeout=120)
            judge.check(directory)
            if show:
                total = sum(map(len, judge.acknowledged.values()))
                print(
                    f"{cycle + 1:,} cycles, {judge.in_recovery:,} before recovery was done, {total:,} acknowledged"
                )
    return judge


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--cycles", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--check-every", type=int, default=25)
    parser.add_argument("--dir", type=Path, help="work folder; a temporary one by default")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--cycle", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--drain", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.work, arguments.cycle, drain=arguments.drain)
        return
    directory = arguments.dir or Path(tempfile.mkdtemp(prefix="walbatch-kill-"))
    directory.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    judge = run(directory, arguments.cycles, arguments.seed, check_every=arguments.check_every, show=True)
    total = sum(map(len, judge.acknowledged.values()))
    print(
        f"{judge.cycles:,} kill -9 cycles in {time.monotonic() - started:,.0f} s ({judge.in_recovery:,} before recovery was done), "
        f"{judge.checks} full checks, {total:,} operations acknowledged: none lost, invented, repeated or out of order"
    )
    if not arguments.dir:
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()
