"""`walbatch dump` and `walbatch load`: operations out of a log and into one."""

from __future__ import annotations

import base64
import binascii
import contextlib
import csv
import json
import os
import stat
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer

import walbatch
from walbatch import limits
from walbatch.cli.delivering import Patience, deliver
from walbatch.cli.exits import Exit
from walbatch.cli.lanes import build_lanes, check_lane, parse_lanes
from walbatch.cli.looking import JsonOption, StoreArgument
from walbatch.cli.output import Step, bytes_field, count_text, json_text, progress_bar, show_json
from walbatch.config import Lane
from walbatch.errors import ConfigError, DurabilityUnknown, WalbatchError
from walbatch.inspection import look, operations, remembered_lanes
from walbatch.types import PRIORITY_MAX, PRIORITY_NORMAL

if TYPE_CHECKING:
    from walbatch.engine import Engine

GROUP_COUNT = 1000
"""Operations that share a commit group while loading."""
GROUP_BYTES = 4 * limits.MIB

LINE_BYTES_MAX = 8 * limits.PAYLOAD_BYTES_MAX
"""A payload in JSON takes six characters a byte at worst. A source without line ends costs this much memory at most."""


def dump(
    store: StoreArgument,
    *,
    lane: Annotated[str | None, typer.Option(metavar="KIND", help="Only this lane.")] = None,
    key: Annotated[str | None, typer.Option(metavar="TEXT", help="Only this key.")] = None,
    key_base64: Annotated[
        str | None, typer.Option(metavar="BASE64", help="Only this key, where it is no text.")
    ] = None,
    first_lsn: Annotated[
        int, typer.Option(min=1, metavar="LSN", help="From this LSN on.", show_default=False)
    ] = 1,
    last_lsn: Annotated[
        int, typer.Option(min=0, metavar="LSN", help="Up to this LSN.", show_default=False)
    ] = limits.LSN_MAX,
    pending: Annotated[bool, typer.Option("--pending", help="Only what is not settled.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines: the only format there is.")] = False,
) -> None:
    """Write the operations of STORE as JSON lines.

    Changes nothing, also while an engine has the store open. Settled operations are in the log until their segment is
    trimmed. Bytes that are not UTF-8 stand in fields named key_base64 and payload_base64. 'walbatch load' reads the
    same lines.

    Exit codes: 0 done, 2 usage, 4 corruption (what stands before it was written), 6 newer format, 8 I/O error.
    """
    del as_json
    if key is not None and key_base64 is not None:
        raise ConfigError("--key and --key-base64 name the same thing: give one of them")
    wanted = _decode(key_base64, "--key-base64") if key_base64 is not None else None
    found = operations(
        store,
        kind=lane,
        key=os.fsencode(key) if key is not None else wanted,
        first_lsn=first_lsn,
        last_lsn=last_lsn,
        pending_only=pending,
    )
    count = 0
    for count, operation in enumerate(found, 1):  # noqa: B007 - told below
        line = json_text(
            {
                "lsn": operation.lsn, "kind": operation.kind, **bytes_field("key", operation.key),
                **bytes_field("payload", operation.payload), "priority": operation.priority, "settled": operation.settled,
            }
        )  # fmt: skip
        sys.stdout.write(f"{line}\n")
    if not count:
        check_lane(store, lane, seen=())


def load(
    store: StoreArgument,
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="A file of JSON lines or CSV; - for standard input.", show_default=False
        ),
    ] = "-",
    *,
    kind: Annotated[
        str | None, typer.Option(metavar="KIND", help="Lane of the rows that name none (else: the only one).")
    ] = None,
    lane: Annotated[
        list[str] | None,
        typer.Option(metavar="KIND=URL", help="Backend of a lane; KIND alone holds it. May be repeated."),
    ] = None,
    shards: Annotated[
        int, typer.Option(min=1, metavar="N", help="Shards of a lane that the store does not know yet.")
    ] = 1,
    as_csv: Annotated[
        bool, typer.Option("--csv", help="The source is CSV; else that is told by its name.")
    ] = False,
    skip: Annotated[
        int, typer.Option(min=0, metavar="N", help="Leave out the first N operations.", show_default=False)
    ] = 0,
    drain: Annotated[bool, typer.Option("--drain/--no-drain", help="Deliver before returning.")] = True,
    stall: Annotated[
        float, typer.Option(min=0, metavar="S", help="Seconds without delivery after which to give up.")
    ] = 60.0,
    as_json: JsonOption = False,
) -> None:
    """Submit operations from a file to STORE.

    The store is made if it does not exist. A row has key (or key_base64), and may have payload (or payload_base64),
    kind and priority; other fields are ignored. CSV has their names in its first line. Each group of rows is durable
    before the next is read.

    A file is checked as a whole first: of one with a row that cannot be read, or of a kind without a lane, nothing is
    loaded. Where standard input has such a row the load ends; the message says with which --skip to go on.

    Exit codes: 0 all durable (and delivered, where there is a backend), 2 usage or a bad row, 3 not all delivered, 4
    corruption, 5 locked by another process, 6 newer format, 8 I/O error.
    """
    named = parse_lanes(lane or ())
    lanes = build_lanes(remembered_lanes(store), named=named, shards=shards)
    if kind is not None and kind not in lanes:
        lanes[kind] = Lane(shards=shards)
    kind = kind or (next(iter(lanes)) if len(lanes) == 1 else None)
    if not lanes:
        raise ConfigError(
            "the store has no lanes yet: name one with --kind KIND, or --lane KIND=URL to deliver as well"
        )
    read = _csv_rows if as_csv or source.endswith(".csv") else _json_rows

    def groups_of(lines: _Lines) -> Iterator[_Group]:
        return _groups(islice(read(lines), skip, None), kind, lanes)

    with _opened(source) as file, progress_bar("loading", hidden=as_json or source == "-") as step:
        if source != "-":
            _check(groups_of, file)
        lines = _Lines(file)
        groups = groups_of(lines)
        first = list(islice(groups, 1))  # a source that is wrong from the start makes no store
        engine = walbatch.Engine.open(store, lanes=lanes)
        if not drain:
            for name in lanes:
                engine.pause(name)
        loaded = _submit(engine, chain(first, groups), lines, step, skipped=skip)
    served = (
        engine.stats().pending if drain and any(lane.backend is not None for lane in lanes.values()) else 0
    )
    with progress_bar("delivering", hidden=as_json or not served) as step:
        done = deliver(
            engine,
            served=served,
            patience=Patience(timeout=None, stall=stall),
            step=step,
        )
    if as_json:
        show_json(
            {
                "loaded": loaded,
                "delivered": done.count,
                "remaining": done.remaining,
                "errors": dict(done.errors),
            }
        )
    else:
        typer.echo(
            f"loaded {count_text(loaded, 'operation')}, all durable; {_waiting(store, lanes, done.remaining)}"
        )
    for name, error in done.errors.items():
        typer.echo(f"last error of lane {name}: {' '.join(error.split())}", err=True)
    raise typer.Exit(Exit.WORK_LEFT if done.errors and drain else Exit.DONE)


def _waiting(store: str, lanes: Collection[str], remaining: int) -> str:
    """How many operations wait to be delivered, and of which lanes."""
    if not remaining or len(lanes) == 1:
        return f"{remaining:,} wait to be delivered"
    found = look(store, full=True).store.lanes.values()
    shares = ", ".join(f"{report.pending:,} of lane {report.name}" for report in found if report.pending)
    return f"{remaining:,} wait to be delivered ({shares})"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """Rows that are submitted together."""

    kind: str
    priority: int
    operations: list[tuple[bytes, bytes]]


def _check(groups_of: Callable[[_Lines], Iterable[_Group]], file: BinaryIO) -> None:
    """Read a regular file once before anything is submitted. What can be read only once is left alone."""
    lines = _Lines(file)
    if not lines.total_bytes:
        return
    try:
        for _ in groups_of(lines):
            pass
    except ConfigError as error:
        error.add_note("nothing was loaded")
        raise
    file.seek(0)


def _submit(engine: Engine, groups: Iterable[_Group], lines: _Lines, step: Step, *, skipped: int) -> int:
    """Submit all groups; returns how many operations. On an error the engine is closed."""
    loaded = 0
    try:
        for group in groups:
            engine.submit_many(group.kind, group.operations, priority=group.priority)
            loaded += len(group.operations)
            step(lines.read_bytes, lines.total_bytes)
    except BaseException as error:
        engine.close(drain=False)
        if isinstance(error, WalbatchError):
            error.add_note(
                f"{count_text(loaded, 'operation')} before it {'is' if loaded == 1 else 'are'} durable"
            )
            if not isinstance(error, DurabilityUnknown):  # else those of its group may be durable too
                error.add_note(f"go on with --skip {skipped + loaded}")
        raise
    return loaded


# --- reading ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _opened(source: str) -> Iterator[BinaryIO]:
    """The source, open for reading bytes."""
    if source == "-":
        yield sys.stdin.buffer
        return
    try:
        file = open(source, "rb")  # noqa: SIM115 - closed below; what the block raises is no problem of this file
    except FileNotFoundError:
        raise ConfigError(f"{source} does not exist: check the path of the file to load") from None
    except IsADirectoryError:
        raise ConfigError(f"{source} is a directory: name a file of JSON lines or CSV") from None
    with file:
        yield file


class _Lines:
    """The lines of a source as text, with their ends, and how far it has been read."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.number = 0
        self.read_bytes = 0
        self.total_bytes = 0
        with contextlib.suppress(OSError):  # a stream may have no file
            facts = os.fstat(file.fileno())
            self.total_bytes = facts.st_size if stat.S_ISREG(facts.st_mode) else 0

    def __iter__(self) -> Iterator[str]:
        while line := self._file.readline(LINE_BYTES_MAX + 1):
            self.number += 1
            self.read_bytes += len(line)
            if len(line) > LINE_BYTES_MAX:
                raise ConfigError(
                    f"line {self.number} is longer than {LINE_BYTES_MAX:,} bytes: it cannot hold an operation"
                )
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                raise ConfigError(
                    f"line {self.number} is not UTF-8 ({error.reason}): write bytes as key_base64 and payload_base64"
                ) from error
            yield text.removeprefix("\ufeff") if self.number == 1 else text


Row = tuple[int, dict[str, Any]]
"""(line number, fields)."""


def _json_rows(lines: _Lines) -> Iterator[Row]:
    for line in lines:
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(
                f"line {lines.number} is not JSON ({error}): correct it and load from there"
            ) from error
        if not isinstance(fields, dict):
            raise ConfigError(
                f"line {lines.number} is not a JSON object, as {{'key': 'k', 'payload': 'p'}} is: correct it"
            )
        yield lines.number, fields


def _csv_rows(lines: _Lines) -> Iterator[Row]:
    csv.field_size_limit(LINE_BYTES_MAX)
    reader = csv.DictReader(lines, strict=True)
    try:
        names = reader.fieldnames or []
        if not {"key", "key_base64"} & set(names):
            raise ConfigError(
                f"the first line of the CSV names no column 'key' or 'key_base64', but {', '.join(names) or 'nothing'}"
            )
        for fields in reader:
            if None in fields:
                raise ConfigError(
                    f"line {lines.number} has more fields than the first line names: correct it"
                )
            yield lines.number, {name: value for name, value in fields.items() if value}
    except csv.Error as error:
        raise ConfigError(
            f"line {lines.number} is not CSV ({error}): correct it and load from there"
        ) from error


def _groups(rows: Iterable[Row], default_kind: str | None, lanes: Collection[str]) -> Iterator[_Group]:
    """Consecutive rows of one kind and priority. What stands before a bad row is a group, then the error comes."""
    group = _Group(kind="", priority=0, operations=[])
    size = 0
    try:
        for number, fields in rows:
            kind = _kind(number, fields, default_kind, lanes)
            priority = _priority(number, fields)
            operation = (
                _field(number, fields, "key", needed=True),
                _field(number, fields, "payload", needed=False),
            )
            full = len(group.operations) >= GROUP_COUNT or size >= GROUP_BYTES
            if full or (group.kind, group.priority) != (kind, priority):
                if group.operations:
                    yield group
                group, size = _Group(kind=kind, priority=priority, operations=[]), 0
            group.operations.append(operation)
            size += len(operation[0]) + len(operation[1])
    except ConfigError:
        if group.operations:
            yield group
        raise
    if group.operations:
        yield group


def _kind(number: int, fields: dict[str, Any], default: str | None, lanes: Collection[str]) -> str:
    kind = fields.get("kind") or default
    if not isinstance(kind, str):
        raise ConfigError(f"line {number} names no kind, and the store has several lanes: give --kind KIND")
    if kind not in lanes:
        raise ConfigError(
            f"line {number}: unknown kind {kind!r}: the lanes are {', '.join(map(repr, lanes))}; "
            f"add --lane {kind}=URL or --lane {kind} (holds it)"
        )
    return kind


def _priority(number: int, fields: dict[str, Any]) -> int:
    value = fields.get("priority", PRIORITY_NORMAL)
    if isinstance(value, str) and value.isascii() and value.isdigit():
        value = int(value[:3])
    if type(value) is not int or not 0 <= value <= PRIORITY_MAX:
        raise ConfigError(f"line {number}: priority must be from 0 to {PRIORITY_MAX}, not {value!r}")
    return value


def _field(number: int, fields: dict[str, Any], name: str, *, needed: bool) -> bytes:
    """The bytes of a key or a payload."""
    encoded = fields.get(f"{name}_base64")
    if encoded is not None:
        return _decode(encoded, f"line {number}: {name}_base64")
    value = fields.get(name)
    if value is None:
        if needed:
            raise ConfigError(f"line {number} has no {name}: give {name} (text) or {name}_base64")
        return b""
    if not isinstance(value, str):
        raise ConfigError(
            f"line {number}: {name} must be text (or give {name}_base64), not {type(value).__name__}"
        )
    try:
        return value.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"line {number}: {name} is no text ({error.reason}): give {name}_base64") from error


def _decode(value: object, what: str) -> bytes:
    try:
        return base64.b64decode(value, validate=True)  # type: ignore[arg-type]  # what is no text is refused
    except (binascii.Error, TypeError, ValueError) as error:
        raise ConfigError(f"{what} is not base64: {error}") from error
