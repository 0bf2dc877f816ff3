"""The one ratio that all norms of two runs have, where they have one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from gradscope.comparison.change import Change, constant_change, factor
from gradscope.comparison.familiar_ratios import EXACT, familiar_ratios
from gradscope.comparison.matched_names import MatchedTensors
from gradscope.comparison.side import Side
from gradscope.comparison_results import ConstantRatio, Measure, UnitComparison

# A common ratio that is known less well than this is no particular number.
WIDEST_CONSTANT = 1.25
# Seeds take a ratio that far from a power of two; other numbers lie too close together to be told apart so.
SEEDS = 1.05
# Of the ratios of single steps and tensors, so many must be the same.
NEARLY_ALL = 0.99


def constant_ratio(
    a: Side,
    b: Side,
    matched: MatchedTensors,
    layers: tuple[Sequence[UnitComparison], Sequence[Change | None]],
    measure: Measure,
) -> ConstantRatio | None:
    """The one number that all ratios are, if it is not 1; ``layers`` are those compared and the change behind each."""
    ranks = a.source.ranks, b.source.ranks
    exact = _exact_ratio(a, b, matched, measure)
    if exact is not None:
        if abs(exact - 1.0) <= EXACT:
            return None
        low, high = exact * (1.0 - EXACT), exact * (1.0 + EXACT)
        return ConstantRatio(exact, True, None, familiar_ratios(exact, low, high, ranks, exact=True))
    units, changes = layers
    if measure != "norm" or len(units) < 2 or None in changes:
        return None
    common = constant_change(changes)
    if common is None or common[1] <= 0.0 <= common[2] or common[2] - common[1] > math.log(WIDEST_CONSTANT):
        return None
    if not all(unit.verdict == "differs" for unit in units):
        return None
    ratio, low, high = map(factor, common)
    explanations = familiar_ratios(ratio, low, high, ranks)
    power = 2.0 ** round(math.log2(ratio))
    if not explanations and power != 1.0 and abs(math.log(ratio / power)) <= math.log(SEEDS):
        explanations = familiar_ratios(power, power, power, ranks, exact=True)
    return ConstantRatio(ratio, False, (low, high), explanations)


def _exact_ratio(a: Side, b: Side, matched: MatchedTensors, measure: Measure) -> float | None:
    """The ratio that nearly every tensor has at nearly every step; None where there is none."""
    if measure == "weight_norm" or not matched.pairs:
        return None
    i, j = [i for i, _ in matched.pairs], [j for _, j in matched.pairs]
    if measure == "recent_norm":
        if a.table is not None or b.table is not None:
            return None
        norms = a.recent[i], b.recent[j]
    else:
        assert a.table is not None and b.table is not None
        if not np.array_equal(a.table.index, b.table.index):
            return None
        both = a.finite & b.finite
        norms = np.sqrt(a.table.energy[both][:, i]), np.sqrt(b.table.energy[both][:, j])
    there = (norms[0] > 0.0) & (norms[1] > 0.0)
    if np.count_nonzero(there) < 2:
        return None
    changes = np.log(norms[1][there]) - np.log(norms[0][there])
    middle = float(np.median(changes))
    near = np.abs(changes - middle) <= EXACT
    return factor(middle) if near.mean() >= NEARLY_ALL else None
