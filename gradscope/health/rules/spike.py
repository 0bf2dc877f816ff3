"""``spike``: one step far above its neighbours."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from gradscope.check_results import Reading
from gradscope.health.evidence import Evidence
from gradscope.health.rule import Limit, Limits, Rule, Verdict
from gradscope.notation import number

FloatArray = NDArray[np.float64]

# Neighbours on either side that a step is compared with, and the fewest that must lie before it.
NEIGHBOURS = 32
FEWEST_NEIGHBOURS = 16
# Steps that are looked at together; what bounds the memory.
PART = 1 << 14
# The median absolute deviation of a normal distribution is σ/1.4826.
MAD_TO_SIGMA = 1.4826
# Neighbours that hardly differ (a converged run) must not make a small step up a large one.
SMALLEST_SCALE = 0.1
# The share of a run's steps that may be spikes; if more are as large, they are what the run is like.
SPIKE_SHARE = 0.01


def judge(evidence: Evidence, limits: Limits) -> Verdict:
    """Compare each step's log norm with those around it."""
    if evidence.table is None:
        return Verdict.cannot_tell("the source holds no gradients of single steps")
    if not evidence.source.in_time:
        return Verdict.cannot_tell("the minibatches of one batch are not steps in time")
    joint = evidence.joint
    rows = np.flatnonzero(np.isfinite(joint) & (joint > 0.0))
    if len(rows) <= FEWEST_NEIGHBOURS:
        return Verdict.cannot_tell(f"it takes more than {FEWEST_NEIGHBOURS} steps whose norm is finite and not 0")
    heights = _heights(np.log(joint[rows]))
    spikes = (heights.z > limits.number("z")) & (heights.above > math.log(limits.number("ratio")))
    found = np.flatnonzero(spikes)
    if not len(found):
        nearest = int(np.argmax(heights.nearness(limits.number("z"), limits.number("ratio"))))
        return Verdict.well(_reading(evidence, rows, joint, heights, nearest, limits))
    worst = found[np.argsort(-heights.above[found], kind="stable")]
    return Verdict.violated([_reading(evidence, rows, joint, heights, int(at), limits) for at in worst])


@dataclass(frozen=True, slots=True, eq=False)
class _Heights:
    """How far each log norm lies ``above`` the median of its neighbours, and how many standard deviations that is."""

    above: FloatArray
    z: FloatArray

    def nearness(self, z: float, ratio: float) -> FloatArray:
        """How near each step comes to exceeding both."""
        return np.minimum(np.exp(self.above) / ratio, self.z / z)


def _heights(logs: FloatArray) -> _Heights:
    parts = [_beside_neighbours(logs, start) for start in range(0, len(logs), PART)]
    above, local = (np.concatenate(column) for column in zip(*parts, strict=True))
    scale = np.maximum(local, max(SMALLEST_SCALE, _scale_of_tail(above[FEWEST_NEIGHBOURS:])))
    return _Heights(above, above / scale)


def _beside_neighbours(logs: FloatArray, start: int) -> tuple[FloatArray, FloatArray]:
    """Each log norm of a part above its neighbours' median, and their standard deviation."""
    places = np.arange(start, min(start + PART, len(logs)))
    padded = np.pad(logs, NEIGHBOURS, constant_values=math.nan)
    windows = sliding_window_view(padded, NEIGHBOURS)
    before, after = windows[places], windows[places + NEIGHBOURS + 1].copy()
    # So few after a step are too few for a median; those before it tell then.
    after[np.isfinite(after).sum(axis=1) < FEWEST_NEIGHBOURS] = math.nan
    early = places < FEWEST_NEIGHBOURS
    medians = np.column_stack([_median(before), _median(after)])
    deviations = np.abs(np.column_stack([before - medians[:, :1], after - medians[:, 1:]]))
    # Above both sides: where the level changes, the first step of the higher level is no spike.
    above = logs[places] - np.fmax(medians[:, 0], medians[:, 1])
    return np.where(early, -math.inf, above), np.where(early, 1.0, MAD_TO_SIGMA * _median(deviations))


def _median(windows: FloatArray) -> FloatArray:
    """The median of each row, NaN passed over; NaN where there is nothing else."""
    medians = np.median(windows, axis=1)
    partly = np.isnan(medians) & ~np.isnan(windows).all(axis=1)
    medians[partly] = np.nanmedian(windows[partly], axis=1)
    return np.asarray(medians)


def _scale_of_tail(above: FloatArray) -> float:
    """σ by the largest deviations of the run, but for as many as may be spikes: heavy tails count as what they are."""
    spared = max(3, math.ceil(SPIKE_SHARE * len(above)))
    if spared >= len(above):
        return 0.0
    reached = float(np.sort(above)[-spared - 1])
    return reached / NormalDist().inv_cdf(1.0 - (spared + 0.5) / len(above))


def _reading(
    evidence: Evidence, rows: NDArray[np.int64], joint: FloatArray, heights: _Heights, at: int, limits: Limits
) -> Reading:
    """Of the two numbers that must be exceeded, the one that is the farther from it."""
    steps = evidence.steps_of(rows[[at]])
    assert steps is not None
    times, z = math.exp(heights.above[at]), float(heights.z[at])
    message = (
        f"Step {steps[0]} has norm {number(float(joint[rows[at]]))}, {number(times)} times the median of its "
        f"neighbours, {number(z)} robust standard deviations of the log norm above it."
    )
    value, limit = min(((times, limits.number("ratio")), (z, limits.number("z"))), key=lambda pair: pair[0] / pair[1])
    return Reading(value, limit, None, steps, message)


SPIKE = Rule(
    name="spike",
    severity="error",
    about="The gradient of a step is far above those of its neighbours.",
    formula=(
        "norm / median norm of the 32 steps on either side (the higher of the two), and the same in robust standard "
        "deviations of the log norm: the larger of 1.4826 MAD of the neighbours and that of the run's upper tail"
    ),
    source=(
        "Rousseeuw & Croux 1993, Alternatives to the median absolute deviation; Chowdhery et al. 2022, PaLM, "
        "section 5.1 (loss spikes)"
    ),
    limits=(
        Limit("z", 10.0, "largest height in robust standard deviations of the log norm", least=1.0),
        Limit("ratio", 30.0, "largest ratio to the median of its neighbours; both must be exceeded", least=1.0),
    ),
    judge=judge,
)
