"""What ``gradscope compare`` returns: frozen dataclasses of plain numbers, named as in the JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from gradscope.results import Source
from gradscope.spread import Spread

T = TypeVar("T")

Verdict = Literal["identical", "differs", "within noise", "unknown"]
Measure = Literal["norm", "recent_norm", "weight_norm"]


@dataclass(frozen=True, slots=True)
class Both(Generic[T]):
    """The same thing of either source."""

    a: T
    b: T


@dataclass(frozen=True, slots=True)
class UnitComparison:
    """A tensor, a layer, a clip group, or everything, by what both sources hold of it.

    ``typical`` is the geometric mean of the L2 norm over the steps at which it is not zero (of a checkpoint: the one
    number that it holds), and ``ratio`` that of B over that of A, with the 95 % interval ``ratio_ci95``, corrected for
    autocorrelation (None: too few independent steps, or one number on a side).  ``p_value`` is that of "no
    difference"; ``verdict`` holds over all units of the same kind together (Holm, 5 %).
    ``zeros`` are shares of elements, ``update_ratio`` the median of ‖θ' − θ‖/‖θ‖, ``share`` that of the squared norm.
    ``shape_distance`` is how far the distributions of |g|/rms are apart, in octaves (Wasserstein-1), and
    ``shape_noise`` how far the two halves of one side are.
    """

    name: str
    name_in_b: str
    typical: Both[float | None]
    ratio: float | None
    ratio_ci95: tuple[float, float] | None
    p_value: float | None
    verdict: Verdict
    effective_steps: Both[float] | None = None
    steps: Both[int] | None = None
    l2_norm: Both[Spread] | None = None
    share: Both[float] | None = None
    zeros: Both[float] | None = None
    zeros_differ: bool = False
    update_ratio: Both[float] | None = None
    weight_norm: Both[float] | None = None
    shape_distance: float | None = None
    shape_noise: float | None = None
    shape_differs: bool = False


@dataclass(frozen=True, slots=True)
class ConstantRatio:
    """One number that every layer's ratio is, and what it may be.

    ``exact``: at every step that both have; else as far as the intervals of all layers tell, together ``ci95``.
    """

    ratio: float
    exact: bool
    ci95: tuple[float, float] | None
    explanations: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ClipRate:
    """How often one side clips.  ``ci95`` is None where there are too few independent steps."""

    clip_rate: float
    ci95: tuple[float, float] | None
    effective_steps: float
    steps: int


@dataclass(frozen=True, slots=True)
class ClipComparison:
    """A clip rate on both sides: of a policy that is simulated, or of what the runs did (``policy`` None).

    ``max_norm`` and ``clip_value`` are those in force on each side.  ``difference_ci95`` is the interval of B's rate
    minus A's, ``differs`` whether it leaves out 0 (None: not known).  ``direction_change_deg`` is the median angle and
    ``scale`` the mean factor.
    """

    policy: str | None
    name: str
    max_norm: Both[float | None]
    clip_value: Both[float | None]
    rate: Both[ClipRate]
    difference_ci95: tuple[float, float] | None
    differs: bool | None
    direction_change_deg: Both[float | None] | None = None
    scale: Both[float] | None = None


@dataclass(frozen=True, slots=True)
class OptimizerSide:
    """What a checkpoint tells of one optimizer."""

    name: str
    type: str
    steps: float | None
    lr: float | None
    max_norm: float | None
    recent_norm: float | None
    mean_norm: float | None
    consistency: float | None
    saturation: float | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """What ``gradscope compare`` found.  ``findings`` say it in sentences, most important first.

    ``measure`` is what the ratios of ``overall``, ``groups``, ``layers`` and ``tensors`` are of; the latter three are
    sorted by what differs most beyond noise, and empty where a side knows nothing of them.  ``paired``: both sides
    hold the same steps, and these follow each other so closely that they were compared one by one.
    ``only`` names the tensors that the other side lacks, ``reshaped`` says which have other shapes, ``renamed``
    what was taken off or put before the names of one side to match those of the other.
    """

    schema: str
    sources: Both[Source]
    verdict: Verdict
    findings: tuple[str, ...]
    notes: tuple[str, ...]
    measure: Measure | None
    paired: bool
    steps: Both[int]
    nonfinite_steps: Both[int]
    overall: UnitComparison | None
    groups: tuple[UnitComparison, ...]
    layers: tuple[UnitComparison, ...]
    tensors: tuple[UnitComparison, ...]
    only: Both[tuple[str, ...]]
    reshaped: tuple[str, ...]
    renamed: str | None
    constant_ratio: ConstantRatio | None
    recorded: tuple[ClipComparison, ...]
    policies: tuple[ClipComparison, ...]
    optimizers: Both[tuple[OptimizerSide, ...]]
