"""How fast rows get into a database, by statement and by batch size: `python3 tools/sql_statements.py`.

Ways of writing the same rows are measured against each other, and against `apply` of the backend, which also stores the mark: all
in one run, because the machine decides the figures, and only their ratios say something. Each batch is one transaction, synced. The
ways take turns, so that a disturbance hits all of them alike; what is printed is rows a second of the median batch. Below each
table stands what goes through an engine, from the first `submit_many` to the last commit, at the batch sizes that it finds itself.

Needs the package with its development tools, and Debian's package postgresql. The folder should lie on a disk, not in memory.
"""

import argparse
import os
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psycopg

import walbatch as wb
from tools.postgres import server

STORE = b"sixteen bytes..."
SIZES = (1, 10, 100, 1_000, 10_000, 30_000)
ROUNDS_MAX = 60
ROWS_WANTED = 60_000
ENGINE_RUNS = 3
ENGINE_ROWS = 200_000
GROUP = 1_000
ENGINE_S = 300.0
UPDATE = " ON CONFLICT (key) DO UPDATE SET payload = excluded.payload"
Rows = list[tuple[bytes, bytes]]
Way = Callable[[Rows], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("/var/tmp"),  # noqa: S108
        help="on a disk (default %(default)s)",
    )
    folder = parser.parse_args().folder
    with tempfile.TemporaryDirectory(prefix="walbatch-sql-", dir=folder) as name:
        scratch = Path(name)
        best = measure("SQLite", sqlite_ways(scratch))
        through_engine(scratch / "one", lambda run: wb.SqliteBackend(scratch / f"engine{run}.db", "t"), best)
        with server(folder) as running:
            best = measure("PostgreSQL", postgres_ways(running.conninfo()))
            through_engine(
                scratch / "two", lambda run: wb.PostgresBackend(running.conninfo(), f"engine{run}"), best
            )


def measure(title: str, ways: dict[str, Way]) -> float:
    """A table in Markdown: a line for each size, a column for each way. Returns the best rate of all ways but the backend."""
    best = 0.0
    print(f"\n| {title}: rows a second | {' | '.join(ways)} |\n|---|{'---|' * len(ways)}")
    for size in SIZES:
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(max(5, min(ROUNDS_MAX, ROWS_WANTED // size))):
            for name, way in ways.items():
                rows = [(os.urandom(16), os.urandom(100)) for _ in range(size)]
                started = time.perf_counter()
                way(rows)
                seconds[name].append(time.perf_counter() - started)
        rates = {name: size / statistics.median(taken) for name, taken in seconds.items()}
        best = max(best, *[rate for name, rate in rates.items() if "Backend" not in name])
        print(f"| {size:,} | {' | '.join(f'{rate:,.0f}' for rate in rates.values())} |", flush=True)
    return best


def through_engine(folder: Path, make: Callable[[int], Any], best: float) -> None:
    """Rows a second through an engine, beside the best of what was measured without one."""
    rates = []
    for number in range(ENGINE_RUNS):
        groups = [
            [(os.urandom(16), os.urandom(100)) for _ in range(GROUP)] for _ in range(ENGINE_ROWS // GROUP)
        ]
        with wb.Engine.open(folder / str(number), {"rows": wb.Lane(make(number))}) as engine:
            started = time.perf_counter()
            for group in groups:
                engine.submit_many("rows", group)
            engine.flush("rows", timeout=ENGINE_S)
            rates.append(ENGINE_ROWS / (time.perf_counter() - started))
    rate = statistics.median(rates)
    print(
        f"\nThrough an engine: {rate:,.0f} rows a second, {rate / best:.2f} of the best above ({best:,.0f})"
    )


def through(backend: Any) -> Way:
    """`apply` of an open backend."""
    backend.open("rows", 1, STORE)
    last = 0

    def apply(rows: Rows) -> None:
        nonlocal last
        lsns = range(last + 1, last + 1 + len(rows))
        last += len(rows)
        keys, payloads = [key for key, _ in rows], [payload for _, payload in rows]
        batch = wb.Batch(
            lane="rows", shard=0, store=STORE, lsns=lsns, keys=keys, payloads=payloads, priorities=[5] * len(rows), attempt=1,
            reason=wb.CutReason.COUNT, mark=wb.Mark(epoch=1, watermark=last),
        )  # fmt: skip
        assert backend.apply(batch) is None

    return apply


def sqlite_ways(folder: Path) -> dict[str, Way]:
    """Each with a file of its own, so that none finds the others' pages in its cache."""

    def opened(name: str) -> sqlite3.Connection:
        db = sqlite3.connect(folder / name, isolation_level=None)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("CREATE TABLE t (key BLOB NOT NULL PRIMARY KEY, payload BLOB)")
        return db

    one, many = opened("one.db"), opened("many.db")

    def one_by_one(rows: Rows) -> None:
        one.execute("BEGIN IMMEDIATE")
        one.executemany("INSERT INTO t VALUES (?, ?)" + UPDATE, rows)  # noqa: S608
        one.execute("COMMIT")

    def together(rows: Rows) -> None:
        many.execute("BEGIN IMMEDIATE")
        for start in range(0, len(rows), 500):
            part = rows[start : start + 500]
            values = ",".join(["(?,?)"] * len(part))
            many.execute(f"INSERT INTO t VALUES {values}{UPDATE}", [value for row in part for value in row])  # noqa: S608
        many.execute("COMMIT")

    return {
        "executemany": one_by_one,
        "500 rows a statement": together,
        "`SqliteBackend`": through(wb.SqliteBackend(folder / "backend.db", "t")),
    }


def postgres_ways(conninfo: str) -> dict[str, Way]:
    """Each with a connection of its own, as the backend has one: a process of the server that has just worked is faster."""

    def opened(name: str) -> Any:
        raw = psycopg.connect(conninfo)
        raw.execute(f"CREATE TABLE {name} (key bytea PRIMARY KEY, payload bytea)".encode())
        raw.commit()
        return raw

    one, two, three, four = map(opened, ("pipeline", "arrays", "selected", "copied"))
    four.execute("CREATE TEMP TABLE staging (key bytea, payload bytea) ON COMMIT DELETE ROWS")
    four.commit()

    def pipeline(rows: Rows) -> None:
        one.cursor().executemany("INSERT INTO pipeline VALUES (%b, %b)" + UPDATE, rows)  # noqa: S608
        one.commit()

    def arrays(rows: Rows) -> None:
        columns = [key for key, _ in rows], [payload for _, payload in rows]
        two.execute("INSERT INTO arrays SELECT * FROM unnest(%b::bytea[], %b::bytea[])" + UPDATE, columns)  # noqa: S608
        two.commit()

    def selected(rows: Rows) -> None:
        columns = [key for key, _ in rows], [payload for _, payload in rows]
        three.execute(
            "INSERT INTO selected SELECT unnest(%b::bytea[]), unnest(%b::bytea[])" + UPDATE, columns
        )
        three.commit()

    def copied(rows: Rows) -> None:
        with four.cursor().copy("COPY staging FROM STDIN (FORMAT binary)") as copy:
            copy.set_types(["bytea", "bytea"])
            for row in rows:
                copy.write_row(row)
        four.execute("INSERT INTO copied SELECT * FROM staging" + UPDATE)  # noqa: S608
        four.commit()

    return {
        "pipeline of executemany": pipeline,
        "COPY, then upsert": copied,
        "FROM unnest(arrays)": arrays,
        "SELECT unnest(arrays)": selected,
        "`PostgresBackend`": through(wb.PostgresBackend(conninfo, "backend")),
    }


if __name__ == "__main__":
    main()
