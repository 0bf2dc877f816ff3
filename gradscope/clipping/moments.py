"""What scaling does to direction: three numbers per set of elements that merge exactly."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradscope.clipping.layout import Partition

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Sets of gradient elements, each multiplied by some factor s.  All arrays are float64 [steps, sets].

    ``energy`` is Σg²; ``mean`` and ``variance`` are those of s weighted by g², so g·c = energy·mean and
    ‖c‖² = energy·(mean² + variance) for the scaled gradient c.
    """

    energy: FloatArray
    mean: FloatArray
    variance: FloatArray

    def merge(self, sets: Partition) -> Moments:
        """The moments of unions of sets, by the pairwise update of Chan, Golub and LeVeque (1979).

        Where a union holds no energy its sets count alike, so that one common factor stays that factor.
        """
        energy = sets.total(self.energy)
        empty = energy == 0.0
        with np.errstate(invalid="ignore", divide="ignore"):
            weight = np.where(empty[:, sets.owner], (1.0 / sets.sizes)[sets.owner], self.energy / energy[:, sets.owner])
        # Deviations from a member's own factor, so that equal factors give a variance of exactly 0; the heaviest
        # member's, so that the mean keeps its digits where the others hardly count.
        heaviest = self.energy == sets.largest(self.energy)[:, sets.owner]
        origin = sets.largest(np.where(heaviest, self.mean, -np.inf))
        mean = origin + sets.total(weight * (self.mean - origin[:, sets.owner]))
        variance = sets.total(weight * (self.variance + (self.mean - mean[:, sets.owner]) ** 2))
        return Moments(energy, mean, variance)

    def norm_ratio(self) -> FloatArray:
        """‖c‖/‖g‖."""
        return np.hypot(self.mean, np.sqrt(self.variance))

    def direction_change_deg(self) -> FloatArray:
        """The angle between g and c in degrees; NaN where c is zero and so has no direction.

        tan θ = √(‖g‖²‖c‖² − (g·c)²)/(g·c) = √variance/mean by Lagrange's identity, without cancellation.
        """
        angle = np.degrees(np.arctan2(np.sqrt(self.variance), self.mean))
        return np.where((self.mean == 0.0) & (self.variance == 0.0), np.nan, angle)
