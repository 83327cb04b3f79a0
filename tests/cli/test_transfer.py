"""`walbatch dump` and `walbatch load`: what goes out comes in again, and bad rows are named."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path

import pytest

import walbatch as wb
from tests.cli.program import assert_one_line, walbatch
from tests.stores import TINY, flip, make_store, picture
from walbatch import limits
from walbatch.inspection import LoggedOperation, operations

SECTOR = limits.SECTOR_BYTES
AWKWARD = (
    b"",
    b"\0",
    b"plain",
    "zoë\u2028\U0001f600".encode(),
    b"\xff\xfe",
    b'"\n,\\',
    bytes(range(256)),
    b"x" * 4096,
)
"""Keys and payloads that an encoding could trip over."""


def content(path: Path) -> list[tuple[str, bytes, bytes, int]]:
    return [(o.kind, o.key, o.payload, o.priority) for o in operations(path)]


def awkward_store(path: Path) -> None:
    lanes = {"put": wb.Lane(None), "lög": wb.Lane(None, shards=3)}
    with wb.Engine.open(path, lanes=lanes, settings=TINY) as engine:
        for number, value in enumerate(AWKWARD):
            engine.submit("put", key=value, payload=AWKWARD[-number], priority=number)
            engine.submit("lög", key=b"%d" % number, payload=value)
        engine.close(drain=False)


# --- both ways -------------------------------------------------------------------------------------------------------


def test_what_is_dumped_can_be_loaded_and_is_the_same(tmp_path: Path) -> None:
    awkward_store(tmp_path / "q")
    dumped = walbatch("dump", "q", cwd=tmp_path)
    assert (dumped.code, dumped.error) == (0, "")
    (tmp_path / "rows.jsonl").write_text(dumped.output, encoding="utf-8")
    ended = walbatch("load", "copy", "rows.jsonl", "--lane", "put", "--lane", "lög", "--json", cwd=tmp_path)
    assert (ended.code, ended.error) == (0, "")
    assert ended.document == {"loaded": 16, "delivered": 0, "remaining": 16, "errors": {}}
    assert content(tmp_path / "copy") == content(tmp_path / "q")
    assert walbatch("dump", "copy", cwd=tmp_path).output == dumped.output


def test_it_goes_through_a_pipe(tmp_path: Path) -> None:
    awkward_store(tmp_path / "q")
    dumped = walbatch("dump", "q", "--lane", "put", cwd=tmp_path)
    ended = walbatch("load", "copy", "-", "--kind", "put", cwd=tmp_path, stdin=dumped.output)
    assert ended.code == 0
    assert ended.output == "loaded 8 operations, all durable; 8 wait to be delivered\n"
    assert content(tmp_path / "copy") == [row for row in content(tmp_path / "q") if row[0] == "put"]


# --- dump ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ([], lambda o: True),
        (["--json"], lambda o: True),
        (["--lane", "log"], lambda o: o.kind == "log"),
        (["--key", "k3"], lambda o: o.key == b"k3"),
        (["--key-base64", base64.b64encode(b"k3").decode()], lambda o: o.key == b"k3"),
        (["--first-lsn", "5", "--last-lsn", "9"], lambda o: 5 <= o.lsn <= 9),
        (["--pending"], lambda o: not o.settled),
        (["--key", "nothing"], lambda o: False),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_dump_can_be_filtered(
    tmp_path: Path, options: list[str], wanted: Callable[[LoggedOperation], bool]
) -> None:
    made = make_store(tmp_path / "q", kinds=("put", "log"), settle="log", count=10)
    before = picture(made.path)
    ended = walbatch("dump", "q", *options, cwd=tmp_path)
    assert ended.code == 0
    assert [(row["lsn"], row["kind"], row["settled"]) for row in ended.rows] == [
        (o.lsn, o.kind, o.settled) for o in operations(made.path) if wanted(o)
    ]
    assert picture(made.path) == before


def test_bytes_that_are_no_text_stand_in_base64(tmp_path: Path) -> None:
    awkward_store(tmp_path / "q")
    row = walbatch("dump", "q", "--key-base64", "//4=", cwd=tmp_path).rows[0]
    assert base64.b64decode(row["key_base64"]) == b"\xff\xfe"
    assert "key" not in row


def test_what_stands_before_damage_is_dumped(tmp_path: Path) -> None:
    made = make_store(tmp_path / "q")
    flip(made.segments[3], SECTOR + 100)
    ended = walbatch("dump", "q", "--json", cwd=tmp_path)
    assert ended.code == 4
    assert [row["lsn"] for row in ended.rows] == list(range(1, 10))
    assert_one_line(ended, [made.segments[3].name, "offset 512", "walbatch verify"])


# --- load ------------------------------------------------------------------------------------------------------------


def test_loading_delivers_to_the_backends_that_are_named_and_remembers_them(tmp_path: Path) -> None:
    rows = "".join(json.dumps({"key": f"k{n}", "payload": f"v{n}"}) + "\n" for n in range(2500))
    ended = walbatch("load", "q", "--lane", "put=lmdb:blocks", "--shards", "3", cwd=tmp_path, stdin=rows)
    assert (ended.code, ended.output) == (0, "loaded 2,500 operations, all durable; 0 wait to be delivered\n")
    assert wb.LmdbBackend(tmp_path / "blocks").count() == 2500
    ended = walbatch("load", "q", "--json", cwd=tmp_path, stdin='{"key": "k1", "payload": "new"}')
    assert ended.document == {"loaded": 1, "delivered": 1, "remaining": 0, "errors": {}}
    assert wb.LmdbBackend(tmp_path / "blocks").get(b"k1") == b"new"
    ended = walbatch("load", "q", "--no-drain", "--json", cwd=tmp_path, stdin='{"key": "k2"}')
    assert ended.code == 0


def test_a_backend_that_fails_leaves_the_operations_in_the_log(tmp_path: Path) -> None:
    (tmp_path / "down.py").write_text("def apply(batch):\n    raise RuntimeError('down')\n")
    ended = walbatch(
        "load", "q", "--lane", "put=python:down:apply", "--stall", "0.5", cwd=tmp_path, stdin='{"key": "k"}\n'
    )
    assert ended.code == 3
    assert "1 wait" in ended.output
    assert ended.error == "last error of lane put: RuntimeError: down\n"
    assert len(content(tmp_path / "q")) == 1


CSV = """kind,key,payload,priority,note
put,a,"one, two",1,ignored
put,b,,,
,c,"three
lines",7,
put,zoë,4,10,
"""


@pytest.mark.parametrize("name", ["rows.csv", "rows.txt"])
def test_csv_is_loaded_by_the_names_in_its_first_line(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("\ufeff" + CSV, encoding="utf-8", newline="")
    flag = [] if name.endswith(".csv") else ["--csv"]
    ended = walbatch("load", "q", name, "--kind", "put", *flag, cwd=tmp_path)
    assert (ended.code, ended.error) == (0, "")
    assert content(tmp_path / "q") == [
        ("put", b"a", b"one, two", 1),
        ("put", b"b", b"", 5),
        ("put", b"c", b"three\nlines", 7),
        ("put", "zoë".encode(), b"4", 10),
    ]


BAD_ROWS: dict[str, tuple[str, list[str]]] = {
    "no JSON": ("{key: 1}", ["line 3 is not JSON"]),
    "half a line": ('{"key": "k', ["line 3 is not JSON"]),
    "no object": ('["key"]', ["line 3 is not a JSON object"]),
    "too deep": ("[" * 100_000, ["line 3 is not JSON"]),
    "no key": ('{"payload": "p"}', ["line 3 has no key"]),
    "a key that is a number": ('{"key": 7}', ["line 3", "key must be text", "int"]),
    "a payload that is a list": ('{"key": "k", "payload": []}', ["line 3", "payload must be text"]),
    "a lone surrogate": ('{"key": "\\ud800"}', ["line 3", "key is no text", "key_base64"]),
    "bad base64": ('{"key_base64": "?"}', ["line 3", "not base64"]),
    "base64 that is a number": ('{"key_base64": 5}', ["line 3", "not base64"]),
    "base64 that is no ASCII": ('{"key_base64": "ü"}', ["line 3", "not base64"]),
    "an unknown kind": ('{"key": "k", "kind": "what"}', ["unknown kind 'what'", "put"]),
    "a kind that is a number": ('{"key": "k", "kind": 7}', ["line 3 names no kind"]),
    "a priority that is too high": (
        '{"key": "k", "priority": 11}',
        ["line 3", "priority must be from 0 to 10"],
    ),
    "a priority that is text": ('{"key": "k", "priority": "high"}', ["line 3", "priority"]),
    "a priority that is true": ('{"key": "k", "priority": true}', ["line 3", "priority"]),
    "a key that is too long": (json.dumps({"key": "k" * 5000}), ["5,000 bytes", "4,096"]),
}


@pytest.mark.parametrize("bad", BAD_ROWS)
def test_a_bad_row_ends_the_load_and_says_what_is_durable(tmp_path: Path, bad: str) -> None:
    row, words = BAD_ROWS[bad]
    stdin = '{"key": "first", "priority": 1}\n\n' + row + '\n{"key": "last"}\n'
    ended = walbatch("load", "q", "--kind", "put", cwd=tmp_path, stdin=stdin)
    assert ended.code == 2
    assert_one_line(ended, words)
    durable = len(content(tmp_path / "q")) if (tmp_path / "q").exists() else 0
    if durable:
        assert "1 operation before it is durable" in ended.error


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (b"", ["names no column 'key'", "nothing"]),
        (b"name,value\na,b\n", ["names no column 'key'", "name, value"]),
        (b"key,payload\na,b,c\n", ["line 2 has more fields"]),
        (b'key,payload\na,"b\n', ["is not CSV"]),
        (b"key,payload\n,b\n", ["line 2 has no key"]),
        (b"key,payload\n\xff,b\n", ["line 2 is not UTF-8", "key_base64"]),
        (b"key\na\0b\nx,\n", ["line"]),
    ],
    ids=["empty", "no key column", "too many fields", "an open quote", "no key", "not UTF-8", "a zero byte"],
)
def test_bad_csv_is_named_by_its_line(tmp_path: Path, rows: bytes, words: list[str]) -> None:
    (tmp_path / "rows.csv").write_bytes(rows)
    ended = walbatch("load", "q", "rows.csv", "--kind", "put", cwd=tmp_path)
    assert ended.code == 2
    assert_one_line(ended, words)


def test_a_line_without_end_costs_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from walbatch.cli import transfer  # noqa: PLC0415 - only to make its limit small

    monkeypatch.setattr(transfer, "LINE_BYTES_MAX", 100)
    with (tmp_path / "rows").open("w+b") as file:
        file.write(b"x" * 101)
        file.seek(0)
        lines = transfer._Lines(file)
        with pytest.raises(wb.ConfigError, match="line 1 is longer than 100 bytes"):
            list(lines)


def test_rows_of_several_lanes_keep_their_order(tmp_path: Path) -> None:
    kinds = ["a", "b", "b", "a", "a", "b"]
    rows = "".join(json.dumps({"kind": kind, "key": str(n)}) + "\n" for n, kind in enumerate(kinds))
    assert walbatch("load", "q", "--lane", "a", "--lane", "b", cwd=tmp_path, stdin=rows).code == 0
    assert [kind for kind, *_ in content(tmp_path / "q")] == kinds


def test_a_row_without_kind_goes_to_the_only_lane(tmp_path: Path) -> None:
    make_store(tmp_path / "q", count=2)
    assert walbatch("load", "q", cwd=tmp_path, stdin='{"key": "k"}').code == 0
    assert [kind for kind, *_ in content(tmp_path / "q")] == ["put"] * 3


KINDS = "".join(
    json.dumps({"kind": kind, "key": str(n)}) + "\n" for n, kind in enumerate(["put", "notify", "put"])
)
HOLD = "add --lane notify=URL or --lane notify (holds it)"


def test_a_load_that_an_unknown_kind_ended_goes_on_where_it_stopped(tmp_path: Path) -> None:
    ended = walbatch("load", "q", "--lane", "put", cwd=tmp_path, stdin=KINDS)
    assert ended.code == 2
    assert_one_line(
        ended,
        ["line 2: unknown kind 'notify'", "the lanes are 'put'", HOLD, "1 operation", "go on with --skip 1"],
    )
    again = walbatch(
        "load", "q", "--lane", "notify", "--lane", "put", "--skip", "1", cwd=tmp_path, stdin=KINDS
    )
    assert (again.code, again.error) == (0, "")
    assert [(kind, key) for kind, key, *_ in content(tmp_path / "q")] == [
        ("put", b"0"),
        ("notify", b"1"),
        ("put", b"2"),
    ]


def test_what_was_skipped_counts_when_a_load_ends_again(tmp_path: Path) -> None:
    stdin = "".join(f'{{"key": "{n}", "priority": {n}}}\n' for n in range(4)) + "{"
    ended = walbatch("load", "q", "--kind", "put", "--skip", "2", cwd=tmp_path, stdin=stdin)
    assert_one_line(
        ended, ["line 5 is not JSON", "2 operations before it are durable", "go on with --skip 4"]
    )
    assert [key for _, key, *_ in content(tmp_path / "q")] == [b"2", b"3"]


@pytest.mark.parametrize("bad", ["an unknown kind", "no key", "half a line"])
def test_of_a_file_with_a_bad_row_nothing_is_loaded(tmp_path: Path, bad: str) -> None:
    row, words = BAD_ROWS[bad]
    (tmp_path / "rows.jsonl").write_text('{"key": "first", "priority": 1}\n\n' + row + "\n")
    ended = walbatch("load", "q", "rows.jsonl", "--kind", "put", cwd=tmp_path)
    assert ended.code == 2
    assert_one_line(ended, [*words, "nothing was loaded"])
    assert "--skip" not in ended.error
    assert not (tmp_path / "q").exists()


def test_rows_that_are_skipped_are_not_judged(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(KINDS)
    ended = walbatch("load", "q", "rows.jsonl", "--lane", "put", "--skip", "2", cwd=tmp_path)
    assert (ended.code, ended.error) == (0, "")
    assert [key for _, key, *_ in content(tmp_path / "q")] == [b"2"]


def test_it_says_of_which_lane_something_waits(tmp_path: Path) -> None:
    assert walbatch("load", "q", "--kind", "a", cwd=tmp_path, stdin='{"key": "1"}').code == 0
    ended = walbatch(
        "load", "q", "--kind", "b", "--lane", "b=lmdb:blocks", cwd=tmp_path, stdin='{"key": "2"}'
    )
    assert (ended.code, ended.output) == (
        0, "loaded 1 operation, all durable; 1 wait to be delivered (1 of lane a)\n"
    )  # fmt: skip
