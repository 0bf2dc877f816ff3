"""Tables of norms: one row per tensor, layer or clip group, the folded tail, the whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from gradscope import results
from gradscope.notation import count, number, percent
from gradscope.views.cells import consistency, known
from gradscope.views.norm_rows import NormRow
from gradscope.views.screen import Column, Row, Table

# Of what had no gradient at any step.
_NEVER = "–"


@dataclass(frozen=True, slots=True)
class Field:
    """A column of norms and how a row fills it; what a row does not know stays empty."""

    column: Column
    text: Callable[[NormRow], str]


def norm_table(
    fields: Sequence[Field], rows: Iterable[NormRow], rest: NormRow | None, whole: NormRow | None, **texts: str
) -> Table:
    """``rows``, then ``rest`` in a quieter tone, then ``whole`` in a stronger one."""
    lines = [Row(_cells(fields, row), row.share) for row in rows]
    if rest is not None:
        lines.append(Row(_cells(fields, rest), rest.share, "quiet"))
    if whole is not None:
        lines.append(Row(_cells(fields, whole), None, "strong"))
    return Table(tuple(field.column for field in fields), tuple(lines), **texts)


def _cells(fields: Iterable[Field], row: NormRow) -> tuple[str, ...]:
    return tuple(field.text(row) for field in fields)


def gradient_fields(
    what: str, rows: Sequence[NormRow], several_steps: bool, all_steps: int | None = None, steps: str = "steps"
) -> list[Field]:
    """The columns for gradients: one norm, or its spread over the steps.

    Where a row's numbers are not over ``all_steps``, a column says over how many ``steps`` they are.
    """
    fields = [name_field(what)]
    if several_steps and any(row.steps not in (None, all_steps) for row in rows):
        fields.append(Field(Column(steps, spare=1), lambda row: known(row.steps, count)))
    updated = [UPDATE] if any(row.update_ratio is not None for row in rows) else []
    noise = _noise_fields(rows)
    if several_steps:
        fields += [
            _spread_field("median norm", "p50"),
            _spread_field("p95", "p95", spare=2),
            _spread_field("max", "max", spare=2 if updated or noise else 0),
            _spread_field("p99", "p99", spare=8),
            _spread_field("min", "min", spare=7),
        ]
    else:
        fields.append(norm_field("norm"))
    return [*fields, SHARE, *updated, *noise, *_tensor_fields(rows), ELEMENTS]


def series_fields(rows: Sequence[NormRow]) -> list[Field]:
    """The columns for the series of a norm log, which tells nothing but norms."""
    fields = gradient_fields("series", rows, several_steps=True)
    kept = {"series", "median norm", "p95", "max", "p99", "min"} | ({"share"} if len(rows) > 1 else set())
    return [field for field in fields if field.column.title in kept]


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
    return Field(Column(title), lambda row: _NEVER if row.steps == 0 else known(row.norm, number))


def _spread_field(title: str, statistic: str, spare: int = 0) -> Field:
    value = attrgetter(statistic)

    def text(row: NormRow) -> str:
        if row.steps == 0:
            return _NEVER
        return number(value(row.spread)) if row.spread else ""

    return Field(Column(title, spare=spare), text)


def _noise_fields(rows: Sequence[NormRow]) -> list[Field]:
    scales = [NOISE_SCALE] if any(row.noise_scale is not None for row in rows) else []
    cosines = [COSINE] if any(row.mean_cosine is not None for row in rows) else []
    return [*scales, *cosines]


def _noise_scale(row: NormRow) -> str:
    scale = row.noise_scale
    if scale is None:
        return ""
    # Without an end above, the lower one is all that is known.
    if scale.ci95 is None and scale.at_least is not None:
        return f"> {number(scale.at_least)}" if scale.at_least > 0.0 else _NEVER
    return _NEVER if scale.estimate is None else number(scale.estimate)


def _tensor_fields(rows: Sequence[NormRow]) -> list[Field]:
    tensors = [row.tensor for row in rows if row.tensor is not None]
    if not tensors:
        return []
    fields = [
        Field(Column("max |g|" if isinstance(tensors[0], results.TensorNorm) else "max |w|", spare=3), _max_abs),
        Field(Column("shape", spare=4), _shape),
        Field(Column("dtype", "left", spare=5), lambda row: _of_tensor(row, "dtype", str)),
    ]
    if any(tensor.zeros for tensor in tensors):
        fields.append(Field(Column("zeros", spare=6), lambda row: _of_tensor(row, "zeros", count)))
    if any(tensor.nonfinite for tensor in tensors):
        fields.append(Field(Column("NaN/Inf"), lambda row: _of_tensor(row, "nonfinite", count)))
    return fields


def _max_abs(row: NormRow) -> str:
    return _of_tensor(row, "max_abs", number)


def _shape(row: NormRow) -> str:
    return _of_tensor(row, "shape", lambda shape: "×".join(map(str, shape)) or "scalar")


def _of_tensor(row: NormRow, name: str, text: Callable[[Any], str]) -> str:
    return "" if row.tensor is None else known(getattr(row.tensor, name), text)


UPDATE = Field(
    Column("update/weight", spare=1, note="update/weight: median ‖θ' − θ‖/‖θ‖ of an optimizer step"),
    lambda row: known(row.update_ratio, lambda ratio: number(ratio, 2)),
)
NOISE_SCALE = Field(
    Column("noise scale", spare=1, note="noise scale: samples at which signal and noise are equally large"),
    _noise_scale,
)
COSINE = Field(
    Column("cosine", spare=1, note="cosine: mean between two minibatches' gradients"),
    lambda row: known(row.mean_cosine, lambda cosine: f"{cosine:.2f}"),
)
SHARE = Field(Column("share"), lambda row: known(row.share, percent))
ELEMENTS = Field(Column("elements", spare=6), lambda row: known(row.numel, count))
