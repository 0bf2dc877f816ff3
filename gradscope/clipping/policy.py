"""What every policy is: a name, its numbers, and for most of them a factor per unit and step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from gradscope.clipping.effect import Effect, effect_of_scaling
from gradscope.clipping.layout import Level, Partition, TensorLayout
from gradscope.clipping.moments import Moments
from gradscope.notation import setting

if TYPE_CHECKING:
    from gradscope.gradients import GradientSource, GradientStep

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

Convention = Literal["exact", "torch"]

# torch.nn.utils.clip_grad_norm_ adds this to the norm before it divides.
TORCH_EPSILON = 1e-6
STRETCH_ELEMENTS = 1 << 20


@dataclass(frozen=True, slots=True)
class Policy(ABC):
    """A clip policy as ``parse_policy`` reads it: ``name`` and the numbers that were given."""

    name: str
    arguments: tuple[float, ...]

    @property
    def label(self) -> str:
        """The notation that ``parse_policy`` reads: ``"norm:0.5"``."""
        return f"{self.name}:{','.join(setting(number) for number in self.arguments)}"

    @property
    def threshold(self) -> float | None:
        """The policy's fixed limit (max_norm, clip_value, rms or lambda); None where it moves with the run."""
        return self.arguments[0]

    @abstractmethod
    def application(
        self, source: GradientSource, layout: TensorLayout, convention: Convention
    ) -> Callable[[GradientStep], ClippedStep | None]:
        """What applies the policy to the elements of the finite steps of ``source``, told one by one in time order.

        It gives None for a step that the policy drops.  Raises GradscopeError where the source lacks what is needed.
        """


@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """What a policy does to its units: the factor applied and whether it was triggered; both [steps, units]."""

    scale: FloatArray
    triggered: NDArray[np.bool_]


class ClippedStep(Protocol):
    """What a policy makes of one step's elements."""

    def block(self, tensor: int, start: int, elements: FloatArray) -> FloatArray:
        """``elements`` (float64 [n]: those of ``tensor`` from flat position ``start`` on), clipped.

        Where nothing changes that is ``elements`` itself.
        """


@dataclass(frozen=True, slots=True, eq=False)
class ScaledTensors:
    """Every tensor multiplied by a factor of its own: ``scale`` is float64 [tensors]."""

    scale: FloatArray

    def block(self, tensor: int, start: int, elements: FloatArray) -> FloatArray:
        """The elements times their tensor's factor."""
        factor = self.scale[tensor]
        return elements if factor == 1.0 else elements * factor


class ScalePolicy(Policy):
    """A policy that multiplies each unit (clip group, layer, tensor or all) by one factor that its norm decides."""

    __slots__ = ()

    @property
    def unit(self) -> Level:
        """Over what one norm is taken: a clip group, unless the policy says otherwise."""
        return "group"

    @abstractmethod
    def factors(self, norms: FloatArray, numel: IntArray, convention: Convention) -> Factors:
        """The factors for ``norms`` (float64 [finite steps, units], in time order); ``numel`` elements per unit.

        A norm that is NaN is none: the unit had no gradient, its factor is 1 and it is not triggered.
        """

    def following(self, units: int, numel: IntArray, convention: Convention) -> Callable[[FloatArray], Factors]:
        """The same told stretch by stretch: each call goes on where the one before it stopped."""
        return lambda norms: self.factors(norms, numel, convention)

    def effect(
        self,
        energies: FloatArray,
        layout: TensorLayout,
        convention: Convention,
        present: NDArray[np.bool_] | None = None,
    ) -> Effect:
        """What the policy does to a run with ``energies`` Σg², float64 [finite steps, tensors].

        ``present`` (bool, likewise) says which tensors had a gradient, None: all; the others' energies are 0.
        """
        units = layout.at(self.unit)
        factors = self.factors(_unit_norms(energies, units, present), layout.numel_in(units), convention)
        # A stretch at a time, so that the temporaries stay small beside the energies.
        rows = max(1, STRETCH_ELEMENTS // energies.shape[1])
        stretches = (slice(start, start + rows) for start in range(0, len(energies), rows))
        return effect_of_scaling((_scaled(energies, factors, units, stretch, present) for stretch in stretches), layout)

    def application(
        self, source: GradientSource, layout: TensorLayout, convention: Convention
    ) -> Callable[[GradientStep], ClippedStep | None]:
        """As for every policy; the norms are those of the steps told."""
        units = layout.at(self.unit)
        following = self.following(len(units), layout.numel_in(units), convention)

        def clip(step: GradientStep) -> ClippedStep | None:
            present = None if step.present is None else step.present[None]
            scale = following(_unit_norms(step.sum_squares[None], units, present)).scale[0, units.owner]
            return ScaledTensors(scale) if scale.any() else None

        return clip


def _unit_norms(energies: FloatArray, units: Partition, present: NDArray[np.bool_] | None) -> FloatArray:
    """The norm of each unit at each step, NaN where it had no gradient."""
    norms = np.sqrt(units.total(energies))
    if present is not None:
        norms[~units.any(present)] = np.nan
    return norms


def _scaled(
    energies: FloatArray, factors: Factors, units: Partition, stretch: slice, present: NDArray[np.bool_] | None
) -> tuple[Moments, NDArray[np.bool_], NDArray[np.bool_] | None]:
    scale = factors.scale[stretch][:, units.owner]
    moments = Moments(energies[stretch], scale, np.zeros_like(scale))
    triggered = factors.triggered[stretch][:, units.owner]
    if present is None:
        return moments, triggered, None
    # What had no gradient is not clipped with the rest of its unit.
    return moments, triggered & present[stretch], present[stretch]


class Replay(Protocol):
    """Sees the finite steps of a run, in time order, and sums up what the policy would have done."""

    def see(self, step: GradientStep) -> None:
        """Take in one step while it is in memory."""

    def effect(self) -> Effect:
        """The effect on the steps seen so far."""


class ElementPolicy(Policy):
    """A policy that norms alone do not decide: it looks at each step while it is in memory."""

    __slots__ = ()

    @abstractmethod
    def replay(self, source: GradientSource, layout: TensorLayout) -> Replay:
        """A replay of this policy on ``source``.

        Raises GradscopeError where the source lacks what the policy needs.
        """


def limit_norm(norms: FloatArray, limits: FloatArray | float, convention: Convention) -> Factors:
    """Clip by norm at ``limits`` (υ, broadcast against ``norms``): triggered where n > υ.

    The factor is min(1, υ/n) (Pascanu et al. 2013; optax ``clip_by_global_norm``), or min(1, υ/(n + 1e-6)) by the
    ``torch`` convention, which also scales a norm within 1e-6 below υ.  A zero gradient keeps the factor 1, and so does
    what has no norm (NaN).
    """
    triggered = norms > limits
    if convention == "torch":
        scale = np.minimum(1.0, limits / (norms + TORCH_EPSILON))
        return Factors(np.where(norms > 0.0, scale, 1.0), triggered)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        scale = np.where(triggered, limits / norms, 1.0)
    return Factors(scale, triggered)
