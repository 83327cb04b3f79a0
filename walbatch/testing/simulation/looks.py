"""Looks at the disk of a simulated machine, without a step of any process."""

from __future__ import annotations

from typing import Any

from walbatch.testing.simulation.machine import Machine

STORE = "/store"
"""Where the store of every workload stands."""


def names_in(machine: Machine, path: str) -> list[str]:
    """Names in a directory, without a step of any process; none where there is no directory."""
    quiet = machine.fs.twin(machine.fs.root)
    return quiet.list_directory(path) if quiet.is_directory(path) else []


def file_bytes(machine: Machine, path: str) -> bytes:
    """What a file of the machine reads as, without a step of any process."""
    quiet = machine.fs.twin(machine.fs.root)
    file = quiet.open_read(path)
    try:
        return file.read(file.size(), 0)
    finally:
        file.close()


def tree_bytes(machine: Machine, path: str) -> int:
    """Bytes of all files in a directory, without a step of any process."""
    return sum(len(file_bytes(machine, f"{path}/{name}")) for name in names_in(machine, path))


def case_text(case: Any) -> str:
    """What recovery found, as a line that two looks at the same store agree on."""
    return f"{case.label}:{case.segment}:{case.offset}"
