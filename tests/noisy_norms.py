"""Norms of healthy runs: log-normal, correlated, of every width met in reinforcement learning."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

STEPS = 300


def heavy_tailed(seed: int, middle: float) -> NDArray[np.float64]:
    """An autoregression of first order of the log norm around ``middle``; its width and memory go by the seed."""
    rng = np.random.default_rng(seed)
    memory, width = (0.0, 0.5, 0.9, 0.98)[seed % 4], (0.3, 0.7, 1.0)[seed % 3]
    logs = rng.standard_normal(STEPS)
    for step in range(1, STEPS):
        logs[step] = memory * logs[step - 1] + np.sqrt(1.0 - memory**2) * logs[step]
    return np.asarray(middle * np.exp(width * logs))
