"""What a copy costs beside a plain loop: `python3 tools/copy_speed.py --scale 3`.

pgbench makes its tables (100,000 accounts for each unit of scale). They are copied to SQLite and back by `copy_tables`, and by the
loop that anybody would write: a server-side cursor and `executemany` one way, a cursor and `executemany` the other, with a commit
for each 5,000 rows. The loop starts over after a kill, and stops at the first row that is refused. Each way is run in turn, some
rounds; the medians count. Needs PostgreSQL with pgbench (Debian: postgresql). Prints JSON.
"""

import argparse
import contextlib
import json
import resource
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import psycopg  # noqa: E402 - behind the line above

from tools.postgres import USER, Server, binaries, server  # noqa: E402 - found through the line above
from walbatch.copying import copy_tables  # noqa: E402

TABLE = "pgbench_accounts"
MADE = f"CREATE TABLE IF NOT EXISTS {TABLE} (aid INTEGER PRIMARY KEY, bid INTEGER, abalance INTEGER, filler TEXT)"
MADE_THERE = f"CREATE TABLE IF NOT EXISTS copied (LIKE {TABLE} INCLUDING ALL)"
BATCH_ROWS = 5_000


def loop_to_sqlite(source: Server, path: Path) -> None:
    """A server-side cursor, and executemany."""
    with psycopg.connect(source.conninfo()) as there, contextlib.closing(sqlite3.connect(path)) as here:
        here.execute("PRAGMA journal_mode = WAL")
        here.execute("PRAGMA synchronous = FULL")
        here.execute(MADE)
        with there.cursor("rows") as cursor:
            cursor.execute(f"SELECT * FROM {TABLE} ORDER BY aid".encode())  # noqa: S608 - a constant
            while rows := cursor.fetchmany(BATCH_ROWS):
                here.executemany(f"INSERT INTO {TABLE} VALUES (?, ?, ?, ?)", rows)  # noqa: S608 - a constant
                here.commit()


def loop_to_postgres(path: Path, target: Server) -> None:
    """A cursor, and executemany."""
    with contextlib.closing(sqlite3.connect(path)) as here, psycopg.connect(target.conninfo()) as there:
        found = here.execute(f"SELECT * FROM {TABLE} ORDER BY aid")  # noqa: S608 - a constant
        while rows := found.fetchmany(BATCH_ROWS):
            there.cursor().executemany("INSERT INTO copied VALUES (%s, %s, %s, %s)", rows)
            there.commit()


def timed(work: Callable[[], Any]) -> float:
    """Seconds."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure(running: Server, folder: Path, rounds: int) -> dict[str, Any]:
    """Rows a second, each way."""
    seconds: dict[str, list[float]] = {}
    database, store = folder / "copy.db", folder / "store"
    with psycopg.connect(running.conninfo(), autocommit=True) as connection:
        (rows,) = connection.execute(f"SELECT count(*) FROM {TABLE}".encode()).fetchone() or (0,)  # noqa: S608 - a constant
        ways: dict[str, Callable[[], Any]] = {
            "to SQLite, loop": lambda: loop_to_sqlite(running, database),
            "to SQLite, walbatch": lambda: copy_tables(
                running.url(), f"sqlite://{database}", [TABLE], store=store, create=True
            ),
            "to PostgreSQL, loop": lambda: loop_to_postgres(database, running),
            "to PostgreSQL, walbatch": lambda: copy_tables(
                f"sqlite://{database}", running.url(), {TABLE: "copied"}, store=store
            ),
        }
        for _ in range(rounds):
            for name, work in ways.items():
                if "to SQLite" in name:
                    for path in folder.glob("copy.db*"):
                        path.unlink()
                else:
                    connection.execute("DROP TABLE IF EXISTS copied")
                    connection.execute(MADE_THERE.encode())
                connection.execute("CHECKPOINT")
                seconds.setdefault(name, []).append(timed(work))
    rates = {name: round(rows / statistics.median(times)) for name, times in seconds.items()}
    return {
        "rows": rows, "rounds": rounds, "rows_per_s": rates,
        "ratio_to_sqlite": round(rates["to SQLite, walbatch"] / rates["to SQLite, loop"], 2),
        "ratio_to_postgres": round(rates["to PostgreSQL, walbatch"] / rates["to PostgreSQL, loop"], 2),
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument(
        "--scale", type=int, default=3, help="of pgbench: hundreds of thousands of rows (default %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="walbatch-speed-"))
    try:
        with server(Path("/tmp"), shared_buffers="'128MB'") as running:  # noqa: S108 - on a disk
            command: list[Any] = [
                binaries() / "pgbench",
                "-i",
                "-q",
                "-s",
                str(arguments.scale),
                "-h",
                running.folder,
                "-U",
                USER,
                "postgres",
            ]
            subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
            print(json.dumps(measure(running, folder, arguments.rounds)))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
