"""The layers of walbatch, and a few other rules about its source, read from the syntax trees.

Nothing is imported here: a rule broken in a module that does not even import is still reported. Only import
statements count (also those inside functions and under TYPE_CHECKING); an import by name at run time, such as the
`python:` backends do, loads the user's code and is none of our layers' business.
"""

import ast
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).resolve().parent.parent

# --- the rules ---------------------------------------------------------------------------------------------

VOCABULARY: Final = {"limits", "types", "errors"}
CONTRACTS: Final = VOCABULARY | {"config", "ports", "metrics"}
BELOW_ENGINE: Final = CONTRACTS | {"core", "storage", "backends", "runtime"}
ENTRY_POINTS: Final = {"engine", "aio", "inspection", "salvage"}

MAY_IMPORT: Final[Mapping[str, set[str]]] = {
    "limits": set(),
    "types": {"limits"},
    "errors": {"types"},
    "core": VOCABULARY | {"core"},
    "config": CONTRACTS,
    "ports": CONTRACTS,
    "metrics": CONTRACTS,
    "storage": CONTRACTS | {"core", "storage"},
    "backends": CONTRACTS | {"backends"},
    "runtime": CONTRACTS | {"core", "runtime"},
    "lanes": BELOW_ENGINE,
    "engine": BELOW_ENGINE | {"lanes"} | ENTRY_POINTS,
    "aio": BELOW_ENGINE | ENTRY_POINTS,
    "inspection": BELOW_ENGINE | ENTRY_POINTS,
    "salvage": BELOW_ENGINE | ENTRY_POINTS,
    # The benchmark measures what a user can reach, so it has the public names and nothing below them. The command imports it when
    # it runs: no other command waits for it.
    "bench": {"walbatch", "bench"},
    "copying": BELOW_ENGINE | ENTRY_POINTS | {"copying"},
    "cli": VOCABULARY
    | ENTRY_POINTS
    | {"config", "metrics", "backends", "cli", "copying", "bench", "walbatch"},
    "testing": CONTRACTS | {"core", "testing"},
    # `walbatch` is the package's own __init__: the public names, for users and for the command line. No module below
    # may import it, because that would be a cycle through every other module.
    "walbatch": BELOW_ENGINE | ENTRY_POINTS | {"testing"},
    "__main__": {"cli"},
}
"""For each layer (the first name below `walbatch`) the layers that it may import."""

ALSO: Final[Mapping[str, set[str]]] = {
    # Why: docs/decisions/0006-backends-may-import-core.md
    "backends": {"walbatch.core.mark", "walbatch.core.routing", "walbatch.core.checksum"},
}
"""For each layer the single modules that it may import beyond that."""

ONE_MODULE_ALSO: Final[Mapping[str, set[str]]] = {
    # Files of batches are written through the port of the log's own files, so that the same simulation crashes them; the real file
    # system behind it is the log's, too.
    "walbatch.backends.files.backend": {"walbatch.storage.filesystem"},
    # The simulation knows no engine; this module puts the shipped one on its ports, for users and for our own tests. It
    # refuses real LMDB to simulated threads, and so must know its class.
    "walbatch.testing.shipped": {"walbatch.engine", "walbatch.backends.lmdb"},
    # What users crash is an application around the shipped engine: it is given the engine's `Environment`.
    "walbatch.testing.crashing": {"walbatch.engine"},
    # What is counted and what is judged is told in the frozen values of `metrics`, which knows nothing but dataclasses.
    "walbatch.core.statistics": {"walbatch.metrics"},
    "walbatch.core.health": {"walbatch.metrics"},
    # A function is a backend only through the engine's own adapter, so the conformance suites take it.
    "walbatch.testing.contracts": {"walbatch.backends.function"},
}
"""For a single module the modules that it may import beyond what its layer may."""

FILES: Final = {"os", "io", "lmdb", "mmap", "fcntl", "shutil", "tempfile"}
CLOCKS_AND_THREADS: Final = {"time", "sched", "threading", "asyncio", "concurrent", "multiprocessing"}
MUST_NOT_IMPORT: Final[Mapping[str, set[str]]] = {
    "core": {"os", "io", "time", "threading", "random", "logging", "lmdb", "asyncio"},
    "config": FILES | CLOCKS_AND_THREADS,
    "ports": FILES | CLOCKS_AND_THREADS,
    "metrics": FILES | CLOCKS_AND_THREADS,
    "runtime": {"os"},
}
"""For each layer the modules of others that it must not import. What a folder may import of ours says the rest."""

UNPICKLERS: Final = {"pickle", "_pickle", "marshal", "shelve"}
"""Reading any of these formats from a store could execute what somebody put there."""


# --- the checker -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Module:
    """One source file: where it stands, its dotted name, and its syntax tree."""

    path: str
    name: str
    tree: ast.Module

    @property
    def layer(self) -> str:
        return layer_of(self.name)

    @property
    def package(self) -> str:
        """The package that a relative import starts from."""
        return self.name if self.path.endswith("/__init__.py") else self.name.rpartition(".")[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Import:
    """One name that a module imports: `target` is the module it comes from."""

    target: str
    line: int


def problems(sources: Mapping[str, str]) -> list[str]:
    """Every breach of the rules in these files (path from the root of the project -> text), as lines to print."""
    modules = {module.name: module for module in map(parse, sources, sources.values())}
    found: list[str] = []
    for module in modules.values():
        imports = list(imports_of(module, modules))
        found += wrong_layers(module, imports)
        found += forbidden_modules(module, imports)
        found += wrong_statements(module)
    found += [f"cycle: {' -> '.join(cycle)}" for cycle in cycles(graph(modules))]
    return found


def parse(path: str, text: str) -> Module:
    parts = path.removesuffix(".py").split("/")
    if parts[-1] == "__init__":
        parts.pop()
    return Module(path=path, name=".".join(parts), tree=ast.parse(text, filename=path))


def layer_of(name: str) -> str:
    """`walbatch.core.frame` -> `core`; the package itself is its own layer."""
    package, _, rest = name.partition(".")
    return rest.partition(".")[0] or package


def is_ours(name: str) -> bool:
    return name == "walbatch" or name.startswith("walbatch.")


def imports_of(module: Module, modules: Mapping[str, Module]) -> Iterator[Import]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(target=alias.name, line=node.lineno)
        elif isinstance(node, ast.ImportFrom):
            source = absolute(module, node)
            for alias in node.names:
                # `from walbatch.core import frame` names a module; `from walbatch.core.frame import encode` does not. A
                # layer is one even before its folder exists.
                name = f"{source}.{alias.name}"
                is_module = name in modules or (source == "walbatch" and alias.name in MAY_IMPORT)
                yield Import(target=name if is_module else source, line=node.lineno)


def absolute(module: Module, node: ast.ImportFrom) -> str:
    if node.level == 0:
        return node.module or ""
    parents = module.package.split(".")
    base = parents[: len(parents) - (node.level - 1)]
    return ".".join([*base, node.module] if node.module else base)


def wrong_layers(module: Module, imports: Iterable[Import]) -> Iterator[str]:
    if module.layer not in MAY_IMPORT:
        yield f"{module.path}: no layer is named {module.layer!r}: give it one in MAY_IMPORT"
        return
    for imported in imports:
        if not is_ours(imported.target):
            continue
        layer = layer_of(imported.target)
        also = ALSO.get(module.layer, set()) | ONE_MODULE_ALSO.get(module.name, set())
        if layer not in MAY_IMPORT[module.layer] and not any(
            imported.target == name or imported.target.startswith(f"{name}.") for name in also
        ):
            yield f"{module.path}:{imported.line}: {module.layer} must not import {imported.target}"


def forbidden_modules(module: Module, imports: Iterable[Import]) -> Iterator[str]:
    forbidden = MUST_NOT_IMPORT.get(module.layer, set()) | UNPICKLERS
    for imported in imports:
        if imported.target.partition(".")[0] in forbidden:
            yield f"{module.path}:{imported.line}: {module.layer} must not import {imported.target}"


def wrong_statements(module: Module) -> Iterator[str]:
    if not ast.get_docstring(module.tree):
        yield f"{module.path}: no docstring says what this module is"
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id == "print" and module.layer != "cli":
                yield f"{module.path}:{node.lineno}: only the command line prints"
            if node.func.id == "open" and module.layer in {"core", "config", "ports", "metrics"}:
                yield f"{module.path}:{node.lineno}: {module.layer} opens no files"


def graph(modules: Mapping[str, Module]) -> dict[str, list[str]]:
    """Which module imports which.

    Python runs a package's __init__ before any module in it, but that is no edge here: only what a module names is.
    """
    return {
        name: sorted({found.target for found in imports_of(module, modules) if found.target in modules})
        for name, module in modules.items()
    }


def cycles(edges: Mapping[str, list[str]]) -> list[list[str]]:
    """The import cycles that a depth-first walk closes, each as the names along it, first name repeated at the end."""
    found: list[list[str]] = []
    done: set[str] = set()

    def walk(name: str, trail: list[str]) -> None:
        if name in trail:
            found.append([*trail[trail.index(name) :], name])
            return
        if name in done:
            return
        for target in edges[name]:
            walk(target, [*trail, name])
        done.add(name)

    for name in sorted(edges):
        walk(name, [])
    return found


def read_sources(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
        for path in sorted(folder.rglob("*.py"))
    }


# --- the package -------------------------------------------------------------------------------------------


def test_the_package_keeps_its_layers() -> None:
    sources = read_sources(ROOT / "walbatch")
    assert sources, "no source file found: is walbatch/ where this test looks?"
    assert problems(sources) == []


def test_every_module_with_an_exception_exists_and_needs_it() -> None:
    modules = {
        module.name: module
        for module in (parse(path, text) for path, text in read_sources(ROOT / "walbatch").items())
    }
    for name, also in ONE_MODULE_ALSO.items():
        targets = {imported.target for imported in imports_of(modules[name], modules)}
        assert also <= targets, name


@pytest.mark.parametrize("folder", ["tests", "tools"])
def test_nothing_beside_the_package_unpickles_either(folder: str) -> None:
    modules = [parse(path, text) for path, text in read_sources(ROOT / folder).items()]
    found = [
        f"{module.path}:{imported.line}: must not import {imported.target}"
        for module in modules
        for imported in imports_of(module, {})
        if imported.target.partition(".")[0] in UNPICKLERS
    ]
    assert found == []


# --- the checker itself ------------------------------------------------------------------------------------


def tree(files: Mapping[str, str]) -> dict[str, str]:
    """A small package, with a docstring in each file so that only the breach under test is found."""
    return {path: f'"""A module."""\n{text}\n' for path, text in files.items()}


ALLOWED: Final[Mapping[str, Mapping[str, str]]] = {
    "the vocabulary is a chain": {
        "walbatch/limits.py": "",
        "walbatch/types.py": "from walbatch.limits import KIB",
        "walbatch/errors.py": "from walbatch import types",
    },
    "core imports itself and the vocabulary": {
        "walbatch/limits.py": "",
        "walbatch/core/frame.py": "import struct\nfrom walbatch.limits import KIB",
        "walbatch/core/scanner.py": "from walbatch.core import frame\nfrom .frame import decode",
    },
    "contracts import one another": {
        "walbatch/config.py": "from pathlib import Path\nfrom walbatch.ports import Backend",
        "walbatch/ports.py": "from collections.abc import Sequence\nfrom walbatch.metrics import Counter",
        "walbatch/metrics.py": "from walbatch.types import LSN",
    },
    "storage imports core, files and itself": {
        "walbatch/storage/segment.py": "import os\nimport lmdb\nfrom walbatch.core.frame import decode",
        "walbatch/storage/log.py": "from walbatch.storage.segment import Segment\nfrom walbatch.ports import Files",
    },
    "a backend imports contracts and itself": {
        "walbatch/backends/lmdb.py": "import lmdb\nfrom walbatch.backends.function import x\nimport walbatch.ports",
    },
    "the runtime has threads and clocks": {
        "walbatch/runtime/committer.py": "import threading, time, logging\nfrom walbatch.core import commit_group",
    },
    "the engine wires everything": {
        "walbatch/engine.py": "import os\nfrom walbatch.storage.log import Log\nfrom walbatch.runtime import clock",
        "walbatch/aio.py": "import asyncio\nfrom walbatch.engine import Engine\nfrom walbatch.backends import lmdb",
        "walbatch/inspection.py": "from walbatch.storage import log\nfrom walbatch.core import scanner",
    },
    "the command line uses the entry points and prints": {
        "walbatch/cli/__init__.py": "import walbatch\nfrom walbatch import inspection, engine\nprint(1)",
        "walbatch/cli/recover.py": "from walbatch.config import Lane\nfrom walbatch.backends.lmdb import LmdbBackend",
        "walbatch/__main__.py": "from walbatch.cli import main",
    },
    "the benchmark stands on the public names": {
        "walbatch/bench/own.py": "import time, threading\nimport walbatch as wb\nfrom walbatch.bench.subject import Subject",
        "walbatch/cli/bench.py": "def bench() -> None:\n    from walbatch.bench.own import Walbatch",
    },
    "the test kit stands on ports and core": {
        "walbatch/testing/simulation.py": "import random, os\nfrom walbatch.ports import Files\nimport walbatch.core.x",
    },
    "single modules of the test kit import what the others may not": {
        "walbatch/testing/shipped.py": "from walbatch.engine import Engine",
        "walbatch/testing/contracts.py": "from walbatch.backends.function import as_backend",
    },
    "the package itself names everything but the command line": {
        "walbatch/__init__.py": "from walbatch.engine import Engine\nfrom walbatch.backends.lmdb import LmdbBackend",
        "walbatch/engine.py": "from walbatch.config import Lane",
    },
    "another project's names are not ours": {
        "walbatch/core/frame.py": "import walbatch_extras\nfrom osmium import io_free",
    },
}


@pytest.mark.parametrize("files", ALLOWED.values(), ids=ALLOWED.keys())
def test_the_checker_accepts(files: Mapping[str, str]) -> None:
    assert problems(tree(files)) == []


def one(path: str, text: str) -> Mapping[str, str]:
    return {path: text}


BREACHES: Final[Mapping[str, tuple[Mapping[str, str], str]]] = {
    "limits imports the vocabulary": (
        one("walbatch/limits.py", "from walbatch.types import LSN"),
        "walbatch/limits.py:2: limits must not import walbatch.types",
    ),
    "types imports errors": (
        one("walbatch/types.py", "import walbatch.errors"),
        "walbatch/types.py:2: types must not import walbatch.errors",
    ),
    "errors reaches past its left neighbour": (
        one("walbatch/errors.py", "from walbatch import limits"),
        "walbatch/errors.py:2: errors must not import walbatch.limits",
    ),
    "core imports a port": (
        one("walbatch/core/frame.py", "from walbatch.ports import Files"),
        "walbatch/core/frame.py:2: core must not import walbatch.ports",
    ),
    "core imports a port by a relative name": (
        one("walbatch/core/frame.py", "from ..ports import Files"),
        "walbatch/core/frame.py:2: core must not import walbatch.ports",
    ),
    "core imports a port from a package's __init__ by a relative name": (
        one("walbatch/core/__init__.py", "from .. import ports"),
        "walbatch/core/__init__.py:2: core must not import walbatch.ports",
    ),
    "core imports the package itself": (
        one("walbatch/core/frame.py", "from walbatch import Engine"),
        "walbatch/core/frame.py:2: core must not import walbatch",
    ),
    "core opens a file": (
        one("walbatch/core/frame.py", "def read() -> None:\n    open('x')"),
        "walbatch/core/frame.py:3: core opens no files",
    ),
    "core imports a file call inside a function": (
        one("walbatch/core/frame.py", "def read() -> None:\n    from os.path import join"),
        "walbatch/core/frame.py:3: core must not import os.path",
    ),
    **{
        f"core imports {name}": (
            one("walbatch/core/frame.py", f"import {name}"),
            f"walbatch/core/frame.py:2: core must not import {name}",
        )
        for name in ("os", "io", "time", "threading", "random", "logging", "lmdb", "asyncio")
    },
    "config imports core": (
        one("walbatch/config.py", "from walbatch.core import batcher"),
        "walbatch/config.py:2: config must not import walbatch.core",
    ),
    "ports import a clock": (
        one("walbatch/ports.py", "import time"),
        "walbatch/ports.py:2: ports must not import time",
    ),
    "metrics import threads": (
        one("walbatch/metrics.py", "from threading import Lock"),
        "walbatch/metrics.py:2: metrics must not import threading",
    ),
    "storage imports a backend": (
        one("walbatch/storage/log.py", "from walbatch.backends.lmdb import LmdbBackend"),
        "walbatch/storage/log.py:2: storage must not import walbatch.backends.lmdb",
    ),
    "storage imports the runtime": (
        one("walbatch/storage/log.py", "from walbatch import runtime"),
        "walbatch/storage/log.py:2: storage must not import walbatch.runtime",
    ),
    "a backend imports storage": (
        one("walbatch/backends/lmdb.py", "import walbatch.storage.filesystem"),
        "walbatch/backends/lmdb.py:2: backends must not import walbatch.storage.filesystem",
    ),
    "a backend imports core": (
        one("walbatch/backends/lmdb.py", "from walbatch.core.settlement import Ranges"),
        "walbatch/backends/lmdb.py:2: backends must not import walbatch.core.settlement",
    ),
    "the runtime imports storage": (
        one("walbatch/runtime/committer.py", "from walbatch.storage.log import Log"),
        "walbatch/runtime/committer.py:2: runtime must not import walbatch.storage.log",
    ),
    "the runtime imports a backend, only for its type": (
        one(
            "walbatch/runtime/committer.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from walbatch.backends import lmdb",
        ),
        "walbatch/runtime/committer.py:4: runtime must not import walbatch.backends",
    ),
    "the runtime imports os": (
        one("walbatch/runtime/committer.py", "import os"),
        "walbatch/runtime/committer.py:2: runtime must not import os",
    ),
    "the engine imports the command line": (
        one("walbatch/engine.py", "from walbatch.cli import main"),
        "walbatch/engine.py:2: engine must not import walbatch.cli",
    ),
    "inspection imports the test kit": (
        one("walbatch/inspection.py", "from walbatch.testing import simulation"),
        "walbatch/inspection.py:2: inspection must not import walbatch.testing",
    ),
    "the command line imports core": (
        one("walbatch/cli/dump.py", "from walbatch.core.frame import decode"),
        "walbatch/cli/dump.py:2: cli must not import walbatch.core.frame",
    ),
    "the command line imports storage": (
        one("walbatch/cli/dump.py", "import walbatch.storage.log as log"),
        "walbatch/cli/dump.py:2: cli must not import walbatch.storage.log",
    ),
    "the command line imports the runtime": (
        one("walbatch/cli/dump.py", "from walbatch.runtime import clock"),
        "walbatch/cli/dump.py:2: cli must not import walbatch.runtime",
    ),
    "the benchmark imports the engine's inside": (
        one("walbatch/bench/own.py", "from walbatch.engine import Engine"),
        "walbatch/bench/own.py:2: bench must not import walbatch.engine",
    ),
    "the engine imports the benchmark": (
        one("walbatch/engine.py", "from walbatch.bench import rounds"),
        "walbatch/engine.py:2: engine must not import walbatch.bench",
    ),
    "the test kit imports storage": (
        one("walbatch/testing/simulation.py", "from walbatch.storage.log import Log"),
        "walbatch/testing/simulation.py:2: testing must not import walbatch.storage.log",
    ),
    "the test kit imports the runtime": (
        one("walbatch/testing/simulation.py", "from walbatch.runtime.clock import Clock"),
        "walbatch/testing/simulation.py:2: testing must not import walbatch.runtime.clock",
    ),
    "the test kit imports the engine": (
        one("walbatch/testing/simulation/explore.py", "from walbatch.engine import Engine"),
        "walbatch/testing/simulation/explore.py:2: testing must not import walbatch.engine",
    ),
    "a module with an exception imports more than that": (
        one("walbatch/testing/shipped.py", "from walbatch.storage.log import Log"),
        "walbatch/testing/shipped.py:2: testing must not import walbatch.storage.log",
    ),
    "the package itself imports the command line": (
        one("walbatch/__init__.py", "from walbatch.cli import main"),
        "walbatch/__init__.py:2: walbatch must not import walbatch.cli",
    ),
    "a module stands in no layer": (
        one("walbatch/helpers.py", ""),
        "walbatch/helpers.py: no layer is named 'helpers': give it one in MAY_IMPORT",
    ),
    "a module prints": (
        one("walbatch/engine.py", "def run() -> None:\n    print(1)"),
        "walbatch/engine.py:3: only the command line prints",
    ),
    "a module unpickles": (
        one("walbatch/storage/checkpoint.py", "from pickle import loads"),
        "walbatch/storage/checkpoint.py:2: storage must not import pickle",
    ),
    "two modules import each other": (
        {
            "walbatch/config.py": "from walbatch.ports import Backend",
            "walbatch/ports.py": "from walbatch import config",
        },
        "cycle: walbatch.config -> walbatch.ports -> walbatch.config",
    ),
    "three modules of core go round, once inside a function": (
        {
            "walbatch/core/a.py": "import walbatch.core.b",
            "walbatch/core/b.py": "from walbatch.core.c import x",
            "walbatch/core/c.py": "def late() -> None:\n    from . import a",
        },
        "cycle: walbatch.core.a -> walbatch.core.b -> walbatch.core.c -> walbatch.core.a",
    ),
    "a package and its module import each other": (
        {
            "walbatch/core/__init__.py": "from walbatch.core.frame import decode",
            "walbatch/core/frame.py": "from walbatch.core import SIZE",
        },
        "cycle: walbatch.core -> walbatch.core.frame -> walbatch.core",
    ),
    "a module imports itself": (
        one("walbatch/engine.py", "import walbatch.engine"),
        "cycle: walbatch.engine -> walbatch.engine",
    ),
}


@pytest.mark.parametrize(("files", "problem"), BREACHES.values(), ids=BREACHES.keys())
def test_the_checker_reports(files: Mapping[str, str], problem: str) -> None:
    assert problems(tree(files)) == [problem]


@pytest.mark.parametrize("text", ["", "# a comment only\n", "import os\n'not the first statement'\n"])
def test_the_checker_misses_a_docstring(text: str) -> None:
    assert problems({"walbatch/engine.py": text}) == [
        "walbatch/engine.py: no docstring says what this module is"
    ]


def test_the_checker_reports_every_problem_at_once() -> None:
    files = {
        "walbatch/core/frame.py": "import os, time",
        "walbatch/limits.py": "from walbatch import types, errors",
    }
    assert problems(tree(files)) == [
        "walbatch/core/frame.py:2: core must not import os",
        "walbatch/core/frame.py:2: core must not import time",
        "walbatch/limits.py:2: limits must not import walbatch.types",
        "walbatch/limits.py:2: limits must not import walbatch.errors",
    ]
