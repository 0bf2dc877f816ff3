"""What a reader makes of a file: nested mappings, lists and scalars, with tensors as leaves.

A ``Tree`` is a ``dict``, ``list``, ``tuple``, scalar (``str``, ``int``, ``float``, ``bool``, ``bytes``, ``None``,
``complex``), a ``StoredTensor``, or one of the nodes below.  Nothing in it is an object of somebody else's class.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from gradscope.errors import GradscopeError
from gradscope.sources.stored import FileTensor, MemoryTensor, StoredTensor, StreamTensor

Tree: TypeAlias = Any

MAX_DEPTH = 200
# A tree may share its parts, so that a small file unfolds into exponentially many names.
MAX_REPEATED_PARTS = 100_000


@dataclass(frozen=True, slots=True)
class Global:
    """A class or function that a pickle names.  It is never looked up."""

    module: str
    name: str


class Opaque:
    """An object of a class that gradscope does not know: how it was made and what was put into it.

    ``args`` are those of its constructor, ``state`` is what ``__setstate__`` or ``__dict__`` would have got,
    ``mapping`` and ``sequence`` hold the items of a subclass of dict or list (None if there were none).
    """

    __slots__ = ("args", "mapping", "module", "name", "sequence", "state")

    def __init__(self, module: str, name: str, args: tuple[Any, ...] = ()) -> None:
        self.module = module
        self.name = name
        self.args = args
        self.state: Any = None
        self.mapping: dict[Any, Any] | None = None
        self.sequence: list[Any] | None = None

    def __repr__(self) -> str:
        return f"<Opaque {self.module}.{self.name}>"


@dataclass(frozen=True, slots=True)
class ByteRange:
    """A long byte string that was left where it lies in the pickle's stream."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class UnreadableTensor:
    """A tensor that the file holds in a form gradscope does not read; ``reason`` says which."""

    reason: str


Leaf: TypeAlias = StoredTensor | UnreadableTensor | None


def named_leaves(tree: Tree, what: str) -> Iterator[tuple[str, Leaf]]:
    """Every tensor in ``tree`` with its dotted name, in order; ``None`` entries of mappings and lists too.

    The names are also written into the tensors' ``info``.  ``what`` names the file in errors.

    Raises:
        GradscopeError: the tree is nested more than 200 deep, or unfolds into far more parts than it has.
    """
    stack: list[Iterator[tuple[str, Tree]]] = [iter([("", tree)])]
    seen: set[int] = set()
    repeated = 0
    while stack:
        entry = next(stack[-1], None)
        if entry is None:
            stack.pop()
            continue
        name, node = _printable(entry[0]), entry[1]
        if isinstance(node, UnreadableTensor) or node is None:
            yield name, node
        elif isinstance(node, FileTensor | MemoryTensor | StreamTensor):
            yield name, node if node.info.name == name else replace(node, info=replace(node.info, name=name))
        elif (container := _container(node)) is not None:
            if len(stack) >= MAX_DEPTH:
                raise GradscopeError(what, f"is nested more than {MAX_DEPTH} deep")
            if id(container) in seen:
                repeated += 1 + len(container)
            seen.add(id(container))
            if repeated > MAX_REPEATED_PARTS:
                raise GradscopeError(what, f"repeats its parts more than {MAX_REPEATED_PARTS:,} times")
            stack.append(_children(name, container))


def _printable(name: str) -> str:
    """Names come from somebody else's file and end up in terminals: control characters are spelled out."""
    return name if name.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)


def _container(node: Tree) -> Mapping[Any, Any] | list[Any] | tuple[Any, ...] | None:
    if isinstance(node, Opaque) and node.module.startswith("__torch__"):
        # A TorchScript module: its class is code, its state is the parameters.
        node = node.state
    elif isinstance(node, Opaque):
        node = node.mapping if node.mapping is not None else node.sequence
    return node if isinstance(node, Mapping | list | tuple) else None


def _children(prefix: str, container: Mapping[Any, Any] | list[Any] | tuple[Any, ...]) -> Iterator[tuple[str, Tree]]:
    dotted = f"{prefix}." if prefix else ""
    if isinstance(container, Mapping):
        return ((f"{dotted}{key}", value) for key, value in container.items() if isinstance(key, str | int))
    return ((f"{dotted}{index}", value) for index, value in enumerate(container))


def same_storage(tensor: StoredTensor) -> Hashable:
    """A key that is equal for two tensors exactly when they are the same view of the same stored elements.

    Tied parameters (one tensor under several names) have equal keys.
    """
    shape, dtype = tensor.info.shape, tensor.info.dtype
    if isinstance(tensor, FileTensor):
        return (str(tensor.path), tensor.offset, tensor.strides, shape, dtype)
    if isinstance(tensor, MemoryTensor):
        return (tensor.array.__array_interface__["data"][0], tensor.array.strides, shape, dtype)
    return (tensor.open_stream, shape, dtype)
