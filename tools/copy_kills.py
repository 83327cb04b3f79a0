"""Kills in the middle of copies: `python3 tools/copy_kills.py sqlite-postgres --kills 100`.

`walbatch copy` runs in a process of its own. It is killed with kill -9 at a random moment, and so is the server, which is also shut
down at once, or told to end its connections. Then the same command is run again, as often as it takes. In the end both tables
must be equal, and a trigger of the target has counted how often each row was written: once. When a copy is complete before there
were enough kills, the target is emptied, and the next one begins.

`careless` is a copy whose target keeps no marks: a planted mistake, which the counting must find.

Needs the package with its development tools (`tools/test.py` makes `.venv` with them), and Debian's package postgresql. Prints
figures as JSON; exit code 1 if anything is wrong.
"""

import argparse
import contextlib
import dataclasses
import json
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import walbatch as wb  # noqa: E402 - found through the line above
from tools.postgres import Server, server  # noqa: E402

DIRECTIONS = ("sqlite-postgres", "postgres-sqlite", "postgres-postgres", "sqlite-sqlite", "careless")

ROWS = 40_000
ENDS_S = 300.0
"""How long one run of the command may take."""

PAUSE_S = 0.05
LINES_MAX = 12
"""A kill comes after so many more batches at most."""

AWAY_CODES = frozenset({0, 3, 8})
"""Of a run that was not killed: complete; given up; a database that was away when it began."""

SCHEMA = {
    "sqlite": """
        CREATE TABLE books (id INTEGER PRIMARY KEY, title TEXT NOT NULL, price REAL, cover BLOB);
        CREATE TABLE pages (book TEXT NOT NULL, number INTEGER NOT NULL, body TEXT, PRIMARY KEY (book, number));
    """,
    "postgres": """
        CREATE TABLE books (id bigint PRIMARY KEY, title text NOT NULL, price double precision, cover bytea);
        CREATE TABLE pages (book text NOT NULL, number bigint NOT NULL, body text, PRIMARY KEY (book, number));
    """,
}
NAMES = {"books": "'b' || new.id", "pages": "new.book || ' ' || new.number"}


def counting(kind: str, names: dict[str, str]) -> list[str]:
    """Statements that make a target count how often each row of its tables was written. `names` has a name for the rows of each."""
    statements = ["CREATE TABLE effects (name text PRIMARY KEY, count bigint NOT NULL)"]
    for table, name in names.items():
        effect = f"INSERT INTO effects VALUES ({name}, 1) ON CONFLICT (name) DO UPDATE SET count = effects.count + 1;"  # noqa: S608 - ours
        if kind == "sqlite":
            statements += [
                f"CREATE TRIGGER {table}_{event} AFTER {event} ON {table} BEGIN {effect} END"
                for event in ("INSERT", "UPDATE")
            ]
        else:
            statements += [
                f"CREATE FUNCTION count_{table}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {effect} RETURN NULL; END $$",
                f"CREATE TRIGGER counted AFTER INSERT OR UPDATE ON {table} FOR EACH ROW EXECUTE FUNCTION count_{table}()",
            ]
    return statements


def rows(count: int) -> dict[str, list[tuple[Any, ...]]]:
    """What is copied. Texts that a database with a language of its own would put in another order are among the keys."""
    chance = random.Random(7)
    books = [
        (n - count // 4, f"title {n} é\u4e2d", n / 7 if n % 5 else None, chance.randbytes(20))
        for n in range(count // 2)
    ]
    names = ["a", "B", "aa", "Ab", "é", "z-1", "Z 1", "zz", "_", "ä"]
    pages = [
        (names[n % len(names)], n // len(names) * 3 - 5, f"page {n}" if n % 3 else None)
        for n in range(count // 2)
    ]
    return {"books": books, "pages": pages}


# --- databases ------------------------------------------------------------------------------------------------------


@dataclass
class Side:
    """The source or the target: its URL, and how the tool itself reads and writes it."""

    kind: str
    path: str
    server: Server | None = None

    @property
    def url(self) -> str:
        """What the command is given."""
        return f"sqlite://{self.path}" if self.server is None else self.server.url(self.path)

    @contextlib.contextmanager
    def _connected(self) -> Iterator[Any]:
        if self.server is None:
            with contextlib.closing(sqlite3.connect(self.path, timeout=60)) as db, db:
                yield db
            return
        import psycopg  # noqa: PLC0415 - only with a server

        with psycopg.connect(self.server.conninfo(self.path)) as connection:
            yield connection

    def script(self, text: str) -> None:
        """Run statements."""
        with self._connected() as db:
            if self.server is None:
                db.executescript(text)
            else:
                db.execute(text)

    def read(self, query: str) -> list[Any]:
        """All rows of a query."""
        with self._connected() as db:
            return list(db.execute(query).fetchall())

    def fill(self, tables: dict[str, list[tuple[Any, ...]]]) -> None:
        """Insert rows."""
        with self._connected() as db:
            for table, values in tables.items():
                mark = "?" if self.server is None else "%s"
                statement = f"INSERT INTO {table} VALUES ({', '.join([mark] * len(values[0]))})"  # noqa: S608 - ours
                (db if self.server is None else db.cursor()).executemany(statement, values)


# --- a run ----------------------------------------------------------------------------------------------------------


@dataclass
class Kills:
    """Kills of copies in one direction, and what came of them."""

    direction: str
    folder: Path
    seed: int
    row_count: int
    source: Side
    target: Side
    figures: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Make the tables."""
        self._chance = random.Random(self.seed)
        self._rows = rows(self.row_count)
        self.source.script(SCHEMA[self.source.kind])
        self.source.fill(self._rows)
        self.target.script(SCHEMA[self.target.kind])
        for statement in counting(self.target.kind, NAMES):
            self.target.script(statement)
        self._servers = [side.server for side in (self.source, self.target) if side.server is not None]
        self._attacks = ["kill the copy"]
        if self._servers:
            self._attacks += ["kill the server", "immediate shutdown", "end the connections"]
        self._batches = self.folder / "batches.jsonl"
        self._batches.touch()

    @property
    def _store(self) -> Path:
        return self.folder / "store"

    def run(self, kills: int, tell: Callable[[str], None] = lambda _: None) -> None:
        """So many kills, in as many copies as that takes; then the last copy is completed."""
        while self.figures["kills"] < kills and not self.problems:
            self._copy(kills, tell)

    def _copy(self, kills: int, tell: Callable[[str], None]) -> None:
        """One copy, from an empty target to its end."""
        for table in ("books", "pages", "effects"):
            self.target.script(f"DELETE FROM {table}")  # noqa: S608 - ours
        has_begun = False
        while True:
            process = self._start()
            try:
                while self.figures["kills"] < kills and process.poll() is None:
                    if not self._wait_for_batches(process):
                        break
                    attack = self._chance.choice(self._attacks)
                    self._attack(attack, process)
                    self.figures[attack] += 1
                    self.figures["kills"] += 1
                    tell(f"{self.figures['kills']}/{kills} {attack}")
                    if attack == "kill the copy":
                        break
                code = process.wait(ENDS_S)
            finally:
                process.kill()
                process.wait()
            is_left = self._store.exists() or self._store.with_name(f"{self._store.name}.done").exists()
            has_begun = has_begun or is_left
            if code == 0 or (code == -signal.SIGKILL and has_begun and not is_left):
                break  # complete; or killed when it had removed its store, which it does when all is there
            if code != -signal.SIGKILL:
                self.figures[f"ended with {code}"] += 1
                if code not in AWAY_CODES:
                    self.problems.append(f"the command ended with {code}: {self._said()}")
                    return
        self.figures["copies"] += 1
        self._judge()

    def _start(self) -> subprocess.Popen[Any]:
        task = "careless" if self.direction == "careless" else "copy"
        command = [sys.executable, __file__, self.direction, "--task", task, self.source.url, self.target.url]
        command += [str(self._store), str(self._batches)]
        with (self.folder / "said").open("a") as said:
            return subprocess.Popen(command, stdout=said, stderr=said, cwd=ROOT)

    def _said(self) -> str:
        return (self.folder / "said").read_text()[-1000:]

    def _wait_for_batches(self, process: subprocess.Popen[Any]) -> bool:
        """Until some more batches have ended; False where the process ends before that."""
        wanted = self._lines() + self._chance.randint(0, LINES_MAX)
        deadline = time.monotonic() + ENDS_S
        while self._lines() < wanted:
            if process.poll() is not None:
                return False
            if time.monotonic() > deadline:
                raise RuntimeError(f"the copy does nothing: {self._said()}")
            time.sleep(0.002)
        time.sleep(self._chance.random() * PAUSE_S)
        return process.poll() is None

    def _lines(self) -> int:
        return self._batches.read_bytes().count(b"\n")

    def _attack(self, attack: str, process: subprocess.Popen[Any]) -> None:
        if attack == "kill the copy":
            process.kill()
            return
        hit = self._chance.choice(self._servers)
        if attack == "end the connections":
            import psycopg  # noqa: PLC0415 - only with a server

            with psycopg.connect(hit.conninfo(), autocommit=True) as connection:
                ended = connection.execute(
                    "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name LIKE 'walbatch%'"
                ).fetchone()
            self.figures["connections ended"] += ended[0] if ended else 0
            return
        hit.restart(signal.SIGQUIT if attack == "immediate shutdown" else signal.SIGKILL)

    def _judge(self) -> None:
        """Equal tables, and one effect for each row."""
        for table, given in self._rows.items():
            found = [
                tuple(bytes(value) if isinstance(value, memoryview) else value for value in row)
                for row in self.target.read(f"SELECT * FROM {table}")  # noqa: S608 - ours
            ]
            if sorted(found, key=repr) != sorted(given, key=repr):
                self.problems.append(
                    f"{table} differs: {len(given)} rows in the source, {len(found)} in the target"
                )
        effects = dict(self.target.read("SELECT name, count FROM effects"))
        repeated = {name: count for name, count in effects.items() if count != 1}
        if repeated:
            self.problems.append(
                f"{len(repeated)} rows were written more than once: {sorted(repeated.items())[:5]}"
            )
        if len(effects) != sum(map(len, self._rows.values())):
            self.problems.append(f"{len(effects)} rows were written")
        self.figures["rows"] += len(effects)


def attack(
    direction: str,
    kills: int,
    seed: int,
    folder: Path,
    *,
    row_count: int = ROWS,
    tell: Callable[[str], None] = lambda _: None,
) -> Kills:
    """Kills in a folder of its own, with servers of its own."""
    first, _, second = ("sqlite-sqlite" if direction == "careless" else direction).partition("-")
    with ExitStack() as stack:
        sides: list[Side] = []
        for role, kind in (("source", first), ("target", second)):
            if kind == "sqlite":
                sides.append(Side(kind, str(folder / f"{role}.db")))
            else:
                sides.append(Side(kind, "postgres", stack.enter_context(server())))
        run = Kills(direction, folder, seed, row_count, source=sides[0], target=sides[1])
        run.run(kills, tell)
    return run


# --- the command ----------------------------------------------------------------------------------------------------


def copy(source: str, target: str, store: str, batches: str) -> None:
    """The command, in this process."""
    from walbatch.cli import main as walbatch  # noqa: PLC0415 - only here

    tables = ["--table", "books", "--table", "pages"]
    sys.argv = ["walbatch", "copy", source, target, *tables, "--store", store, "--batches", batches, "--json"]
    walbatch()


def forget_marks() -> None:
    """A planted mistake: the target keeps no marks, so that what a kill leaves unsettled is written twice."""
    from walbatch.copying.sqlite import SqliteLanding  # noqa: PLC0415 - only here

    with_mark = SqliteLanding.apply

    def apply(self: Any, batch: wb.Batch) -> Any:
        return with_mark(self, dataclasses.replace(batch, mark=None))

    SqliteLanding.apply = apply  # type: ignore[method-assign]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("direction", choices=DIRECTIONS)
    parser.add_argument(
        "--kills", type=int, default=100, help="of copies and servers together (default %(default)s)"
    )
    parser.add_argument("--rows", type=int, default=ROWS, help="of both tables (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--task", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.task:
        task, *places = arguments.task
        if task == "careless":
            forget_marks()
        copy(*places)
        return
    started = time.monotonic()

    def tell(text: str) -> None:
        print(text, file=sys.stderr)

    with tempfile.TemporaryDirectory(prefix="walbatch-kills-") as folder:
        run = attack(
            arguments.direction,
            arguments.kills,
            arguments.seed,
            Path(folder),
            row_count=arguments.rows,
            tell=tell,
        )
    seconds = round(time.monotonic() - started, 1)
    print(json.dumps({**run.figures, "seconds": seconds, "problems": run.problems}))
    sys.exit(1 if run.problems else 0)


if __name__ == "__main__":
    main()
