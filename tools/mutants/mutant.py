"""A mutant: one mistake in walbatch's own code, put in without touching the working tree.

What is not here: the mistakes (the modules beside this one), and who finds them (`probes`).

The idea needed to read it: a mutant replaces exact pieces of source, each of which must be there exactly once, so that it
notices when the code has moved on. It is applied by an import hook in a process that has not imported walbatch yet; where
more processes are started from there, by a patched copy of the tree.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, ModuleType
from typing import Final

ROOT: Final = Path(__file__).parent.parent.parent


@dataclass(frozen=True, slots=True)
class Edit:
    """One piece of source in `file` (below the root), replaced by another."""

    file: str
    old: str
    new: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """A mistake as a sentence, the row of the checklist that warns of it, and who is expected to find it fast."""

    name: str
    row: str
    edits: tuple[Edit, ...]
    hint: str
    """The probe that is tried first."""

    @property
    def word(self) -> str:
        """The name without blanks."""
        return self.name.replace(" ", "_").replace("'", "").replace(",", "")

    def sources(self) -> dict[str, str]:
        """The mutated source by file. Raises ValueError where an edit does not fit exactly once."""
        sources: dict[str, str] = {}
        for edit in self.edits:
            source = sources.get(edit.file) or (ROOT / edit.file).read_text()
            if source.count(edit.old) != 1:
                raise ValueError(
                    f"{self.name}: {edit.file} has this {source.count(edit.old)} times: {edit.old!r}"
                )
            sources[edit.file] = source.replace(edit.old, edit.new)
        return sources

    def compiled(self) -> dict[str, CodeType]:
        """The mutated code by module name. Raises ValueError, SyntaxError."""
        return {
            module_name(file): compile(source, str(ROOT / file), "exec", dont_inherit=True)
            for file, source in self.sources().items()
        }

    def install(self) -> None:
        """From now on this process imports the mutated modules. None of walbatch may be imported yet."""
        loaded = [name for name in sys.modules if name.partition(".")[0] == "walbatch"]
        if loaded:
            raise RuntimeError(f"{loaded[0]} is imported already: a mutant needs a fresh process")
        sys.meta_path.insert(0, _Finder(self.compiled()))

    def copy_to(self, folder: Path) -> None:
        """A copy of the package and its tools in `folder`, mutated: for processes that start others."""
        for name in ("walbatch", "tools"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        for file, source in self.sources().items():
            (folder / file).write_text(source)


UNHARMED: Final = Mutant(name="no mistake at all", row="", edits=(), hint="")
"""The control: it must survive every probe."""


def module_name(file: str) -> str:
    """`walbatch/core/frame.py` as `walbatch.core.frame`."""
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


class _Loader(importlib.abc.Loader):
    """Runs code that was compiled before."""

    def __init__(self, code: CodeType) -> None:
        self._code = code

    def exec_module(self, module: ModuleType) -> None:
        exec(self._code, module.__dict__)  # noqa: S102 - that is what a loader does


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the mutated modules before anybody else does."""

    def __init__(self, code: dict[str, CodeType]) -> None:
        self._code = code

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        code = self._code.get(fullname)
        if code is None:
            return None
        return importlib.util.spec_from_loader(fullname, _Loader(code), origin=code.co_filename)
