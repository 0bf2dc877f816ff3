"""What the commands return: frozen dataclasses of plain numbers.

Field names are the keys of the JSON output (a trailing underscore is dropped); tuples become lists.  Numbers that are
not finite stay floats here and become the strings "nan", "inf", "-inf" in JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gradscope.spread import Spread


@dataclass(frozen=True, slots=True)
class Source:
    """Where the numbers come from.

    ``picked``: which of a directory's checkpoints it is, where only that was named.  ``arguments``: what names the
    source on a command line beside its path.
    """

    path: str
    kind: str
    format: str
    steps: int
    picked: str | None = None
    arguments: str | None = None


@dataclass(frozen=True, slots=True)
class NonfiniteStep:
    """A step that holds NaN or Inf; ``last_finite_before``: in module order, the finite tensor before each fault."""

    step: int
    label: str
    tensors: tuple[str, ...]
    last_finite_before: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Float32Overflow:
    """Finite float32 or bfloat16 gradients whose L2 norm, taken in float32, is infinite: their squares overflow.

    ``tensors`` are those that do so by themselves, ``groups`` the clip groups, in any of ``steps`` steps (None: not
    counted).
    """

    steps: int | None
    tensors: tuple[str, ...]
    groups: tuple[str, ...]


# --- inspect ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class GradientTotals:
    """All tensors together; ``zeros`` and ``nonfinite`` count elements over all steps, ``numel`` those of one step.

    ``steps`` is how many steps a statistic is over: here the finite ones, below those of them at which the group, layer
    or tensor had a gradient.
    A norm log tells nothing of elements: None, here and below.
    """

    l2_norm: Spread
    max_abs: float | None
    numel: int | None
    zeros: int | None
    nonfinite: int | None
    nonfinite_steps: int
    steps: int | None = None


@dataclass(frozen=True, slots=True)
class GroupNorm:
    """One clip group, by the gradients that it met itself; ``share`` as in LayerNorm.

    Where groups share tensors, it is the group's share of what all of them met.
    """

    name: str
    l2_norm: Spread
    numel: int | None
    share: float
    steps: int | None = None


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """``share`` is the layer's share of the squared norm, summed over the finite steps.

    ``update_ratio`` is the median of ‖θ' − θ‖/‖θ‖, what an optimizer step changes of the weights, over the steps at
    which a trace holds both.
    """

    name: str
    l2_norm: Spread
    numel: int
    share: float
    update_ratio: float | None = None
    steps: int | None = None


@dataclass(frozen=True, slots=True)
class TensorNorm:
    """One tensor, or one series of a norm log; ``rms`` is over all elements of the finite steps.

    ``group`` is its clip group, ``update_ratio`` as in LayerNorm.
    """

    name: str
    layer: str
    group: str
    shape: tuple[int, ...] | None
    dtype: str | None
    numel: int | None
    l2_norm: Spread
    rms: float | None
    max_abs: float | None
    zeros: int | None
    nonfinite: int | None
    share: float
    update_ratio: float | None = None
    steps: int | None = None


@dataclass(frozen=True, slots=True)
class StepRow:
    """One step of the neighbourhood that ``--at`` shows."""

    step: int
    label: str
    l2_norm: float
    max_abs: float | None
    zeros: int | None
    nonfinite: int


@dataclass(frozen=True, slots=True)
class RecentClipping:
    """The newest part of the run: its first and last step by their index, and its ``length`` in recorded steps."""

    steps: tuple[int, int]
    clip_rate: float
    clip_rate_ci95: tuple[float, float] | None
    effective_steps: float
    length: int


@dataclass(frozen=True, slots=True)
class RecordedClipping:
    """What a run itself clipped: rates over the ``steps`` that are finite and met a limit, of ``updates`` there were.

    ``name`` is a clip group's, or ``"all"`` for the steps as a whole, which are clipped where one of their groups is.
    ``max_norm`` and ``clip_value`` are the last in force, None where nothing clipped so (or groups differ);
    ``max_norm`` started as ``first_max_norm`` and changed ``max_norm_changes`` times.  At ``decisions_differ`` steps
    the norm that the library returned lies on the other side of max_norm than the exact one.
    """

    name: str
    max_norm: float | None
    first_max_norm: float | None
    max_norm_changes: int
    clip_value: float | None
    steps: int
    clipped_steps: int
    clip_rate: float
    clip_rate_ci95: tuple[float, float] | None
    effective_steps: float
    recent: RecentClipping
    decisions_differ: int
    updates: int | None = None


@dataclass(frozen=True, slots=True)
class RecordedRun:
    """What a trace tells of the run beside its gradients.

    At ``steps_skipped`` steps no optimizer stepped although one was asked to; None where that was not recorded.
    ``nonfinite_skipped`` of them hold NaN or Inf.
    ``phases`` are the stretches of steady size, with the median norm of each.
    """

    overall: RecordedClipping
    groups: tuple[RecordedClipping, ...]
    steps_skipped: int | None
    nonfinite_skipped: int | None
    phases: tuple[NormPhase, ...]


@dataclass(frozen=True, slots=True)
class NormPhase:
    """A stretch of the run: steps a to b, both inclusive, by their index."""

    steps: tuple[int, int]
    median_norm: float


@dataclass(frozen=True, slots=True)
class GradientSummary:
    """The gradients of a source; ``at`` is given with ``--at`` only."""

    global_: GradientTotals
    groups: tuple[GroupNorm, ...]
    layers: tuple[LayerNorm, ...]
    tensors: tuple[TensorNorm, ...]
    nonfinite: tuple[NonfiniteStep, ...]
    at: tuple[StepRow, ...] | None


@dataclass(frozen=True, slots=True)
class WeightTotals:
    """All parameters together."""

    l2_norm: float
    numel: int


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """The parameters of one layer."""

    name: str
    l2_norm: float
    numel: int


@dataclass(frozen=True, slots=True)
class TensorWeights:
    """One parameter."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    numel: int
    l2_norm: float
    rms: float
    max_abs: float
    zeros: int
    nonfinite: int


@dataclass(frozen=True, slots=True)
class WeightSummary:
    """The weights of a checkpoint."""

    global_: WeightTotals
    layers: tuple[LayerWeights, ...]
    tensors: tuple[TensorWeights, ...]


@dataclass(frozen=True, slots=True)
class OptimizerGroup:
    """One clip group of an optimizer.  ``qualifications`` say why the saturation bounds may not hold.

    ``trained_max_norm`` is what the file names, where ``max_norm`` was given in its place.
    """

    name: str
    max_norm: float | None
    recent_norm: float | None
    mean_norm: float | None
    consistency: float | None
    saturation: float | None
    clipped_share_at_most: float | None
    at_limit_share_at_least: Mapping[str, float] | None
    share: float | None
    qualifications: tuple[str, ...]
    trained_max_norm: float | None = None


@dataclass(frozen=True, slots=True)
class OptimizerTensor:
    """What the optimizer knows of one parameter; ``share`` is its share of the recent squared norm."""

    name: str
    recent_norm: float | None
    mean_norm: float | None
    consistency: float | None
    share: float | None


@dataclass(frozen=True, slots=True)
class OptimizerReport:
    """Forensics of one optimizer.  A number that its state does not hold is None; ``unavailable`` says why.

    ``window`` is the length in steps of the average behind ``recent_norm``, 1/(1−β₂); ``mean_window`` 1/(1−β₁).
    ``momentum_norm`` is the norm of the momentum buffer (momentum SGD only).
    """

    name: str
    type: str
    steps: float | None
    lr: float | None
    max_norm: float | None
    recent_norm: float | None
    mean_norm: float | None
    momentum_norm: float | None
    consistency: float | None
    window: float | None
    mean_window: float | None
    saturation: float | None
    clipped_share_at_most: float | None
    at_limit_share_at_least: Mapping[str, float] | None
    groups: tuple[OptimizerGroup, ...]
    tensors: tuple[OptimizerTensor, ...]
    qualifications: tuple[str, ...]
    unavailable: str | None


@dataclass(frozen=True, slots=True)
class NoiseScale:
    """The gradient noise scale tr Σ/‖G‖², in samples: at so large a minibatch signal and noise are equally large.

    ``signal`` is the unbiased estimate of ‖G‖², the true gradient's squared norm, and ``noise`` that of tr Σ, the
    variance of one sample's gradient.  ``estimate`` is None where ``signal`` is not positive.  ``ci95`` is None where
    ``signal`` is not told apart from zero, or the minibatches are too few; ``at_least`` is its lower end, which may be
    known by itself.
    """

    estimate: float | None
    ci95: tuple[float, float] | None
    signal: float | None
    noise: float | None
    at_least: float | None = None


@dataclass(frozen=True, slots=True)
class GroupNoise:
    """One clip group."""

    name: str
    noise_scale: NoiseScale


@dataclass(frozen=True, slots=True)
class LayerNoise:
    """One layer; ``mean_cosine`` is between its own gradients."""

    name: str
    noise_scale: NoiseScale
    mean_cosine: float | None


@dataclass(frozen=True, slots=True)
class MinibatchNoise:
    """What ``minibatches`` of equal size, disjoint and finite, tell of signal and noise.

    ``samples`` are in all of them together.  ``mean_cosine`` is the mean cosine between the gradients of two of them,
    None where fewer than two are not zero.
    """

    samples: int
    minibatch_size: int
    minibatches: int
    noise_scale: NoiseScale
    mean_cosine: float | None
    groups: tuple[GroupNoise, ...]
    layers: tuple[LayerNoise, ...]


@dataclass(frozen=True, slots=True)
class Inspection:
    """What ``gradscope inspect`` found.  ``findings`` say it in sentences, most important first."""

    schema: str
    source: Source
    findings: tuple[str, ...]
    notes: tuple[str, ...]
    skipped: tuple[str, ...]
    gradients: GradientSummary | None
    weights: WeightSummary | None
    optimizers: tuple[OptimizerReport, ...]
    recorded: RecordedRun | None = None
    batch: MinibatchNoise | None = None


# --- simulate --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PolicyGroup:
    """One clip group under one policy.  Rate and spreads are over the finite ``steps`` at which it had a gradient.

    They are NaN where there is none, and, but for ``norm``, where the policy needs more than the norm of a group that
    shares tensors with one before it.
    """

    name: str
    clip_rate: float
    norm: Spread
    scale: Spread
    direction_change_deg: Spread
    share: float
    steps: int | None = None


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of the run: steps a to b, both inclusive, by their index."""

    steps: tuple[int, int]
    clip_rate: float
    norm: Spread
    scale: Spread


@dataclass(frozen=True, slots=True)
class PolicyLayer:
    """``clip_rate`` is over the finite ``steps`` at which the layer had a gradient.

    The other means, and the total of ``clipped_elements``, which is off by ``clipped_elements_error`` at most, are over
    those among the ``layer_steps`` of the policy's result.
    """

    name: str
    clip_rate: float
    scale: float
    direction_change_deg: float
    clipped_elements: int
    clipped_elements_error: int = 0
    steps: int | None = None


@dataclass(frozen=True, slots=True)
class RoleClipping:
    """The actor or the critic of one clip group; ``clip_rate_alone`` is the rate had it been clipped by itself."""

    name: str
    share: float
    clip_rate_alone: float


@dataclass(frozen=True, slots=True)
class PolicyResult:
    """What one policy would have done.

    ``scale`` is (g·c)/‖g‖², the factor by which the gradient's own direction was kept, which for a policy that
    multiplies by one factor is that factor; ``norm_ratio`` is ‖c‖/‖g‖.  ``clip_rate_ci95`` is None where there are too
    few independent steps; ``effective_steps`` is the sample size behind it.  ``clipped_elements`` is over all steps and
    surely within ``clipped_elements_error`` of the truth, 0 where it is exact.  ``recent`` is the newest part of the
    run.  ``roles`` are given where one norm is taken over an actor and a critic together.  ``group_steps`` and
    ``layer_steps`` are the finite steps at which what became of the clip groups and of the layers is known: fewer than
    all in a trace that holds the spectra of tensors at some of its steps.
    ``update_direction_change_deg`` is the angle between the updates that Adam, as the checkpoint left it, would make of
    the raw and of the clipped gradient; None where that is not known.
    """

    policy: str
    threshold: float | None
    clip_rate: float
    clip_rate_ci95: tuple[float, float] | None
    effective_steps: float
    clipped_steps: int
    scale: Spread
    norm_ratio: Spread
    direction_change_deg: Spread | None
    direction_change_error_deg: float
    clipped_elements: int
    groups: tuple[PolicyGroup, ...]
    phases: tuple[Phase, ...]
    recent: RecentClipping
    layers: tuple[PolicyLayer, ...]
    roles: tuple[RoleClipping, ...]
    clipped_elements_error: int = 0
    group_steps: int | None = None
    layer_steps: int | None = None
    update_direction_change_deg: Spread | None = None


@dataclass(frozen=True, slots=True)
class NormHistogram:
    """Counts of finite steps by the largest clip-group norm; ``edges`` has one entry more than ``counts``.

    ``smallest`` and ``largest`` are the least and the greatest of those norms; NaN where no step is finite.
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    smallest: float
    largest: float


@dataclass(frozen=True, slots=True)
class SweepRow:
    """One rung of the ladder: what a ``max_norm`` would clip; ``scale`` is the mean over the finite steps."""

    max_norm: float
    clip_rate: float
    recent_clip_rate: float
    scale: float


@dataclass(frozen=True, slots=True)
class Simulation:
    """``suggested_max_norm`` maps "0.50", "0.10", "0.05", "0.01" to the υ that clips that share, "steps" to [a, b].

    It looks at the newest ``recent_steps`` of the ``steps``.  At ``nonfinite_skipped`` of the ``nonfinite_steps`` the
    optimizer is known not to have stepped.
    """

    schema: str
    source: Source
    convention: str
    findings: tuple[str, ...]
    notes: tuple[str, ...]
    skipped: tuple[str, ...]
    steps: int
    nonfinite_steps: int
    nonfinite: tuple[NonfiniteStep, ...]
    norm: Spread
    norm_histogram: NormHistogram
    results: tuple[PolicyResult, ...]
    sweep: tuple[SweepRow, ...]
    suggested_max_norm: Mapping[str, float | tuple[int, int]]
    suggested_max_norm_overall: Mapping[str, float | tuple[int, int]]
    recent_steps: int
    float32_overflow: Float32Overflow | None = None
    nonfinite_skipped: int = 0
    batch: MinibatchNoise | None = None
