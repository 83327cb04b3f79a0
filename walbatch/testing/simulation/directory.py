"""A directory on a simulated disk: the names that are seen, and those that a power cut may take back.

What is not here: paths, and the calls that change names (`filesystem`).

The idea needed to read it: changes form a list. A sync makes the whole list durable; a failed one leaves its changes
undecided for ever, while later ones may still become durable.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace

from walbatch.testing.simulation.disk import Inode


class NameChange(enum.StrEnum):
    """The changes of a directory."""

    CREATE = "create"
    UNLINK = "unlink"
    RENAME = "rename"


@dataclass(frozen=True, slots=True, kw_only=True)
class NameOp:
    """One change of a directory: what it did to the name of `node`.

    `sure`: a sync has made it durable, but not all of those before it.
    """

    change: NameChange
    name: str
    target: str = ""
    node: Inode | Directory
    sure: bool = False
    dropped: bool = False
    """A failed sync of the directory dropped it: no later sync makes it durable."""


class Directory:
    """Names. `view` is what is seen, `durable` and `ops` what a power cut decides from."""

    __slots__ = ("durable", "ops", "view")

    def __init__(self) -> None:
        self.view: dict[str, Inode | Directory] = {}
        self.durable: dict[str, Inode | Directory] = {}
        self.ops: list[NameOp] = []

    def apply(self, op: NameOp) -> None:
        """Change the view; durable after `sync`."""
        change_names(self.view, op)
        self.ops.append(op)

    def sync(self) -> None:
        """All changes are durable, except those that a failed sync dropped."""
        self.ops = [op if op.dropped or op.sure else replace(op, sure=True) for op in self.ops]
        while self.ops and self.ops[0].sure:
            change_names(self.durable, self.ops.pop(0))

    def fail_sync(self) -> None:
        """The changes may or may not be durable, and no later sync will help."""
        self.ops = [op if op.sure else replace(op, dropped=True) for op in self.ops]


def change_names(names: dict[str, Inode | Directory], op: NameOp) -> None:
    """Apply one change where it makes sense; elsewhere it leaves the table alone.

    A change is about one node. Where its name means another one (because the changes between were lost), it is not
    well-formed: no file system renames a file that it was not told to.
    """
    match op.change:
        case NameChange.CREATE:
            names[op.name] = op.node
        case NameChange.UNLINK:
            if names.get(op.name) is op.node:
                del names[op.name]
        case NameChange.RENAME:
            if names.get(op.name) is op.node:
                names[op.target] = names.pop(op.name)


def _clone_node(node: Inode | Directory, nodes: dict[int, Inode | Directory]) -> Inode | Directory:
    found = nodes.get(id(node))
    if found is None:
        found = node.clone() if isinstance(node, Inode) else clone_directory(node, nodes)
        nodes[id(node)] = found
    return found


def clone_directory(directory: Directory, nodes: dict[int, Inode | Directory]) -> Directory:
    """A copy that shares nothing. `nodes`: copies made so far, by the identity of what they copy."""
    twin = Directory()
    nodes[id(directory)] = twin
    twin.view = {name: _clone_node(node, nodes) for name, node in directory.view.items()}
    twin.durable = {name: _clone_node(node, nodes) for name, node in directory.durable.items()}
    twin.ops = [replace(op, node=_clone_node(op.node, nodes)) for op in directory.ops]
    return twin


def fingerprint(node: Inode | Directory) -> object:
    """A value that is equal for trees that hold the same and may lose the same."""
    if isinstance(node, Inode):
        return node.fingerprint()
    ops = tuple((op.change, op.name, op.target, op.sure, op.dropped) for op in node.ops)
    durable = tuple(sorted(node.durable)) if ops else ()
    return ops, durable, tuple((name, fingerprint(child)) for name, child in sorted(node.view.items()))
