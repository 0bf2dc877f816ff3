"""Where a run changes its size: change points of the log norm."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradscope.intervals import log_norms

FloatArray = NDArray[np.float64]

MOST_PHASES = 8
SHORTEST_PHASE = 8
# Neighbours whose median norms differ by less than a quarter are one phase to a reader.
SMALLEST_CHANGE = math.log(1.25)
# Of the largest squared t statistic over all places.  A Brownian bridge trimmed at 1/32 exceeds 15 in 1 % of the runs
# (Andrews 1993); the rest allows for a noise level that is itself estimated.
PENALTY = 30.0
# Blocks over whose means the noise is measured; the fewest blocks span the longest correlations.
BLOCK_COUNTS = (64, 32, 16)


@dataclass(frozen=True, slots=True)
class _Split:
    """The best place to divide ``start:stop``, and how clearly it stands out."""

    start: int
    place: int
    stop: int
    statistic: float


def find_phases(norms: FloatArray) -> list[range]:
    """Divide a run into at most 8 stretches of steady size; ``norms`` is float64 [steps], all finite.

    Binary segmentation of the ranks of the log norm, which a spike cannot bend, by the largest CUSUM statistic; the
    noise is measured by differences between means of neighbouring blocks, so that neither the correlation of
    neighbouring steps nor the change itself passes for something else.  A phase has at least max(8, steps/32) steps.
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
    return [range(a, b) for a, b in zip(edges, edges[1:], strict=False)]


def _best_split(series: FloatArray, start: int, stop: int, shortest: int) -> _Split | None:
    """The change point of ``series[start:stop]`` that stands out most, if one does."""
    n = stop - start
    if n < 2 * shortest:
        return None
    part = series[start:stop]
    ranks = _ranks(part)
    left = np.arange(shortest, n - shortest + 1)
    drift = np.cumsum(ranks - ranks.mean())[left - 1]
    noise = _long_run_variance(ranks)
    if noise == 0.0:
        noise = 1.0 / n
    statistics = drift**2 * n / (left * (n - left)) / noise
    best = int(np.argmax(statistics))
    place = int(left[best])
    change = abs(float(np.median(part[:place]) - np.median(part[place:])))
    if statistics[best] < PENALTY or change < SMALLEST_CHANGE:
        return None
    return _Split(start, start + place, stop, float(statistics[best]))


def _ranks(values: FloatArray) -> FloatArray:
    """Mid-ranks (ties share theirs), as shares of the length."""
    ordered = np.sort(values)
    below = np.searchsorted(ordered, values, side="left")
    up_to = np.searchsorted(ordered, values, side="right")
    return (below + up_to) / (2.0 * len(values))


def _long_run_variance(series: FloatArray) -> float:
    """n times the variance of a mean of n values: Σ of all autocovariances, unmoved by a change of level.

    Half the mean squared difference of neighbouring block means, times the block length; a tenth of the differences, the
    largest, are left out (they may straddle a change) and made up for by the factor for normal differences.
    """
    estimates = [float(np.var(np.diff(series))) / 2.0 if len(series) > 2 else 0.0]
    for count in BLOCK_COUNTS:
        length = len(series) // count
        if length < 1:
            continue
        blocks = series[: count * length].reshape(count, length).mean(axis=1)
        squares = np.sort(np.diff(blocks) ** 2)[: math.floor(0.9 * (count - 1))]
        estimates.append(length * float(squares.mean()) / 2.0 / TRIMMED_SHARE)
    return max(estimates)


# E[x²; |x| below its 90th percentile]/0.9 for a standard normal x.
TRIMMED_SHARE = 0.6230
