"""The clip groups of a recorded run: what each was limited to, and how often that clipped it."""

from __future__ import annotations

from gradscope import results
from gradscope.findings import threshold
from gradscope.notation import count, number, percent
from gradscope.views.cells import known
from gradscope.views.screen import Column, Row, Table

_NEVER = "–"


def recorded_table(run: results.RecordedRun, gradients: results.GradientSummary | None) -> Table:
    """One row per clip group; with ``gradients``, which have the same groups, also how large each was.

    Where the groups were not all there at every update, a column says at how many each was.
    """
    values = any(group.clip_value is not None for group in run.groups)
    counted = any(group.updates != run.overall.updates for group in run.groups)
    columns = [
        Column("clip group", "left"),
        *[Column("updates")] * counted,
        Column("max_norm"),
        *[Column("clip_value")] * values,
        Column("clipped"),
        Column(f"last {count(run.overall.recent.length)}", spare=2),
        *[Column("median norm", spare=1), Column("share")] * (gradients is not None),
    ]
    rows = []
    for i, group in enumerate(run.groups):
        cells = [
            group.name,
            *[known(group.updates, count)] * counted,
            known(group.max_norm, threshold),
            *[known(group.clip_value, threshold)] * values,
            percent(group.clip_rate) if group.steps else _NEVER,
            percent(group.recent.clip_rate) if group.steps else _NEVER,
        ]
        norm = gradients.groups[i] if gradients is not None else None
        cells += [number(norm.l2_norm.p50) if norm.steps != 0 else _NEVER, percent(norm.share)] if norm else []
        rows.append(Row(tuple(cells), bar=norm.share if norm else None))
    return Table(tuple(columns), tuple(rows))
