"""The six numbers that stand for a series of values."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


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
        """The spread of ``values`` (any shape); all NaN where there are none, or where one is."""
        series = np.asarray(values, dtype=np.float64).ravel()
        if series.size <= 1:
            return cls.constant(float(series[0]) if series.size else math.nan)
        series = np.sort(series)
        if math.isnan(series[-1]):
            return cls.constant(math.nan)
        return cls(
            min=float(series[0]),
            p50=_percentile(series, 50),
            mean=float(series.mean()),
            p95=_percentile(series, 95),
            p99=_percentile(series, 99),
            max=float(series[-1]),
        )

    @classmethod
    def constant(cls, value: float) -> Spread:
        """The spread of a series that never changes."""
        return cls(value, value, value, value, value, value)


def _percentile(ordered: NDArray[np.float64], percent: int) -> float:
    """As ``numpy.percentile``, which loads numpy.ma (12 ms) and sorts again; ``ordered`` is ascending."""
    below, part = divmod(percent * (len(ordered) - 1), 100)
    low, high = float(ordered[below]), float(ordered[min(below + 1, len(ordered) - 1)])
    return low if low == high or part == 0 else low + (high - low) * part / 100
