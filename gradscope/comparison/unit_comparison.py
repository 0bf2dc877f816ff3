"""Two sides, unit by unit: how far a tensor, a layer, a clip group or everything lies apart, and beyond noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from gradscope.comparison.change import LEVEL, ROUNDING, Change, factor
from gradscope.comparison.side import Side
from gradscope.comparison.spectrum_shapes import Shape, distance
from gradscope.comparison.units import Unit
from gradscope.comparison_results import Both, Measure, UnitComparison, Verdict
from gradscope.differences import difference
from gradscope.holm import holm
from gradscope.spread import Spread

FloatArray = NDArray[np.float64]

# An interval that is wider than this, and holds 1, tells nothing.
WIDEST = 100.0
# Two runs follow each other step by step where what is new in each step is this much the same.
LEAST_CORRELATION = 0.95
FEWEST_PAIRED = 8
# A share of zeros that moves by less is not worth a word.
LEAST_ZEROS = 0.01
# Cells of 1/16 octave and the bins of a trace blur a shape by about this, in octaves.
LEAST_SHAPE = 0.05
SHAPE_FACTOR = 3.0


def follow_each_other(a: Side, b: Side, whole: Unit) -> bool:
    """Whether both hold the same steps, and the gradients change from one to the next in the same way."""
    if a.table is None or b.table is None or not np.array_equal(a.table.index, b.table.index):
        return False
    logs = [_logs(side.norms(members)) for side, members in ((a, whole.a), (b, whole.b))]
    known = np.isfinite(logs[0]) & np.isfinite(logs[1])
    if not known.any():
        return False
    apart = logs[0][known] - logs[1][known]
    if np.abs(apart - np.median(apart)).max() <= ROUNDING:
        return True
    steps = [np.diff(series[known]) for series in logs]
    if len(steps[0]) < FEWEST_PAIRED or not (steps[0].std() > 0.0 and steps[1].std() > 0.0):
        return False
    return bool(np.corrcoef(steps[0], steps[1])[0, 1] >= LEAST_CORRELATION)


def compare_units(
    a: Side, b: Side, units: Sequence[Unit], measure: Measure, paired: bool
) -> tuple[list[UnitComparison], list[Change | None]]:
    """Every unit, sorted by what differs most beyond noise, and the change behind each."""
    found = [_compare(a, b, unit, measure, paired) for unit in units]
    differ = holm([math.nan if change is None else change.probability for _, change, _ in found], LEVEL)
    zeros = holm([math.nan if zeros is None else zeros.probability for _, _, zeros in found], LEVEL)
    told = [
        (_judged(unit, change, apart, _zeros_differ(unit, other)), change)
        for (unit, change, _), apart, other in zip(found, differ, zeros, strict=True)
    ]
    told.sort(key=lambda pair: _rank(*pair))
    return [unit for unit, _ in told], [change for _, change in told]


def _logs(norms: FloatArray) -> FloatArray:
    """Natural logarithms, NaN where a norm is zero or not known."""
    return np.log(norms, out=np.full(norms.shape, np.nan), where=norms > 0.0)


def _compare(
    a: Side, b: Side, unit: Unit, measure: Measure, paired: bool
) -> tuple[UnitComparison, Change | None, Change | None]:
    """The unit, the change of its norm, and that of its share of zeros."""
    change, zeros_change = None, None
    if measure == "norm":
        compared, change, zeros_change = _series(a, b, unit, paired)
    else:
        compared = _numbers(a, b, unit, measure)
    weights = [_joined(side.weight_norm, members) for side, members in ((a, unit.a), (b, unit.b))]
    if measure != "weight_norm" and not math.isnan(weights[0] + weights[1]):
        compared = replace(compared, weight_norm=Both(*weights))
    return compared, change, zeros_change


def _joined(norms: FloatArray, members: Sequence[int]) -> float:
    """The norm of ``members`` together, of those that are known."""
    held = norms[list(members)]
    known = held[~np.isnan(held)]
    return float(np.sqrt(np.square(known).sum())) if len(known) else math.nan


def _numbers(a: Side, b: Side, unit: Unit, measure: Measure) -> UnitComparison:
    """One number on each side, and no noise known."""
    arrays = (a.recent, b.recent) if measure == "recent_norm" else (a.weight_norm, b.weight_norm)
    one, other = _joined(arrays[0], unit.a), _joined(arrays[1], unit.b)
    same = one == other or abs(one - other) <= ROUNDING * max(one, other)
    wholes = [float(np.nansum(np.square(array))) for array in arrays]
    shares = [
        value * value / whole if whole > 0.0 else math.nan for value, whole in zip((one, other), wholes, strict=True)
    ]
    return UnitComparison(
        name=unit.name,
        name_in_b=unit.name_in_b,
        typical=Both(_known(one), _known(other)),
        ratio=other / one if one > 0.0 and other > 0.0 else None,
        ratio_ci95=None,
        p_value=None,
        verdict="identical" if same else "unknown",
        share=_shares(shares),
    )


def _shares(shares: Sequence[float]) -> Both[float] | None:
    """Both shares; what rounding leaves of a whole is a whole."""
    if math.isnan(sum(shares)):
        return None
    return Both(*(1.0 if abs(share - 1.0) <= ROUNDING else share for share in shares))


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _series(a: Side, b: Side, unit: Unit, paired: bool) -> tuple[UnitComparison, Change | None, Change | None]:
    assert a.table is not None and b.table is not None
    norms = (a.norms(unit.a), b.norms(unit.b))
    known = [series[~np.isnan(series)] for series in norms]
    one, other = _logs(norms[0]), _logs(norms[1])
    noise = difference(np.where(np.isnan(other - one), np.nan, 0.0), other - one) if paired else difference(one, other)
    change = Change(noise)
    shown = not math.isnan(change.change)
    interval = change.interval() if change.known else None
    compared = UnitComparison(
        name=unit.name,
        name_in_b=unit.name_in_b,
        typical=Both(_typical(one, known[0]), _typical(other, known[1])),
        ratio=factor(change.change) if shown else None,
        ratio_ci95=None if interval is None else (factor(interval[0]), factor(interval[1])),
        p_value=change.probability if change.known else None,
        verdict="identical" if _same(a, b, unit) else "unknown",
        effective_steps=Both(*noise.effective) if shown else None,
        steps=Both(len(known[0]), len(known[1])),
        l2_norm=Both(Spread.of(known[0]), Spread.of(known[1])),
        share=_shares([_share(series, side.total) for series, side in zip(known, (a, b), strict=True)]),
        update_ratio=_both(a.table.update_ratio(unit.a), b.table.update_ratio(unit.b)),
    )
    zeros = _zeros(a, unit.a), _zeros(b, unit.b)
    compared = _with_shapes(replace(compared, zeros=_both(*map(_mean, zeros))), a, b, unit)
    return compared, change if shown else None, None if compared.zeros is None else Change(difference(*zeros))


def _typical(logs: FloatArray, norms: FloatArray) -> float | None:
    """The geometric mean of the norms that are not zero; 0 where all are."""
    held = logs[~np.isnan(logs)]
    if len(held):
        return math.exp(float(held.mean()))
    return 0.0 if len(norms) else None


def _share(norms: FloatArray, total: float) -> float:
    return float(np.square(norms).sum()) / total if total > 0.0 else math.nan


def _mean(series: FloatArray) -> float | None:
    """Of what is known; None where nothing is."""
    known = series[~np.isnan(series)]
    return float(known.mean()) if len(known) else None


def _both(a: float | None, b: float | None) -> Both[float] | None:
    return None if a is None or b is None else Both(a, b)


def _zeros(side: Side, members: Sequence[int]) -> FloatArray:
    """The share of zeros, float64 [steps]; NaN at steps at which not all of ``members`` have a finite gradient."""
    assert side.table is not None
    places = list(members)
    numel = sum(side.tensors[i].numel for i in places)
    here = side.finite & side.table.present[:, places].all(axis=1)
    return np.where(here & (numel > 0), side.table.zeros[:, places].sum(axis=1) / max(1, numel), np.nan)


def _zeros_differ(unit: UnitComparison, beyond_noise: bool) -> bool:
    return beyond_noise and unit.zeros is not None and abs(unit.zeros.b - unit.zeros.a) >= LEAST_ZEROS


def _with_shapes(unit: UnitComparison, a: Side, b: Side, places: Unit) -> UnitComparison:
    """``unit`` with how far its shapes are apart, and how far the halves of one side are from each other."""
    if not a.shapes or not b.shapes:
        return unit
    halves = [
        [Shape.merge(side.shapes[i][half] for i in members) for half in (0, 1)]
        for side, members in ((a, places.a), (b, places.b))
    ]
    apart = distance(Shape.merge(halves[0]), Shape.merge(halves[1]))
    own = [distance(*pair) for pair in halves]
    noise = max(d for d in own if d is not None) if None not in own else None
    differ = apart is not None and noise is not None and apart > max(LEAST_SHAPE, SHAPE_FACTOR * noise)
    return replace(unit, shape_distance=apart, shape_noise=noise, shape_differs=differ)


def _same(a: Side, b: Side, unit: Unit) -> bool:
    """Whether all numbers of the unit are the same on both sides, step by step."""
    one, other = a.table, b.table
    assert one is not None and other is not None
    i, j = list(unit.a), list(unit.b)
    if not np.array_equal(one.index, other.index) or len(i) != len(j):
        return False
    exact = all(
        np.array_equal(mine[:, i], theirs[:, j])
        for mine, theirs in (
            (one.zeros, other.zeros),
            (one.nan, other.nan),
            (one.inf, other.inf),
            (one.present, other.present),
        )
    )
    return exact and all(
        np.allclose(mine[:, i], theirs[:, j], rtol=ROUNDING, atol=0.0, equal_nan=True)
        for mine, theirs in ((one.energy, other.energy), (one.max_abs, other.max_abs))
    )


def _judged(unit: UnitComparison, change: Change | None, apart: bool, zeros_differ: bool) -> UnitComparison:
    verdict: Verdict = unit.verdict
    if not apart and unit.ratio_ci95 is not None and unit.ratio_ci95[1] > WIDEST * unit.ratio_ci95[0]:
        unit, change = replace(unit, ratio_ci95=None), None
    if verdict != "identical" and change is not None and change.known:
        same = change.noise.error == 0.0 and abs(change.change) <= ROUNDING and unit.steps != Both(1, 1)
        # A log of norms says no more of a unit than that its norm is the same at every step.
        verdict = "differs" if apart else "identical" if same and unit.zeros is None else "within noise"
    if verdict == "unknown" and unit.ratio is None and unit.steps is not None and min(unit.steps.a, unit.steps.b) > 1:
        # Zero at every step of one side, and not of the other.
        alone = None not in (unit.typical.a, unit.typical.b) and bool(unit.typical.a or unit.typical.b)
        verdict = "differs" if alone else "unknown"
    return replace(unit, verdict=verdict, zeros_differ=zeros_differ)


def _rank(unit: UnitComparison, change: Change | None) -> tuple[int, float]:
    """What differs comes first, by how far from 1 its ratio surely is; then the rest by its ratio."""
    order: dict[Verdict, int] = {"differs": 0, "unknown": 1, "within noise": 2, "identical": 3}
    if unit.ratio is None:
        return order[unit.verdict], -math.inf if unit.verdict == "differs" else math.inf
    beyond = abs(math.log(unit.ratio))
    if change is not None and unit.ratio_ci95 is not None:
        low, high = change.interval()
        beyond = max(low, -high)
    return order[unit.verdict], -beyond
