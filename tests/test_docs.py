"""The documents and the code say the same: recovery's tables, the format's offsets, the limits, links and names."""

import ast
import inspect
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields as fields_of
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

import pytest

import walbatch as wb
from tests.pages import DOCS, TableRow, plain, read, tables
from tests.testing.installed import PLUGIN_OPTIONS
from walbatch import limits, metrics
from walbatch.core import columns, frame, health, mark, recovery
from walbatch.core.columns import Column
from walbatch.core.frame import (
    Body,
    Codec,
    FrameType,
    SegmentHeader,
    decode_frame_header,
    encode_frame_header,
    encode_segment_header,
)
from walbatch.core.recovery import (
    SEGMENT_ROWS,
    IdentityState,
    SegmentFacts,
    StoreFacts,
    make_plan,
)
from walbatch.core.scanner import SegmentScan
from walbatch.engine.engine import CHANGEABLE
from walbatch.storage import envelope, layout, letters
from walbatch.types import Checkpoint

ROOT: Final = Path(__file__).resolve().parent.parent
UNITS: Final = {"": 1, "KiB": limits.KIB, "MiB": limits.MIB, "GiB": limits.GIB}
MARKDOWN: Final = sorted(DOCS.rglob("*.md"))


def table(name: str, *columns: str, first: str) -> list[TableRow]:
    """The one table with these columns whose first row starts with `first`."""
    (rows,) = (rows for rows in tables(name) if [*rows[0]] == [*columns] and rows[0][columns[0]] == first)
    return rows


# --- recovery.md --------------------------------------------------------------------------------------------------


def test_the_rows_of_a_segment_are_those_of_the_code() -> None:
    rows = table(
        "recovery.md", "label", "situation", "evidence looked at", "decision", "why that is safe", first="W1"
    )
    documented = [(row["label"], row["situation"], row["decision"]) for row in rows]
    assert documented == [(row.label, row.situation, str(row.decision)) for row in SEGMENT_ROWS]
    assert all(row["evidence looked at"] and row["why that is safe"] for row in rows)


HEADER: Final = SegmentHeader(
    store=b"S" * 16,
    salt=1,
    epoch=1,
    number=2,
    first_lsn=5,
    prev_number=1,
    prev_salt=1,
    prev_last_lsn=4,
    operations_before=4,
    checkpointed_lsn=4,
    created_wall_ns=0,
)
SCAN: Final = SegmentScan(
    end_offset=1024,
    last_lsn=5,
    proven_lsn=5,
    frames=2,
    operations=1,
    sealed=False,
    clean=True,
    lost=0,
    unproven=(),
    damage=None,
)
SEGMENT: Final = SegmentFacts(
    number=2, file_bytes=1024, state=frame.HeaderState.VALID, header=HEADER, scan=SCAN
)
CHECKPOINT: Final = Checkpoint(generation=1, epoch=1, watermark=4, durable_lsn=5, segment=2, settled_count=4)
SOUND: Final = StoreFacts(
    identity=IdentityState.VALID, store=HEADER.store, segments=(SEGMENT,), checkpoint=CHECKPOINT
)
STORE_SITUATIONS: Final = {
    "S1": replace(SOUND, identity=IdentityState.MISSING, store=None),
    "S2": replace(SOUND, identity=IdentityState.DAMAGED, store=None),
    "S3": replace(SOUND, identity=IdentityState.NEWER, store=None),
    "S4": replace(SOUND, segments=()),
    "S5": replace(SOUND, segments=(), checkpoint=None),
    "S6": replace(SOUND, state_findings=("a finding",)),
    "S7": replace(SOUND, checkpoint=None),
    "S8": replace(SOUND, segments=(replace(SEGMENT, scan=replace(SCAN, last_lsn=2**63 - 9)),)),
    "S9": replace(SOUND, superseded=(1,)),
    "S10": replace(
        SOUND,
        checkpoint=None,
        segments=(replace(SEGMENT, header=replace(HEADER, flags=frame.SEGMENT_COMPACTED)),),
    ),
}


@pytest.mark.parametrize("label", STORE_SITUATIONS)
def test_the_rows_of_the_store_are_those_of_the_code(label: str) -> None:
    rows = table("recovery.md", "label", "situation", "decision", "why that is safe", first="S1")
    row = next(row for row in rows if row["label"] == label)
    (case,) = (case for case in make_plan(STORE_SITUATIONS[label]).cases if case.label == label)
    assert row["decision"] == case.severity.name.lower()
    assert label == "S6" or row["situation"] == case.message
    assert row["why that is safe"]


def test_every_label_of_the_code_is_documented() -> None:
    source = Path(recovery.__file__).read_text(encoding="utf-8")
    labels = {
        node.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and re.fullmatch(r"[SW]\d+", node.value)
    }
    documented = {row["label"] for rows in tables("recovery.md") for row in rows if "situation" in row}
    assert documented == labels == {*STORE_SITUATIONS, *(row.label for row in SEGMENT_ROWS)}


def test_there_is_advice_for_every_refusal_and_for_nothing_else() -> None:
    advised = [
        label
        for row in table("recovery.md", "label", "what to do", first="S1, S2")
        for label in row["label"].split(", ")
    ]
    refusing = {row.label for row in SEGMENT_ROWS if row.decision in {"corrupt", "newer"}}
    for label, facts in STORE_SITUATIONS.items():
        if make_plan(facts).refusal is not None:
            refusing.add(label)
    assert sorted(advised) == sorted(refusing)


# --- format.md ----------------------------------------------------------------------------------------------------


def fields(layout_: struct.Struct, *, start: int = 0) -> list[tuple[int, int]]:
    """Offset and size of every field of a struct, padding as one field."""
    assert layout_.format.startswith("<"), "little-endian, no alignment"
    found: list[tuple[int, int]] = []
    at = start
    for number, code in re.findall(r"(\d*)([a-zA-Z])", layout_.format):
        count = int(number or 1)
        sizes = [count] if code in "sx" else [struct.calcsize("<" + code)] * count
        for size in sizes:
            found.append((at, size))
            at += size
    assert at == start + layout_.size
    return found


def offsets(rows: Sequence[TableRow]) -> list[tuple[int, int]]:
    return [
        (int(row["offset"]), int(row["size"]))
        for row in rows
        if row["offset"].isdigit() and row["size"].isdigit()
    ]


CRC: Final = 4
SEGMENT_END: Final = frame._SEGMENT.size + frame._WALL.size
STRUCTS: Final[dict[str, tuple[str, list[tuple[int, int]]]]] = {
    "identity": (
        "`57 42 53 54 4f 52 45 0a` (`WBSTORE\\n`)",
        [*fields(layout._IDENTITY), (layout._IDENTITY.size, CRC)],
    ),
    "segment header": (
        "`89 57 42 53 45 47 0d 0a` (`\\x89WBSEG\\r\\n`)",
        [
            *fields(frame._SEGMENT),
            (frame._SEGMENT.size, frame._WALL.size),
            (SEGMENT_END, limits.SECTOR_BYTES - CRC - SEGMENT_END),
            (limits.SECTOR_BYTES - CRC, CRC),
        ],
    ),
    "frame header": (
        "`8e 57 42 46` (`\\x8eWBF`)",
        [
            *fields(frame._FRAME),
            (frame._FRAME.size, limits.FRAME_HEADER_BYTES - CRC - frame._FRAME.size),
            (limits.FRAME_HEADER_BYTES - CRC, CRC),
        ],
    ),
    "body header": ("1 to 64", fields(columns._BODY)),
    "directory entry": (
        "see below; each at most once, unknown ones are a newer format",
        fields(columns._COLUMN),
    ),
    "trailer": ("where the SEAL frame starts in the file", fields(frame._TRAILER)),
    "footer": ("last LSN of the segment", fields(frame._FOOTER)),
    "envelope": ("`57 42 73 74` (`WBst`)", fields(envelope._HEADER)),
    "checkpoint": ("grows by one with each checkpoint", fields(envelope._CHECKPOINT)),
    "letter": ("when it was given up", fields(letters._BODY)),
    "mark": ("`57 42 6d 6b` (`WBmk`)", fields(mark._HEADER)),
}


def offset_tables() -> list[list[TableRow]]:
    return [rows for rows in tables("format.md") if [*rows[0]] == ["offset", "size", "field", "meaning"]]


def offset_table(meaning: str) -> list[TableRow]:
    (rows,) = (rows for rows in offset_tables() if rows[0]["meaning"] == meaning)
    return rows


@pytest.mark.parametrize(("meaning", "expected"), STRUCTS.values(), ids=STRUCTS.keys())
def test_a_table_of_offsets_is_that_of_the_code(meaning: str, expected: list[tuple[int, int]]) -> None:
    assert offsets(offset_table(meaning)) == expected


def test_every_table_of_offsets_is_compared_with_the_code() -> None:
    assert len(offset_tables()) == len(STRUCTS)


def test_magics_are_those_of_the_code() -> None:
    documented = {
        bytes.fromhex(row["meaning"].split("`")[1])
        for rows in offset_tables()
        for row in rows
        if row["field"] == "magic"
    }
    assert documented == {
        layout.IDENTITY_MAGIC,
        frame.SEGMENT_MAGIC,
        frame.FRAME_MAGIC,
        frame.FOOTER_MAGIC,
        envelope.MAGIC,
        mark.MAGIC,
    }


def named_fields(kind: str) -> Iterator[tuple[str, int, int]]:
    """Rows whose field is the name of an attribute: it stands in backticks."""
    for row in offset_table(STRUCTS[kind][0]):
        if row["field"].startswith("`"):
            yield plain(row["field"]), int(row["offset"]), int(row["size"])


def test_a_segment_header_has_each_field_where_the_table_says() -> None:
    header = replace(
        HEADER,
        salt=11,
        epoch=12,
        number=13,
        first_lsn=15,
        prev_number=10,
        prev_salt=16,
        prev_last_lsn=14,
        operations_before=17,
        checkpointed_lsn=18,
        created_wall_ns=19,
    )
    data = encode_segment_header(header)
    names = {name: data[offset : offset + size] for name, offset, size in named_fields("segment header")}
    assert names.pop("store") == header.store
    values = {name: int.from_bytes(value, "little") for name, value in names.items()}
    assert values == {name: getattr(header, name) for name in values}
    assert {*values, "store"} == {*SegmentHeader.__dataclass_fields__}


def test_a_frame_header_has_each_field_where_the_table_says() -> None:
    body = Body(codec=Codec.ZSTD, count=3, stored_bytes=7, raw_bytes=9, parts=(bytes(448),), crc=77)
    data = encode_frame_header(
        body,
        type=FrameType.OPERATIONS,
        first_lsn=21,
        span=3,
        synced_lsn=20,
        wall_ns=99,
        seed=5,
        flags=frame.FLAG_COPIED,
    )
    header = decode_frame_header(data, seed=5)
    values = {
        name: int.from_bytes(data[offset : offset + size], "little")
        for name, offset, size in named_fields("frame header")
    }
    assert values == {name: getattr(header, name) for name in values}
    assert {*values} == {*frame.FrameHeader.__dataclass_fields__}


def test_types_flags_and_columns_are_those_of_the_code() -> None:
    types = table("format.md", "type", "name", "body", "`count`", "`span`", "written", first="1")
    assert {row["name"]: int(row["type"]) for row in types} == {
        member.name: member.value for member in FrameType
    }
    flags = table("format.md", "flag", "name", "on", "meaning", first="1")
    assert {row["name"]: int(row["flag"]) for row in flags} == {
        name.removeprefix("FLAG_"): value for name, value in vars(frame).items() if name.startswith("FLAG_")
    }
    documented = table("format.md", "id", "column", "left out where", "limit of an element", first="1")
    assert [int(row["id"]) for row in documented] == [member.value for member in Column]
    bits = table("format.md", "bit", "segment", "meaning", first="1")
    assert {row["segment"]: int(row["bit"]) for row in bits} == {
        name.removeprefix("SEGMENT_"): getattr(frame, name)
        for name in ("SEGMENT_COMPACTED", "SEGMENT_OPTIONS")
    }


def amount(text: str) -> int:
    """`64 MiB`, `65,536`, `2^20` or `2^63 - 1` as a number."""
    power = re.fullmatch(r"2\^(\d+)( - 1)?", text)
    if power:
        return int(2 ** int(power[1])) - bool(power[2])
    number, _, unit = text.partition(" ")
    return int(number.replace(",", "")) * UNITS[unit]


def test_limits_have_the_values_of_the_code() -> None:
    rows = table("format.md", "limit", "value", "of what", first="`SECTOR_BYTES`")
    documented = {plain(row["limit"]): amount(row["value"]) for row in rows}
    assert documented == {name: getattr(limits, name) for name in documented}


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda path: str(path.relative_to(DOCS)))
def test_a_limit_that_a_document_names_exists_with_that_value(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    names = set(re.findall(r"`([A-Z][A-Z_]*(?:_MAX|_MIN|_BYTES|_JUMP))`", text))
    assert {name for name in names if not hasattr(limits, name)} == set()
    for name, value in re.findall(r"`([A-Z][A-Z_]*)`\s+\(([\d,^]+(?: [KMG]iB)?)\)", text):
        assert amount(value) == getattr(limits, name), name


def test_the_example_is_the_golden_segment() -> None:
    (name,) = re.findall(
        r"^`(fixtures/golden/\S+\.seg)`, the whole of it", read("format.md"), flags=re.MULTILINE
    )
    data = (ROOT / name).read_bytes()
    shown: dict[int, bytes] = {}
    for at, row, text in re.findall(
        r"^    ([0-9a-f]{3})  ((?:[0-9a-f]{2} ?){16}) \|(.{16})\|$", read("format.md"), flags=re.MULTILINE
    ):
        shown[int(at, 16)] = bytes.fromhex(row)
        assert text == "".join(chr(byte) if 32 <= byte < 127 else "." for byte in bytes.fromhex(row))
    assert shown
    for at in range(0, len(data), 16):
        assert data[at : at + 16] == shown.pop(at, bytes(16)), hex(at)
    assert not shown


# --- guarantees.md ------------------------------------------------------------------------------------------------

GUARANTEES: Final = [f"G{number}" for number in range(1, 11)]


def defined(path: Path) -> set[str]:
    """The tests of a module: functions, and methods as `Class::method`, inherited ones of our contracts included."""
    found: set[str] = set()
    contracts = methods(ROOT / "walbatch" / "testing" / "contracts.py")
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ClassDef):
            bases = {base.id for base in node.bases if isinstance(base, ast.Name)}
            own = {child.name for child in node.body if isinstance(child, ast.FunctionDef)}
            inherited = contracts if bases & {"BackendContract", "TransactionalBackendContract"} else set()
            found |= {f"{node.name}::{name}" for name in own | inherited}
    return found


def methods(path: Path) -> set[str]:
    return {
        child.name
        for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)
        for child in node.body if isinstance(child, ast.FunctionDef)
    }  # fmt: skip


def sections(name: str) -> dict[str, str]:
    """The sections of a document, by the first word of their headings."""
    parts = re.split(r"^## (\S+)[^\n]*\n", read(name), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda path: str(path.relative_to(DOCS)))
def test_every_test_that_a_document_names_exists(path: Path) -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)((?:::\w+)*)`", path.read_text(encoding="utf-8"))
    missing = [
        f"{file}{test}" for file, test in named
        if not (ROOT / file).is_file() or (test and test.removeprefix("::") not in defined(ROOT / file))
    ]  # fmt: skip
    assert missing == []


def test_a_test_that_does_not_exist_would_be_noticed() -> None:
    here = defined(Path(__file__))
    assert "test_a_test_that_does_not_exist_would_be_noticed" in here
    assert "test_that_does_not_exist" not in here
    assert "TestLmdb::test_closing_twice_is_the_same_as_once" in defined(
        ROOT / "tests/backends/test_contracts.py"
    )


@pytest.mark.parametrize("guarantee", GUARANTEES)
def test_a_guarantee_has_a_statement_what_it_rests_on_its_tests_and_its_limits(guarantee: str) -> None:
    section = sections("guarantees.md")[guarantee]
    statement, _, rest = section.partition("Rests on: ")
    assert all(line.startswith(">") for line in statement.strip().splitlines())
    assumptions, _, rest = rest.partition("Shown by:")
    tests, _, limits_ = rest.partition("Not promised")
    assert assumptions.strip()
    assert len(re.findall(r"^- `tests/[\w/]+\.py::[\w:]+`$", tests, flags=re.MULTILINE)) >= 5
    assert re.findall(r"^- ", limits_, flags=re.MULTILINE)


def test_the_guarantees_are_those_of_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| (G\d+) \|", readme, flags=re.MULTILINE) == GUARANTEES
    assert [name for name in sections("guarantees.md") if re.fullmatch(r"G\d+", name)] == GUARANTEES


# --- crash-testing.md ---------------------------------------------------------------------------------------------


def run_example(folder: Path, *options: str, without: str = "") -> subprocess.CompletedProcess[str]:
    """Run the example of crash-testing.md as it stands, or without one of its lines."""
    blocks = re.findall(
        r"^```python\n# (\w+\.py)\n(.*?)^```", read("crash-testing.md"), re.DOTALL | re.MULTILINE
    )
    names = ["notebook.py", "test_notebook.py", "test_pages.py", "test_lines.py", "test_archive.py"]
    assert [name for name, _ in blocks] == names
    for name, text in blocks:
        left = [line for line in text.splitlines() if not without or line.strip() != without]
        (folder / name).write_text("\n".join(left) + "\n", encoding="utf-8")
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "pytest", "-q", "-p", "no:cacheprovider", *PLUGIN_OPTIONS, *options],
        cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip


def test_the_example_of_a_crash_test_runs_as_it_stands(tmp_path: Path) -> None:
    done = run_example(tmp_path)
    assert done.returncode == 0, done.stdout
    assert "skipped" not in done.stdout


@pytest.mark.parametrize(
    ("test", "line"),
    [
        ("test_notebook.py", "file.datasync()"),
        ("test_notebook.py", "self.fs.sync_directory(ROOT)"),
        ("test_pages.py", "file.datasync()"),
    ],
)
def test_the_example_finds_what_the_document_says_it_finds(tmp_path: Path, test: str, line: str) -> None:
    done = run_example(tmp_path, test, without=line)
    assert done.returncode == 1, done.stdout
    assert "after a crash " in done.stdout
    (replay,) = set(re.findall(r"--walbatch-replay '([^']+)'", done.stdout))
    assert "1 failed" in run_example(tmp_path, test, "--walbatch-replay", replay, without=line).stdout


def test_the_options_in_the_document_are_those_of_the_plugin() -> None:
    source = (ROOT / "_walbatch_pytest.py").read_text(encoding="utf-8")
    assert set(re.findall(r"--walbatch-[\w-]+", read("crash-testing.md"))) == set(
        re.findall(r'"(--walbatch-[\w-]+)"', source)
    )


# --- backends.md --------------------------------------------------------------------------------------------------


def backend_examples(folder: Path) -> None:
    """Write the examples of backends.md as the files that they name."""
    blocks = re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```", read("backends.md"), re.DOTALL | re.MULTILINE)
    assert [name for name, _ in blocks] == ["post.py", "pages.py", "test_pages.py"]
    for name, text in blocks:
        (folder / name).write_text(text, encoding="utf-8")


def run_python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip


def test_the_function_that_is_a_backend_runs_as_it_stands(tmp_path: Path) -> None:
    backend_examples(tmp_path)
    done = run_python(tmp_path, "post.py")
    assert (done.returncode, done.stdout) == (0, "6 [b'letter']\n"), done.stderr


def test_the_backend_of_the_document_keeps_the_contracts(tmp_path: Path) -> None:
    backend_examples(tmp_path)
    done = run_python(
        tmp_path, "-m", "pytest", "-q", "-p", "no:cacheprovider", *PLUGIN_OPTIONS, "test_pages.py"
    )
    assert done.returncode == 0, done.stdout
    assert "skipped" not in done.stdout


def test_the_errors_are_those_of_the_code() -> None:
    named = {
        plain(row["error"]) for row in table("backends.md", "error", "what to do", first="`WalbatchError`")
    }
    public = [getattr(wb, name) for name in wb.__all__]
    assert named == {
        member.__name__ for member in public if isinstance(member, type) and issubclass(member, Exception)
    }


# --- engine.md ----------------------------------------------------------------------------------------------------

CALLED: Final[tuple[type, ...]] = (wb.Engine, wb.Ticket, wb.AsyncEngine, wb.AsyncTicket)
VALUES: Final[tuple[type, ...]] = (
    wb.DeadLetter, wb.CloseReport, wb.EngineStats, wb.LaneStats, wb.ShardStats, wb.BatchStats, metrics.CutStats,
    metrics.Spread, metrics.ControllerStats, wb.Health, wb.HealthReason,
)  # fmt: skip
CHOICES: Final[tuple[type[StrEnum], ...]] = (wb.OperationStatus, metrics.HealthCheck)


def engine_table(owner: type) -> list[TableRow]:
    """The one table of engine.md that is headed by the name of the class."""
    (rows,) = (rows for rows in tables("engine.md") if f"`{owner.__name__}`" in rows[0])
    return rows


def engine_names(owner: type) -> list[str]:
    return [plain(row[f"`{owner.__name__}`"]) for row in engine_table(owner)]


def written(name: str, method: Callable[..., object]) -> str:
    """A method as the page writes it: without types, and with `await` where that is needed."""
    signature = inspect.signature(method)
    parameters = [
        each.replace(annotation=each.empty)
        for each in signature.parameters.values() if each.name not in {"self", "cls"}
    ]  # fmt: skip
    text = str(signature.replace(parameters=parameters, return_annotation=signature.empty))
    return "await " * inspect.iscoroutinefunction(method) + name + text.replace("'", '"')


def public(owner: type) -> set[str]:
    """The public methods, as they are called, and the public attributes, those of an instance included."""
    methods_ = {
        name: value for name, value in inspect.getmembers(owner, callable) if not name.startswith("_")
    }
    source = inspect.getsource(owner.__init__)  # type: ignore[misc]  # read, not called
    others = {name for name in dir(owner) if not name.startswith("_")} - {*methods_}
    others |= set(re.findall(r"self\.([a-z]\w*)(?:: [^=]+)? = ", source))
    return others | {written(name, value) for name, value in methods_.items()}


@pytest.mark.parametrize("owner", CALLED, ids=lambda owner: owner.__name__)
def test_every_method_stands_there_as_it_is_called(owner: type) -> None:
    names = engine_names(owner)
    assert len(names) == len(set(names))
    assert set(names) == public(owner)


@pytest.mark.parametrize("owner", VALUES, ids=lambda owner: owner.__name__)
def test_every_field_stands_there_in_the_order_of_the_code(owner: Any) -> None:
    computed = [name for name, value in vars(owner).items() if isinstance(value, property)]
    assert engine_names(owner) == [*(field.name for field in fields_of(owner)), *computed]


@pytest.mark.parametrize("owner", VALUES, ids=lambda owner: owner.__name__)
def test_a_time_or_a_number_of_bytes_says_so(owner: Any) -> None:
    """The unit is the one that the name of the field says."""
    rows = engine_table(owner)
    if "unit" not in rows[0]:
        assert not [field.name for field in fields_of(owner) if re.match("int|float", str(field.type))]
        return
    for name, row in zip(engine_names(owner), rows, strict=True):
        assert row["unit"] == "s" or not re.search(r"_s$|_s_|seconds", name), name
        assert row["unit"] == "bytes" or not re.search(r"bytes", name), name
        assert row["unit"] == "LSN" or not re.search(r"lsn$", name), name


@pytest.mark.parametrize("owner", CHOICES, ids=lambda owner: owner.__name__)
def test_every_choice_stands_there(owner: type[StrEnum]) -> None:
    assert sorted(engine_names(owner)) == sorted(owner)


def test_every_option_of_an_operation_stands_there() -> None:
    (rows,) = (rows for rows in tables("engine.md") if "option" in rows[0])
    options = {*inspect.signature(wb.Engine.submit_nowait).parameters} - {"self", "kind", "key", "payload"}
    assert {plain(row["option"]) for row in rows} == options


def test_a_method_or_field_without_a_line_would_be_noticed() -> None:
    class Longer(wb.Engine):
        def louder(self, kind: str, *, by: int = 1) -> None:
            """Not on the page."""

    assert {*public(Longer)} - {*engine_names(wb.Engine)} == {"louder(kind, *, by=1)"}


def test_every_line_says_something() -> None:
    for owner in (wb.Engine, wb.Ticket, *VALUES, *CHOICES):
        assert [row for row in engine_table(owner) if not "".join([*row.values()][1:])] == []


def test_what_configure_may_change_is_what_the_code_lets_through() -> None:
    (listed,) = re.findall(
        r"^### What `configure` may change\n\n(.*?)\.", read("engine.md"), re.DOTALL | re.MULTILINE
    )
    assert set(re.findall(r"`(\w+)`", listed)) == CHANGEABLE


def test_the_limits_of_the_checks_of_health_are_those_of_the_code() -> None:
    rows = {
        plain(row["`HealthCheck`"]): f"{row['degraded']}; {row['failing']}"
        for row in engine_table(metrics.HealthCheck)
    }
    said = {
        "memory": (f"{health.MEMORY_DEGRADED:.0%}", f"{health.MEMORY_FAILING:.0%}"),
        "disk": (f"{health.DISK_DEGRADED:.0%}", f"{health.DISK_FAILING:.0%}"),
        "dead letters": (f"{health.DEAD_LETTERS_DEGRADED:.0%}",),
        "abandoned": (f"{health.ABANDONED_DEGRADED * limits.ABANDONED_MAX:.0f}", f"{limits.ABANDONED_MAX}"),
        "sync": (f"{health.SYNC_S_MAX:g} s", f"{health.SYNCS_MIN} syncs"),
        "clock": (f"{health.CLOCK_JUMP_S:g} s", f"{health.CLOCK_JUMP_SHOWN_S / 60:g} minutes"),
        "failures": (f"{health.FAILURES_MAX}",),
        "growing": (f"{health.GROWTH_MIN:,}",),
    }
    assert (health.TREND_S, health.GROWTH_SHARE, health.NONSENSE_MAX) == (60, 0.1, 1), (
        "a minute, a tenth, the last answer"
    )
    for check, figures in said.items():
        numbers = re.findall(r"\d[\d,.]*(?: s\b| syncs| minutes|%)?", rows[check].replace(" %", "%"))
        assert {*figures} <= {*numbers}, check


def test_the_example_of_the_engine_runs_as_it_stands_and_prints_what_it_says(tmp_path: Path) -> None:
    (example,) = re.findall(
        r"^```python\n# engine\.py\n(.*?)^```", read("engine.md"), re.DOTALL | re.MULTILINE
    )
    done = run_python(tmp_path, "-c", example)
    assert done.stdout.splitlines() == re.findall(r"print\(.*\)  # (.+)$", example, re.MULTILINE), done.stderr
    assert done.returncode == 0


# --- all documents -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda path: str(path.relative_to(DOCS)))
def test_links_between_documents_lead_somewhere(path: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (path.parent / link).exists()] == []


def test_decisions_are_numbered_without_gaps() -> None:
    numbers = [int(path.name[:4]) for path in sorted((DOCS / "decisions").glob("*.md"))]
    assert numbers == list(range(1, len(numbers) + 1))


def test_the_glossary_is_sorted_and_names_each_word_once() -> None:
    words: list[Any] = [
        plain(row["word"]).casefold() for rows in tables("glossary.md") for row in rows if "word" in row
    ]
    assert words
    assert words == sorted(set(words))
