"""Backends by URL: what opens, what is refused, and what is never remembered."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest

from walbatch.backends import open_backend, strip_password, url_of
from walbatch.backends.function import FunctionBackend
from walbatch.backends.lmdb import LmdbBackend
from walbatch.errors import BackendError, ConfigError
from walbatch.types import Batch


def apply(_: Batch) -> None:
    """A function that a URL can name."""


class Target:
    """A backend object that a URL can name."""

    url = "postgresql://app:secret@db/queue"

    def apply(self, batch: Batch) -> None:
        pass

    deliver = staticmethod(apply)


@pytest.fixture(autouse=True)
def _module(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("urls_target")
    vars(module).update(apply=apply, target=Target(), Target=Target, number=7)
    monkeypatch.setitem(sys.modules, "urls_target", module)


# --- lmdb ---------------------------------------------------------------------------------------------------------

PATHS = {
    "lmdb:///data/blocks": "/data/blocks",
    "LMDB:///data/blocks": "/data/blocks",
    "lmdb:/data/blocks": "/data/blocks",
    "lmdb:///a%20b/c%23%3F%25": "/a b/c#?%",
    "lmdb:///caf%C3%A9": "/café",
    "lmdb:///user:name@host/x": "/user:name@host/x",
    "lmdb:///data/../up": "/up",
}


@pytest.mark.parametrize(("url", "path"), PATHS.items())
def test_an_lmdb_url_names_a_directory(url: str, path: str) -> None:
    backend = open_backend(url, allow_python=False)
    assert isinstance(backend, LmdbBackend)
    assert backend.path == Path(path)


def test_a_relative_lmdb_url_is_made_absolute_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    backend = open_backend("lmdb:blocks/new", allow_python=False)
    assert url_of(backend) == f"lmdb://{tmp_path}/blocks/new"


@pytest.mark.parametrize("name", ["plain", "a b", "100%", "what?", "#1", "café", "a:b@c", "\udcff"])
def test_the_url_of_an_lmdb_backend_makes_it_again(tmp_path: Path, name: str) -> None:
    backend = LmdbBackend(tmp_path / name)
    url = url_of(backend)
    assert url is not None
    assert url.isprintable()
    again = open_backend(url, allow_python=False)
    assert isinstance(again, LmdbBackend)
    assert again.path == backend.path


def test_opening_a_url_makes_nothing_on_disk(tmp_path: Path) -> None:
    open_backend(f"lmdb://{tmp_path}/blocks", allow_python=False)
    assert [*tmp_path.iterdir()] == []


# --- python -------------------------------------------------------------------------------------------------------


def test_a_python_url_names_a_function_and_is_remembered() -> None:
    backend = open_backend("python:urls_target:apply", allow_python=True)
    assert isinstance(backend, FunctionBackend)
    assert url_of(backend) == "python:urls_target:apply"


def test_a_python_url_names_an_object_or_something_in_one() -> None:
    backend = open_backend("python:urls_target:target", allow_python=True)
    assert isinstance(backend, Target)
    assert isinstance(open_backend("python:urls_target:target.deliver", allow_python=True), FunctionBackend)


def test_a_remembered_python_url_is_never_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    imported: list[str] = []
    monkeypatch.setattr("importlib.import_module", imported.append)
    with pytest.raises(ConfigError, match="name it yourself on the command line"):
        open_backend("python:urls_target:apply", allow_python=False)
    assert imported == []


def test_a_module_that_fails_to_import_is_a_backend_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_target.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(BackendError, match="ZeroDivisionError"):
        open_backend("python:broken_target:apply", allow_python=True)


# --- refusals -----------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[type[Exception], str]] = {
    "": (ConfigError, "must start with one of http:, https:, jsonl:, lmdb:"),
    "blocks": (ConfigError, "must start with one of http:, https:, jsonl:, lmdb:"),
    "mongodb://host/0": (ConfigError, "'mongodb://host/0'.*python:, redis:, .*sqlite:"),
    "lmdb:": (ConfigError, "names no directory"),
    "lmdb:///": (ConfigError, "names no directory"),
    "lmdb://": (ConfigError, "names no directory"),
    "lmdb:///a%00b": (ConfigError, "names no directory"),
    "lmdb://blocks/x": (ConfigError, "names a host, 'blocks'.*lmdb:blocks/x"),
    "lmdb:///data?map=7": (ConfigError, "no options are known"),
    "lmdb:///data#7": (ConfigError, "no options are known"),
    "python:urls_target": (ConfigError, "must be python:module:name"),
    "python::apply": (ConfigError, "must be python:module:name"),
    "python:urls_target:": (ConfigError, "must be python:module:name"),
    "python:../evil:apply": (ConfigError, "must be python:module:name"),
    "python:urls_target:missing": (BackendError, "missing"),
    "python:no_such_module:apply": (BackendError, "no_such_module"),
    "python:urls_target:number": (ConfigError, "backend must be"),
    "python:urls_target:Target": (ConfigError, "backend must be"),
}


@pytest.mark.parametrize(("url", "error", "reason"), [(url, *why) for url, why in REFUSED.items()])
def test_what_cannot_be_opened_is_refused_with_its_reason(
    url: str, error: type[Exception], reason: str
) -> None:
    with pytest.raises(error, match=reason):
        open_backend(url, allow_python=True)


def test_a_refusal_does_not_show_the_password() -> None:
    with pytest.raises(ConfigError) as caught:
        open_backend("mysql://app:hunter2@db/queue", allow_python=True)
    assert "hunter2" not in str(caught.value)


# --- passwords ----------------------------------------------------------------------------------------------------

STRIPPED = {
    "postgresql://app:secret@db/queue": "postgresql://app@db/queue",
    "postgresql://app:secret@db:5432/queue?sslmode=require": "postgresql://app@db:5432/queue?sslmode=require",
    "postgresql://app@db/queue": "postgresql://app@db/queue",
    "postgresql://db/queue": "postgresql://db/queue",
    "postgresql://db:5432/queue": "postgresql://db:5432/queue",
    "postgresql://db:5432/q@1": "postgresql://db:5432/q@1",
    "postgresql:///queue?host=/run&password=secret": "postgresql:///queue?host=/run",
    "postgresql://db/q?PassWord=x&user=app&sslpassword=y": "postgresql://db/q?user=app",
    "postgresql://db/q?password=x": "postgresql://db/q",
    "postgresql://app:se@cret@db/queue": "postgresql://app@db/queue",
    "postgresql://app:se/cret@db/queue": "postgresql://app@db/queue",
    "postgresql://app:se:cret@db/queue": "postgresql://app@db/queue",
    "postgresql://app:se?cret@db/queue?table=t": "postgresql://app@db/queue?table=t",
    "postgresql://app:secret?@db/queue?table=t": "postgresql://app@db/queue?table=t",
    "postgresql://app:se/c?ret@db/queue?table=t": "postgresql://app@db/queue?table=t",
    "postgresql://app:12?se=cret@db/queue?table=t": "postgresql://app@db/queue?table=t",
    "redis://app:12?secret@host/0": "redis://app@host/0",
    "postgresql://db:5432/queue?table=a@b": "postgresql://db:5432/queue?table=a@b",
    "postgresql://[::1]:5432/queue?table=a@b": "postgresql://[::1]:5432/queue?table=a@b",
    "https://host:8080?to=a@b": "https://host:8080?to=a@b",
    "https://host:8080/{key}?to=a@b": "https://host:8080/{key}?to=a@b",
    "https://app:se?cret@host/x": "https://app@host/x",
    "https://:secret@host/x?api_key=1": "https://@host/x",
    "sqlite:///data/app.db": "sqlite:///data/app.db",
    "sqlite:///data/a:b@c.db": "sqlite:///data/a:b@c.db",
    "lmdb:///data/a:b@c": "lmdb:///data/a:b@c",
    "python:urls_target:apply": "python:urls_target:apply",
    "no url at all": "no url at all",
    "": "",
}


@pytest.mark.parametrize(("url", "stripped"), STRIPPED.items())
def test_passwords_are_stripped(url: str, stripped: str) -> None:
    assert strip_password(url) == stripped
    assert strip_password(stripped) == stripped


def test_the_url_of_a_backend_is_without_its_password() -> None:
    assert url_of(Target()) == "postgresql://app@db/queue"


@pytest.mark.parametrize("backend", [None, apply, FunctionBackend(apply), object()])
def test_a_backend_without_a_url_has_none(backend: object) -> None:
    assert url_of(backend) is None
