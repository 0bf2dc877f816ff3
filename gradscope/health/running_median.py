"""Medians of neighbouring steps."""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

# Windows that overlap by three quarters or more tell the same.
PLACES_PER_WINDOW = 4
# Of more steps than these, evenly spaced, a median is no other.
MOST_BEFORE = 256


def running_medians(values: NDArray[np.float64], window: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Where windows of ``window`` neighbours start, the last of them at the end, and the median of each.

    ``values`` is float64 [n], n ≥ window.  Windows are a quarter of their length apart, or one place.
    """
    starts = np.arange(len(values) - window, -1, -max(1, window // PLACES_PER_WINDOW))[::-1]
    return starts, np.median(sliding_window_view(values, window)[starts], axis=1)


def medians_before(values: NDArray[np.float64], starts: NDArray[np.int64]) -> NDArray[np.float64]:
    """The median of all ``values`` (float64 [n]) before each of ``starts``, all ≥ 1."""
    return np.array([np.median(values[: start : max(1, start // MOST_BEFORE)]) for start in starts])
