"""The six numbers that stand for a series of values."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True, slots=True)
class Spread:
    """Minimum, median, mean, 95th and 99th percentile (linear interpolation) and maximum of a series."""

    min: float
    p50: float
    mean: float
    p95: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: ArrayLike) -> Spread:
        """The spread of ``values`` (any shape); all NaN where there are none."""
        series = np.asarray(values, dtype=np.float64).ravel()
        if series.size == 0:
            return cls.constant(float("nan"))
        # Between infinities there is nothing to interpolate.
        if np.isfinite(series).all():
            p50, p95, p99 = np.percentile(series, [50, 95, 99])
        else:
            p50, p95, p99 = np.percentile(series, [50, 95, 99], method="nearest")
        return cls(
            min=float(series.min()),
            p50=float(p50),
            mean=float(series.mean()),
            p95=float(p95),
            p99=float(p99),
            max=float(series.max()),
        )

    @classmethod
    def constant(cls, value: float) -> Spread:
        """The spread of a series that never changes."""
        return cls(value, value, value, value, value, value)
