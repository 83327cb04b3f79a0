"""Kills in the middle of batches into a database: `python3 tools/database_kills.py postgres --kills 1000`.

A process submits operations through an engine. It is killed with kill -9, and so is the server, which is also shut down at once, or
told to end its connections; then all goes on. In the end everything is drained, and looked at: each acknowledged operation took
effect exactly once. That is counted by the database, with a trigger on the table or in the `write` function, so that an upsert
hides no repetition. Operations that a constraint refuses must be dead letters, each of them, and nothing else.

Needs the package with its development tools (`tools/test.py` makes `.venv` with them), and for `postgres` Debian's package
postgresql. Prints figures as JSON; exit code 1 if anything is wrong.
"""

import argparse
import dataclasses
import faulthandler
import json
import os
import random
import signal
import sqlite3
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import walbatch as wb  # noqa: E402 - found through the line above
from tools.postgres import Server, server  # noqa: E402

LIFE_NUMBERS = 1_000_000
"""Operations that one life of the worker may name."""

GROUP_MAX = 40
POISON_EVERY = 60
KEYS = 7
"""Keys of the lane `calls`: many operations for each, whose order is checked."""

SAID_S = 120.0
"""How long the worker may say nothing."""

DRAIN_S = 300.0
PAUSE_S = 0.002
PENDING_MAX = 400
"""Operations that wait in the log: what is killed is a batch, and draining takes no time in the end."""

RETRY = wb.RetryPolicy(base_s=0.005, ceiling_s=0.1, breaker_s=0.05, breaker_s_max=0.2)
COUNT = struct.Struct("<Q")

SCHEMA = {
    "sqlite": """
        CREATE TABLE IF NOT EXISTS rows (key BLOB PRIMARY KEY, payload BLOB CHECK (payload <> x'626164'));
        CREATE TABLE IF NOT EXISTS effects (name TEXT PRIMARY KEY, count INTEGER NOT NULL);
        CREATE TABLE IF NOT EXISTS latest (key TEXT PRIMARY KEY, number INTEGER NOT NULL, disorder INTEGER NOT NULL);
        CREATE TABLE IF NOT EXISTS calls (name TEXT PRIMARY KEY, payload BLOB CHECK (payload <> x'626164'));
        CREATE TRIGGER IF NOT EXISTS inserted AFTER INSERT ON rows BEGIN
            INSERT INTO effects VALUES (CAST(new.key AS TEXT), 1) ON CONFLICT DO UPDATE SET count = count + 1; END;
        CREATE TRIGGER IF NOT EXISTS updated AFTER UPDATE ON rows BEGIN
            INSERT INTO effects VALUES (CAST(new.key AS TEXT), 1) ON CONFLICT DO UPDATE SET count = count + 1; END;
    """,
    "postgres": """
        CREATE TABLE rows (key bytea PRIMARY KEY, payload bytea CHECK (payload <> 'bad'));
        CREATE TABLE effects (name text PRIMARY KEY, count bigint NOT NULL);
        CREATE TABLE latest (key text PRIMARY KEY, number bigint NOT NULL, disorder bigint NOT NULL);
        CREATE TABLE calls (name text PRIMARY KEY, payload bytea CHECK (payload <> 'bad'));
        CREATE FUNCTION count_effect() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            INSERT INTO effects VALUES (convert_from(new.key, 'UTF8'), 1)
                ON CONFLICT (name) DO UPDATE SET count = effects.count + 1;
            RETURN NULL; END $$;
        CREATE TRIGGER counted AFTER INSERT OR UPDATE ON rows FOR EACH ROW EXECUTE FUNCTION count_effect();
    """,
}
COUNT_CALL = [
    "INSERT INTO effects VALUES ({0}, 1) ON CONFLICT (name) DO UPDATE SET count = effects.count + 1",
    """
    INSERT INTO latest VALUES ({0}, {0}, 0) ON CONFLICT (key) DO UPDATE SET number = excluded.number, disorder = latest.disorder
        + CASE WHEN excluded.number > latest.number THEN 0 ELSE 1 END
    """,
    "INSERT INTO calls VALUES ({0}, {0})",
]
"""What the `write` function does for an operation: count it, look at its order, keep it."""


# --- the worker -----------------------------------------------------------------------------------------------------


def lanes(kind: str, target: str) -> dict[str, wb.Lane]:
    """The lanes of the engine: `rows` through a table, `calls` through a function."""
    limits: dict[str, Any] = {"shards": 2, "retry": RETRY, "timeout_s": 20.0}
    if kind == "lmdb":
        return {"calls": wb.Lane(wb.LmdbBackend(target, write=count_in_lmdb), **limits)}
    make: Callable[..., Any] = wb.PostgresBackend if kind == "postgres" else wb.SqliteBackend
    if kind == "careless":
        return {"rows": wb.Lane(Careless(target, "rows"), **limits)}
    mark = "%s" if kind == "postgres" else "?"
    one, two, three = (statement.format(mark) for statement in COUNT_CALL)

    def count(cursor: Any, operation: wb.Operation) -> None:
        name, _, payload = operation.payload.partition(b" ")
        cursor.execute(one, (name.decode(),))
        cursor.execute(two, (operation.key.decode(), int(name[1:])))
        cursor.execute(three, (name.decode(), payload))

    return {
        "rows": wb.Lane(make(target, "rows"), **limits),
        "calls": wb.Lane(make(target, write=count), **limits),
    }


class Careless(wb.SqliteBackend):
    """A planted mistake: it stores no marks, so that what a kill leaves unsettled takes effect twice."""

    def apply(self, batch: wb.Batch) -> Any:
        """Without its mark."""
        return super().apply(dataclasses.replace(batch, mark=None))


def count_in_lmdb(txn: Any, operation: wb.Operation) -> None:
    """How often each name took effect, and that numbers of a key ascend."""
    name = operation.payload.partition(b" ")[0]
    txn.put(name, COUNT.pack(COUNT.unpack(txn.get(name, bytes(8)))[0] + 1))
    key, number = b"latest " + operation.key, int(name[1:])
    if COUNT.unpack(txn.get(key, bytes(8)))[0] >= number:
        txn.put(b"disorder " + name, bytes(8))
    txn.put(key, COUNT.pack(number))


def opened(kind: str, target: str, store: str) -> wb.Engine:
    """The engine, opened as soon as the server is there."""
    deadline = time.monotonic() + SAID_S
    while True:
        try:
            return wb.Engine.open(store, lanes(kind, target))
        except wb.CorruptionError:
            raise
        except wb.StorageError as error:
            if time.monotonic() > deadline:
                raise
            say("waiting", str(error))
            time.sleep(0.05)


def say(*words: object) -> None:
    """A line to the parent."""
    print(json.dumps(words), flush=True)


def work(kind: str, target: str, store: str, life: int) -> None:
    """Submit for ever, and say what was acknowledged."""
    chance = random.Random(life)
    engine = opened(kind, target, store)
    say("ready")
    number = life * LIFE_NUMBERS
    while True:
        lane = chance.choice(list(lanes(kind, target)))
        count = chance.randint(1, GROUP_MAX)
        numbers = range(number, number + count)
        number += count
        poison = [kind != "lmdb" and one % POISON_EVERY == 0 for one in numbers]
        if lane == "rows":
            group = [
                (b"r%d" % one, b"bad" if bad else os.urandom(40))
                for one, bad in zip(numbers, poison, strict=True)
            ]
        else:
            group = [
                (b"%d" % (one % KEYS), b"c%d %s" % (one, b"bad" if bad else b"good"))
                for one, bad in zip(numbers, poison, strict=True)
            ]
        engine.submit_many(lane, group)
        say("ack", lane[0], numbers[0], count)
        while engine.stats().pending > PENDING_MAX:
            time.sleep(PAUSE_S)


def drain(kind: str, target: str, store: str) -> None:
    """Deliver all that is left, and say what is dead."""
    engine = opened(kind, target, store)
    engine.flush(timeout=DRAIN_S)
    for letter in engine.dead_letters():
        name = letter.key if letter.lane == "rows" else letter.payload.partition(b" ")[0]
        say("dead", name.decode(), letter.reason, letter.error)
    say("drained", engine.health().verdict)
    engine.close()


# --- the parent -----------------------------------------------------------------------------------------------------


@dataclass
class Worker:
    """A worker process, and what it said."""

    process: subprocess.Popen[str]
    log: Path
    said: list[list[Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Listen to it."""
        self._news = threading.Condition()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.endswith("\n"):  # a kill may cut one
                with self._news:
                    self.said.append(json.loads(line))
                    self._news.notify_all()

    def count(self, word: str) -> int:
        """How often it has said this."""
        return sum(words[0] == word for words in self.said)

    def wait_for(self, word: str, count: int, seconds: float = SAID_S) -> None:
        """Wait until it has said it so often."""
        with self._news:
            # Second by second: who stops all of this for a while, worker included, does not make it late.
            for _ in range(int(seconds)):
                if self._news.wait_for(
                    lambda: self.count(word) >= count or self.process.poll() is not None, timeout=1
                ):
                    break
            else:
                self.process.send_signal(signal.SIGUSR1)  # it writes down where its threads are
                self._news.wait(1)
                raise RuntimeError(
                    f"the worker says nothing but {self.said[-3:]}: {self.log.read_text()[-4000:]}"
                )
        if self.count(word) < count:
            self._listener.join(SAID_S)
            if self.count(word) < count:
                raise RuntimeError(f"the worker has ended: {self.process.poll()}, {self.said[-3:]}")

    def kill(self) -> None:
        """Kill -9, and hear what it still had to say."""
        self.process.kill()
        self.process.wait()
        self._listener.join(SAID_S)
        if self.process.stdout is not None:
            self.process.stdout.close()


@dataclass
class Kills:
    """A run: what is attacked, and what came of it."""

    kind: str
    folder: Path
    seed: int
    postgres: Server | None = None
    figures: Counter[str] = field(default_factory=Counter)
    acknowledged: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)

    def run(self, kills: int, tell: Callable[[str], None] = lambda _: None) -> None:
        """So many kills, each of the worker or of the server, and the look at what is left."""
        chance = random.Random(self.seed)
        self._make_tables()
        life, done = 1, 0
        attacks = ["kill the engine"]
        if self.postgres is not None:
            attacks += ["end the connections", "immediate shutdown", "kill the server"]
        while done < kills:
            worker = self._start("work", life)
            try:
                worker.wait_for("ready", 1)
                attack = ""
                while done < kills and attack != "kill the engine":
                    worker.wait_for("ack", worker.count("ack") + chance.randint(1, 12))
                    time.sleep(chance.random() * 0.05)
                    attack = chance.choice(attacks)
                    self._attack(attack, worker)
                    self.figures[attack] += 1
                    done += 1
                    tell(f"{done}/{kills} {attack}")
            finally:
                worker.kill()
            for _, lane, first, count in (words for words in worker.said if words[0] == "ack"):
                self.acknowledged.update(f"{lane}{number}" for number in range(first, first + count))
            life += 1
        self._judge()

    def _attack(self, attack: str, worker: Worker) -> None:
        if attack == "kill the engine":
            worker.kill()
            return
        assert self.postgres is not None
        if attack == "end the connections":
            import psycopg  # noqa: PLC0415 - only with a server

            with psycopg.connect(self.postgres.conninfo(), autocommit=True) as connection:
                ended = connection.execute(
                    "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name = 'walbatch'"
                ).fetchone()
            self.figures["connections ended"] += ended[0] if ended else 0
            return
        self.postgres.restart(signal.SIGQUIT if attack == "immediate shutdown" else signal.SIGKILL)

    @property
    def _target(self) -> str:
        if self.postgres is not None:
            return self.postgres.conninfo()
        return str(self.folder / ("blocks" if self.kind == "lmdb" else "app.db"))

    def _make_tables(self) -> None:
        if self.postgres is not None:
            import psycopg  # noqa: PLC0415 - only with a server

            with psycopg.connect(self.postgres.conninfo()) as connection:
                connection.execute(SCHEMA["postgres"].encode())
        elif self.kind != "lmdb":
            db = sqlite3.connect(self._target)
            db.executescript(SCHEMA["sqlite"])
            db.close()

    def _start(self, task: str, life: int) -> Worker:
        command = [sys.executable, __file__, self.kind, "--task", task, "--target", self._target]
        command += ["--store", str(self.folder / "store"), "--life", str(life)]
        path = self.folder / "worker.log"
        with path.open("a") as log:
            return Worker(
                subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT), path
            )

    def _judge(self) -> None:
        worker = self._start("drain", 0)
        try:
            worker.wait_for("drained", 1, DRAIN_S)
            worker.process.wait(SAID_S)
        finally:
            worker.kill()
        dead = {words[1]: words[3] for words in worker.said if words[0] == "dead"}
        effects, disorder = self._effects()
        poison = {name for name in effects.keys() | dead.keys() | self.acknowledged if self._is_poison(name)}
        repeated = {name: count for name, count in effects.items() if count != 1}
        lost = self.acknowledged - effects.keys() - dead.keys()
        named = {name: text for name, text in dead.items() if "constraint" not in text.lower()}
        for problem, found in {
            "took effect more than once": repeated,
            "were acknowledged and lost": lost,
            "are dead without reason": dead.keys() - poison,
            "are poison and took effect": effects.keys() & poison,
            "died without the database's message": named,
            "came out of order": disorder,
        }.items():
            if found:
                self.problems.append(f"{len(found)} {problem}: {sorted(found)[:5]}")
        self.figures["acknowledged"] = len(self.acknowledged)
        self.figures["took effect"] = len(effects)
        self.figures["dead letters"] = len(dead)

    def _is_poison(self, name: str) -> bool:
        return self.kind != "lmdb" and int(name[1:]) % POISON_EVERY == 0

    def _effects(self) -> tuple[dict[str, int], list[str]]:
        if self.kind == "lmdb":
            backend = wb.LmdbBackend(self._target)
            items = dict(backend.items())
            backend.close()
            counts = {key.decode(): COUNT.unpack(value)[0] for key, value in items.items() if b" " not in key}
            return counts, [key.decode() for key in items if key.startswith(b"disorder ")]
        with self._reading() as read:
            counts = dict(read("SELECT name, count FROM effects"))
            disorder = [str(row[0]) for row in read("SELECT key FROM latest WHERE disorder > 0")]
        return counts, disorder

    @contextmanager
    def _reading(self) -> Iterator[Callable[[str], Any]]:
        if self.postgres is not None:
            import psycopg  # noqa: PLC0415 - only with a server

            with psycopg.connect(self.postgres.conninfo()) as connection:
                yield lambda query: connection.execute(query.encode()).fetchall()
        else:
            db = sqlite3.connect(self._target)
            try:
                yield lambda query: db.execute(query).fetchall()
            finally:
                db.close()


def attack(
    kind: str, kills: int, seed: int, folder: Path, tell: Callable[[str], None] = lambda _: None
) -> Kills:
    """A run in a folder of its own, with a server of its own."""
    with ExitStack() as stack:
        postgres = stack.enter_context(server()) if kind == "postgres" else None
        run = Kills(kind, folder, seed, postgres)
        run.run(kills, tell)
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("kind", choices=["sqlite", "postgres", "lmdb", "careless"])
    parser.add_argument(
        "--kills", type=int, default=100, help="of engine and server together (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=1)
    for name in ("task", "target", "store"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    parser.add_argument("--life", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.task:
        faulthandler.register(signal.SIGUSR1)
    if arguments.task == "work":
        work(arguments.kind, arguments.target, arguments.store, arguments.life)
    elif arguments.task == "drain":
        drain(arguments.kind, arguments.target, arguments.store)
    else:
        started = time.monotonic()

        def tell(text: str) -> None:
            print(text, file=sys.stderr)

        with tempfile.TemporaryDirectory(prefix="walbatch-kills-") as folder:
            run = attack(arguments.kind, arguments.kills, arguments.seed, Path(folder), tell)
        seconds = round(time.monotonic() - started, 1)
        print(json.dumps({**run.figures, "seconds": seconds, "problems": run.problems}))
        sys.exit(1 if run.problems else 0)


if __name__ == "__main__":
    main()
