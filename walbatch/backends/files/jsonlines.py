"""Files of JSON lines: a line for each operation, in the order in which they are applied.

What is not here: why each stands in exactly one file (`stream`).

The idea needed to read it: an operation that makes no line (a payload that is no JSON, a function that raises) is a fault of that
operation alone.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable, Mapping, Sequence
from json.encoder import encode_basestring as quoted
from typing import Any, Final

import zstandard

from walbatch.backends.files.backend import Encoded, FilesBackend
from walbatch.errors import ConfigError
from walbatch.ports import FileSystem
from walbatch.types import Batch, Operation

Line = Callable[[Operation], Any]
"""What an operation becomes: bytes or text, one line as it is; anything that JSON can write; or None for no line at all."""

COMPRESS_LEVEL_MAX: Final = 22
SHOWN_BYTES_MAX: Final = 60
_FORMS: Final = ("text", "json", "payload")


class JsonLinesBackend(FilesBackend):
    """A transactional backend that writes each batch as a file of JSON lines into the folder `path`.

    `line` says what a line is:

    - "text": an object with `lsn`, `key`, `payload` and `priority`; bytes that are no UTF-8 stand in `key_base64` and
      `payload_base64` instead. `walbatch load` reads the same lines;
    - "json": the same, but the payload is JSON, and stands there as it is, with spaces for line ends;
    - "payload": the payload alone, which is JSON;
    - a function of an operation, which returns an object to be written as JSON, or a line as bytes or text, or None for none.

    What cannot be written becomes a dead letter; the rest of its batch is written. `compress="zstd"` makes files of
    `.jsonl.zst`, at `level` 1 to 22. On a lane with durability "none", `lsn` is null. `fs` is for crash tests.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        line: str | Line = "text",
        compress: str | None = None,
        level: int = 3,
        fs: FileSystem | None = None,
    ) -> None:
        if not callable(line) and line not in _FORMS:
            raise ConfigError(
                f"line is {line!r}, but must be one of {', '.join(_FORMS)}, or a function of an operation"
            )
        if compress not in {None, "zstd"}:
            raise ConfigError(f'compress is {compress!r}, but must be "zstd" or None')
        if type(level) is not int or not 1 <= level <= COMPRESS_LEVEL_MAX:
            raise ConfigError(f"level is {level!r}, but must be from 1 to {COMPRESS_LEVEL_MAX}")
        super().__init__(path, ".jsonl.zst" if compress else ".jsonl", fs)
        self._line = line
        self._compress = compress
        self._level = level

    @property
    def url(self) -> str | None:
        """`jsonl:///path?line=...`, from which the command line makes it again; None with a function, which no URL can name."""
        if not isinstance(self._line, str):
            return None
        fields = {} if self._line == "text" else {"line": self._line}
        if self._compress:
            fields |= {"compress": self._compress, "level": str(self._level)}
        return self._url("jsonl", fields)

    def encode(self, batch: Batch, wanted: Sequence[int]) -> Encoded:
        """Lines, compressed where that was asked for."""
        lines: list[bytes] = []
        rejected: dict[int, str] = {}
        if self._line == "text" and not batch.options:
            lines = _text_lines(batch, wanted)
        else:
            write = _written if self._line == "text" else _FORM_LINES.get(str(self._line))
            operations = list(batch)
            for index in wanted:
                try:
                    line = write(operations[index]) if write else _line_of(self._line, operations[index])
                except Exception as error:  # noqa: BLE001 - whatever the function raises, it is about this operation
                    rejected[index] = f"{type(error).__name__}: {error}"
                    continue
                if line is not None:
                    lines.append(line)
        content = b"".join(lines)
        if self._compress and lines:
            content = zstandard.ZstdCompressor(level=self._level, write_checksum=True).compress(content)
        return Encoded(content=(content,), count=len(lines), rejected=rejected)


def _text_lines(batch: Batch, wanted: Sequence[int]) -> list[bytes]:
    """The usual case, without an object for each operation."""
    lsns: Sequence[int | str] = batch.lsns or ["null"] * len(batch)
    keys, payloads, priorities = batch.keys, batch.payloads, batch.priorities
    return [
        f'{{"lsn":{lsns[index]},{_field("key", keys[index])},{_field("payload", payloads[index])},'
        f'"priority":{priorities[index]}}}\n'.encode()
        for index in wanted
    ]


def _field(name: str, value: bytes) -> str:
    """A field for bytes: as text where it is UTF-8, else as `<name>_base64`."""
    try:
        return f'"{name}":{quoted(value.decode())}'
    except UnicodeDecodeError:
        return f'"{name}_base64":"{base64.b64encode(value).decode()}"'


def _envelope(operation: Operation, payload: str) -> bytes:
    lsn = "null" if operation.lsn is None else operation.lsn
    return (
        f'{{"lsn":{lsn},{_field("key", operation.key)},{payload},"priority":{operation.priority}}}\n'.encode()
    )


def _written(operation: Operation) -> bytes:
    return _envelope(operation, _field("payload", operation.payload))


def _json(operation: Operation) -> bytes:
    return _envelope(operation, f'"payload":{_checked(operation.payload)}')


def _payload(operation: Operation) -> bytes:
    return f"{_checked(operation.payload)}\n".encode()


_FORM_LINES: Final[Mapping[str, Callable[[Operation], bytes]]] = {"json": _json, "payload": _payload}


def _checked(payload: bytes) -> str:
    """A payload that is JSON, on one line. Raises ValueError."""
    try:
        text = payload.decode()
        json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        shown = payload if len(payload) <= SHOWN_BYTES_MAX else payload[:SHOWN_BYTES_MAX] + b"..."
        raise ValueError(f"the payload {shown!r} is no JSON: {error}") from error
    # Between values: in a string they are escaped.
    return text.replace("\r", " ").replace("\n", " ")


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _line_of(line: Any, operation: Operation) -> bytes | None:
    """What a user's function makes of an operation, as a line."""
    made = line(operation)
    if made is None:
        return None
    if isinstance(made, str):
        made = made.encode()
    if not isinstance(made, (bytes, bytearray)):
        made = json.dumps(made, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    if b"\n" in made or b"\r" in made:
        raise ValueError("a line must not have a line end in it")
    return bytes(made) + b"\n"
