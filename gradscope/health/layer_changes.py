"""How far the layers of a run lie from those of a baseline, and what of that seeds and noise explain."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradscope.differences import Course
from gradscope.health.baselines import Baseline
from gradscope.health.run_courses import LayerCourses, RunCourses
from gradscope.layer_series import QUANTITIES, Quantity
from gradscope.student_t import student_probability, student_quantile

FloatArray = NDArray[np.float64]

# The assumed spread between seeds counts as much as what this many further runs say of a layer.
ASSUMED_RUNS = 4.0
# It is known no better than from about as many pairs of runs.
ASSUMED_FREEDOM = 30.0
# The layers of a network do not vary by themselves.
LAYERS_PER_FREEDOM = 3.0
# Of fewer fractions of a run no scatter is known.
FEWEST_FRACTIONS = 4
# Fewer layers have no typical one.
FEWEST_LAYERS = 3
EVERYWHERE = "most layers"


@dataclass(frozen=True, slots=True)
class LayerChange:
    """One quantity of one layer, or of the typical one, against the baseline.

    ``change`` is the mean of log(run / baseline) over equal fractions of the runs, NaN where too few are known.  As
    large as ``margin`` it counts for nothing; ``spread`` is the standard deviation expected of it, ``freedom`` are the
    degrees of freedom by which that is known.
    """

    where: str
    quantity: Quantity
    change: float
    margin: float
    spread: float
    freedom: float

    @property
    def known(self) -> bool:
        """Whether there is enough to tell a change from noise."""
        return math.isfinite(self.change) and math.isfinite(self.spread)

    @property
    def excess(self) -> float:
        """How far the change is beyond its margin, in standard deviations."""
        beyond = abs(self.change) - self.margin
        return beyond / self.spread if self.spread > 0.0 else math.copysign(math.inf, beyond)

    @property
    def probability(self) -> float:
        """Of so large a change, where in truth it is no larger than the margin."""
        return student_probability(self.excess, self.freedom) / 2.0 if self.excess > 0.0 else 1.0

    def reach(self, alpha: float) -> float:
        """The largest change that passes a test of this size by itself."""
        return self.margin + student_quantile(1.0 - min(alpha, 0.5), self.freedom) * self.spread


def layer_changes(
    run: RunCourses, baseline: Baseline, ratio: float, spreads: Mapping[Quantity, float]
) -> tuple[list[LayerChange], list[LayerChange]]:
    """Those of the typical layer, and those of each layer, in every quantity that run and baseline have.

    ``ratio`` is the factor up to which a layer counts as unchanged; the typical layer's is its root.  ``spreads`` are
    the factors by which a quantity is assumed to differ between seeds.
    """
    everywhere, layers = [], []
    margin, further = math.log(ratio), len(baseline.runs) - 1
    for quantity in QUANTITIES:
        found = _of_quantity(run, baseline, quantity)
        if not found:
            continue
        own = {name: _variance_between(changes) for name, changes in found.items()}
        weight = further * len(found) / LAYERS_PER_FREEDOM
        assumed = ASSUMED_RUNS * math.log(spreads[quantity]) ** 2
        pooled = (assumed + weight * float(np.mean(list(own.values())))) / (ASSUMED_RUNS + weight)
        freedom = ASSUMED_FREEDOM + weight
        # The mean of a baseline of several runs has a part of the spread, too.
        wider = 1.0 + 1.0 / (1 + further)
        means = {name: np.asarray(changes.mean(axis=0)) for name, changes in found.items()}
        for name, mean in means.items():
            variance = (ASSUMED_RUNS * pooled + further * own[name]) / (ASSUMED_RUNS + further)
            layers.append(_change(name, quantity, mean, margin, variance * wider, freedom))
        if len(found) >= FEWEST_LAYERS:
            # What differs at random from layer to layer is not there in the typical one.
            typical = _typical(list(means.values()))
            everywhere.append(_change(EVERYWHERE, quantity, typical, margin / 2.0, pooled * wider, freedom))
    return everywhere, layers


def _of_quantity(run: RunCourses, baseline: Baseline, quantity: Quantity) -> dict[str, FloatArray]:
    """How far each layer lies above each run of the baseline, [runs, fractions]."""
    common = [name for name in run.layers if name in baseline.runs[0].layers]
    changes = {name: _against(run.layers[name], [r.layers[name] for r in baseline.runs], quantity) for name in common}
    return {name: found for name, found in changes.items() if found is not None}


def _against(layer: LayerCourses, usual: Sequence[LayerCourses], quantity: Quantity) -> FloatArray | None:
    """How far the layer lies above each run of the baseline, [runs, fractions]; NaN where any is not known."""
    if quantity not in layer.courses or any(quantity not in other.courses for other in usual):
        return None
    courses = [layer.courses[quantity], *(other.courses[quantity] for other in usual)]
    fractions = min(len(course.means) for course in courses)
    here, *others = (course.coarser(fractions) for course in courses)
    changes = here - np.array(others)
    changes[:, np.isnan(changes).any(axis=0)] = math.nan
    return None if np.isnan(changes).all() else changes


def _typical(means: Sequence[FloatArray]) -> FloatArray:
    """The median over the layers, in each fraction that is known of all."""
    fractions = min(len(changes) for changes in means)
    coarse = np.array([Course(tuple(changes.tolist()), 0.0).coarser(fractions) for changes in means])
    return np.asarray(np.median(coarse, axis=0))


def _variance_between(changes: FloatArray) -> float:
    """The variance between the runs of the baseline, from what the run differs from each; 0 for one run."""
    return float(np.nanmean(changes, axis=1).var(ddof=1)) if len(changes) > 1 else 0.0


def _change(
    where: str, quantity: Quantity, changes: FloatArray, margin: float, variance: float, freedom: float
) -> LayerChange:
    """A change with what is expected of it, ``variance`` being that between seeds.

    The noise within the runs is what scatters from one fraction to the next (von Neumann 1941, the mean square
    successive difference).  Slower wanderings are how seeds differ, and would hide a change that comes with time.
    """
    known = changes[~np.isnan(changes)]
    if len(known) < FEWEST_FRACTIONS:
        return LayerChange(where, quantity, math.nan, margin, math.inf, freedom)
    noise = float(np.square(np.diff(known)).mean()) / 2.0 / len(known)
    # Successive differences are worth two thirds of as many values.
    doubt = variance**2 / freedom + noise**2 / (2.0 / 3.0 * (len(known) - 1))
    total = variance + noise
    freedom = total**2 / doubt if doubt > 0.0 else math.inf
    return LayerChange(where, quantity, float(known.mean()), margin, math.sqrt(total), freedom)
