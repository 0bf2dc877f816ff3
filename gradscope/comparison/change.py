"""How far the logarithm of a norm changed between two runs, and whether that is more than noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gradscope.differences import Difference
from gradscope.student_t import student_probability, student_quantile

# At this level over all units of a kind together a unit is said to differ (Holm 1979).
LEVEL = 0.05
# Of fewer parts of the runs nobody can tell how long they hang together: of 12 steps of a first-order autoregression
# (0.9), 29 % of pairs would differ.  Nor is an error known with fewer degrees of freedom.
FEWEST_PARTS = 16
FEWEST_FREEDOM = 4.0
# How the difference itself wanders is told by this many parts of the runs.
SEGMENTS = 8
# Sums in float64 over the same numbers in another order.
ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Change:
    """How far the logarithm of a norm differs, by the noise within the runs and by how the difference wanders."""

    noise: Difference

    @property
    def change(self) -> float:
        """The mean of log B − log A."""
        return self.noise.change

    @property
    def known(self) -> bool:
        """Whether there is an interval: enough independent steps, or a change that is the same throughout."""
        if not (math.isfinite(self.noise.error) and math.isfinite(self.noise.change)):
            return False
        parts = sum(not math.isnan(change) for change in self.noise.changes)
        return self.noise.error == 0.0 or (parts >= FEWEST_PARTS and self.noise.freedom >= FEWEST_FREEDOM)

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """The wider of the intervals by noise within the runs and by the scatter of equal fractions of them."""
        low, high = self.noise.interval(confidence)
        wander, freedom = self._wander()
        if wander > 0.0:
            reach = student_quantile(0.5 + confidence / 2.0, freedom) * wander
            low, high = min(low, self.change - reach), max(high, self.change + reach)
        return low, high

    @property
    def probability(self) -> float:
        """How likely so large a change is where there is none; NaN where there is no interval."""
        if not self.known:
            return math.nan
        if abs(self.change) <= ROUNDING:
            return 1.0
        found = 0.0
        if self.noise.error > 0.0:
            found = student_probability(abs(self.change) / self.noise.error, self.noise.freedom)
        wander, freedom = self._wander()
        return max(found, student_probability(abs(self.change) / wander, freedom)) if wander > 0.0 else found

    def _wander(self) -> tuple[float, float]:
        changes = np.array(self.noise.changes)
        if len(changes) < SEGMENTS or np.isnan(changes).any():
            return 0.0, math.inf
        segments = changes.reshape(SEGMENTS, -1).mean(axis=1)
        return float(segments.std(ddof=1)) / math.sqrt(SEGMENTS), SEGMENTS - 1.0


def factor(change: float) -> float:
    """The ratio whose logarithm is ``change``; infinite where no float64 holds it."""
    return math.exp(change) if change < 709.0 else math.inf


def constant_change(changes: Sequence[Change | None]) -> tuple[float, float, float] | None:
    """The one change that all of ``changes`` allow, together at 95 %: its middle, least and most; None: there is none.

    The intervals are simultaneous (Bonferroni); what they all hold is what is left of each.
    """
    known = [change for change in changes if change is not None and change.known]
    if not known:
        return None
    confidence = 1.0 - LEVEL / len(known)
    intervals = [change.interval(confidence) for change in known]
    low, high = max(low for low, _ in intervals), min(high for _, high in intervals)
    return ((low + high) / 2.0, low, high) if low <= high else None
