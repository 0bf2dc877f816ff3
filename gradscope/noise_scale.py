"""How much of a minibatch's gradient is signal and how much noise: the gradient noise scale, and how minibatches agree.

Source: McCandlish, Kaplan, Amodei, "An Empirical Model of Large-Batch Training", 2018, section 2 and appendix A.1.
A minibatch of B samples has the gradient g = G + noise of covariance Σ/B, so E‖g‖² = ‖G‖² + tr Σ/B.  The noise scale
tr Σ/‖G‖² is the number of samples at which signal and noise are equally large.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradscope import results
from gradscope.clipping.layout import Partition, TensorLayout
from gradscope.gradients import GradientSource, GradientStep, Progress
from gradscope.student_t import student_quantile

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

# Elements turned into float64 at a time.
BLOCK = 1 << 20
# A spread of fewer minibatches says nothing of their own.
FEWEST_FOR_INTERVAL = 8
# A second pass over the source must meet the gradients of the first.
SAME_GRADIENT = 1e-6


class MinibatchMeter:
    """Collects from the minibatches of one epoch, as they pass, what their noise scale and their cosines need.

    A step takes part where it says of how many ``samples`` it is, and of as many as the first, is finite, and has its
    elements at hand.  Three float64 sums as large as the model stay in memory (of the gradients, and of their
    directions as a whole and by layer), and a number per tensor and step.
    """

    def __init__(self, source: GradientSource, layout: TensorLayout) -> None:
        self._source = source
        self._layout = layout
        self._minibatch_size: int | None = None
        self._positions: list[int] = []
        self._energies: list[FloatArray] = []
        self._present: list[BoolArray] = []
        self._sums: list[_Sums] = []

    def see(self, position: int, step: GradientStep) -> None:
        """Take in the step at ``position`` of the source while it is in memory."""
        if step.samples is None or step.read is None or not step.finite:
            return
        energies = np.array(step.sum_squares, dtype=np.float64)
        if self._minibatch_size not in (None, step.samples) or not math.isfinite(energies.sum()):
            return
        self._minibatch_size = step.samples
        layers = self._layout.layers
        whole, by_layer = math.sqrt(energies.sum()), np.sqrt(layers.total(energies[None])[0])[layers.owner]
        if not self._sums:
            self._sums = [_Sums(tensor.numel) for tensor in self._source.tensors]
        for i in np.flatnonzero(energies).tolist():
            self._sums[i].add(step.read(i), whole, float(by_layer[i]))
        self._positions.append(position)
        self._energies.append(energies)
        self._present.append(np.ones(len(energies), np.bool_) if step.present is None else step.present.copy())

    def report(self, progress: Progress | None = None) -> results.MinibatchNoise | None:
        """The noise scale and the cosines; None of fewer than two minibatches.

        The interval needs the product of each gradient with their sum, which is known at the end only: the same steps
        are read a second time.  Where they are not the same any more there is no interval.
        """
        if self._minibatch_size is None or len(self._positions) < 2:
            return None
        energies, present = np.array(self._energies), np.array(self._present)
        products = self._products(energies, progress) if len(energies) >= FEWEST_FOR_INTERVAL else None
        sums = np.array([total.energies() for total in self._sums])
        series = _Series(self._minibatch_size, energies, present, products, sums)
        layout = self._layout
        whole = series.of(layout.joint)[0]
        return results.MinibatchNoise(
            samples=self._minibatch_size * len(energies),
            minibatch_size=self._minibatch_size,
            minibatches=len(energies),
            noise_scale=whole[0],
            mean_cosine=whole[1],
            groups=tuple(
                results.GroupNoise(name, noise)
                for name, (noise, _) in zip(layout.groups.names, series.of(layout.groups), strict=True)
            ),
            layers=tuple(
                results.LayerNoise(name, noise, cosine)
                for name, (noise, cosine) in zip(layout.layers.names, series.of(layout.layers, True), strict=True)
            ),
        )

    def _products(self, energies: FloatArray, progress: Progress | None) -> FloatArray | None:
        """Each gradient times the sum of all, [minibatches, tensors]; None where the gradients are others now."""
        products = np.zeros_like(energies)
        row_of = {position: row for row, position in enumerate(self._positions)}
        again = range(self._positions[0], self._positions[-1] + 1)
        for position, step in zip(again, self._source.read_steps(again, progress), strict=True):
            if position not in row_of:
                continue
            row = row_of[position]
            if step.read is None or not np.allclose(step.sum_squares, energies[row], rtol=SAME_GRADIENT, atol=0.0):
                return None
            for i in np.flatnonzero(energies[row]).tolist():
                products[row, i] = self._sums[i].times(step.read(i))
        return products


class _Sums:
    """Running sums of one tensor's gradients: as they are, and divided by the norm of the step and of its layer."""

    def __init__(self, numel: int) -> None:
        self._sums = np.zeros((3, numel))

    def add(self, gradient: NDArray[np.floating], whole: float, layer: float) -> None:
        flat = gradient.reshape(-1)
        for start in range(0, flat.size, BLOCK):
            block = flat[start : start + BLOCK].astype(np.float64)
            part = self._sums[:, start : start + BLOCK]
            part[0] += block
            part[1] += block / whole
            part[2] += block / layer

    def times(self, gradient: NDArray[np.floating]) -> float:
        """The product of ``gradient`` with the sum of all."""
        flat = gradient.reshape(-1)
        parts = range(0, flat.size, BLOCK)
        total = self._sums[0]
        return math.fsum(float(flat[i : i + BLOCK].astype(np.float64) @ total[i : i + BLOCK]) for i in parts)

    def energies(self) -> FloatArray:
        """The squared norm of each of the three sums."""
        return np.asarray(np.einsum("sn,sn->s", self._sums, self._sums))


@dataclass(frozen=True, slots=True, eq=False)
class _Series:
    """The minibatches: ``energies``, ``present`` and ``products`` are [minibatches, tensors], ``sums`` [tensors, 3]."""

    size: int
    energies: FloatArray
    present: BoolArray
    products: FloatArray | None
    sums: FloatArray

    def of(self, sets: Partition, by_layer: bool = False) -> list[tuple[results.NoiseScale, float | None]]:
        """Noise scale and mean cosine of each set of tensors, over the minibatches at which it had a gradient.

        Where a part of it had none, as TD3's actor at every other step, that part counts as zero.
        """
        energies, sums = sets.total(self.energies), sets.total(self.sums.T)
        there = sets.any(self.present)
        products = None if self.products is None else sets.total(self.products)
        found = []
        for i in range(len(sets)):
            own = there[:, i]
            product = None if products is None else products[own, i]
            noise = noise_scale(self.size, energies[own, i], float(sums[0, i]), product)
            found.append((noise, _mean_cosine(float(sums[2 if by_layer else 1, i]), int((energies[:, i] > 0.0).sum()))))
        return found


def _mean_cosine(energy: float, count: int) -> float | None:
    """The mean over all pairs of ``count`` directions, the squared norm of whose sum is ``energy``."""
    if count < 2:
        return None
    return min(1.0, max(-1.0, (energy - count) / (count * (count - 1))))


def noise_scale(
    minibatch_size: int, energies: FloatArray, sum_energy: float, products: FloatArray | None
) -> results.NoiseScale:
    """The noise scale of N gradients of ``minibatch_size`` samples each, in samples.

    ``energies`` (float64 [N]) are their squared norms and ``sum_energy`` is that of their sum; ``products`` (float64
    [N]) is each gradient's product with the sum, None where it is not known.  With S the mean of ``energies`` and M the
    squared norm of the mean gradient, ‖G‖² = (N·M − S)/(N − 1) and tr Σ = B·N(S − M)/(N − 1) are unbiased.
    The interval is Fieller's (1954) for the ratio of the two, with their covariance from the delete-one jackknife.
    It has no upper end, and is None, where ‖G‖² is not significantly above zero.
    """
    count, unit = len(energies), float(energies.max(initial=0.0)) or 1.0
    if count < 2:
        return results.NoiseScale(None, None, None, None)
    # In units of the largest, so that the squares of squares below stay numbers.
    energies, sum_energy = energies / unit, sum_energy / unit
    signal, noise = map(float, _signal_and_noise(minibatch_size, count, float(energies.sum()), sum_energy))
    estimate = noise / signal if signal > 0.0 else None
    if products is None or count < FEWEST_FOR_INTERVAL:
        return results.NoiseScale(estimate, None, signal * unit, noise * unit)
    left_out = sum_energy - 2.0 * products / unit + energies
    pairs = np.array(_signal_and_noise(minibatch_size, count - 1, energies.sum() - energies, left_out))
    deviations = pairs - pairs.mean(axis=1, keepdims=True)
    covariance = (count - 1) / count * deviations @ deviations.T
    low, high = fieller(noise, signal, covariance[::-1, ::-1], student_quantile(0.975, count - 1))
    interval = (low, high) if estimate is not None and math.isfinite(high) else None
    return results.NoiseScale(estimate, interval, signal * unit, noise * unit, low)


def _signal_and_noise(
    size: int, count: int, energy: float | FloatArray, sum_energy: float | FloatArray
) -> tuple[float | FloatArray, float | FloatArray]:
    """‖G‖² and tr Σ from the sum of squared norms and the squared norm of the sum of ``count`` gradients."""
    mean, of_mean = energy / count, sum_energy / count**2
    # Equal gradients have no noise; rounding would make it a little less.
    spread = np.maximum(mean - of_mean, 0.0)
    return (count * of_mean - mean) / (count - 1), size * count * spread / (count - 1)


def fieller(above: float, below: float, covariance: FloatArray, quantile: float) -> tuple[float, float]:
    """All ratios ρ ≥ 0 with (above − ρ·below)² ≤ quantile²·Var(above − ρ·below); infinite where nothing ends them."""
    squared = quantile**2
    a = below**2 - squared * float(covariance[1, 1])
    b = above * below - squared * float(covariance[0, 1])
    c = above**2 - squared * float(covariance[0, 0])
    root = math.sqrt(max(0.0, b * b - a * c))
    if a > 0.0:
        return max(0.0, (b - root) / a), max(0.0, (b + root) / a)
    # The set is all but an open interval of ratios, or everything: what lies below is excluded from 0 on, if anything.
    if c <= 0.0 or (root == 0.0 and b <= 0.0):
        return 0.0, math.inf
    return c / (b + root) if b + root > 0.0 else 0.0, math.inf
