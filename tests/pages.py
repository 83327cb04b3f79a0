"""Reading the documents: their tables, and amounts and defaults as they write them."""

from __future__ import annotations

import re
from dataclasses import MISSING
from pathlib import Path
from typing import Final

from walbatch import limits

DOCS: Final = Path(__file__).resolve().parent.parent / "docs"
UNITS: Final = {"": 1, "KiB": limits.KIB, "MiB": limits.MIB, "GiB": limits.GIB}

TableRow = dict[str, str]


def read(name: str) -> str:
    """The text of a document."""
    return (DOCS / name).read_text(encoding="utf-8")


def plain(text: str) -> str:
    """A cell without its code marks."""
    return text.replace("`", "")


def tables(name: str) -> list[list[TableRow]]:
    """Every table of a document, each as rows by column name."""
    found: list[list[TableRow]] = []
    head: list[str] = []
    for line in read(name).splitlines():
        if not line.startswith("|"):
            head = []
            continue
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if not head:
            head = cells
            found.append([])
        elif set(line) - set("|- "):
            found[-1].append(dict(zip(head, cells, strict=True)))
    return found


def amount(text: str) -> float:
    """`64 MiB`, `65,536`, `0.5`, `2^20` or `2^63 - 1` as a number."""
    power = re.fullmatch(r"(\d+)\^(\d+)( - 1)?", text)
    if power:
        return int(int(power[1]) ** int(power[2])) - bool(power[3])
    number, _, unit = text.partition(" ")
    value = float(number.replace(",", ""))
    return (int(value) if value.is_integer() else value) * UNITS[unit]


def shown(name: str, value: object) -> str:
    """The default of a setting as the tables write it; "-" where it has none."""
    if value is MISSING:
        return "-"
    if value is None:
        return "none"
    if isinstance(value, str):
        return f'"{value}"'
    if "bytes" in name and isinstance(value, int) and value:
        unit = next(unit for unit in ("GiB", "MiB", "KiB", "") if value % UNITS[unit] == 0)
        return f"{value // UNITS[unit]} {unit}".rstrip()
    if isinstance(value, int | float):
        timed = re.search(r"_(ms|s)(_max)?$", name)
        return f"{value:,g} {timed[1]}" if timed else f"{value:,g}"
    return f"{type(value).__name__}()"
