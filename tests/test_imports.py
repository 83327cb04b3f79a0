"""What importing walbatch imports: told by the modules that a fresh interpreter holds then, not by the time that it took.

What is not here: whether an import is fast enough on some machine. Each of the modules that are named here costs something on all.
"""

from __future__ import annotations

import ast
import copy
import importlib
import json
import subprocess
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Final

import pytest

import walbatch as wb

SOURCE: Final = Path(wb.__file__).read_text(encoding="utf-8")

WITH_A_LIBRARY: Final = (
    "lmdb",
    "zstandard",
    "crcmod",
    "crc32c",
    "typer",
    "click",
    "rich",
    "numpy",
    "pytest",
    "greenlet",
)
WITH_THE_INTERPRETER: Final = (
    "asyncio", "concurrent", "ssl", "subprocess", "argparse", "email", "importlib.metadata", "typing", "dataclasses", "inspect",
    "logging", "re", "json", "socket",
)  # fmt: skip
NEVER_BY_AN_ENGINE: Final = frozenset(
    ("asyncio", "concurrent", "ssl", "subprocess", "argparse", "email", "importlib.metadata", "typer", "click", "rich",
     "numpy", "crc32c")
)  # fmt: skip
"""What no engine needs that delivers to plain functions: asyncio and all that it brings, what belongs to command lines, and what
the `crc32c` package imports beside its function."""


def modules_after(program: str) -> set[str]:
    """The modules that a fresh interpreter holds after `program`, beyond those that it begins with."""
    script = (
        "import sys; at_first = set(sys.modules)\n"
        f"{program}\n"
        "import json; print(json.dumps(sorted(before_this - at_first)))"
    )
    script = script.replace("import json;", "before_this = set(sys.modules); import json;")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def among(modules: Collection[str], names: Collection[str]) -> set[str]:
    """Which of the names were imported, or anything below them."""
    return {name for name in names if any(one == name or one.startswith(f"{name}.") for one in modules)}


# --- what is imported -----------------------------------------------------------------------------------------------


def test_importing_the_package_imports_nothing_else() -> None:
    found = modules_after("import walbatch")
    assert among(found, WITH_A_LIBRARY + WITH_THE_INTERPRETER) == set()
    assert found == {"walbatch"}


@pytest.mark.parametrize(
    "names", ["WalbatchError, Overloaded", "Lane, Settings, Trigger", "Batch, Retry, Failures", "Backend"]
)
def test_a_word_of_the_vocabulary_imports_no_engine(names: str) -> None:
    found = modules_after(f"from walbatch import {names}")
    assert among(found, WITH_A_LIBRARY) == set()
    assert (
        among(found, ["walbatch.engine", "walbatch.runtime", "walbatch.storage", "walbatch.core", "asyncio"])
        == set()
    )


def test_an_engine_imports_what_it_works_with_and_no_more() -> None:
    found = modules_after("import walbatch; walbatch.Engine")
    assert {"lmdb", "zstandard", "crcmod"} <= found, "else this looks at the wrong thing"
    assert among(found, NEVER_BY_AN_ENGINE) == set()


def test_delivering_to_a_function_imports_no_more(tmp_path: Path) -> None:
    program = f"""
import walbatch
with walbatch.Engine.open({str(tmp_path / "store")!r}, {{"put": walbatch.Lane(lambda batch: None)}}) as engine:
    engine.submit("put", key=b"k", payload=b"v").result(30)
    engine.stats(), engine.health()
"""
    assert among(modules_after(program), NEVER_BY_AN_ENGINE) == set()


@pytest.mark.parametrize(
    "program",
    ["import walbatch; walbatch.AsyncEngine",
     "async def apply(batch): pass\nfrom walbatch.backends import FunctionBackend; FunctionBackend(apply)"],
    ids=["the engine for asyncio", "a backend that is a coroutine function"],
)  # fmt: skip
def test_coroutines_import_asyncio_before_anything_is_delivered(program: str) -> None:
    assert "asyncio" in modules_after(program)


def test_the_help_of_the_command_line_imports_no_more_than_its_commands() -> None:
    program = "import sys; sys.argv = ['walbatch', '--help']\nfrom walbatch.cli import main\ntry: main()\nexcept SystemExit: pass"
    found = modules_after(program)
    assert {"typer", "walbatch.cli.app"} <= found, "else this looks at the wrong thing"
    of_typer = {"typer", "click", "rich", "subprocess", "argparse"}
    assert among(found, NEVER_BY_AN_ENGINE - of_typer) == set()
    of_an_engine = {"walbatch.engine", "walbatch.runtime", "walbatch.aio"}
    assert among(found, of_an_engine) == set(), "a command that opens a store imports it then"


# --- what can be used is what it was ---------------------------------------------------------------------------------


def homes() -> Iterator[tuple[str, str]]:
    """(module, name) of every import for those who read types."""
    for node in ast.walk(ast.parse(SOURCE)):
        if (
            isinstance(node, ast.ImportFrom)
            and node.module is not None
            and node.module.startswith("walbatch")
        ):
            yield from ((node.module, alias.name) for alias in node.names)


NEED_AN_EXTRA = {"HttpBackend", "ParquetBackend", "PostgresBackend", "RedisBackend", "RedisKeys"}
"""Not in `__all__`: `import *` must work without what they need."""


def test_every_public_name_is_looked_up_where_the_types_say() -> None:
    listed = [(home, name) for home, names in wb._HOMES.items() for name in names]
    assert sorted(listed) == sorted(homes())
    assert sorted({name for _, name in listed} - NEED_AN_EXTRA) == sorted(wb.__all__)
    for home, name in listed:
        assert getattr(wb, name) is getattr(importlib.import_module(home), name), name
        assert name in vars(wb), "it is looked up once"


def test_no_other_name_passes_for_a_public_one_where_types_are_read() -> None:
    hidden = next(
        node
        for node in ast.parse(SOURCE).body
        if isinstance(node, ast.If) and isinstance(node.test, ast.UnaryOp)
    )
    assert {node.name for node in hidden.body if isinstance(node, ast.FunctionDef)} == {
        "__getattr__",
        "__dir__",
    }
    assert not [node for node in ast.parse(SOURCE).body if isinstance(node, ast.FunctionDef)]


def test_all_names_are_shown_before_any_is_used() -> None:
    program = "import walbatch; shown = dir(walbatch); assert set(walbatch.__all__) <= set(shown), shown\n"
    program += (
        "assert {'aio', 'engine', 'errors', 'types'} <= set(shown) and 'TYPE_CHECKING' not in shown, shown"
    )
    assert modules_after(program) == {"walbatch"}


@pytest.mark.parametrize("program", [
    "from walbatch import *\nassert Engine and AsyncEngine and LmdbBackend",
    "import walbatch\nassert walbatch.types.Batch is walbatch.Batch and walbatch.errors and walbatch.config and walbatch.aio",
    "import walbatch\nassert walbatch.backends.LmdbBackend is walbatch.LmdbBackend",
    "from walbatch import limits, Engine\nassert limits.KIB == 1024 and callable(Engine.open)",
    "import walbatch, inspect\nassert dict(inspect.getmembers(walbatch))['Engine'] is walbatch.Engine",
])  # fmt: skip
def test_a_program_reaches_what_it_reached_before(program: str) -> None:
    assert "walbatch" in modules_after(program)


@pytest.mark.parametrize("name", ["Typo", "engines", "_private", "cli2"])
def test_a_name_that_there_is_not_is_an_attribute_error_that_names_it(name: str) -> None:
    assert not hasattr(wb, name)
    with pytest.raises(AttributeError, match=f"module 'walbatch' has no attribute '{name}'"):
        getattr(wb, name)


@pytest.mark.parametrize("name", [name for name in wb.__all__ if isinstance(getattr(wb, name), type)])
def test_a_class_is_found_by_the_name_under_which_its_objects_travel(name: str) -> None:
    kind = getattr(wb, name)
    assert getattr(importlib.import_module(kind.__module__), kind.__qualname__) is kind


def test_an_error_can_travel() -> None:
    error = wb.ConfigError("one thing", "another")
    twin = copy.copy(error)
    assert (type(twin), str(twin), twin.problems) == (wb.ConfigError, str(error), error.problems)
