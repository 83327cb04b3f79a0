"""What was measured, as text for a terminal and as Markdown for the documents.

The idea needed to read it: a table is rows of cells, the first row its head; the two forms differ in how cells stand together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from walbatch.bench.results import Results, Spread, WorkloadNote
from walbatch.bench.targets import OWN, RAW, Verdict, verdicts

Rows = list[list[str]]

COMPARED: Final = frozenset({"w1", "w2", "w3", "w4", "w4c", "w5", "w6", "w7", "w9"})
SMALL: Final = 0.095
LARGE: Final = 100
TARGET_DIGITS: Final = 4
"""So that what misses its bound by little does not look as if it met it."""
LEGEND: Final = (
    """Each figure is a median over the rounds, with the lowest and the highest in brackets. A ratio is that of walbatch to the
    row, made within each round: above 1, walbatch is faster. In each round every subject comes once, in turn, in an empty folder;
    payloads and keys are made before the clock starts. Every acknowledgement is durable, but for subjects marked *, which do not
    wait for the disk and are no peers. + marks what is there for information only.""",
    """w1 to w4 and w6: walbatch's lane is paused, as the others deliver nothing either. w5: the clock runs from the resumption
    until all is delivered to a function that does nothing, and the checkpoint that says so is on disk; peers delete what they have
    read, a thousand in a commit where they can. w7 and w9: until everything is in LMDB. w6: a subject without asyncio works in 32
    threads; raw writes groups of 1,000.""",
)


def text(results: Results) -> Iterator[str]:
    """All of it, line by line, for a terminal."""
    for note in results.workloads:
        yield f"{note.name}  {note.title}"
        yield from _aligned(workload_rows(results, note))
        yield ""
    for line in LEGEND if any(note.name in COMPARED for note in results.workloads) else ():
        yield from _wrapped(line)
        yield ""
    yield from _notes(results)
    yield from (f"! {problem}" for problem in results.problems)
    found = verdicts(results)
    if found:
        yield ""
        yield "targets"
        yield from _aligned(target_rows(found))
        met = sum(verdict.is_met is True for verdict in found)
        missed = sum(verdict.is_met is False for verdict in found)
        yield f"{met} met, {missed} missed, {len(found) - met - missed} not measured"
    yield _machine(results)


def markdown(results: Results) -> Iterator[str]:
    """The tables, line by line, each under its heading."""
    titles = {note.name: f"{note.name}: {note.title}" for note in results.workloads}
    for name, lines in sections(results):
        yield f"### {titles.get(name, name.capitalize())}"
        yield ""
        yield from lines
        yield ""


def sections(results: Results) -> Iterator[tuple[str, list[str]]]:
    """The lines of each table by name: the workloads, `targets`, `machine`."""
    for note in results.workloads:
        yield note.name, list(_piped(workload_rows(results, note)))
    found = verdicts(results)
    if found:
        yield "targets", list(_piped(target_rows(found)))
    releases = _releases(results)
    yield "machine", [f"{_machine(results)}.{f' Measured with {releases}.' if releases else ''}"]


def _machine(results: Results) -> str:
    facts = ", ".join(f"{name} {value}" for name, value in results.machine.items())
    return f"profile {results.profile}, {results.elapsed_s:,.0f} s; {facts}"


def _releases(results: Results) -> str:
    """Versions of what was measured."""
    measured = {sample.subject for sample in results.samples}
    releases = [note.version for note in results.subjects if note.version and note.name in measured]
    return ", ".join(dict.fromkeys(releases))


# --- rows ------------------------------------------------------------------------------------------------------------


def workload_rows(results: Results, note: WorkloadNote) -> Rows:
    """The table of one workload."""
    if note.name in COMPARED:
        return _compared(results, note)
    return _figures(results, note)


def target_rows(found: Sequence[Verdict]) -> Rows:
    """What was to be reached."""
    words = {True: "met", False: "MISSED", None: "not measured"}
    return [
        ["workload", "target", "bound", "measured", ""],
        *(
            [
                verdict.workload,
                verdict.what,
                verdict.bound,
                _bracketed(verdict.found, TARGET_DIGITS),
                words[verdict.is_met],
            ]
            for verdict in found
        ),
    ]


def _compared(results: Results, note: WorkloadNote) -> Rows:
    """Fastest first. Latencies only where there are some."""
    subjects = results.measured(note.name)
    rates = {name: spread for name in subjects if (spread := results.spread(note.name, name)) is not None}
    has_latency = any(results.values(note.name, name, "p50_us") for name in rates)
    head = [
        "subject",
        note.unit,
        *(["p50 us", "p99 us"] if has_latency else []),
        "CPU us/op",
        "walbatch to it",
    ]
    rows = [head]
    for name in sorted(rates, key=lambda name: rates[name].median, reverse=True):
        ratio = Spread.of(results.ratios(note.name, OWN, name)) if name != OWN else None
        rows.append(
            [
                _marked(results, name),
                _bracketed(rates[name]),
                *([_median(results, note.name, name, figure) for figure in ("p50_us", "p99_us")] if has_latency else []),
                _median(results, note.name, name, "cpu_us"),
                _bracketed(ratio),
            ]
        )  # fmt: skip
    return rows


def _figures(results: Results, note: WorkloadNote) -> Rows:
    """Figures of walbatch alone: one row for each of what was measured."""
    rows = [["what", "figure", "median"]]
    for name in results.measured(note.name):
        figures = dict.fromkeys(
            figure
            for sample in results.samples
            if (sample.workload, sample.subject) == (note.name, name)
            for figure in sample.figures
        )
        rows += [
            [name, figure.replace("_", " "), _bracketed(results.spread(note.name, name, figure))]
            for figure in figures
        ]
    return rows


def _marked(results: Results, name: str) -> str:
    """A subject's title, with a mark where it is no peer."""
    note = next((note for note in results.subjects if note.name == name), None)
    if note is None or name in {OWN, RAW}:
        return results.title(name)
    return f"{note.title}{'' if note.syncs else ' *'}{' +' if note.role == 'hint' else ''}"


def _median(results: Results, workload: str, subject: str, figure: str) -> str:
    spread = results.spread(workload, subject, figure)
    return number(spread.median) if spread else ""


def _bracketed(spread: Spread | None, digits: int = 3) -> str:
    if spread is None:
        return ""
    if spread.count == 1:
        return number(spread.median, digits)
    return f"{number(spread.median, digits)} [{number(spread.low, digits)}, {number(spread.high, digits)}]"


def number(value: float, digits: int = 3) -> str:
    """So many digits, or all that stand before the point."""
    if abs(value) >= LARGE:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}" if abs(value) >= SMALL or not value else f"{value:.{digits}f}"


# --- lines -----------------------------------------------------------------------------------------------------------


def _aligned(rows: Rows) -> Iterator[str]:
    """Cells below one another, the first to the left and figures to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.ljust(width) if index == 0 or not _is_figure(rows, index) else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield f"  {'  '.join(cells)}".rstrip()


def _is_figure(rows: Rows, column: int) -> bool:
    return all(not row[column] or row[column][0].isdigit() or row[column][0] == "-" for row in rows[1:])


def _piped(rows: Rows) -> Iterator[str]:
    head, *body = rows
    yield f"| {' | '.join(head)} |"
    yield "|" + "|".join("---:" if index and _is_figure(rows, index) else "---" for index in range(len(head))) + "|"  # fmt: skip
    for row in body:
        yield f"| {' | '.join(row)} |"


def _wrapped(line: str, width: int = 120) -> Iterator[str]:
    shown = ""
    for word in line.split():
        if shown and len(shown) + 1 + len(word) > width:
            yield shown
            shown = ""
        shown = f"{shown} {word}".strip()
    yield shown


def _notes(results: Results) -> Iterator[str]:
    """What each subject is, and what is not installed."""
    measured = {sample.subject for sample in results.samples}
    for note in results.subjects:
        if note.missing:
            yield f"not installed: {note.title}: {note.missing}"
        elif note.note and note.name in measured:
            yield f"{note.title}: {note.note}"
    if releases := _releases(results):
        yield from _wrapped(f"versions: {releases}")
