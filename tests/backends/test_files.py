"""Folders of files as a backend: each operation in exactly one file, whatever is killed, full, or tidied up meanwhile."""

from __future__ import annotations

import base64
import json
import os
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import pytest
import zstandard

import walbatch as wb
from walbatch.backends import open_backend, url_of
from walbatch.backends.files.backend import FilesBackend
from walbatch.backends.files.jsonlines import JsonLinesBackend
from walbatch.backends.files.markfile import SLOT_BYTES
from walbatch.core.checksum import crc32c
from walbatch.errors import (
    BackendBroken,
    ConfigError,
    CorruptionError,
    EngineClosed,
    Fenced,
    RetryBatch,
    StorageError,
)
from walbatch.testing.contracts import OTHER_STORE, STORE, Pair, TransactionalBackendContract
from walbatch.types import Batch, Failures, Mark, Operation, Options

DEADLINE_S = 30


def shown(path: Path) -> list[Path]:
    """What a reader sees who lists the folder as a shell does."""
    return sorted(file for file in path.iterdir() if not file.name.startswith("."))


def rows_of(file: Path) -> list[dict[str, Any]]:
    data = file.read_bytes()
    if file.suffix == ".zst":
        data = zstandard.ZstdDecompressor().decompress(data)
    return [json.loads(line) for line in data.decode().split("\n")[:-1]]


def bytes_of(row: dict[str, Any], name: str) -> bytes:
    text = row.get(f"{name}_base64")
    return base64.b64decode(text) if text is not None else str(row[name]).encode()


class FilesContract(TransactionalBackendContract):
    """Every operation adds a row: nothing hides a repetition."""

    replaces: ClassVar[bool] = False

    def rows(self, path: Path) -> Iterator[dict[str, Any]]:
        for file in shown(path / "out"):
            yield from rows_of(file)

    def content(self, path: Path) -> Iterable[Pair]:
        return [(bytes_of(row, "key"), bytes_of(row, "payload")) for row in self.rows(path)]

    def opened_now(self, path: Path, shards: int = 2, store: bytes = STORE) -> FilesBackend:
        backend = self.make_backend(path)
        assert isinstance(backend, FilesBackend)
        backend.open(self.lane, shards, store)
        return backend


class TestJsonLines(FilesContract):
    def make_backend(self, path: Path) -> Any:
        return JsonLinesBackend(path / "out")

    def test_a_line_has_text_where_it_is_text_and_base64_elsewhere(self, tmp_path: Path) -> None:
        backend = self.opened_now(tmp_path)
        backend.apply(self.batch([("käse".encode(), b'say "\n"'), (b"\xff", b"\0\x80")], lsns=(7, 9)))
        backend.close()
        (file,) = shown(tmp_path / "out")
        assert rows_of(file) == [
            {"lsn": 7, "key": "käse", "payload": 'say "\n"', "priority": 5},
            {"lsn": 9, "key_base64": "/w==", "payload_base64": "AIA=", "priority": 5},
        ]

    def test_operations_with_options_are_written_alike(self, tmp_path: Path) -> None:
        backend = self.opened_now(tmp_path)
        plain = self.batch([(b"a", b"1"), (b"b", b"2")])
        dated = Batch(
            **{name: getattr(plain, name) for name in Batch.__slots__}
            | {"options": [Options(deadline_ns=5)] * 2}
        )
        backend.apply(dated)
        backend.close()
        assert [row["key"] for row in self.rows(tmp_path)] == ["a", "b"]

    # --- folders --------------------------------------------------------------------------------------------------

    def test_files_are_numbered_in_the_order_in_which_they_are_applied(self, tmp_path: Path) -> None:
        backend = self.opened_now(tmp_path)
        for number in range(12):
            self.apply(backend, self.batch(self.pairs(1, start=number), first_lsn=20 - number))
        backend.close()
        files = shown(tmp_path / "out")
        assert [file.name.rpartition("-")[2] for file in files] == [f"{n:012d}.jsonl" for n in range(1, 13)]
        assert [row["lsn"] for row in self.rows(tmp_path)] == list(range(20, 8, -1))
        assert all(file.name.startswith("put-") for file in files)

    def test_files_are_readable_for_their_owner_only(self, tmp_path: Path) -> None:
        backend = self.opened_now(tmp_path)
        self.apply(backend, self.batch(self.pairs(1)))
        backend.close()
        for place in [tmp_path / "out", *(tmp_path / "out").rglob("*")]:
            assert place.stat().st_mode & 0o077 == 0, place

    def test_consumed_files_may_be_moved_and_deleted_and_stay_away(self, tmp_path: Path) -> None:
        backend = self.opened_now(tmp_path)
        self.apply(backend, self.batch(self.pairs(3)))
        self.apply(backend, self.batch(self.pairs(3, start=3), first_lsn=4))
        first, second = shown(tmp_path / "out")
        first.unlink()
        second.rename(tmp_path / "kept.jsonl")
        self.apply(backend, self.batch(self.pairs(6)))
        backend.close()
        backend = self.opened_now(tmp_path)
        assert backend.applied_mark(0) == Mark(epoch=1, ranges=((1, 6),))
        self.apply(backend, self.batch(self.pairs(7)))
        backend.close()
        (third,) = shown(tmp_path / "out")
        assert third.name.endswith("-000000000003.jsonl")
        assert [row["lsn"] for row in rows_of(third)] == [7]

    def test_a_batch_that_is_covered_makes_no_file(self, tmp_path: Path) -> None:
        backend = self.opened_now(tmp_path)
        self.apply(backend, self.batch(self.pairs(3)))
        self.apply(backend, self.batch(self.pairs(3), mark=Mark(epoch=3, watermark=3)))
        assert backend.applied_mark(0) == Mark(epoch=3, watermark=3)
        backend.close()
        assert len(shown(tmp_path / "out")) == 1
        assert self.applied_mark(tmp_path) == Mark(epoch=3, watermark=3)

    def test_a_name_never_comes_again_although_everything_was_deleted(self, tmp_path: Path) -> None:
        import shutil  # noqa: PLC0415

        names = set()
        for _ in range(2):
            backend = self.opened_now(tmp_path)
            self.apply(backend, self.batch(self.pairs(1)))
            backend.close()
            names |= {file.name for file in shown(tmp_path / "out")}
            shutil.rmtree(tmp_path / "out")
        assert len(names) == 2

    def test_a_hidden_file_that_somebody_deletes_is_made_again(self, tmp_path: Path) -> None:
        backend = self.opened_now(tmp_path)
        for number in range(3):
            for file in (tmp_path / "out").glob(".*.tmp"):
                file.unlink()
            self.apply(backend, self.batch(self.pairs(1, start=number), first_lsn=number + 1))
        backend.close()
        self.check_content(tmp_path, self.pairs(3))

    def test_a_hidden_file_that_is_deleted_at_the_last_moment_is_written_again(self, tmp_path: Path) -> None:
        backend = self.opened_now(tmp_path)
        stream = backend._streams[0]
        show = stream._show
        gone: list[bool] = []

        def delete_first(hidden: str) -> None:
            if not gone:
                gone.append(True)
                for file in (tmp_path / "out").glob(".*-000-*.tmp"):
                    file.unlink()
            show(hidden)

        stream._show = delete_first  # type: ignore[method-assign]
        self.apply(backend, self.batch(self.pairs(2)))
        assert gone
        backend.close()
        self.check_content(tmp_path, self.pairs(2))
        assert self.applied_mark(tmp_path) == Mark(epoch=1, ranges=((1, 2),))

    def test_a_file_that_is_in_the_way_is_not_written_over(self, tmp_path: Path) -> None:
        backend = self.opened_now(tmp_path)
        self.apply(backend, self.batch(self.pairs(1)))
        (file,) = shown(tmp_path / "out")
        foreign = file.with_name(file.name.replace("01.jsonl", "02.jsonl"))
        foreign.write_text("somebody else's")
        for _ in range(2):
            with pytest.raises(BackendBroken, match="move it away"):
                backend.apply(self.batch(self.pairs(1, start=1), first_lsn=2))
        backend.close()
        with pytest.raises(StorageError, match="move it away"):
            self.opened_now(tmp_path)
        assert foreign.read_text() == "somebody else's"
        foreign.unlink()
        backend = self.opened_now(tmp_path)
        self.apply(backend, self.batch(self.pairs(2)))
        backend.close()
        self.check_content(tmp_path, self.pairs(2))

    def test_a_folder_that_is_gone_stops_the_shard(self, tmp_path: Path) -> None:
        backend = self.opened_now(tmp_path)
        (tmp_path / "out").rename(tmp_path / "away")
        for _ in range(2):
            with pytest.raises(BackendBroken, match="No such file"):
                backend.apply(self.batch(self.pairs(1)))
        (tmp_path / "away").rename(tmp_path / "out")
        self.apply(backend, self.batch(self.pairs(1)))
        backend.close()
        self.check_content(tmp_path, self.pairs(1))

    def test_another_number_of_shards_or_another_format_is_refused(self, tmp_path: Path) -> None:
        self.opened_now(tmp_path).close()
        with pytest.raises(ConfigError, match="shards=2, or another folder"):
            self.opened_now(tmp_path, shards=3)
        with pytest.raises(ConfigError, match=r"\.jsonl.*another folder"):
            JsonLinesBackend(tmp_path / "out", compress="zstd").open("put", 2, STORE)

    def test_several_lanes_share_a_folder(self, tmp_path: Path) -> None:
        one, other = JsonLinesBackend(tmp_path / "out"), JsonLinesBackend(tmp_path / "out", compress="zstd")
        one.open("put", 1, STORE)
        other.open("../.hidden/x", 1, STORE)
        one.apply(self.batch(self.pairs(1)))
        other.apply(self.batch(self.pairs(1, start=1)))
        one.close()
        other.close()
        assert len(shown(tmp_path / "out")) == 2
        self.check_content(tmp_path, self.pairs(2))

    # --- damage ---------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("slots", [(0,), (1,), (0, 1)])
    def test_marks_that_are_damaged_are_refused_where_something_acknowledged_is_lost(
        self, tmp_path: Path, slots: tuple[int, ...]
    ) -> None:
        backend = self.opened_now(tmp_path)
        for number in range(2):
            self.apply(backend, self.batch(self.pairs(1, start=number), first_lsn=number + 1))
        written = backend._streams[0]._marks
        assert written is not None
        newest = written._record.generation % 2
        backend.close()
        (marks,) = (tmp_path / "out").rglob("000.*.mark")
        with marks.open("r+b") as file:
            for slot in slots:
                file.seek(slot * SLOT_BYTES + 50)
                file.write(b"\xff")
        if newest not in slots:
            assert self.applied_mark(tmp_path) == Mark(epoch=1, ranges=((1, 2),))
            return
        with pytest.raises(CorruptionError, match="Restore it from a backup"):
            self.opened_now(tmp_path)

    def test_marks_of_a_newer_version_are_left_alone(self, tmp_path: Path) -> None:
        self.opened_now(tmp_path).close()
        (marks,) = (tmp_path / "out").rglob("000.*.mark")
        data = bytearray(marks.read_bytes())
        for slot in (0, SLOT_BYTES):
            size = 36 + int.from_bytes(data[slot + 32 : slot + 36], "little")
            data[slot + 4] = 2
            data[slot + size : slot + size + 4] = crc32c(bytes(data[slot : slot + size]), 0).to_bytes(
                4, "little"
            )
        marks.write_bytes(data)
        with pytest.raises(wb.UnsupportedFormat, match="version 2"):
            self.opened_now(tmp_path)

    def test_a_layout_that_is_gone_or_damaged_is_refused(self, tmp_path: Path) -> None:
        backend = self.opened_now(tmp_path)
        self.apply(backend, self.batch(self.pairs(1)))
        backend.close()
        (layout,) = (tmp_path / "out").rglob("layout.json")
        text = layout.read_text()
        layout.unlink()
        with pytest.raises(CorruptionError, match="marks beside it"):
            self.opened_now(tmp_path)
        for damaged in (text.replace('"shards": 2', '"shards": 1'), "{}", "[" * 5000, ""):
            layout.write_text(damaged)
            with pytest.raises(CorruptionError, match="is damaged"):
                self.opened_now(tmp_path)
        layout.write_text(text.replace('"version": 1', '"version": 2'))
        with pytest.raises(wb.UnsupportedFormat):
            self.opened_now(tmp_path)
        layout.write_text(text)
        (marks,) = (tmp_path / "out").rglob("001.*.mark")
        marks.unlink()
        with pytest.raises(StorageError, match=r"001\.\*\.mark is gone"):
            self.opened_now(tmp_path)

    # --- who else is there ----------------------------------------------------------------------------------------

    def test_a_folder_that_another_one_has_open_is_refused(self, tmp_path: Path) -> None:
        backend = self.opened_now(tmp_path)
        with pytest.raises(StorageError, match=f'"pid": {os.getpid()}'):
            self.opened_now(tmp_path)
        other_store = self.opened_now(tmp_path, store=OTHER_STORE)
        other_store.close()
        backend.close()

    def test_where_locks_do_not_hold_an_old_engine_is_fenced(self, tmp_path: Path) -> None:
        old = self.opened_now(tmp_path)
        self.apply(old, self.batch(self.pairs(1)))
        assert old._held is not None
        old._held.release()
        new = self.opened_now(tmp_path)
        for _ in range(2):
            with pytest.raises(Fenced):
                old.apply(self.batch(self.pairs(1, start=50), first_lsn=2))
        self.apply(new, self.batch(self.pairs(1, start=1), first_lsn=2, epoch=2))
        with pytest.raises(Fenced):
            old.apply(self.batch(self.pairs(1, start=50), first_lsn=2))
        old.close()
        new.close()
        self.check_content(tmp_path, self.pairs(2))

    def test_a_forked_child_has_nothing_open(self, tmp_path: Path) -> None:
        backend = self.opened_now(tmp_path)
        backend._pid += 1
        with pytest.raises(EngineClosed):
            backend.apply(self.batch(self.pairs(1)))
        backend._pid -= 1
        backend.close()

    def test_a_call_that_was_given_up_makes_the_next_one_come_again_and_closes_its_files(
        self, tmp_path: Path
    ) -> None:
        begun, go_on = threading.Event(), threading.Event()

        def slow(operation: Operation) -> Any:
            begun.set()
            assert go_on.wait(DEADLINE_S)
            return {"key": operation.key.decode(), "payload": operation.payload.decode()}

        backend = JsonLinesBackend(tmp_path / "out", line=slow)
        backend.open("put", 1, STORE)
        stream = backend._streams[0]
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(backend.apply, self.batch(self.pairs(1)))
            assert begun.wait(DEADLINE_S)
            backend.limit_time(0.1)
            with pytest.raises(RetryBatch, match="earlier call"):
                backend.apply(self.batch(self.pairs(1)))
            go_on.set()
            first.result(DEADLINE_S)
        backend.limit_time(None)
        self.apply(backend, self.batch(self.pairs(1)))
        stream.is_wanted = False
        with pytest.raises(EngineClosed):
            backend.apply(self.batch(self.pairs(1)))
        assert not stream.is_open
        backend.close()
        self.check_content(tmp_path, self.pairs(1))

    def test_a_mark_that_a_call_holds_for_too_long_is_an_error(self, tmp_path: Path) -> None:
        backend = self.opened_now(tmp_path)
        backend.limit_time(0.05)
        with backend._streams[0].lock, pytest.raises(StorageError, match="has written to shard 0"):
            backend.applied_mark(0)
        assert backend.applied_mark(1) == Mark()
        backend.close()

    def test_closing_waits_for_stuck_calls_once_and_not_for_each_shard(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("walbatch.backends.files.backend.CLOSE_WAIT_S", 0.5)
        backend = self.opened_now(tmp_path, shards=8)
        streams = backend._streams
        for stream in streams[:6]:
            stream.lock.acquire()
        begun = time.monotonic()
        backend.close()
        assert time.monotonic() - begun < 2  # 3 s one after the other
        assert [stream.is_open for stream in streams] == [True] * 6 + [False] * 2
        for stream in streams[:6]:
            stream.close()


class TestCompressedJsonLines(FilesContract):
    kills: ClassVar[int] = 5

    def make_backend(self, path: Path) -> Any:
        return JsonLinesBackend(path / "out", compress="zstd", level=1)

    def test_files_are_named_after_it(self, tmp_path: Path) -> None:
        backend = self.opened_now(tmp_path)
        self.apply(backend, self.batch(self.pairs(100)))
        backend.close()
        (file,) = shown(tmp_path / "out")
        assert file.name.endswith(".jsonl.zst")


# --- lines --------------------------------------------------------------------------------------------------------


def written(tmp_path: Path, pairs: list[Pair], **options: Any) -> tuple[list[str], dict[int, str]]:
    """Lines, and what was rejected."""
    backend = JsonLinesBackend(tmp_path / "out", **options)
    backend.open("put", 1, STORE)
    answer = backend.apply(FilesContract().batch(pairs))
    backend.close()
    rejected = answer.outcomes if isinstance(answer, Failures) else {}
    lines = [line for file in shown(tmp_path / "out") for line in file.read_text().split("\n")[:-1]]
    return lines, {index: getattr(outcome, "error", "") for index, outcome in rejected.items()}


def test_a_payload_that_is_json_can_stand_in_its_line_as_it_is(tmp_path: Path) -> None:
    pairs = [
        (b"a", b'{"n": 1.50}'),
        (b"b", b"[1,\r\n 2]"),
        (b"c", b"\xff"),
        (b"d", b"{"),
        (b"e", b"NaN"),
        (b"f", b"null"),
    ]
    lines, rejected = written(tmp_path, pairs, line="json")
    assert lines == [
        '{"lsn":1,"key":"a","payload":{"n": 1.50},"priority":5}',
        '{"lsn":2,"key":"b","payload":[1,   2],"priority":5}',
        '{"lsn":6,"key":"f","payload":null,"priority":5}',
    ]
    assert sorted(rejected) == [2, 3, 4]
    assert "is no JSON" in rejected[3]


@pytest.mark.parametrize(
    "payload",
    [
        b'{"x":\n1e999}',
        b'{"a":1,\r\n"a":2}',
        b"[\n0.1000000000000000055511151231257827]",
        b'{"s":\n"\\ud800\\n"}',
    ],
)
def test_a_payload_of_several_lines_stays_as_it_is_with_spaces_for_line_ends(
    tmp_path: Path, payload: bytes
) -> None:
    lines, rejected = written(tmp_path, [(b"k", payload)], line="payload")
    assert not rejected
    assert lines == [payload.decode().replace("\r", " ").replace("\n", " ")]


def test_what_was_rejected_is_not_in_the_mark(tmp_path: Path) -> None:
    backend = JsonLinesBackend(tmp_path / "out", line="payload")
    backend.open("put", 1, STORE)
    backend.apply(FilesContract().batch([(b"a", b"1"), (b"b", b"no"), (b"c", b"3")]))
    assert backend.applied_mark(0) == Mark(epoch=1, ranges=((1, 1), (3, 3)))
    backend.apply(FilesContract().batch([(b"b", b"no")], first_lsn=2))
    assert backend.applied_mark(0) == Mark(epoch=1, ranges=((1, 1), (3, 3)))
    backend.close()
    (file,) = shown(tmp_path / "out")
    assert file.read_text() == "1\n3\n"


def test_the_payloads_alone_can_be_the_lines(tmp_path: Path) -> None:
    lines, rejected = written(tmp_path, [(b"a", b'{"x":1}'), (b"b", b'{\n"x":2}')], line="payload")
    assert lines == ['{"x":1}', '{ "x":2}']
    assert not rejected


def test_a_function_says_what_a_line_is(tmp_path: Path) -> None:
    def line(operation: Operation) -> Any:
        if operation.key == b"skip":
            return None
        if operation.key == b"bad":
            raise LookupError("unknown")
        return {b"text": "as text", b"bytes": b"as bytes", b"ends": "a\nb", b"nan": float("nan")}.get(
            operation.key, {"k": operation.key.decode(), "lsn": operation.lsn}
        )

    keys = [b"text", b"skip", b"bytes", b"bad", b"ends", b"nan", b"other"]
    lines, rejected = written(tmp_path, [(key, b"") for key in keys], line=line)
    assert lines == ["as text", "as bytes", '{"k":"other","lsn":7}']
    assert sorted(rejected) == [3, 4, 5]
    assert rejected[3] == "LookupError: unknown"


def test_what_makes_no_line_makes_no_file_and_is_covered(tmp_path: Path) -> None:
    backend = JsonLinesBackend(tmp_path / "out", line=lambda operation: None)
    backend.open("put", 1, STORE)
    assert backend.apply(FilesContract().batch([(b"a", b"1")])) is None
    assert backend.applied_mark(0).covers(1)
    backend.close()
    assert shown(tmp_path / "out") == []


@pytest.mark.parametrize(
    "options", [{"line": "xml"}, {"compress": "gzip"}, {"level": 0}, {"level": 23}, {"level": "3"}], ids=str
)
def test_settings_that_make_no_sense_are_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        JsonLinesBackend(tmp_path, **options)


@pytest.mark.parametrize(
    ("options", "query"),
    [
        ({}, ""),
        ({"line": "json"}, "?line=json"),
        ({"compress": "zstd", "level": 9}, "?compress=zstd&level=9"),
    ],
    ids=str,
)
def test_a_url_makes_it_again(options: dict[str, Any], query: str) -> None:
    backend = JsonLinesBackend("/a b/c?", **options)
    url = url_of(backend)
    assert url == f"jsonl:///a%20b/c%3F{query}"
    again = open_backend(url, allow_python=False)
    assert isinstance(again, JsonLinesBackend)
    assert url_of(again) == url
    assert again.path == backend.path


def test_a_function_has_no_url() -> None:
    assert url_of(JsonLinesBackend("/x", line=str)) is None


@pytest.mark.parametrize(
    "url", ["jsonl:///x?lines=json", "jsonl:///x?line", "jsonl:///x#y", "jsonl:", "jsonl:///x?level=a"]
)
def test_urls_that_cannot_be_right_are_refused(url: str) -> None:
    with pytest.raises(ConfigError):
        open_backend(url, allow_python=False)
