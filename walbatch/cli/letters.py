"""`walbatch dlq`: the dead letters of a store.

`list`, `show` and `export` change nothing and work beside an engine; `requeue` and `drop` open the store for writing.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Final

import typer

import walbatch
from walbatch.cli.delivering import Patience, deliver
from walbatch.cli.exits import Exit, explain, guarded
from walbatch.cli.lanes import build_lanes, check_known, check_lane, parse_lanes
from walbatch.cli.looking import JsonOption, StoreArgument
from walbatch.cli.output import bytes_field, count_text, json_text, progress_bar, show_json, size_text
from walbatch.config import Lane
from walbatch.errors import ConfigError, CorruptionError, UnsupportedFormat
from walbatch.inspection import (
    OWN_PREFIX,
    damaged_letters,
    dead_letters,
    find_store,
    look,
    operations,
    remembered_lanes,
    requeue_key,
)
from walbatch.types import DeadLetter

if TYPE_CHECKING:
    from walbatch.engine import Engine

SHOWN_BYTES: Final = 400
"""Of a payload, for people."""
KEY_CHARS: Final = 20
ERROR_CHARS: Final = 60
"""Of a key and an error, in a table."""
NAMED_MAX: Final = 5
"""LSNs named in one message."""

LaneOption = Annotated[str | None, typer.Option(metavar="KIND", help="Only this lane.")]
LsnArguments = Annotated[
    list[int] | None, typer.Argument(metavar="[LSN]...", help="Which ones, by LSN.", show_default=False)
]

dlq = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


# --- looking -----------------------------------------------------------------------------------------------------------


def list_letters(store: StoreArgument, *, lane: LaneOption = None, as_json: JsonOption = False) -> None:
    """Show the dead letters of STORE, one in a line.

    Changes nothing, also while an engine has the store open.

    Exit codes: 0 done, 2 usage, 4 some cannot be read (state/ is damaged), 6 newer format, 8 I/O error.
    """
    letters, findings = _of_lane(store, lane)
    damage = _damage(store, findings)
    size = sum(len(letter.key) + len(letter.payload) for letter in letters)
    if as_json:
        rows = [{**_fields(letter), "payload_bytes": len(letter.payload)} for letter in letters]
        show_json(
            {"count": len(letters), "bytes": size, "letters": rows, "error": damage, "exit": _exit(damage)}
        )
    else:
        for line in _table(letters):
            typer.echo(line)
        typer.echo(f"{count_text(len(letters), 'dead letter')}, {size_text(size)}")
        if letters:
            typer.echo(f"next: walbatch dlq show {store} LSN, or requeue, drop or export", err=True)
    _end(damage)


def show_letter(
    store: StoreArgument,
    lsn: Annotated[int, typer.Argument(metavar="LSN", help="Which one.")],
    *,
    as_json: JsonOption = False,
) -> None:
    """Show all of one dead letter of STORE.

    Changes nothing, also while an engine has the store open. Bytes that are not UTF-8 stand in fields
    named key_base64 and payload_base64; people see a payload with escapes, and its beginning only.

    Exit codes: 0 done, 2 usage or no such letter, 4 it cannot be read (state/ is damaged), 6 newer format, 8 I/O error.
    """
    ((letter,), _) = _chosen(store, [lsn], every=False)
    if as_json:
        show_json({**_fields(letter), **bytes_field("payload", letter.payload), "exit": Exit.DONE})
        return
    for name, value in _fields(letter).items():
        typer.echo(f"{name:<18} {_printable(value)}")
    shown = _printable(letter.payload[:SHOWN_BYTES])
    rest = f" and {len(letter.payload) - SHOWN_BYTES:,} more" if len(letter.payload) > SHOWN_BYTES else ""
    typer.echo(f"{'payload':<18} {size_text(len(letter.payload))}: {shown}{rest}")
    typer.echo(f"next: walbatch dlq requeue {store} {lsn}, or walbatch dlq drop {store} {lsn}", err=True)


def export_letters(
    store: StoreArgument,
    *,
    lane: LaneOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines: the only format there is.")] = False,
) -> None:
    """Write the dead letters of STORE as JSON lines.

    Changes nothing, also while an engine has the store open. Bytes that are not UTF-8 stand in fields named key_base64
    and payload_base64. 'walbatch load' reads the same lines.

    Exit codes: 0 done, 2 usage, 4 some cannot be read (the others were written), 6 newer format, 8 I/O error.
    """
    del as_json
    letters, findings = _of_lane(store, lane)
    for letter in letters:
        sys.stdout.write(f"{json_text({**_fields(letter), **bytes_field('payload', letter.payload)})}\n")
    _end(_damage(store, findings))


# --- changing ----------------------------------------------------------------------------------------------------------


def requeue(
    store: StoreArgument,
    lsns: LsnArguments = None,
    *,
    every: Annotated[bool, typer.Option("--all", help="All of them.")] = False,
    per_second: Annotated[
        float, typer.Option(min=0.001, metavar="N", help="Submit at most so many a second.")
    ] = 100.0,
    lane: Annotated[
        list[str] | None,
        typer.Option(metavar="KIND=URL", help="Backend of a lane; KIND alone holds it. May be repeated."),
    ] = None,
    stall: Annotated[
        float, typer.Option(min=0, metavar="S", help="Seconds without delivery after which to give up.")
    ] = 60.0,
    as_json: JsonOption = False,
) -> None:
    """Submit dead letters of STORE again, and deliver them with whatever else is pending.

    Each gets a new LSN and a full number of attempts. A lane whose backend is neither named nor remembered is held: its
    operations wait in the log. An interruption submits none twice.

    Exit codes: 0 all delivered, 2 usage or no such letter, 3 work left or dead again, 4 corruption (with --all: some cannot be
    read, the others were requeued), 5 locked by another process, 6 newer format, 8 I/O error.
    """
    letters, damage = _chosen(store, lsns, every=every)
    found = look(store, full=True).store
    if found.refusal is not None:
        raise found.refusal
    named = parse_lanes(lane or ())
    kinds = {letter.lane for letter in letters}
    check_known(named, known=found.kinds | kinds)
    lanes = build_lanes(remembered_lanes(store), named=named)
    if unknown := sorted(kinds - set(lanes)):
        raise ConfigError(
            f"the store does not remember lane {unknown[0]!r} of a dead letter: add --lane {unknown[0]}=URL or --lane "
            f"{unknown[0]} (holds it)"
        )
    count = delivered = dead = 0
    remaining = found.pending
    errors: dict[str, str] = {}
    waiting = {kind for kind, report in found.lanes.items() if report.pending}
    if letters or any(kind in lanes and lanes[kind].backend is not None for kind in waiting):
        before = {letter.lsn for letter in dead_letters(store)[0]}
        engine = _opened(store, lanes)
        try:
            if letters:
                count = engine.requeue([letter.lsn for letter in letters], per_second=per_second)
        except BaseException as error:
            engine.close(drain=False)
            error.add_note("run it again for the rest: none is submitted twice")
            raise
        served = engine.stats().pending if any(each.backend is not None for each in lanes.values()) else 0
        with progress_bar("delivering", hidden=as_json or not served) as step:
            done = deliver(
                engine,
                served=served,
                patience=Patience(timeout=None, stall=stall),
                step=step,
            )
        delivered, remaining, errors = done.count, done.remaining, dict(done.errors)
        dead = sum(letter.lsn not in before for letter in dead_letters(store)[0])
    held = sorted(kind for kind in kinds | waiting if kind not in lanes or lanes[kind].backend is None)
    code = Exit.CORRUPT if damage else Exit.WORK_LEFT if remaining or dead else Exit.DONE
    if as_json:
        show_json(
            {
                "requeued": count, "delivered": delivered, "remaining": remaining, "dead": dead, "held": held, "errors": errors,
                "error": damage, "exit": code,
            }
        )  # fmt: skip
    else:
        typer.echo(
            f"requeued {count_text(count, 'dead letter')}: delivered {delivered:,}, {remaining:,} left in the log, "
            f"{dead:,} dead again"
        )
        for line in _steps(store, held if remaining else [], errors, dead=dead):
            typer.echo(line, err=True)
    _end(damage)
    raise typer.Exit(code)


def drop(
    store: StoreArgument,
    lsns: LsnArguments = None,
    *,
    every: Annotated[bool, typer.Option("--all", help="All of them; needs --yes.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Yes, for good.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Drop dead letters of STORE for good. Delivers nothing.

    One that cannot be read is dropped only where its LSN is given; its bytes are kept in quarantine/.

    Exit codes: 0 done, 2 usage or no such letter, 4 corruption (with --all: some cannot be read, the others were dropped), 5
    locked by another process, 6 newer format, 8 I/O error.
    """
    if every and not yes:
        raise ConfigError(
            f"--all drops every dead letter for good: add --yes, or keep a copy first: walbatch dlq export {store}"
        )
    broken = damaged_letters(store) & set(lsns or ())
    left = [lsn for lsn in lsns or () if lsn not in broken]
    letters, damage = _chosen(store, left, every=every) if left or not broken or every else ([], None)
    wanted = broken.union(letter.lsn for letter in letters)
    if wanted:
        remembered = remembered_lanes(store)
        engine = _opened(store, build_lanes(remembered, named=dict.fromkeys(remembered)))
        try:
            engine.drop(wanted)
        finally:
            engine.close(drain=False)
    if as_json:
        show_json({"dropped": len(wanted), "error": damage, "exit": _exit(damage)})
    else:
        typer.echo(f"dropped {count_text(len(wanted), 'dead letter')}")
    _end(damage)


# --- common ------------------------------------------------------------------------------------------------------------


def _chosen(store: str, lsns: Sequence[int] | None, *, every: bool) -> tuple[list[DeadLetter], str | None]:
    """The letters that are meant, and what is wrong with others of them.

    Raises ConfigError where that is not clear, or one is not there; CorruptionError where one that is named, or all, cannot be
    read.
    """
    if every == bool(lsns):
        how = "either LSNs or --all, not both" if every else "LSNs, or --all for all of them"
        raise ConfigError(f"name {how}: see them with 'walbatch dlq list {store}'")
    letters, findings = dead_letters(store)
    damage = _damage(store, findings)
    if every:
        if damage is not None and not letters:
            raise _damaged(store, "; ".join(findings))
        return letters, damage
    wanted = set(lsns or ())
    if missing := sorted(wanted - {letter.lsn for letter in letters}):
        if damage is not None:
            raise _damaged(store, "; ".join(findings))
        more = f" and {len(missing) - NAMED_MAX:,} more" if len(missing) > NAMED_MAX else ""
        named = ", ".join(map(str, missing[:NAMED_MAX])) + more
        raise ConfigError(
            f"no dead letter has LSN {named}{_requeued(store, missing)}: see them with 'walbatch dlq list {store}'"
        )
    return [letter for letter in letters if letter.lsn in wanted], None


def _of_lane(store: str, lane: str | None) -> tuple[list[DeadLetter], Sequence[str]]:
    """The letters of one lane, or all, and what of them could not be read."""
    letters, findings = dead_letters(store)
    if not findings:  # else it may have been the lane of one that cannot be read
        check_lane(store, lane, seen={letter.lane for letter in letters})
    return [letter for letter in letters if lane is None or letter.lane == lane], findings


def _requeued(store: str, lsns: Collection[int]) -> str:
    """What became of the letters among `lsns` that were submitted again, as far as the log still holds that."""
    keys = {requeue_key(lsn): lsn for lsn in lsns}
    with contextlib.suppress(CorruptionError, UnsupportedFormat):
        for operation in operations(store):
            lsn = keys.get(operation.options.idempotency_key)
            if lsn is not None and operation.settled:
                return f" ({lsn} was requeued as LSN {operation.lsn}, and is settled)"
            if lsn is not None:
                return (
                    f" ({lsn} was requeued, and waits in the log as LSN {operation.lsn}: deliver it with 'walbatch recover {store} "
                    f"--lane {operation.kind}=URL')"
                )
    return ""


def _opened(store: str, lanes: dict[str, Lane]) -> Engine:
    find_store(store)  # opening would make one
    return walbatch.Engine.open(store, lanes=lanes)


def _steps(store: str, held: Sequence[str], errors: dict[str, str], *, dead: int) -> Iterator[str]:
    """What the user should do now."""
    for kind, error in errors.items():
        yield f"last error of lane {kind}: {' '.join(error.split())}"
    if errors:
        yield f"next: repair the backend, then walbatch recover {store}; the operations are safe in the log"
    for kind in held:
        yield f"next: lane {kind} is held, its operations wait in the log: walbatch recover {store} --lane {kind}=URL"
    if dead:
        yield f"next: look why with walbatch dlq list {store}"


def _damage(store: str, findings: Sequence[str]) -> str | None:
    """One sentence about what cannot be read."""
    return explain(_damaged(store, "; ".join(findings))) if findings else None


def _damaged(store: str, text: str) -> CorruptionError:
    return CorruptionError(
        f"{text}. What is damaged was left as it is; keep a copy of state/. Opening the store copies it to quarantine/; then drop "
        f"such a letter by its LSN: walbatch dlq drop {store} LSN",
        path=store,
        expected="dead letters that can be read",
    )


def _exit(damage: str | None) -> Exit:
    return Exit.DONE if damage is None else Exit.CORRUPT


def _end(damage: str | None) -> None:
    if damage is not None:
        typer.echo(f"walbatch: {damage}", err=True)
        raise typer.Exit(Exit.CORRUPT)


def _fields(letter: DeadLetter) -> dict[str, object]:
    """A letter without its payload, for programs; what it does not have is left out."""
    options = letter.options
    fields: dict[str, object] = {
        "lsn": letter.lsn, "kind": letter.lane, **bytes_field("key", letter.key), "priority": letter.priority,
        "reason": str(letter.reason), "error": letter.error, "attempts": letter.attempts, "died": _time(letter.died_wall_ns),
    }  # fmt: skip
    if options.origin:
        fields["first_lsn"] = options.origin
    if options.not_before_ns:
        fields["not_before"] = _time(options.not_before_ns)
    if options.deadline_ns:
        fields["deadline"] = _time(options.deadline_ns)
    if options.idempotency_key and not options.idempotency_key.startswith(OWN_PREFIX):
        fields.update(bytes_field("idempotency_key", options.idempotency_key))
    return fields


def _time(wall_ns: int) -> str:
    """UTC, to the second. A clock may have been anything."""
    try:
        return datetime.fromtimestamp(wall_ns // 10**9, tz=UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (OverflowError, ValueError, OSError):
        return f"{wall_ns} ns"


def _table(letters: Iterable[DeadLetter]) -> Iterator[str]:
    """One line for each letter, and a head."""
    rows = [
        (str(letter.lsn), letter.lane, str(letter.reason), str(letter.attempts), _time(letter.died_wall_ns),
         _short(letter.key, KEY_CHARS), _short(letter.error, ERROR_CHARS))
        for letter in letters
    ]  # fmt: skip
    if not rows:
        return
    head = ("lsn", "lane", "reason", "attempts", "died", "key", "error")
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _short(value: object, chars: int) -> str:
    text = _printable(value)
    return text if len(text) <= chars else f"{text[: chars - 3]}..."


def _printable(value: object) -> str:
    """On one line, and nothing that a terminal would act on."""
    text = value.decode(errors="backslashreplace") if isinstance(value, bytes) else str(value)
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


COMMANDS: Final[tuple[tuple[str, Callable[..., None]], ...]] = (
    ("list", list_letters), ("show", show_letter), ("requeue", requeue), ("drop", drop),
)  # fmt: skip
for _name, _command in COMMANDS:
    dlq.command(_name)(guarded(_command))
dlq.command("export")(guarded(export_letters, json_errors=False))
