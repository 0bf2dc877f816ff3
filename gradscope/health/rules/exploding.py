"""``exploding``: a gradient that is enormous, or that keeps growing."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from gradscope.check_results import Reading
from gradscope.health.evidence import Evidence
from gradscope.health.rule import Limit, Limits, Rule, Verdict
from gradscope.health.running_median import medians_before, running_medians
from gradscope.notation import number, setting

# The window of the running median: a sixteenth of the run, within these.
SHORTEST_WINDOW = 8
LONGEST_WINDOW = 64


def judge(evidence: Evidence, limits: Limits) -> Verdict:
    """Compare the running median of the joint norm with the limit, and with the median of all that came before."""
    if evidence.table is None:
        return _remembered(evidence, limits.number("max"))
    joint = evidence.joint
    rows = np.flatnonzero(~np.isnan(joint) & ~(evidence.table.nonfinite.any(axis=1)))
    if not len(rows):
        return Verdict.cannot_tell("every step holds NaN or Inf")
    norms = joint[rows]
    growth = _growth(evidence, rows, norms, limits)
    readings = [_size(evidence, rows, norms, limits.number("max")), *([growth] if growth is not None else [])]
    beyond = [reading for reading in readings if reading.over_limit > 1.0]
    return Verdict.violated(beyond) if beyond else Verdict.well(max(readings, key=lambda reading: reading.over_limit))


def _window(steps: int) -> int:
    return min(LONGEST_WINDOW, max(SHORTEST_WINDOW, steps // 16))


def _size(evidence: Evidence, rows: NDArray[np.int64], norms: NDArray[np.float64], most: float) -> Reading:
    """The largest running median of the norm; of few steps, or of steps not in time, the median."""
    window = _window(len(norms))
    if not evidence.source.in_time or len(norms) < window:
        window = len(norms)
    starts, medians = running_medians(norms, window)
    at = int(np.argmax(medians))
    largest = float(medians[at])
    what = "Gradient norm" if window == 1 else f"Median gradient norm of {window} steps"
    message = f"{what}: {number(largest)}"
    if largest > most:
        message += f", above {setting(most)}; lower the learning rate or clip by norm, and look at the loss"
    return Reading(largest, most, None, evidence.steps_of(rows[starts[at] : starts[at] + window]), f"{message}.")


def _growth(evidence: Evidence, rows: NDArray[np.int64], norms: NDArray[np.float64], limits: Limits) -> Reading | None:
    """The largest ratio of a running median to the median of all steps before its window; None where none counts."""
    window = _window(len(norms))
    if not evidence.source.in_time or len(norms) < 2 * window:
        return None
    starts, after = running_medians(norms, window)
    starts, after = starts[starts >= window], after[starts >= window]
    before = medians_before(norms, starts)
    counts = (before > 0.0) & np.isfinite(before) & (after > limits.number("min-norm"))
    most = limits.number("ratio")
    if not counts.any():
        return None
    ratios = np.zeros(len(starts))
    np.divide(after, before, out=ratios, where=counts)
    at = int(np.argmax(ratios))
    grown = float(ratios[at])
    steps = evidence.steps_of(rows[starts[at] : starts[at] + window])
    assert steps is not None
    message = f"The median norm of {window} steps is at most {number(grown)} times that of all steps before them."
    if grown > most:
        message = (
            f"From step {steps[0]} on the median gradient norm is {number(float(after[at]))}, {number(grown)} times "
            f"that of the steps before ({number(float(before[at]))}): the run diverges; lower the learning rate."
        )
    return Reading(grown, most, None, steps, message)


def _remembered(evidence: Evidence, most: float) -> Verdict:
    """By the recent norms that optimizers remember."""
    known = [(report.recent_norm, report) for report in evidence.reports if report.recent_norm is not None]
    if not known:
        return Verdict.cannot_tell("the source holds no gradients, and no optimizer state that tells their size")
    norm, report = max(known, key=lambda pair: pair[0] if not math.isnan(pair[0]) else -1.0)
    message = f"{report.name} saw gradients of norm {number(norm)} in its last {number(report.window or 1)} steps."
    return Verdict.by_value([Reading(norm, most, report.name, None, message)])


EXPLODING = Rule(
    name="exploding",
    severity="error",
    about="The gradient norm is enormous over several steps, or keeps growing.",
    formula=(
        "largest running median of the joint norm; and that median / the median of all steps before its window "
        "(a sixteenth of the run, 8 to 64 steps)"
    ),
    source="Pascanu, Mikolov & Bengio 2013, On the difficulty of training recurrent neural networks, section 2",
    limits=(
        Limit("max", 1e6, "largest median norm over several steps"),
        Limit("ratio", 100.0, "largest growth over the median of what came before", least=1.0),
        Limit("min-norm", 100.0, "median norm up to which growth does not count: a run may start at next to nothing"),
    ),
    judge=judge,
)
