"""``spike``: one step far above its neighbours."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from gradscope.check_results import Reading
from gradscope.health.evidence import Evidence
from gradscope.health.rule import Limit, Limits, Rule, Verdict
from gradscope.notation import number

FloatArray = NDArray[np.float64]

# Neighbours on either side that a step is compared with, and the fewest that must lie before it.
NEIGHBOURS = 32
FEWEST_NEIGHBOURS = 16
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
    joint = evidence.table.norms(range(len(evidence.tensors)))
    rows = np.flatnonzero(np.isfinite(joint) & (joint > 0.0))
    if len(rows) <= FEWEST_NEIGHBOURS:
        return Verdict.cannot_tell(f"it takes more than {FEWEST_NEIGHBOURS} steps to tell a spike from the others")
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
    above, local = np.full(len(logs), -math.inf), np.full(len(logs), 1.0)
    for at in range(FEWEST_NEIGHBOURS, len(logs)):
        before, after = logs[max(0, at - NEIGHBOURS) : at], logs[at + 1 : at + 1 + NEIGHBOURS]
        sides = [side for side in (before, after) if len(side) >= FEWEST_NEIGHBOURS] or [before]
        # Above both sides: where the level changes, the first step of the higher level is no spike.
        above[at] = logs[at] - max(float(np.median(side)) for side in sides)
        deviations = np.concatenate([side - np.median(side) for side in sides])
        local[at] = MAD_TO_SIGMA * float(np.median(np.abs(deviations)))
    scale = np.maximum(local, max(SMALLEST_SCALE, _scale_of_tail(above[FEWEST_NEIGHBOURS:])))
    return _Heights(above, above / scale)


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
        Limit("z", 8.0, "largest height in robust standard deviations of the log norm"),
        Limit("ratio", 30.0, "largest ratio to the median of its neighbours; both must be exceeded", least=1.0),
    ),
    judge=judge,
)
