"""What two sources have in common to compare: gradients, else what optimizers remember of them, else weights."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from gradscope.comparison.side import Side
from gradscope.comparison_results import Measure
from gradscope.errors import GradscopeError
from gradscope.selection import first_groups
from gradscope.step_table import members_of

FloatArray = NDArray[np.float64]


def common_measure(a: Side, b: Side) -> Measure:
    """What both sides hold; gradients first.

    Raises GradscopeError where there is nothing.
    """
    if a.table is not None and b.table is not None:
        return "norm"
    recent = [side.table is not None or not np.isnan(side.recent).all() for side in (a, b)]
    if all(recent):
        return "recent_norm"
    if not (np.isnan(a.weight_norm).all() or np.isnan(b.weight_norm).all()):
        return "weight_norm"
    lacks = a if not recent[0] else b
    raise GradscopeError(
        lacks.source.info.path,
        "holds neither gradients nor an optimizer's state to compare with the other's",
        "--as gradients takes a bare mapping of tensors for gradients",
    )


def with_recent_norms(a: Side, b: Side) -> tuple[Side, Side]:
    """Both with the recent norms that an optimizer's state holds, in the window of such a state.

    What holds gradients has them computed, as ``recent_norms`` does.
    """
    windows = [report.window for side in (a, b) for report in side.reports if report.window is not None]
    window = windows[0] if windows else 1.0
    one, other = (side if side.table is None else replace(side, recent=recent_norms(side, window)) for side in (a, b))
    return one, other


def recent_norms(side: Side, window: float) -> FloatArray:
    """What an optimizer's state would hold of these steps: √ of the mean of ‖g‖² that is weighted by β₂ to the age.

    1 − β₂ = 1/``window`` (Kingma & Ba 2015).  Where a recording tells max_norm, of the gradients as clipped by it.
    Float64 [tensors].
    """
    table = side.table
    assert table is not None
    energy = table.energy.copy()
    members = list(members_of(side.source.tensors, side.source.groups).values())
    if table.history is not None:
        for g, (held, first) in enumerate(zip(members, first_groups(side.source.groups), strict=True)):
            limit, norm = table.history.max_norm[:, g], table.norms(held)
            clipped = (norm > limit) & first
            energy[np.ix_(clipped, held)] *= np.square(limit[clipped] / norm[clipped])[:, None]
    age = (table.index[-1] - table.index).astype(np.float64)
    weight = np.exp(age * math.log1p(-1.0 / window)) if window > 1.0 else (age == 0).astype(np.float64)
    weight = np.where(side.finite, weight, 0.0)
    if not weight.sum() > 0.0:
        return np.full(energy.shape[1], np.nan)
    return np.asarray(np.sqrt(weight @ np.where(side.finite[:, None], energy, 0.0) / weight.sum()))
