"""Medians of neighbouring steps."""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray


def running_median(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """The median of each ``window`` neighbours of ``values`` (float64 [n]): float64 [n − window + 1]."""
    return np.asarray(np.median(sliding_window_view(values, window), axis=1))
