"""Tables of a benchmark's JSON, as Markdown: `python tools/bench/report.py bench.json [--write]`.

--write puts them into docs/performance.md, between the marks `<!-- bench: NAME -->` and `<!-- end of bench -->`, where NAME is a
workload, `targets` or `machine`: no figure is copied by hand.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from walbatch.bench.results import Results
from walbatch.bench.table import markdown, sections

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "performance.md"
MARKED = re.compile(
    r"(?P<start><!-- bench: (?P<name>[\w-]+) -->\n).*?(?P<end><!-- end of bench -->)", re.DOTALL
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("document", type=Path, help="what `walbatch bench --json-file` has written")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/performance.md")
    arguments = parser.parse_args()
    try:
        results = Results.of_document(json.loads(arguments.document.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        sys.exit(f"{arguments.document} cannot be read: {error}")
    if not arguments.write:
        print("\n".join(markdown(results)))
        return
    text, filled = fill(DOCUMENT.read_text(encoding="utf-8"), results)
    DOCUMENT.write_text(text, encoding="utf-8")
    print(f"{DOCUMENT.name}: {', '.join(filled) or 'nothing'} written")


def fill(text: str, results: Results) -> tuple[str, list[str]]:
    """The text with the tables that it has marks for and that were measured, and their names."""
    found = dict(sections(results))
    filled = []

    def table(match: re.Match[str]) -> str:
        lines = found.get(match["name"])
        if lines is None:
            return match[0]
        filled.append(match["name"])
        return "\n".join([match["start"], *lines, "", match["end"]])

    return MARKED.sub(table, text), filled


if __name__ == "__main__":
    main()
