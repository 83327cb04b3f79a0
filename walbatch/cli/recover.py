"""`walbatch recover`: make a store consistent, show what was found, deliver what is pending."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated

import typer

import walbatch
from walbatch.cli.delivering import Delivered, Patience, deliver
from walbatch.cli.exits import Exit, exit_code, explain
from walbatch.cli.lanes import build_lanes, check_known, check_shards, moves, name_one, parse_lanes
from walbatch.cli.output import count_text, progress_bar, show_json, size_text
from walbatch.config import Lane
from walbatch.errors import ConfigError, CorruptionError
from walbatch.inspection import LaneReport, StoreReport, dead_letters, look, remembered_lanes
from walbatch.salvage import Salvage, salvage_store


def recover(
    store: Annotated[str, typer.Argument(metavar="STORE", help="The store's directory.")],
    *,
    to: Annotated[
        str | None, typer.Option(metavar="URL", help="Backend of the lane, for a store with one lane.")
    ] = None,
    lane: Annotated[
        list[str] | None,
        typer.Option(metavar="KIND=URL", help="Backend of a lane; KIND alone holds it. May be repeated."),
    ] = None,
    shards: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Shards of a lane that the store does not remember."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write nothing; show what would be done.")
    ] = False,
    salvage: Annotated[
        bool, typer.Option("--salvage", help="Give up what is damaged, and say what that is.")
    ] = False,
    timeout: Annotated[
        float | None, typer.Option(min=0, metavar="S", help="Seconds to deliver; else as long as it takes.")
    ] = None,
    stall: Annotated[
        float, typer.Option(min=0, metavar="S", help="Seconds without progress after which to give up.")
    ] = 60.0,
    as_json: Annotated[bool, typer.Option("--json", help="Show one JSON document.")] = False,
) -> None:
    """Make STORE consistent and deliver what is pending.

    Shows what was found. Backends with a URL are remembered in the store: lmdb:///path, and python:module:function,
    which has to be named each time, because it runs code.

    Exit codes: 0 consistent and delivered, 2 usage, 3 work or dead letters left, 4 corruption (nothing was changed; where only
    dead letters are damaged, the rest was delivered), 5 locked by another process, 6 newer format, 7 salvaged with stated loss,
    8 I/O error.
    """
    named = parse_lanes(lane or ())
    with progress_bar("checking", hidden=as_json) as step:
        found = look(store, full=True, lock=True, progress=step).store
    loss = Salvage()
    if salvage and (found.refusal is None or isinstance(found.refusal, CorruptionError)):
        if not found.kinds.issuperset(named):  # wrong usage must not come after a change
            planned = salvage_store(store, dry_run=True)
            check_known(named, known={*_known(store, found), *planned.pending})
        loss = salvage_store(store, dry_run=dry_run)
        found = _salvaged(found, loss)
    if found.refusal is not None:
        _refuse(found, as_json=as_json)
    if found.uuid is None:
        raise ConfigError(f"{found.path} holds no store yet: nothing to recover; check the path")
    if to is not None:
        named = name_one(to, known=found.lanes, named=named)
    check_known(named, known=_known(store, found))
    remembered = remembered_lanes(store)
    check_shards(shards, named=named, remembered=remembered)
    lanes = build_lanes(remembered, named=named, shards=shards)
    patience = Patience(timeout=timeout, stall=stall)
    letters, findings = dead_letters(store)
    told = {case.message for case in found.cases}
    damage = tuple(finding for finding in findings if finding not in told)
    delivered = None
    if lanes and not dry_run:
        delivered = _deliver(store, lanes, found, patience, hidden=as_json)
        before, (letters, _) = {letter.lsn for letter in letters}, dead_letters(store)
        died = sum(letter.lsn not in before for letter in letters)
        # What a backend's own mark covers was delivered before, and is only known now.
        delivered = replace(delivered, count=max(0, found.pending - delivered.remaining - died))
    result = _Result(
        found=found, loss=loss, delivered=delivered, dry_run=dry_run, letters=len(letters), damage=damage,
        moved=moves(lanes, remembered),
        unserved=tuple(report for report in found.lanes.values() if report.pending and not _has_backend(lanes, report.name)),
    )  # fmt: skip
    if as_json:
        show_json(result.document())
    else:
        for line in result.lines():
            typer.echo(line)
        for line in result.next_steps():
            typer.echo(line, err=True)
    raise typer.Exit(result.exit)


def _known(store: str, found: StoreReport) -> set[str]:
    """The lanes of a store: remembered, in its log, or of its dead letters."""
    return {*found.kinds, *found.lanes, *(letter.lane for letter in dead_letters(store)[0])}


def _has_backend(lanes: Mapping[str, Lane], kind: str) -> bool:
    return kind in lanes and lanes[kind].backend is not None


def _refuse(found: StoreReport, *, as_json: bool) -> None:
    """End with what recovery refuses; nothing was changed."""
    assert found.refusal is not None
    code = exit_code(found.refusal)
    if not as_json:
        raise found.refusal
    show_json({**found_json(found), "error": explain(found.refusal), "exit": code})
    typer.echo(f"walbatch: {explain(found.refusal)}", err=True)
    raise typer.Exit(code)


def _salvaged(found: StoreReport, loss: Salvage) -> StoreReport:
    """The store as a salvage leaves it, with the cases that were found before: the same for a dry run."""
    if not loss.rebuilt:
        return found
    lanes = {kind: replace(report, pending=0, pending_bytes=0) for kind, report in found.lanes.items()}
    for kind, count in loss.pending.items():
        report = lanes.get(kind) or LaneReport(name=kind, shards=None, url=None)
        lanes[kind] = replace(report, pending=count.operations, pending_bytes=count.bytes)
    return replace(
        found, refusal=None, lanes=dict(sorted(lanes.items())), next_lsn=loss.next_lsn,
        pending=sum(count.operations for count in loss.pending.values()), torn_bytes=loss.torn_bytes,
        copied_operations=loss.copied_operations,
    )  # fmt: skip


def _deliver(
    store: str, lanes: dict[str, Lane], found: StoreReport, patience: Patience, *, hidden: bool
) -> Delivered:
    """Open the store, which carries out the recovery, and deliver what has a backend."""
    served = sum(report.pending or 0 for kind, report in found.lanes.items() if _has_backend(lanes, kind))
    engine = walbatch.Engine.open(store, lanes=lanes)
    with progress_bar("delivering", hidden=hidden or not served) as step:
        return deliver(engine, served=served, patience=patience, step=step)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Result:
    """What a recovery did, or would do."""

    found: StoreReport
    loss: Salvage
    delivered: Delivered | None
    dry_run: bool
    moved: Mapping[str, tuple[str, str]]
    """Lanes whose backend is another one now: the URL that was remembered, and the one that was named."""
    unserved: tuple[LaneReport, ...]
    """Lanes with pending operations and without a backend."""
    letters: int
    """Dead letters that are left. A dry run knows of those that are there already."""
    damage: tuple[str, ...]
    """Dead letters that cannot be read, a sentence each."""

    @property
    def remaining(self) -> int:
        """Operations that are left. A dry run expects of each backend that it works."""
        if self.delivered is not None:
            return self.delivered.remaining
        return sum(report.pending or 0 for report in self.unserved)

    @property
    def exit(self) -> Exit:
        """The exit code."""
        if self.loss.lost_something:
            return Exit.SALVAGED
        if self.damage:
            return Exit.CORRUPT
        return Exit.WORK_LEFT if self.remaining or self.letters else Exit.DONE

    @property
    def findings(self) -> tuple[str, ...]:
        """What could not be read of state/, a sentence each, and that is no case of recovery's."""
        return tuple(dict.fromkeys((*self.found.findings, *self.damage)))

    def document(self) -> dict[str, object]:
        """For programs."""
        done = self.delivered
        return {
            **found_json(self.found), "dry_run": self.dry_run, "rebuilt": list(self.loss.rebuilt),
            "lost": [list(span) for span in self.loss.lost], "end_lost_after": self.loss.end_lost_after,
            "delivered": done.count if done else 0, "remaining": self.remaining, "dead_letters": self.letters,
            "findings": list(self.findings), "error": "; ".join(self.damage) or None,
            "elapsed_s": round(done.elapsed_s, 3) if done else 0.0,
            "without_backend": [report.name for report in self.unserved], "errors": dict(done.errors) if done else {},
            "exit": self.exit,
        }  # fmt: skip

    def lines(self) -> Iterable[str]:
        """For people."""
        found = self.found
        size = size_text(sum(segment.file_bytes for segment in found.segments))
        pending = count_text(found.pending, "operation")
        yield f"{found.path}: {count_text(len(found.segments), 'segment')}, {size}, {pending} pending"
        yield from case_lines(found)
        yield from (f"  {finding}" for finding in self.findings)
        yield from self._loss_lines()
        for name, lane in found.lanes.items():
            if lane.pending:
                yield f"  lane {name}: {lane.pending:,} pending, remembered backend: {lane.url or 'none'}"
                if name in self.moved:
                    goes = "would go" if self.dry_run else "goes"
                    yield (
                        f"  lane {name}: {goes} to {self.moved[name][1]} from now on; unless that is the same data, what the other "
                        "one has applied last may be applied here again"
                    )
        if self.dry_run:
            if found.torn_bytes:
                yield f"would copy a torn tail of {found.torn_bytes:,} bytes to quarantine/"
            if found.copied_operations:
                yield f"would copy {count_text(found.copied_operations, 'unproven operation')} forward and sync them"
            skips = found.next_lsn > found.durable_lsn + 1
            jump = " (after an unclean end the log skips LSNs)" if skips else ""
            yield f"would go on at LSN {found.next_lsn:,}{jump}, with {self.remaining:,} left; nothing was written"
        elif self.delivered is not None:
            done = self.delivered
            rate = f" ({done.count / done.elapsed_s:,.0f} a second)" if done.count and done.elapsed_s else ""
            yield f"delivered {done.count:,}{rate}, {done.remaining:,} left"
        else:
            yield f"delivered 0, {self.remaining:,} left"

    def _loss_lines(self) -> Iterable[str]:
        would = "would be " if self.dry_run else ""
        if self.loss.rebuilt:
            numbers = ", ".join(map(str, self.loss.rebuilt))
            yield f"  {would}rebuilt: segment {numbers}; the damaged files {'would go' if self.dry_run else 'are'} in quarantine/"
        for first, last in self.loss.lost:
            yield f"  {would}LOST: LSN {first:,} to {last:,} ({count_text(last - first + 1, 'operation')} at most)"
        if self.loss.end_lost_after is not None:
            yield f"  {would}LOST: whatever was acknowledged after LSN {self.loss.end_lost_after:,}; nothing tells how much"

    def next_steps(self) -> Iterable[str]:
        """What the user should do now."""
        for kind, error in (self.delivered.errors if self.delivered else {}).items():
            yield f"last error of lane {kind}: {' '.join(error.split())}"
        for report in self.unserved:
            hint = f"{report.name}={report.url or 'lmdb:///path'}"
            if report.url is None:
                hint += f" or {report.name}=python:module:function"
            why = (
                " (python: backends run code, so name it each time)"
                if (report.url or "").startswith("python:")
                else ""
            )
            yield f"next: name the backend of lane {report.name}, for example --lane {hint}{why}"
        if self.delivered is not None and self.delivered.remaining and not self.unserved:
            yield "next: repair the backend and run this again; the operations are safe in the log"
        if self.damage:
            yield (
                f"walbatch: dead letters are damaged: copies are in quarantine/ once the store was opened; drop each with walbatch "
                f"dlq drop {self.found.path} LSN"
            )
        if self.letters:
            are = "dead letter is" if self.letters == 1 else "dead letters are"
            yield f"{self.letters:,} {are} left: see walbatch dlq list {self.found.path}, then requeue or drop them"


def found_json(found: StoreReport) -> dict[str, object]:
    """What a look found, for programs."""
    return {
        "store": found.path, "uuid": found.uuid, "live": found.live, "durable_lsn": found.durable_lsn,
        "settled_lsn": found.settled_lsn, "next_lsn": found.next_lsn, "pending": found.pending,
        "settled_count": found.settled_count, "segments": len(found.segments), "torn_bytes": found.torn_bytes,
        "copied_operations": found.copied_operations,
        "lanes": {
            name: {"pending": lane.pending, "shards": lane.shards, "url": lane.url} for name, lane in found.lanes.items()
        },
        "cases": [
            {"label": case.label, "severity": case.severity.name.lower(), "message": case.message, "segment": case.segment,
             "offset": case.offset, "first_lsn": case.first_lsn, "last_lsn": case.last_lsn}
            for case in found.cases
        ],
    }  # fmt: skip


def case_lines(found: StoreReport) -> Iterable[str]:
    """What recovery found, a line each; what is fine is left out."""
    for case in found.cases:
        if case.is_noteworthy:
            place = f" (segment {case.segment}, offset {case.offset:,})" if case.segment is not None else ""
            yield f"  {case.label}: {case.message}{place}"
