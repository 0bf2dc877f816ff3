"""How sure a clip rate is: the Wilson interval, for steps that are not independent of each other."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

FEWEST_EFFECTIVE_STEPS = 10.0
Z_95 = 1.959963984540054


def clip_rate_interval(
    clipped: NDArray[np.bool_], norms: NDArray[np.float64]
) -> tuple[tuple[float, float] | None, float]:
    """The 95 % interval of the share of ``clipped`` (bool [steps]), and the effective number of steps behind it.

    The sample size is corrected by the autocorrelation of the indicator, or of the log of ``norms`` where the
    indicator never changes.  Below 10 effective steps there is no interval.
    """
    if len(clipped) == 0:
        return None, 0.0
    changes = bool(clipped.any() and not clipped.all())
    size = effective_sample_size(clipped if changes else log_norms(norms))
    if size < FEWEST_EFFECTIVE_STEPS:
        return None, size
    return wilson_interval(float(clipped.mean()), size), size


def wilson_interval(share: float, size: float, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval for a ``share`` seen in ``size`` independent trials (Wilson 1927)."""
    spread = z * z / size
    centre = (share + spread / 2) / (1 + spread)
    half_width = z / (1 + spread) * math.sqrt(share * (1 - share) / size + spread / (4 * size))
    # The interval of a share at the end of its range starts there exactly; the formula rounds.
    low = max(0.0, centre - half_width) if share > 0.0 else 0.0
    return low, (min(1.0, centre + half_width) if share < 1.0 else 1.0)


def effective_sample_size(series: ArrayLike) -> float:
    """How many independent values tell as much about the mean as ``series`` (one-dimensional) does: n/τ, at most n.

    τ = 1 + 2Σρ_k, summed by Geyer's initial monotone sequence (Geyer 1992, "Practical Markov chain Monte Carlo",
    section 3.3).  A series that never changes counts as one value.
    """
    values = np.asarray(series, dtype=np.float64)
    if len(values) < 2:
        return float(len(values))
    deviations = values - values.mean()
    if not deviations.any() or np.ptp(values) == 0.0:
        return 1.0
    pairs = _autocorrelation(deviations)
    pairs = pairs[: len(pairs) // 2 * 2].reshape(-1, 2).sum(axis=1)
    ends = np.flatnonzero(pairs <= 0.0)
    positive = pairs[: ends[0]] if len(ends) else pairs
    time = 2.0 * float(np.minimum.accumulate(positive).sum()) - 1.0 if len(positive) else 1.0
    return len(values) / max(1.0, time)


def log_norms(norms: NDArray[np.float64]) -> NDArray[np.float64]:
    """Natural logarithms of ``norms`` ≥ 0; a zero counts as half the smallest norm that is not."""
    positive = norms[norms > 0.0]
    floor = float(positive.min()) / 2.0 if len(positive) else 1.0
    return np.log(np.maximum(norms, floor))


def _autocorrelation(deviations: NDArray[np.float64]) -> NDArray[np.float64]:
    """ρ_k for k = 0 … n−1, by the Wiener–Khinchin theorem; padded so that the ends do not meet."""
    n = len(deviations)
    spectrum = np.fft.rfft(deviations, 1 << (2 * n - 1).bit_length())
    covariance = np.fft.irfft(np.abs(spectrum) ** 2)[:n]
    return np.asarray(covariance / covariance[0])
