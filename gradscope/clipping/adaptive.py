"""Policies whose limit follows the run, or that act on the step as a whole.

Each clip group has a history of its own; only finite steps enter it.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence

import numpy as np

from gradscope.clipping.policy import Convention, Factors, FloatArray, IntArray, ScalePolicy, limit_norm

ZCLIP_ALPHA = 0.97
ZCLIP_WARMUP = 25
ZCLIP_MAX_NORM = 1.0
ZCLIP_EPSILON = 1e-6


class AutoClip(ScalePolicy):
    """υ_t = the p-th percentile of ‖g_1‖ … ‖g_t‖, this step included, with linear interpolation.

    Source: Seetharaman, Wichern, Pardo, Le Roux, "AutoClip: Adaptive Gradient Clipping for Source Separation Networks",
    MLSP 2020, whose code takes ``np.percentile`` of the whole history and then clips by norm.
    """

    __slots__ = ()

    @property
    def threshold(self) -> None:
        """None: the limit follows the run."""
        return None

    def factors(self, norms: FloatArray, numel: IntArray, convention: Convention) -> Factors:
        """Clip by norm at the running percentile of each unit's norms."""
        return self.following(norms.shape[1], numel, convention)(norms)

    def following(self, units: int, numel: IntArray, convention: Convention) -> Callable[[FloatArray], Factors]:
        """Each unit has a percentile that moves with its own norms."""
        limits = [RunningPercentile(self.arguments[0]).after for _ in range(units)]
        return lambda norms: limit_norm(norms, _limits(norms, limits), convention)


def _limits(norms: FloatArray, limits: Sequence[Callable[[float], float]]) -> FloatArray:
    """What ``limits``, one per unit, give in turn for the steps at which it had a gradient; infinite at the others."""
    found = np.full_like(norms, np.inf)
    for unit, series in enumerate(norms.T):
        there = ~np.isnan(series)
        found[there, unit] = [limits[unit](norm) for norm in series[there].tolist()]
    return found


class RunningPercentile:
    """``np.percentile(series[: t + 1], percentile)`` for every t of a series that is told one by one, in O(log t).

    Two heaps meet at the order statistic below the percentile, whose rank never falls as the series grows.
    """

    def __init__(self, percentile: float) -> None:
        self._share = percentile / 100.0
        self._below: list[float] = []
        self._above: list[float] = []

    def after(self, value: float) -> float:
        """The percentile of the series that ``value`` continues."""
        below, above = self._below, self._above
        rank, fraction = divmod((len(below) + len(above)) * self._share, 1.0)
        heapq.heappush(above, -heapq.heappushpop(below, -value) if below else value)
        while len(below) <= rank:
            heapq.heappush(below, -heapq.heappop(above))
        low = -below[0]
        return low + (above[0] - low) * fraction if fraction else low


class ZClip(ScalePolicy):
    """Norms that stand out from their moving mean and variance are pulled back towards the mean.

    With z_t = (n_t − μ)/(σ + 1e-6): where z_t > z the limit is μ + σ·z²/z_t and otherwise there is none; where n_t is
    above the lower of that limit and 1.0 the gradient is scaled to it.  Then, with x the limit (before the cap at 1.0)
    where there was one and n_t elsewhere, μ ← αμ + (1−α)x and σ² ← ασ² + (1−α)(x − μ)², μ being the new mean.  The
    first 25 steps are only capped at 1.0; their mean and (population) variance start μ and σ².

    Source: Kumar, Owen, Roy Chowdhury, Güra, "ZClip: Adaptive Spike Mitigation for LLM Pre-Training", 2025, with the
    defaults of the authors' code (bluorion-com/ZClip: alpha 0.97, z_thresh 2.5, max_grad_norm 1.0, warmup_steps 25,
    mode zscore, clip_option adaptive_scaling).
    """

    __slots__ = ()

    @property
    def threshold(self) -> None:
        """None: the limit follows the run."""
        return None

    def factors(self, norms: FloatArray, numel: IntArray, convention: Convention) -> Factors:
        """Clip by norm at the limits that each unit's own moving mean and variance give."""
        return self.following(norms.shape[1], numel, convention)(norms)

    def following(self, units: int, numel: IntArray, convention: Convention) -> Callable[[FloatArray], Factors]:
        """Each unit has a moving mean and variance of its own."""
        z, alpha = (*self.arguments, ZCLIP_ALPHA)[:2]
        limits = [_ZClipLimit(z, alpha).after for _ in range(units)]
        return lambda norms: limit_norm(norms, _limits(norms, limits), convention)


class _ZClipLimit:
    """The norm to which each step of a unit is scaled; infinite after the warm-up where the step is left as it is."""

    def __init__(self, z: float, alpha: float) -> None:
        self._z = z
        self._alpha = alpha
        self._warmup: list[float] = []
        self._mean = 0.0
        self._variance = 0.0

    def after(self, norm: float) -> float:
        """The limit of the next step, whose norm this is."""
        if len(self._warmup) < ZCLIP_WARMUP:
            self._warmup.append(norm)
            if len(self._warmup) == ZCLIP_WARMUP:
                series = np.array(self._warmup)
                self._mean, self._variance = float(series.mean()), float(series.var())
            return ZCLIP_MAX_NORM
        deviation = math.sqrt(self._variance)
        score = (norm - self._mean) / (deviation + ZCLIP_EPSILON)
        target = self._mean + deviation * self._z * self._z / score if score > self._z else norm
        limit = min(target, ZCLIP_MAX_NORM)
        self._mean = self._alpha * self._mean + (1.0 - self._alpha) * target
        self._variance = self._alpha * self._variance + (1.0 - self._alpha) * (target - self._mean) ** 2
        return limit if norm > limit else math.inf


class Skip(ScalePolicy):
    """The whole step is dropped when the norm of any clip group exceeds υ (Megatron-LM skips an iteration likewise).

    A dropped step has factor 0 in every group; a group is triggered by its own norm.
    """

    __slots__ = ()

    def factors(self, norms: FloatArray, numel: IntArray, convention: Convention) -> Factors:
        """1 or 0: a step counts for all units."""
        triggered = norms > self.arguments[0]
        dropped = triggered.any(axis=1, keepdims=True)
        return Factors(np.where(dropped, 0.0, np.ones_like(norms)), triggered)
