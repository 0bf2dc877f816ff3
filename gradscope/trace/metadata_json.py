"""``TraceMetadata`` as the text of ``trace.json``, and back."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from typing import Any, TypeVar, get_args

from gradscope.errors import GradscopeError
from gradscope.trace.schema import SCHEMA, Detail, LintFinding, RecordedGroup, RecordedTensor, TraceMetadata

T = TypeVar("T", TraceMetadata, RecordedTensor, RecordedGroup, LintFinding)


def metadata_to_json(metadata: TraceMetadata) -> bytes:
    """The text of ``trace.json``; what ``extra`` holds beyond JSON's types is written as ``str()`` tells it."""
    tree = _plain(metadata)
    for name in ("tensors", "groups", "findings"):
        tree[name] = [_plain(part) for part in getattr(metadata, name)]
    return (json.dumps(tree, default=str, separators=(",", ":")) + "\n").encode()


def metadata_from_json(text: bytes, what: str) -> TraceMetadata:
    """What ``metadata_to_json`` wrote; keys that a later version added are passed over.

    Raises GradscopeError, which names ``what``, where the text is something else.
    """
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError):
        raise GradscopeError(what, "is no JSON: it is damaged") from None
    schema = tree.get("schema") if isinstance(tree, dict) else None
    if not isinstance(schema, str) or schema.partition("/")[0] != SCHEMA.partition("/")[0]:
        raise GradscopeError(what, "does not describe a gradscope trace")
    if schema != SCHEMA:
        raise GradscopeError(what, f"is of the form {schema}, which this version does not know", "upgrade gradscope")
    try:
        metadata = _record(TraceMetadata, tree)
        _check(metadata)
    except ValueError as error:
        raise GradscopeError(what, f"is damaged: {error}") from None
    return metadata


def _plain(record: TraceMetadata | RecordedTensor | RecordedGroup | LintFinding) -> dict[str, Any]:
    return {field.name: getattr(record, field.name) for field in fields(record)}


def _record(kind: type[T], tree: Any) -> T:
    if not isinstance(tree, dict):
        raise ValueError(f"a {kind.__name__} is no object")
    values = {}
    for field in fields(kind):
        if field.name in tree:
            values[field.name] = _read(str(field.type), tree[field.name], field.name)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"{field.name} is missing")
    return kind(**values)


def _read(annotation: str, value: Any, name: str) -> Any:
    if annotation.endswith(" | None"):
        return None if value is None else _read(annotation.removesuffix(" | None"), value, name)
    reader = _READERS[annotation]
    if not (isinstance(value, reader[0]) and not (isinstance(value, bool) and reader[0] is not bool)):
        raise ValueError(f"{name} is no {annotation}")
    return reader[1](value)


def _each(read: Callable[[Any], Any], kind: type | tuple[type, ...]) -> Callable[[list[Any]], list[Any]]:
    def every(values: list[Any]) -> list[Any]:
        if not all(isinstance(value, kind) and not isinstance(value, bool) for value in values):
            raise ValueError("a list holds a value of the wrong kind")
        return [read(value) for value in values]

    return every


def _detail(value: str) -> str:
    if value not in get_args(Detail):
        raise ValueError(f"detail {value!r} is not known")
    return value


# How the value of a field is read, by the field's annotation: the JSON type it must have, and what becomes of it.
_READERS: dict[str, tuple[type | tuple[type, ...], Callable[[Any], Any]]] = {
    "str": (str, str),
    "int": (int, int),
    "float": ((int, float), float),
    "bool": (bool, bool),
    "Detail": (str, _detail),
    "dict[str, Any]": (dict, dict),
    "dict[str, str]": (dict, lambda tree: {key: str(value) for key, value in tree.items()}),
    "list[str]": (list, _each(str, str)),
    "list[int]": (list, _each(int, int)),
    "tuple[str, ...]": (list, lambda values: tuple(_each(str, str)(values))),
    "tuple[int, ...]": (list, lambda values: tuple(_each(int, int)(values))),
    "list[RecordedTensor]": (list, _each(lambda tree: _record(RecordedTensor, tree), dict)),
    "list[RecordedGroup]": (list, _each(lambda tree: _record(RecordedGroup, tree), dict)),
    "list[LintFinding]": (list, _each(lambda tree: _record(LintFinding, tree), dict)),
}


def _check(metadata: TraceMetadata) -> None:
    if not 0 <= metadata.rank < metadata.world_size:
        raise ValueError(f"rank {metadata.rank} of {metadata.world_size}")
    if metadata.every < 1:
        raise ValueError(f"every {metadata.every}")
    for tensor in metadata.tensors:
        _check_tensor(tensor)
    _check_unique("tensor", [tensor.name for tensor in metadata.tensors])
    _check_unique("group", [group.name for group in metadata.groups])
    for group in metadata.groups:
        if len(set(group.tensors)) < len(group.tensors):
            raise ValueError(f"the group {group.name!r} names a tensor twice")
        if not all(0 <= i < len(metadata.tensors) for i in group.tensors):
            raise ValueError(f"the group {group.name!r} names a tensor that there is not")


def _check_tensor(tensor: RecordedTensor) -> None:
    for shape in (tensor.shape, tensor.local_shape):
        if not all(size >= 0 for size in shape) or math.prod(shape) >= 1 << 62:
            raise ValueError(f"the shape of {tensor.name!r} is impossible")
    dimensions = {len(tensor.placements), len(tensor.mesh_shape), len(tensor.mesh_coordinate)}
    if len(dimensions) > 1:
        raise ValueError(f"the placements of {tensor.name!r} do not fit its mesh")


def _check_unique(what: str, values: Sequence[Any]) -> None:
    seen = set()
    for value in values:
        if value in seen:
            raise ValueError(f"there are two {what}s {value!r}")
        seen.add(value)
