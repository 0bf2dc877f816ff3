"""Round numbers that cover a range of norms evenly on a logarithmic scale: histogram edges and thresholds to try."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gradscope.results import NormHistogram

MOST_BINS = 24
# Edges per decade, finest first: 10^(k/n) to three digits, then to two (as in the E series of resistors).
DENSITIES = (240.0, 120.0, 96.0, 48.0, 24.0, 12.0, 6.0, 3.0, 2.0, 1.0, 0.5, 0.2, 0.1, 0.05, 0.02)
RUNGS = 13


def norm_histogram(norms: NDArray[np.float64]) -> NormHistogram:
    """Count ``norms`` (float64 [steps], finite, ≥ 0) in at most 24 bins; a zero norm counts in the first."""
    positive = norms[norms > 0.0]
    if not len(positive):
        only = 0.0 if len(norms) else math.nan
        return NormHistogram(edges=(0.0, 1.0), counts=(len(norms),), smallest=only, largest=only)
    largest = float(positive.max())
    edges = _edges(float(positive.min()), largest)
    counts, _ = np.histogram(np.maximum(norms, edges[0]), bins=edges)
    return NormHistogram(
        edges=tuple(edges),
        counts=tuple(int(count) for count in counts),
        smallest=float(norms.min()),
        largest=largest,
    )


def round_ladder(norms: NDArray[np.float64], given: Sequence[float]) -> list[float]:
    """About 13 round thresholds from the 1 % quantile of ``norms`` to their maximum, and the ``given`` ones."""
    positive = norms[norms > 0.0]
    if not len(positive):
        return sorted(set(given))
    rungs = np.geomspace(np.percentile(positive, 1), positive.max(), RUNGS)
    return sorted({*given, *(_rounded(float(rung), 2) for rung in rungs)})


def _edges(smallest: float, largest: float) -> list[float]:
    for density in DENSITIES:
        if (math.log10(largest) - math.log10(smallest)) * density > MOST_BINS:
            continue
        first = math.floor(math.log10(smallest) * density) - 1
        last = math.ceil(math.log10(largest) * density) + 1
        edges = [_rounded(10.0 ** (k / density), 2 if density <= 24 else 3) for k in range(first, last + 1)]
        # The rounding may have moved an edge past an end of the range: one was added at each for that.
        inner = [k for k, edge in enumerate(edges) if edge <= smallest][-1]
        outer = next(k for k, edge in enumerate(edges) if edge >= largest and k > inner)
        if outer - inner <= MOST_BINS:
            return edges[inner : outer + 1]
    raise AssertionError("the coarsest density covers every float64")


def _rounded(value: float, digits: int) -> float:
    return float(f"{value:.{digits}g}")
