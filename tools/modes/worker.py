"""What a worker of the torture run does until it is killed: open a store, submit from several threads, say what happened.

What is not here: when it dies and what that must leave (`kill`, `powercut`, `fulldisk`, `syscalls`, `judge`), and how it is
started (`forks`).

The idea needed to read it: an operation's payload says which operation it is, and everything else of it follows from that.
The lane `once` has LMDB behind it (exactly once in effect, counted in the same transaction), the lane `least` a function
that tells the parent what it applied: the parent is the outside world, which no crash of this machine takes back. Promises
("ready", "ack") end with the time at which they were given, by the clock that all processes share (CLOCK_MONOTONIC): the parent
may hear them later.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import mmap
import os
import random
import signal
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Never

import walbatch as wb
from tools.modes.forks import Channel
from tools.modes.recorder import RecordingFileSystem, SkippingFileSystem
from walbatch import config
from walbatch.ports import FileSystem
from walbatch.storage.filesystem import RealFileSystem

KEYS: Final = 7
GROUP: Final = 20
INTERVAL_MS: Final = 10
"""Of lanes that sync later."""
PAUSE_S: Final = 0.01
"""Between two submits of a thread that is in no hurry any more."""
NEVER_MS: Final = 60_000
"""The longest interval that there is: no worker sees the end of it."""
WAIT_S: Final = 60.0
COUNT_PREFIX: Final = b"n:"
LAST_PREFIX: Final = b"k:"
WRONG_KEY: Final = b"wrong"
WAL_SYNCS_OFFSET: Final = 24
"""Of `wal_syncs` in `errno_shim.c`."""
TRIGGER: Final = wb.Trigger(count=50, linger_ms=2)
RETRY: Final = wb.RetryPolicy(base_s=0.005, ceiling_s=0.05)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What a worker is told."""

    directory: str
    cycle: int
    seed: str = ""
    drain: bool = False
    """Recover, deliver everything, close, and say what is in LMDB, instead of working."""
    backend: str = ""
    """Where the LMDB of the lane `once` stands; empty: beside the store."""
    threads: int = 4
    operations: int | None = None
    """Submits of each thread, after which the worker closes and ends by itself; None: until it is killed."""
    once: str = "sync"
    least: str = "sync"
    """Durability of the two lanes."""
    interval_ms: int = INTERVAL_MS
    hurry_s: float = WAIT_S
    """So long a thread submits as fast as it can, and then with pauses."""
    shards: int = 3
    """Of the lane `once`: each is an LMDB file."""
    segment_bytes: int = 128 * 1024
    compress_bytes_min: int | None = 1024
    payload_bytes_max: int = 300
    disk_full_wait_s: float = 5.0
    close_s: float = 20.0
    """How long closing may take to drain."""
    control: str = ""
    """The control page of a shim (`syscalls`), which counts failed syncs of the log; empty: none."""
    records: str = ""
    """The mount point below which all file-system calls are told to the parent; empty: none."""
    skips: str = ""
    """A call of the file-system port that lies: it does nothing and says that it did (for controls)."""

    @property
    def settings(self) -> wb.Settings:
        """The engine's settings."""
        return wb.Settings(
            segment_bytes=self.segment_bytes, compress_bytes_min=self.compress_bytes_min, timer_ms=5, checkpoint_ms=20,
            idle_stamp_ms=30, disk_full_wait_s=self.disk_full_wait_s, submit_timeout_s=5,
        )  # fmt: skip

    def to_request(self) -> dict[str, object]:
        """As the fork server takes it."""
        return dataclasses.asdict(self)


# --- operations -------------------------------------------------------------------------------------------------------


def name_at(cycle: int, thread: int, number: int) -> str:
    """The name of an operation."""
    return f"{cycle}.{thread}.{number}"


def key_at(name: str) -> bytes:
    """Its key. A thread's keys are its own, so that the order of a key is the order of its names."""
    _, thread, number = name.split(".")
    return b"%s.%d" % (thread.encode(), int(number) // 3 * 5 % KEYS)


def payload_of(name: str, lane: str, size_max: int) -> bytes:
    """Its payload: the name and the lane, and bytes that follow from them."""
    stamp = f"{name} {lane} {size_max}".encode()
    digest = hashlib.shake_128(stamp)
    return stamp + b"=" + digest.digest(int.from_bytes(digest.digest(2), "little") % (size_max + 1))


def name_of(lane: str, key: bytes, payload: bytes) -> str:
    """The operation that these bytes are, whole; "" for what nobody submitted."""
    stamp = payload.partition(b"=")[0].decode(errors="replace")
    name, _, rest = stamp.partition(" ")
    its_lane, _, size_max = rest.partition(" ")
    if its_lane != lane or not size_max.isdigit() or name.count(".") != 2:
        return ""
    return name if payload_of(name, lane, int(size_max)) == payload and key_at(name) == key else ""


# --- backends -----------------------------------------------------------------------------------------------------------


def count_once(txn: Any, operation: wb.Operation) -> None:
    """The write of the lane `once`: counts an operation's applications and checks the order of its key."""
    name = name_of("once", operation.key, operation.payload).encode()
    lsn = operation.lsn or 0
    last_key = LAST_PREFIX + operation.key
    last = int(txn.get(last_key) or b"0")
    if not name or lsn <= last:
        txn.put(WRONG_KEY, b"lsn %d (%s) of key %s after lsn %d" % (lsn, name, operation.key, last))
    txn.put(last_key, b"%d" % lsn)
    counted = COUNT_PREFIX + name
    count = int((txn.get(counted) or b"0 0").split()[0])
    txn.put(counted, b"%d %d" % (count + 1, lsn))


def lanes_of(task: Task, channel: Channel) -> dict[str, wb.Lane]:
    """Both lanes."""

    def tell(batch: wb.Batch) -> None:
        applied = [
            (op.lsn, op.key.decode(errors="replace"), name_of("least", op.key, op.payload)) for op in batch
        ]
        channel.say("applied", applied)

    def interval_ms(durability: str) -> float:
        return task.interval_ms if durability == "interval" else config.INTERVAL_MS

    once = wb.LmdbBackend(Path(task.backend or task.directory) / "lmdb", write=count_once)
    return {
        "once": wb.Lane(
            once,
            shards=task.shards,
            trigger=TRIGGER,
            retry=RETRY,
            durability=task.once,
            interval_ms=interval_ms(task.once),
        ),
        "least": wb.Lane(
            tell,
            shards=2,
            trigger=TRIGGER,
            retry=RETRY,
            durability=task.least,
            interval_ms=interval_ms(task.least),
        ),
    }


# --- the worker ---------------------------------------------------------------------------------------------------------


def run(request: dict[str, Any], channel: Channel) -> Never:
    """Do what the request says, and end the process. Everything unexpected is said to the parent."""
    task = Task(**request)
    code = 0
    # Signals end the main thread in an orderly way; what they interrupt is what is tested.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: signal.default_int_handler(signal.SIGTERM, None))
    threading.excepthook = lambda what: channel.say("crash", f"thread: {_shown(what.exc_value)}")
    try:
        (_drain if task.drain else _work)(task, channel)
    except wb.WalbatchError as error:
        channel.say("error", type(error).__name__, str(error))
        code = 1
    except KeyboardInterrupt:
        channel.say("interrupted")
    except BaseException as error:  # noqa: BLE001 - the parent judges it
        channel.say("crash", _shown(error))
        code = 2
    channel.say("end")
    os._exit(code)


def warm_up() -> None:
    """Import what the first use would, and be quiet: a dying engine's warnings are no news here."""
    logging.getLogger("walbatch").addHandler(logging.NullHandler())
    logging.getLogger("walbatch").propagate = False
    payload_of("0.0.0", "once", 1)
    "".encode("idna")


def open_engine(task: Task, channel: Channel) -> wb.Engine:
    """Recover the store."""
    fs: FileSystem = SkippingFileSystem(task.skips) if task.skips else RealFileSystem()
    if task.records:
        fs = RecordingFileSystem(fs, task.records, channel)
    engine = wb.Engine.open(
        Path(task.directory) / "store",
        lanes=lanes_of(task, channel),
        settings=task.settings,
        environment=wb.Environment(fs=fs),
    )
    channel.say("ready", time.monotonic())
    return engine


def _drain(task: Task, channel: Channel) -> None:
    engine = open_engine(task, channel)
    engine.flush(timeout=WAIT_S)
    channel.say("drained", engine.close().reason)
    backend = wb.LmdbBackend(Path(task.backend or task.directory) / "lmdb")
    found = [(key.decode(), value.decode()) for key, value in backend.items()]
    backend.close()
    channel.say("counted", found)


def _work(task: Task, channel: Channel) -> None:
    engine = open_engine(task, channel)
    drains = random.Random(f"{task.seed} {task.cycle} close").random() < 0.5
    producers = [
        threading.Thread(target=_produce, args=(engine, task, thread, channel), daemon=True)
        for thread in range(task.threads)
    ]
    try:
        for producer in producers:
            producer.start()
        for producer in producers:
            producer.join(WAIT_S)
            if producer.is_alive():
                channel.say("crash", "a submit did not return within a minute")
    finally:
        report = engine.close(drain=drains, timeout=task.close_s)
        channel.say("closed", report.reason, engine.stats().state)


def _produce(engine: wb.Engine, task: Task, thread: int, channel: Channel) -> None:
    """One producer: one by one, without waiting, and in groups. Ends with the engine."""
    chance = random.Random(f"{task.seed} {task.cycle} {thread}")
    failed_syncs = _failed_syncs(task.control)
    number = calls = 0
    hurries_until = time.monotonic() + task.hurry_s
    while task.operations is None or calls < task.operations:
        calls += 1
        lane = chance.choice(["once", "least"])
        many = chance.choice([1, 1, 1, GROUP])
        names = [name_at(task.cycle, thread, number + n) for n in range(many)]
        where = (lane, thread, number, many)
        number += many
        channel.say("submit", *where)
        had_failed = failed_syncs()
        try:
            lsn = _submit(engine, lane, names, task.payload_bytes_max, waits=bool(thread % 2))
        except (wb.Overloaded, wb.EngineClosed) as error:
            channel.say("refused", *where, type(error).__name__)
            if isinstance(error, wb.EngineClosed):
                return
        except wb.WalbatchError as error:
            channel.say("unknown", *where, type(error).__name__, str(error))
            return
        else:
            channel.say("ack", *where, lsn, time.monotonic())
            if had_failed:
                channel.say("crash", f"acknowledged after a failed sync: {names[0]}")
        if time.monotonic() > hurries_until:
            time.sleep(PAUSE_S)


def _failed_syncs(control: str) -> Callable[[], int]:
    """A function that says how many syncs of the log have failed so far."""
    if not control:
        return lambda: 0
    with Path(control).open("rb") as file:
        page = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    return lambda: int.from_bytes(page[WAL_SYNCS_OFFSET : WAL_SYNCS_OFFSET + 4], "little")


def _submit(engine: wb.Engine, lane: str, names: list[str], size_max: int, *, waits: bool) -> int | None:
    """Submit, and return the first LSN when it is durable."""
    pairs = [(key_at(name), payload_of(name, lane, size_max)) for name in names]
    if len(pairs) > 1:
        return engine.submit_many(lane, pairs).start
    key, payload = pairs[0]
    if waits:
        return engine.submit(lane, key=key, payload=payload).lsn
    ticket = engine.submit_nowait(lane, key=key, payload=payload)
    ticket.wait_durable(WAIT_S)
    return ticket.lsn


def _shown(error: BaseException | None) -> str:
    """The error and where it came from, in a line."""
    if error is None:
        return "no error"
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    places = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames))
    return f"{error!r} at {places}"
