"""How far clipping turns the update that Adam makes of a gradient, which is not how far it turns the gradient.

Adam (Kingma & Ba 2015, algorithm 1) divides the mean gradient by the root mean square of each element, moments and all:
u(g) = lr·m'/(√v' + eps) with m' = (β₁m + (1−β₁)g)/(1−β₁ᵗ) and v' = (β₂v + (1−β₂)g²)/(1−β₂ᵗ), the update being its
t-th.  Even one common factor on g turns u(g), because m and v keep their size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from gradscope.clipping.layout import TensorLayout
from gradscope.clipping.policy import ClippedStep, Convention, Policy
from gradscope.gradients import GradientSource, GradientStep
from gradscope.optimizer_state import AdamMoments
from gradscope.spread import Spread

FloatArray = NDArray[np.float64]
Update = Callable[[FloatArray], FloatArray]

# Elements turned into float64 at a time.
BLOCK = 1 << 18


class UpdateMeter:
    """Follows the finite steps of a run: for each policy the angle between the updates of raw and clipped gradient.

    Every step's update is the one that the optimizer, as the checkpoint left it, would make next.  The moments stay in
    memory, as they do in training.
    """

    def __init__(
        self,
        source: GradientSource,
        policies: Sequence[Policy],
        layout: TensorLayout,
        convention: Convention,
        moments: Mapping[str, AdamMoments],
    ) -> None:
        held = [moments[tensor.name] for tensor in source.tensors]
        rates = [moment.lr for moment in held]
        # One common rate changes no direction, and at the end of a schedule it is 0.
        rates = [1.0] * len(rates) if len(set(rates)) == 1 else rates
        self._adams = [_Adam(moment, rate) for moment, rate in zip(held, rates, strict=True)]
        self._clips = {policy: policy.application(source, layout, convention) for policy in policies}
        self._angles: dict[Policy, list[float]] = {policy: [] for policy in self._clips}
        self._known = True

    def see(self, step: GradientStep) -> None:
        """Take in one finite step while it is in memory."""
        clipped = {policy: clip(step) for policy, clip in self._clips.items()}
        kept = {policy: done for policy, done in clipped.items() if done is not None}
        turns = {policy: _Turn() for policy in kept}
        self._known = self._known and step.read is not None
        if step.read is None:
            return
        for i, adam in enumerate(self._adams):
            if step.present is None or step.present[i]:
                _turn_tensor(i, step.read(i), adam, kept, turns)
        for policy, turn in turns.items():
            self._angles[policy].append(turn.degrees())

    def change(self, policy: Policy) -> Spread | None:
        """The angles in degrees over the steps that ``policy`` did not drop; None where there are none."""
        angles = np.array(self._angles[policy])
        angles = angles[np.isfinite(angles)]
        return Spread.of(angles) if self._known and len(angles) else None


def update_meter(
    source: GradientSource, policies: Sequence[Policy], layout: TensorLayout, convention: Convention
) -> UpdateMeter | None:
    """A meter for ``source``; None where no state of Adam is known for all of its tensors.

    Raises GradscopeError where a policy needs more than the source holds.
    """
    moments = source.adam_moments() if policies else None
    if moments is None or not all(tensor.name in moments for tensor in source.tensors):
        return None
    return UpdateMeter(source, policies, layout, convention, moments)


class _Adam:
    """The moments of one parameter, float32 or float64 [numel], and the update that they and a gradient make."""

    def __init__(self, moments: AdamMoments, rate: float) -> None:
        self._first = None if moments.exp_avg is None else moments.exp_avg().reshape(-1)
        self._second = None if moments.exp_avg_sq is None else moments.exp_avg_sq().reshape(-1)
        self._weight = moments.weight().reshape(-1) if moments.weight_decay and moments.weight is not None else None
        self._decay = moments.weight_decay
        self._betas = moments.betas
        self._corrections = [1.0 - beta ** (moments.step + 1.0) for beta in moments.betas]
        self._eps = moments.eps
        self._rate = rate

    def at(self, start: int, stop: int) -> Update:
        """What makes an update, float64, of the gradient's elements from ``start`` to ``stop``."""
        (beta1, beta2), (correction1, correction2) = self._betas, self._corrections
        first, second, weight = (
            0.0 if held is None else held[start:stop].astype(np.float64)
            for held in (self._first, self._second, self._weight)
        )

        def update(gradient: FloatArray) -> FloatArray:
            decayed = gradient + self._decay * weight
            mean = (beta1 * first + (1.0 - beta1) * decayed) / correction1
            square = (beta2 * second + (1.0 - beta2) * decayed**2) / correction2
            divisor = np.sqrt(square) + self._eps
            # Without eps an element that never had a gradient would be 0/0.
            return np.asarray(self._rate * np.divide(mean, divisor, out=np.zeros_like(mean), where=divisor > 0.0))

        return update


def _turn_tensor(
    tensor: int,
    gradient: NDArray[np.floating],
    adam: _Adam,
    clipped: Mapping[Policy, ClippedStep],
    turns: Mapping[Policy, _Turn],
) -> None:
    flat = gradient.reshape(-1)
    for start in range(0, flat.size, BLOCK):
        elements = flat[start : start + BLOCK].astype(np.float64)
        update = adam.at(start, start + len(elements))
        raw = update(elements)
        for policy, step in clipped.items():
            block = step.block(tensor, start, elements)
            turns[policy].add(raw, raw if block is elements else update(block))


class _Turn:
    """The angle between two vectors u and c that come block by block, without cancellation for small ones.

    Each block leaves ‖u‖², u·c and ‖c − (u·c/‖u‖²)u‖²; together they give what of the whole c is not along u, as in the
    pairwise update of Chan, Golub and LeVeque (1979).
    """

    def __init__(self) -> None:
        self._blocks: list[tuple[float, float, float]] = []

    def add(self, u: FloatArray, c: FloatArray) -> None:
        energy = float(u @ u)
        if c is u:
            self._blocks.append((energy, energy, 0.0))
            return
        product = float(u @ c)
        across = c - (product / energy) * u if energy > 0.0 else c
        self._blocks.append((energy, product, float(across @ across)))

    def degrees(self) -> float:
        """The angle; NaN where either vector is zero."""
        energies, products, across = np.array(self._blocks).reshape(-1, 3).T
        energy, product = float(energies.sum()), float(products.sum())
        if not energy > 0.0:
            return float("nan")
        factors = np.divide(products, energies, out=np.zeros_like(products), where=energies > 0.0)
        beside = float(across.sum() + (energies * (factors - product / energy) ** 2).sum())
        if beside == 0.0 and product == 0.0:
            return float("nan")
        return float(np.degrees(np.arctan2(np.sqrt(energy * beside), product)))
