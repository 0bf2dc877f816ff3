"""The shape of a distribution of magnitudes, whatever their size, and how far two shapes are apart."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradscope.spectra_sample import Spectra
from gradscope.spectrum import MagnitudeSpectrum

FloatArray = NDArray[np.float64]

CELLS_AN_OCTAVE = 16


@dataclass(frozen=True, slots=True, eq=False)
class Shape:
    """How many non-zero elements lie in each cell of 1/16 octave of |g|, from cell ``first`` on, and their Σg²."""

    first: int = 0
    counts: FloatArray | None = None
    sum_squares: float = 0.0

    @classmethod
    def of(cls, spectrum: MagnitudeSpectrum) -> Shape:
        """The shape of ``spectrum``, each of whose bins stands at its mean."""
        if not spectrum.count.size:
            return cls()
        cells = np.floor(np.log2(spectrum.sum_abs / spectrum.count) * CELLS_AN_OCTAVE).astype(np.int64)
        first = int(cells.min())
        return cls(first, np.bincount(cells - first, spectrum.count).astype(np.float64), spectrum.sum_squares)

    @classmethod
    def merge(cls, shapes: Iterable[Shape]) -> Shape:
        """The shape of all their elements together."""
        filled = [(shape.first, shape.counts, shape.sum_squares) for shape in shapes if shape.counts is not None]
        if not filled:
            return cls()
        first = min(start for start, _, _ in filled)
        counts = np.zeros(max(start + len(held) for start, held, _ in filled) - first)
        for start, held, _ in filled:
            counts[start - first : start - first + len(held)] += held
        return cls(first, counts, math.fsum(squares for _, _, squares in filled))

    def octaves(self) -> tuple[FloatArray, FloatArray] | None:
        """log2(|g|/rms), ascending, and the share of the non-zero elements there; None where there are none."""
        if self.counts is None or not 0.0 < self.sum_squares < math.inf:
            return None
        total = float(self.counts.sum())
        rms = math.log2(self.sum_squares / total) / 2.0
        cells = np.arange(self.first, self.first + len(self.counts))
        return (cells + 0.5) / CELLS_AN_OCTAVE - rms, self.counts / total


def distance(a: Shape, b: Shape) -> float | None:
    """The Wasserstein-1 distance in octaves: how far |g|/rms must be moved, on average, to make one the other.

    None where one of them has no elements other than zero.  In one dimension it is ∫|F_a − F_b| (Vallender 1974).
    """
    one, other = a.octaves(), b.octaves()
    if one is None or other is None:
        return None
    at = np.concatenate([one[0], other[0]])
    order = np.argsort(at, kind="stable")
    apart = np.cumsum(np.concatenate([one[1], -other[1]])[order])
    return float(np.abs(apart[:-1] * np.diff(at[order])).sum())


class HalfShapes:
    """The shape of each of ``tensors`` in the first and in the second half of ``steps``, of those that are shown."""

    def __init__(self, tensors: int, steps: int) -> None:
        self._steps = steps
        self._halves = [[Shape(), Shape()] for _ in range(tensors)]
        self._shown = False

    def take(self, row: int, spectra: Spectra) -> None:
        """Add the shapes of a step, as a ``SpectraSample`` shows it."""
        self._shown = True
        half = int(2 * row >= self._steps)
        for halves, spectrum in zip(self._halves, spectra, strict=True):
            if spectrum is not None:
                halves[half] = Shape.merge([halves[half], Shape.of(spectrum)])

    def halves(self) -> tuple[tuple[Shape, Shape], ...]:
        """For each tensor its two shapes; none where no step was shown."""
        return tuple((early, late) for early, late in self._halves) if self._shown else ()
