"""Where a run changes its size: change points of the log norm."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from gradscope.intervals import log_norms

FloatArray = NDArray[np.float64]

MOST_PHASES = 8
SHORTEST_PHASE = 8
# Neighbours whose median norms differ by less than a quarter are one phase to a reader.
SMALLEST_CHANGE = math.log(1.25)
# Of the largest squared t statistic over all places.  With known noise it exceeds about 13 in 1 % of steady runs
# (Andrews 1993); the rest allows for noise that is itself estimated.
PENALTY = 30.0
# Blocks over whose means the noise is measured; the fewest blocks span the longest correlations.
BLOCK_COUNTS = (64, 32, 16)
# E[x²; |x| below its 90th percentile]/0.9 for a standard normal x.
TRIMMED_SHARE = 0.6230


@dataclass(frozen=True, slots=True)
class _Split:
    """The best place to divide ``start:stop``, and how clearly it stands out."""

    start: int
    place: int
    stop: int
    statistic: float


def find_phases(norms: FloatArray) -> list[range]:
    """Divide a run into at most 8 stretches of steady size; ``norms`` is float64 [steps], all finite.

    Binary segmentation of the log norm by the largest CUSUM statistic, spikes pulled in.  The noise is the long-run
    variance, so that correlated steps raise no false alarm.  A phase has at least max(8, steps/32) steps.
    Returns the phases' positions in order; none for an empty run.
    """
    if len(norms) == 0:
        return []
    series = log_norms(norms)
    shortest = max(SHORTEST_PHASE, math.ceil(len(series) / 32))
    places: list[int] = []
    candidates = [_best_split(series, 0, len(series), shortest)]
    while len(places) < MOST_PHASES - 1:
        split = max((c for c in candidates if c is not None), key=lambda c: c.statistic, default=None)
        if split is None:
            break
        places.append(split.place)
        candidates.remove(split)
        candidates.append(_best_split(series, split.start, split.place, shortest))
        candidates.append(_best_split(series, split.place, split.stop, shortest))
    edges = [0, *sorted(places), len(series)]
    return [range(a, b) for a, b in pairwise(edges)]


def _best_split(series: FloatArray, start: int, stop: int, shortest: int) -> _Split | None:
    """The change point of ``series[start:stop]`` that stands out most, if one does."""
    n = stop - start
    if n < 2 * shortest:
        return None
    part = _without_spikes(series[start:stop], shortest // 2)
    left = np.arange(shortest, n - shortest + 1)
    drift = np.cumsum(part - part.mean())[left - 1]
    gains = drift**2 * n / (left * (n - left))
    best = int(np.argmax(gains))
    before, after = np.split(part, [left[best]])
    noise = max(
        _block_noise(part), _autoregressive_noise(np.concatenate([before - before.mean(), after - after.mean()]))
    )
    change = abs(float(np.median(before) - np.median(after)))
    if gains[best] < PENALTY * noise or change < SMALLEST_CHANGE:
        return None
    statistic = float(gains[best]) / noise if noise > 0.0 else math.inf
    return _Split(start, start + int(left[best]), stop, statistic)


def _without_spikes(values: FloatArray, most: int) -> FloatArray:
    """``values`` with the ``most`` largest and smallest pulled in to the next one: fewer than a phase has."""
    ordered = np.partition(values, [most, len(values) - 1 - most])
    return np.clip(values, ordered[most], ordered[len(values) - 1 - most])


def _autoregressive_noise(residuals: FloatArray) -> float:
    """The long-run variance σ²(1+φ)/(1−φ) of a first-order autoregression (Andrews 1991) fitted to ``residuals``.

    φ is corrected for its bias in short series, (1+4φ)/n by Kendall (1954), taken twice for the two means removed.
    """
    n = len(residuals)
    variance = float(np.mean(residuals**2))
    if variance == 0.0:
        return 0.0
    phi = float(np.mean(residuals[1:] * residuals[:-1])) / variance
    phi = min(max(0.0, phi + 2.0 * (1.0 + 4.0 * phi) / n), 1.0 - 1.0 / n)
    return variance * (1.0 + phi) / (1.0 - phi)


def _block_noise(series: FloatArray) -> float:
    """The long-run variance from means of neighbouring blocks, which a change of level or a trend leaves alone.

    Half the mean squared difference of the means, times the block length; a tenth of the differences, the largest, are
    left out (they may straddle a change) and made up for by the factor for normal differences.
    """
    estimates = [0.0]
    for count in BLOCK_COUNTS:
        length = len(series) // count
        if length:
            means = series[: count * length].reshape(count, length).mean(axis=1)
            squares = np.sort(np.diff(means) ** 2)[: math.floor(0.9 * (count - 1))]
            estimates.append(length * float(squares.mean()) / 2.0 / TRIMMED_SHARE)
    return max(estimates)
