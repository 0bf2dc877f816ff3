"""Tables of norms: one row per tensor, layer or clip group, the folded tail, the whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter

from gradscope import results
from gradscope.notation import count, number, percent
from gradscope.views.cells import consistency, known
from gradscope.views.norm_rows import NormRow
from gradscope.views.screen import Column, Row, Table


@dataclass(frozen=True, slots=True)
class Field:
    """A column of norms and how a row fills it; what a row does not know stays empty."""

    column: Column
    text: Callable[[NormRow], str]


def norm_table(
    fields: Sequence[Field], rows: Iterable[NormRow], rest: NormRow | None, whole: NormRow | None, **texts: str
) -> Table:
    """``rows``, then ``rest`` in a quieter tone, then ``whole`` in a stronger one."""
    lines = [Row(_cells(fields, row), row.share or 0.0) for row in rows]
    if rest is not None:
        lines.append(Row(_cells(fields, rest), rest.share, "quiet"))
    if whole is not None:
        lines.append(Row(_cells(fields, whole), None, "strong"))
    return Table(tuple(field.column for field in fields), tuple(lines), **texts)


def _cells(fields: Iterable[Field], row: NormRow) -> tuple[str, ...]:
    return tuple(field.text(row) for field in fields)


def gradient_fields(what: str, rows: Sequence[NormRow], several_steps: bool) -> list[Field]:
    """The columns for gradients: one norm, or its spread over the steps."""
    fields = [name_field(what)]
    if several_steps:
        fields += [
            _spread_field("median norm", "p50"),
            _spread_field("p95", "p95", spare=2),
            _spread_field("max", "max"),
            _spread_field("p99", "p99", spare=8),
            _spread_field("min", "min", spare=7),
        ]
    else:
        fields.append(norm_field("norm"))
    return [*fields, SHARE, *_tensor_fields(rows), ELEMENTS]


def weight_fields(what: str, rows: Sequence[NormRow]) -> list[Field]:
    """The columns for weights."""
    return [name_field(what), norm_field("weight norm"), SHARE, *_tensor_fields(rows), ELEMENTS]


def optimizer_fields(what: str, rows: Sequence[NormRow]) -> list[Field]:
    """The columns for what an optimizer knows."""
    fields = [name_field(what), norm_field("recent norm"), SHARE]
    if any(row.mean_norm is not None for row in rows):
        fields.append(Field(Column("mean norm", spare=3), lambda row: known(row.mean_norm, number)))
    # Several tensors have none together, so that by layer the column may be all but empty.
    if 2 * sum(row.consistency is not None for row in rows) > len(rows):
        fields.append(Field(Column("consistency", spare=4), lambda row: known(row.consistency, consistency)))
    return fields


def name_field(what: str) -> Field:
    """The column of names."""
    return Field(Column(what, "left"), lambda row: row.name)


def norm_field(title: str) -> Field:
    """The column of a single norm."""
    return Field(Column(title), lambda row: known(row.norm, number))


def _spread_field(title: str, statistic: str, spare: int = 0) -> Field:
    value = attrgetter(statistic)
    return Field(Column(title, spare=spare), lambda row: number(value(row.spread)) if row.spread else "")


def _tensor_fields(rows: Sequence[NormRow]) -> list[Field]:
    tensors = [row.tensor for row in rows if row.tensor is not None]
    if not tensors:
        return []
    fields = [
        Field(Column("max |g|" if isinstance(tensors[0], results.TensorNorm) else "max |w|", spare=3), _max_abs),
        Field(Column("shape", spare=4), _shape),
        Field(Column("dtype", "left", spare=5), lambda row: row.tensor.dtype if row.tensor else ""),
    ]
    if any(tensor.zeros for tensor in tensors):
        fields.append(Field(Column("zeros", spare=6), lambda row: count(row.tensor.zeros) if row.tensor else ""))
    if any(tensor.nonfinite for tensor in tensors):
        fields.append(Field(Column("NaN/Inf"), lambda row: count(row.tensor.nonfinite) if row.tensor else ""))
    return fields


def _max_abs(row: NormRow) -> str:
    return number(row.tensor.max_abs) if row.tensor else ""


def _shape(row: NormRow) -> str:
    return ("×".join(map(str, row.tensor.shape)) or "scalar") if row.tensor else ""


SHARE = Field(Column("share"), lambda row: known(row.share, percent))
ELEMENTS = Field(Column("elements", spare=6), lambda row: known(row.numel, count))
