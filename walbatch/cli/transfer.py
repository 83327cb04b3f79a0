"""`walbatch dump` and `walbatch load`: operations out of a log and into one."""

from __future__ import annotations

import base64
import binascii
import csv
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from itertools import chain
from typing import Annotated, Any, TextIO

import typer

from walbatch import limits
from walbatch.cli.exits import Exit
from walbatch.cli.lanes import build_lanes, parse_lanes
from walbatch.cli.looking import JsonOption, StoreArgument
from walbatch.cli.output import bytes_field, progress_bar, show_json
from walbatch.config import Lane
from walbatch.engine import Engine
from walbatch.errors import ConfigError
from walbatch.inspection import operations, remembered_lanes

GROUP_COUNT = 1000
"""Operations that share a commit group while loading."""
GROUP_BYTES = 4 * limits.MIB


def dump(
    store: StoreArgument,
    lane: Annotated[str | None, typer.Option(help="Only this lane.")] = None,
    key: Annotated[str | None, typer.Option(help="Only this key (text).")] = None,
    first: Annotated[int, typer.Option("--from", help="First LSN.")] = 1,
    last: Annotated[int, typer.Option("--to", help="Last LSN.")] = limits.LSN_MAX,
    *,
    pending: Annotated[bool, typer.Option("--pending", help="Only what is not settled.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines; this is the default.")] = True,
) -> None:
    """Write the operations in the log of STORE as JSON lines. Changes nothing.

    Bytes that are not UTF-8 stand in fields named key_base64 and payload_base64. `walbatch load` reads the
    same lines.
    """
    del as_json
    found = operations(
        store,
        kind=lane,
        key=key.encode() if key is not None else None,
        first_lsn=first,
        last_lsn=last,
        pending_only=pending,
    )
    for operation in found:
        show_json(
            {
                "lsn": operation.lsn, "kind": operation.kind, **bytes_field("key", operation.key),
                **bytes_field("payload", operation.payload), "priority": operation.priority, "settled": operation.settled,
            }
        )  # fmt: skip


def load(
    store: StoreArgument,
    source: Annotated[
        str, typer.Argument(help="JSON lines or CSV (with a header); - for standard input.")
    ] = "-",
    kind: Annotated[str | None, typer.Option(help="Kind of the rows that name none.")] = None,
    lane: Annotated[
        list[str] | None, typer.Option(help="KIND=URL of a backend; may be given several times.")
    ] = None,
    shards: Annotated[int, typer.Option(help="Shards of a lane that the store does not know yet.")] = 1,
    *,
    as_csv: Annotated[
        bool, typer.Option("--csv", help="The source is CSV; told by the file's name otherwise.")
    ] = False,
    drain: Annotated[bool, typer.Option("--drain/--no-drain", help="Deliver before returning.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Submit operations from a file to STORE (made if it does not exist).

    Each group is durable before the next is read.

    A line that cannot be read stops the load; the message says how many operations before it are durable.
    """
    named = parse_lanes(lane or ())
    remembered = remembered_lanes(store)
    lanes = build_lanes(remembered, named=named, shards=shards)
    if kind is not None and kind not in lanes:
        lanes[kind] = Lane(shards=shards)
    loaded = 0
    with (
        nullcontext(sys.stdin) if source == "-" else open(source, encoding="utf-8", newline="") as file,
        progress_bar("loading", hidden=as_json or source == "-") as step,
    ):
        total = 0 if source == "-" else file.seek(0, 2)
        if total:
            file.seek(0)
        rows = _csv_rows(file) if as_csv or source.endswith(".csv") else _json_rows(file)
        first_row = next(rows, None)
        if first_row is not None and not lanes:
            raise ConfigError(
                "the store has no lanes yet: name one with --kind KIND, or --lane KIND=URL to deliver as well"
            )
        engine = Engine.open(store, lanes=lanes)
        try:
            for group_kind, group, read_bytes in _groups(chain([first_row] if first_row else [], rows), kind):
                engine.submit_many(group_kind, group)
                loaded += len(group)
                step(read_bytes, total)
        except ConfigError as error:
            raise ConfigError(f"{error}; {loaded:,} operations before it are durable") from error
        finally:
            report = engine.close(drain=drain, timeout=None if drain else 30.0)
    if as_json:
        show_json(
            {
                "loaded": loaded,
                "delivered": report.settled,
                "remaining": report.remaining,
                "reason": report.reason,
            }
        )
    else:
        typer.echo(f"loaded {loaded:,} operations, all durable; {report.remaining:,} wait to be delivered")
    raise typer.Exit(Exit.DONE)


Row = tuple[int, dict[str, Any]]
"""(line number, fields)."""


def _json_rows(file: TextIO) -> Iterator[Row]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"line {number} is not JSON: {error}") from error
        if not isinstance(fields, dict):
            raise ConfigError(f"line {number} is not a JSON object")
        yield number, fields


def _csv_rows(file: TextIO) -> Iterator[Row]:
    reader = csv.DictReader(file)
    try:
        for fields in reader:
            yield reader.line_num, dict(fields)
    except csv.Error as error:
        raise ConfigError(f"line {reader.line_num} is not CSV: {error}") from error


def _field(number: int, fields: dict[str, Any], name: str, *, needed: bool) -> bytes:
    text = fields.get(f"{name}_base64")
    if text:
        try:
            return base64.b64decode(text, validate=True)
        except (binascii.Error, TypeError, ValueError) as error:
            raise ConfigError(f"line {number}: {name}_base64 is not base64: {error}") from error
    value = fields.get(name)
    if value is None and not needed:
        return b""
    if not isinstance(value, str):
        raise ConfigError(
            f"line {number}: {name!r} must be text (or give {name}_base64), not {type(value).__name__}"
        )
    return value.encode()


def _groups(
    rows: Iterable[Row], default_kind: str | None
) -> Iterator[tuple[str, list[tuple[bytes, bytes]], int]]:
    """Consecutive rows of one kind as groups, with an estimate of the bytes read so far."""
    group: list[tuple[bytes, bytes]] = []
    group_kind = ""
    group_bytes = read_bytes = 0
    for number, fields in rows:
        kind = fields.get("kind") or default_kind
        if not isinstance(kind, str):
            raise ConfigError(f"line {number} names no kind: give --kind")
        key = _field(number, fields, "key", needed=True)
        payload = _field(number, fields, "payload", needed=False)
        if group and (kind != group_kind or len(group) >= GROUP_COUNT or group_bytes >= GROUP_BYTES):
            yield group_kind, group, read_bytes
            group, group_bytes = [], 0
        group_kind = kind
        group.append((key, payload))
        size = len(key) + len(payload)
        group_bytes += size
        read_bytes += size
    if group:
        yield group_kind, group, read_bytes
