"""Adaptive gradient clipping: each output unit's gradient against that unit's weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gradscope.clipping.effect import BoolArray, Effect, effect_of_scaling
from gradscope.clipping.layout import TensorLayout
from gradscope.clipping.moments import Moments
from gradscope.clipping.policy import ClippedStep, Convention, ElementPolicy, FloatArray
from gradscope.errors import GradscopeError
from gradscope.gradients import SAVE_TENSORS

if TYPE_CHECKING:
    from gradscope.gradients import GradientSource, GradientStep, Weights
    from gradscope.tensors import TensorInfo

AGC_EPS = 1e-3
# optax divides by no norm below this.
SMALLEST_DIVISOR = 1e-6
# Elements turned into float64 at a time.
BLOCK = 1 << 20


class AdaptiveGradientClip(ElementPolicy):
    """For each unit u, if ‖g_u‖ > L = λ·max(‖w_u‖, eps) then g_u ← g_u·L/max(‖g_u‖, 1e-6).

    Source: Brock, De, Smith, Simonyan, "High-Performance Large-Scale Image Recognition Without Normalization", ICML
    2021; the arithmetic is optax's ``adaptive_grad_clip``.  A unit is one output: an index of dimension 0 in PyTorch's
    layout, of the last axis in optax's, whose axes are transposed.  Like there, a tensor with at most one dimension
    longer than 1 is a single unit.
    """

    __slots__ = ()

    def replay(self, source: GradientSource, layout: TensorLayout) -> _UnitwiseReplay:
        """A replay that holds one limit per unit.  Raises GradscopeError for weights that are missing or differ."""
        return _UnitwiseReplay(self.label, layout, source.tensors, self._limits(source))

    def application(
        self, source: GradientSource, layout: TensorLayout, convention: Convention
    ) -> Callable[[GradientStep], ClippedStep | None]:
        """Each unit by its own factor; raises as ``replay`` does."""
        limits = self._limits(source)
        return lambda step: _ScaledUnits.of(_elements(step, self.label), limits)

    def _limits(self, source: GradientSource) -> list[FloatArray]:
        """What the norm of each unit of each tensor may be."""
        if source.info.kind == "trace":
            raise GradscopeError(
                f"--policy {self.label}",
                "a trace holds magnitudes; agc needs whole tensors and their weights",
                f"{SAVE_TENSORS}; --weights FILE names the parameters",
            )
        weights = source.weights()
        if weights is None:
            raise GradscopeError(
                f"--policy {self.label}",
                f"{source.info.path} holds gradients without the weights that agc compares them with",
                "--weights FILE names a file with the parameters",
            )
        clipping, eps = (*self.arguments, AGC_EPS)[:2]
        return [clipping * np.maximum(norms, eps) for norms in self._weight_norms(source.tensors, weights)]

    def _weight_norms(self, tensors: tuple[TensorInfo, ...], weights: Weights) -> list[FloatArray]:
        shapes = {info.name: info.shape for info in weights.tensors}
        found = []
        for tensor in tensors:
            if shapes.get(tensor.name) != tensor.shape:
                held = "lacks it" if tensor.name not in shapes else f"has it as {shapes[tensor.name]}"
                why = f"its gradient {tensor.name} has shape {tensor.shape} and the weights' side {held}"
                raise GradscopeError(f"--policy {self.label}", why)
            norms = np.sqrt(unit_energies(weights.read(tensor.name)))
            if not np.isfinite(norms).all():
                raise GradscopeError(f"--policy {self.label}", f"the weight {tensor.name} holds NaN or Inf")
            found.append(norms)
        return found


class _UnitwiseReplay:
    """Collects, for every step seen, each tensor's moments."""

    def __init__(
        self, label: str, layout: TensorLayout, tensors: tuple[TensorInfo, ...], limits: list[FloatArray]
    ) -> None:
        self._label = label
        self._layout = layout
        self._tensors = tensors
        self._limits = limits
        self._rows: list[FloatArray] = []
        self._triggered: list[BoolArray] = []

    def see(self, step: GradientStep) -> None:
        read = _elements(step, self._label)
        clipped = [_clip_units(unit_energies(read(i)), limits) for i, limits in enumerate(self._limits)]
        self._rows.append(np.array([row for row, _ in clipped]).T)
        self._triggered.append(np.array([triggered for _, triggered in clipped]))

    def effect(self) -> Effect:
        columns = len(self._tensors)
        rows = np.stack(self._rows) if self._rows else np.empty((0, 3, columns))
        triggered = np.stack(self._triggered) if self._triggered else np.empty((0, columns), dtype=np.bool_)
        return effect_of_scaling([(Moments(rows[:, 0], rows[:, 1], rows[:, 2]), triggered, None)], self._layout)


@dataclass(frozen=True, slots=True, eq=False)
class _ScaledUnits:
    """Every unit multiplied by a factor of its own; ``lengths`` says how many elements a unit of each tensor has."""

    factors: list[FloatArray]
    lengths: list[int]

    @classmethod
    def of(cls, read: Callable[[int], NDArray[np.floating]], limits: Sequence[FloatArray]) -> _ScaledUnits:
        """The units of the tensors that ``read`` gives, each kept below its limit."""
        factors, lengths = [], []
        for i, own in enumerate(limits):
            tensor = read(i)
            factors.append(_factors(np.sqrt(unit_energies(tensor)), own))
            lengths.append(tensor.size // max(1, len(own)))
        return cls(factors, lengths)

    def block(self, tensor: int, start: int, elements: FloatArray) -> FloatArray:
        factors = self.factors[tensor]
        if (factors == 1.0).all():
            return elements
        return elements * factors[np.arange(start, start + len(elements)) // self.lengths[tensor]]


def _elements(step: GradientStep, label: str) -> Callable[[int], NDArray[np.floating]]:
    if step.read is None:
        raise GradscopeError(
            f"--policy {label}",
            f"step {step.index} ({step.label}) holds no whole tensors, which agc needs",
            "gradient dumps hold them",
        )
    return step.read


def unit_energies(tensor: NDArray[np.floating]) -> FloatArray:
    """Σx² of each output unit of ``tensor`` (any float dtype, PyTorch's layout), in float64."""
    vector = sum(length != 1 for length in tensor.shape) <= 1
    rows = 1 if vector else tensor.shape[0]
    units = tensor.reshape(rows, math.prod(tensor.shape) // rows if rows else 0)
    energies = np.zeros(rows)
    tall = max(1, BLOCK // max(1, units.shape[1]))
    for row in range(0, rows, tall):
        for column in range(0, units.shape[1], BLOCK):
            block = units[row : row + tall, column : column + BLOCK].astype(np.float64)
            energies[row : row + tall] += np.einsum("uc,uc->u", block, block)
    return energies


def _factors(norms: FloatArray, limits: FloatArray) -> FloatArray:
    """What each unit of these norms is multiplied by."""
    return np.where(norms < limits, 1.0, limits / np.maximum(norms, SMALLEST_DIVISOR))


def _clip_units(energies: FloatArray, limits: FloatArray) -> tuple[tuple[float, float, float], bool]:
    """Energy of a tensor, mean and variance of its units' factors weighted by it, and whether any was triggered."""
    norms = np.sqrt(energies)
    factors = _factors(norms, limits)
    total = float(energies.sum())
    if total == 0.0:
        return (0.0, 1.0, 0.0), False
    weights = energies / total
    origin = factors[np.argmax(energies)]
    mean = origin + float(weights @ (factors - origin))
    variance = float(weights @ (factors - mean) ** 2)
    return (total, mean, variance), bool((norms > limits).any())
