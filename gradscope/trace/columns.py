"""The columns of ``trace.schema`` as Arrow types."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from gradscope.trace.schema import COLUMNS, NULLABLE, SCHEMA

if TYPE_CHECKING:
    import pyarrow as pa


@cache
def arrow_schema() -> pa.Schema:
    """The schema of a rank's stream; its metadata names the version of the format."""
    import pyarrow as pa

    fields = [pa.field(name, _arrow_type(kind), nullable=name in NULLABLE) for name, kind in COLUMNS.items()]
    return pa.schema(fields, metadata={"gradscope": SCHEMA})


def element_type(kind: str) -> str | None:
    """The type of a list column's elements; None for other columns."""
    return kind[len("list<") : -1] if kind.startswith("list<") else None


def _arrow_type(kind: str) -> pa.DataType:
    import pyarrow as pa

    element = element_type(kind)
    if element is not None:
        return pa.list_(pa.field("item", _arrow_type(element), nullable=False))
    return pa.bool_() if kind == "bool" else pa.type_for_alias(kind)
