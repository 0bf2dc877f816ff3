"""Policies whose limit follows the run, or that act on the step as a whole.

Each clip group has a history of its own; only finite steps enter it.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable

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
        limits = _limits(norms, lambda series: running_percentile(series, self.arguments[0]))
        return limit_norm(norms, limits, convention)


def _limits(norms: FloatArray, limits_of: Callable[[FloatArray], FloatArray]) -> FloatArray:
    """``limits_of`` the series of each unit, over the steps at which it had a gradient; infinite at the others."""
    limits = np.full_like(norms, np.inf)
    for unit, series in enumerate(norms.T):
        there = ~np.isnan(series)
        limits[there, unit] = limits_of(series[there])
    return limits


def running_percentile(series: FloatArray, percentile: float) -> FloatArray:
    """``np.percentile(series[: t + 1], percentile)`` for every t, in O(S log S).

    Two heaps meet at the order statistic below the percentile, whose rank never falls as the series grows.
    """
    below: list[float] = []
    above: list[float] = []
    running = np.empty_like(series)
    for t, value in enumerate(series.tolist()):
        rank, fraction = divmod(t * (percentile / 100.0), 1.0)
        heapq.heappush(above, -heapq.heappushpop(below, -value) if below else value)
        while len(below) <= rank:
            heapq.heappush(below, -heapq.heappop(above))
        low = -below[0]
        running[t] = low + (above[0] - low) * fraction if fraction else low
    return running


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
        z, alpha = (*self.arguments, ZCLIP_ALPHA)[:2]
        return limit_norm(norms, _limits(norms, lambda series: _zclip_limits(series, z, alpha)), convention)


def _zclip_limits(series: FloatArray, z: float, alpha: float) -> FloatArray:
    """The norm to which each step is scaled; infinite after the warm-up where the step is left as it is."""
    limits = np.full_like(series, ZCLIP_MAX_NORM)
    if len(series) <= ZCLIP_WARMUP:
        return limits
    mean, variance = float(series[:ZCLIP_WARMUP].mean()), float(series[:ZCLIP_WARMUP].var())
    for t, norm in enumerate(series[ZCLIP_WARMUP:].tolist(), start=ZCLIP_WARMUP):
        deviation = math.sqrt(variance)
        score = (norm - mean) / (deviation + ZCLIP_EPSILON)
        target = mean + deviation * z * z / score if score > z else norm
        limit = min(target, ZCLIP_MAX_NORM)
        limits[t] = limit if norm > limit else math.inf
        mean = alpha * mean + (1.0 - alpha) * target
        variance = alpha * variance + (1.0 - alpha) * (target - mean) ** 2
    return limits


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
