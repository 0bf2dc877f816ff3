"""``drift``: layers whose gradients are no longer those of the baseline, beyond what noise and seeds explain.

Equal fractions of the runs are compared, so that a trend both went through counts for nothing.  Two seeds truly differ:
a layer has drifted where the mean of log(run / baseline) exceeds the margin log(ratio) by more than t standard
deviations, those between seeds and of the noise within the runs together.  The spread between seeds is assumed
(``seed-spread``, ``update-spread``) for a baseline of one run; further runs take its place, those of all layers pooled
first, then each layer's own.  The median layer is tested, too, with half the margin: a learning rate moves all layers
a little.  These two families share ``alpha``; in each, Holm's procedure holds the chance of any false alarm.

Measured (``python -m benchmarks.drift_false_alarms``): 0 false alarms in all 1,092 judgements of one seed by another,
of 22 seeds each of SB3's PPO and a transformer and 4 each of 14 further trainings, nor any with baselines of three.
The 50 pairs that share no run bound the rate only by 7.1 % (Wilson, 95 %), and the limits were set on these runs: one
(A2C) failed at a ``seed-spread`` of 1.1, whence 1.25; none does since. Learning rates 3 and 10 times as high, initial
weights times 5 and 0, and LayerNorms left out were seen in every judgement of PPO and the transformer, of 4 seeds
each. Of an MLP that no limit was set on, 3 seeds against 8: SGD for Adam, weight decay 0.1 and a loss times 10
always, inputs times 10 in 87 %, a learning rate times 3 in 45 % (by three runs: always); a batch 8 times as large,
tanh for ReLU or dropout never by three runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradscope.check_results import Reading
from gradscope.differences import Course
from gradscope.health.baselines import Baseline
from gradscope.health.evidence import Evidence
from gradscope.health.rule import Limit, Limits, Rule, Verdict
from gradscope.health.run_courses import LayerCourses, RunCourses
from gradscope.holm import holm
from gradscope.layer_series import QUANTITIES, Quantity
from gradscope.notation import called, count, names, number, percent, setting
from gradscope.printable import printable
from gradscope.student_t import student_probability, student_quantile

FloatArray = NDArray[np.float64]

# Fewer steps have no course.
FEWEST_STEPS = 16
# Equal fractions of runs of very different lengths are no longer the same part of a training.
LARGEST_STEPS_RATIO = 2.0
# The assumed spread between seeds counts as much as what this many further runs say of a layer.
ASSUMED_RUNS = 4.0
# It is known no better than from about as many pairs of runs.
ASSUMED_FREEDOM = 30.0
# The layers of a network do not vary by themselves.
LAYERS_PER_FREEDOM = 3.0
# Of fewer fractions of a run no scatter is known.
FEWEST_FRACTIONS = 4
# Of a clip rate whose steps are too few, or hang together too much, for an interval.
WIDEST_HALF = 0.25
# Fewer layers have no typical one.
FEWEST_LAYERS = 3
EVERYWHERE = "most layers"


@dataclass(frozen=True, slots=True)
class _Change:
    """One quantity of one layer against the baseline; ``spread`` is the standard deviation expected of it."""

    where: str
    quantity: Quantity
    change: float
    margin: float
    spread: float
    freedom: float

    def probability(self) -> float:
        """Of so large a change, where in truth it is no larger than the margin."""
        beyond = abs(self.change) - self.margin
        if beyond <= 0.0:
            return 1.0
        return student_probability(beyond / self.spread, self.freedom) / 2.0 if self.spread > 0.0 else 0.0

    def reach(self, alpha: float) -> float:
        """The largest change that passes a test of this size by itself."""
        return self.margin + student_quantile(1.0 - min(alpha, 0.5), self.freedom) * self.spread


def judge(evidence: Evidence, limits: Limits) -> Verdict:
    """Compare the run with those of the baseline, layer by layer."""
    baseline = evidence.baseline
    if baseline is None:
        return Verdict.cannot_tell("there is no baseline to compare with (--baseline FILE)")
    run = RunCourses.of(evidence)
    if run is None:
        return Verdict.cannot_tell("a checkpoint is one moment of a run: compare the run's recording with the baseline")
    if (run.kind == "norm-log") != (baseline.runs[0].kind == "norm-log"):
        return Verdict.cannot_tell("a log of norms and a source with layers have no series in common")
    if not set(run.layers) & set(baseline.runs[0].layers):
        return Verdict.violated([_said(evidence, None, "the run has no layer of the baseline: it is another model.")])
    why = _not_comparable(run, baseline)
    if why is not None:
        return Verdict.cannot_tell(why)
    everywhere, layers = _changes(run, baseline, limits)
    if not layers:
        return Verdict.cannot_tell("the baseline and this run have no measured quantity in common")
    # Half of alpha for the network as a whole, of which little is tested, half for its layers.
    alpha = limits.number("alpha") / 2.0
    drifted = [
        *_readings(evidence, everywhere, alpha),
        *_readings(evidence, layers, alpha),
    ]
    found = [*_structure(evidence, run, baseline), *drifted, *_clipping(evidence, run, baseline, limits)]
    if found:
        return Verdict.violated(found)
    return Verdict.well(_nearest(evidence, [(everywhere, alpha), (layers, alpha)]))


def _not_comparable(run: RunCourses, baseline: Baseline) -> str | None:
    usual = round(float(np.median([r.steps for r in baseline.runs])))
    least, most = sorted((run.steps, usual))
    lengths = f"this run has {count(run.steps)}, the baseline {count(usual)}"
    if least < FEWEST_STEPS:
        return f"at least {FEWEST_STEPS} steps are needed of both: {lengths}"
    if most > LARGEST_STEPS_RATIO * least:
        return f"runs of about as many steps are needed: {lengths}"
    return None


def _changes(run: RunCourses, baseline: Baseline, limits: Limits) -> tuple[list[_Change], list[_Change]]:
    """What is tested: of the typical layer, and of each."""
    everywhere, layers = [], []
    margin = math.log(limits.number("ratio"))
    for quantity in QUANTITIES:
        # Adaptive optimizers take the size out of a gradient, which in reinforcement learning goes with the rewards.
        spread = "update-spread" if quantity in ("update", "update-ratio") else "seed-spread"
        assumed = math.log(limits.number(spread)) ** 2
        found = {
            name: changes
            for name, layer in run.layers.items()
            if name in baseline.runs[0].layers
            and (changes := _against(layer, [r.layers[name] for r in baseline.runs], quantity)) is not None
        }
        if not found:
            continue
        further = len(baseline.runs) - 1
        own = {name: _variance_between(changes) for name, changes in found.items()}
        weight = further * len(found) / LAYERS_PER_FREEDOM
        pooled = (ASSUMED_RUNS * assumed + weight * float(np.mean(list(own.values())))) / (ASSUMED_RUNS + weight)
        freedom = ASSUMED_FREEDOM + weight
        means = {name: np.asarray(changes.mean(axis=0)) for name, changes in found.items()}
        for name, mean in means.items():
            variance = (ASSUMED_RUNS * pooled + further * own[name]) / (ASSUMED_RUNS + further)
            layers.append(_change(name, quantity, mean, margin, variance * (1.0 + 1.0 / (1 + further)), freedom))
        if len(found) >= FEWEST_LAYERS:
            # What differs at random from layer to layer is not there in the typical one.
            typical = _typical(list(means.values()))
            variance = pooled * (1.0 + 1.0 / (1 + further))
            everywhere.append(_change(EVERYWHERE, quantity, typical, margin / 2.0, variance, freedom))
    return everywhere, layers


def _against(layer: LayerCourses, usual: Sequence[LayerCourses], quantity: Quantity) -> FloatArray | None:
    """How far the layer lies above each run of the baseline, [runs, fractions]; NaN where any is not known."""
    if quantity not in layer.courses or any(quantity not in other.courses for other in usual):
        return None
    courses = [layer.courses[quantity], *(other.courses[quantity] for other in usual)]
    fractions = min(len(course.means) for course in courses)
    here, *others = (course.coarser(fractions) for course in courses)
    changes = here - np.array(others)
    changes[:, np.isnan(changes).any(axis=0)] = math.nan
    return None if np.isnan(changes).all() else changes


def _typical(means: Sequence[FloatArray]) -> FloatArray:
    """The median over the layers, in each fraction that is known of all."""
    fractions = min(len(changes) for changes in means)
    coarse = np.array([Course(tuple(changes.tolist()), 0.0).coarser(fractions) for changes in means])
    return np.asarray(np.median(coarse, axis=0))


def _variance_between(changes: FloatArray) -> float:
    """The variance between the runs of the baseline, from what the run differs from each; 0 for one run."""
    return float(np.nanmean(changes, axis=1).var(ddof=1)) if len(changes) > 1 else 0.0


def _change(
    where: str, quantity: Quantity, changes: FloatArray, margin: float, variance: float, freedom: float
) -> _Change:
    """A change with what is expected of it, ``variance`` being that between seeds.

    The noise within the runs is what scatters from one fraction to the next (von Neumann 1941, the mean square
    successive difference).  Slower wanderings are how seeds differ, and would hide a change that comes with time.
    """
    known = changes[~np.isnan(changes)]
    if len(known) < FEWEST_FRACTIONS:
        return _Change(where, quantity, math.nan, margin, math.inf, freedom)
    noise = float(np.square(np.diff(known)).mean()) / 2.0 / len(known)
    # Successive differences are worth two thirds of as many values.
    doubt = variance**2 / freedom + noise**2 / (2.0 / 3.0 * (len(known) - 1))
    total = variance + noise
    freedom = total**2 / doubt if doubt > 0.0 else math.inf
    return _Change(where, quantity, float(known.mean()), margin, math.sqrt(total), freedom)


def _readings(evidence: Evidence, tested: Sequence[_Change], alpha: float) -> list[Reading]:
    """One for each place at which something has drifted (Holm 1979), the worst first."""
    drifted: dict[str, list[_Change]] = {}
    known = [change for change in tested if math.isfinite(change.change) and math.isfinite(change.spread)]
    for change, fell in zip(known, holm([change.probability() for change in known], alpha), strict=True):
        if fell:
            drifted.setdefault(change.where, []).append(change)
    each = alpha / max(1, len(known))
    worst = [max(changes, key=_excess) for changes in drifted.values()]
    worst.sort(key=_excess, reverse=True)
    return [_reading(evidence, change, each, [c for c in drifted[change.where] if c is not change]) for change in worst]


def _excess(change: _Change) -> float:
    beyond = abs(change.change) - change.margin
    return beyond / change.spread if change.spread > 0.0 else math.copysign(math.inf, beyond)


def _nearest(evidence: Evidence, families: Sequence[tuple[Sequence[_Change], float]]) -> Reading:
    tried = [
        (change, alpha / max(1, len(tested)))
        for tested, alpha in families
        for change in tested
        if math.isfinite(change.change) and math.isfinite(change.spread)
    ]
    if not tried:
        return _said(evidence, None, "too little is known of the layers to tell drift from noise.")
    return _reading(
        evidence, *max(tried, key=lambda one: abs(one[0].change) / (one[0].margin + 4.0 * one[0].spread + 1e-9)), []
    )


def _reading(evidence: Evidence, change: _Change, alpha: float, others: Sequence[_Change]) -> Reading:
    times, reach = math.exp(change.change), math.exp(min(change.reach(alpha), 700.0))
    where = "Across the layers the" if change.where == EVERYWHERE else f"{called(printable(change.where))}: the"
    also = f" (also the {names([QUANTITIES[other.quantity] for other in others])})" if others else ""
    return Reading(
        value=max(times, 1.0 / times),
        limit=reach,
        where=change.where,
        steps=_all_steps(evidence),
        message=(
            f"{where} {QUANTITIES[change.quantity]} is {number(times)} times the baseline's{also}; "
            f"seeds and noise explain {number(1.0 / reach)} to {number(reach)}."
        ),
    )


def _structure(evidence: Evidence, run: RunCourses, baseline: Baseline) -> list[Reading]:
    """Layers that are gone, new, of another size, or silent where they were not."""
    usual = baseline.runs[0].layers
    found = [
        _said(evidence, name, f"{called(printable(name))} is gone: the baseline has it.")
        for name in usual
        if name not in run.layers
    ]
    found += [
        _said(evidence, name, f"{called(printable(name))} is new: the baseline does not have it.")
        for name in run.layers
        if name not in usual
    ]
    for name, layer in run.layers.items():
        if name not in usual:
            continue
        if layer.numel != usual[name].numel:
            was = count(usual[name].numel)
            message = f"{called(printable(name))} has {count(layer.numel)} parameters; in the baseline {was}."
            found.append(_said(evidence, name, message))
        silent = [other.layers[name].silent for other in baseline.runs]
        if not any(math.isnan(share) for share in silent) and math.isnan(layer.silent):
            found.append(
                _said(evidence, name, f"{called(printable(name))} has no finite gradient; in the baseline it has.")
            )
        elif layer.silent - max(silent) > 0.5:
            message = (
                f"the gradient of {called(printable(name))} is zero in {percent(layer.silent)} of the steps; "
                f"in the baseline in {percent(max(silent))}."
            )
            found.append(_said(evidence, name, message))
    return found


def _clipping(evidence: Evidence, run: RunCourses, baseline: Baseline, limits: Limits) -> list[Reading]:
    """Another max_norm, or another share of steps clipped."""
    found = []
    for group, max_norm in run.clipping.max_norms.items():
        usual = {other.clipping.max_norms.get(group) for other in baseline.runs} - {None}
        if usual and max_norm not in usual:
            was = " or ".join(setting(value) for value in usual if value is not None)
            of_group = "" if group == "all" else f" of {printable(group)}"
            message = f"max_norm{of_group} is {setting(max_norm)}; in the baseline it is {was}."
            found.append(_said(evidence, group, message))
    rate, most = run.clipping.rate, limits.number("clip-rate")
    rates = [other.clipping.rate for other in baseline.runs if other.clipping.rate is not None]
    if rate is None or not rates:
        return found
    off = max(rate - max(rates), min(rates) - rate)
    off -= sum(_half_width(r) for r in (run, max(baseline.runs, key=_half_width)))
    if off > most:
        usual_rate = float(np.mean(rates))
        message = f"The run clips {percent(rate)} of its steps; the baseline {percent(usual_rate)}."
        found.append(Reading(abs(rate - usual_rate), most, None, _all_steps(evidence), message))
    return found


def _half_width(run: RunCourses) -> float:
    interval = run.clipping.interval
    return WIDEST_HALF if interval is None else (interval[1] - interval[0]) / 2.0


def _said(evidence: Evidence, where: str | None, message: str) -> Reading:
    return Reading(
        None, None, where, _all_steps(evidence), message[:1].upper() + message[1:] if where is None else message
    )


def _all_steps(evidence: Evidence) -> tuple[int, int] | None:
    return evidence.steps_of([0, len(evidence.table.index) - 1]) if evidence.table is not None else None


DRIFT = Rule(
    name="drift",
    severity="error",
    about="A layer's gradients are not those of the baseline.",
    formula=(
        "|mean over equal fractions of log(run / baseline)| > log(ratio) + t × √(between seeds² + within runs²); "
        "t by Holm over all layers and quantities"
    ),
    source="Holm 1979; von Neumann 1941 (noise within runs); Smyth 2004 (moderated variances); limits measured",
    limits=(
        Limit("ratio", 1.5, "smallest factor by which a layer counts as changed; √ratio for most layers together", 1.0),
        Limit("alpha", 0.01, "largest chance that a run that has not changed by more than this fails", 1e-6, 0.5),
        Limit(
            "seed-spread", 1.25, "factor by which a layer's gradients differ between seeds, where one run tells", 1.0
        ),
        Limit("update-spread", 1.1, "factor by which its updates differ between seeds, likewise", 1.0),
        Limit("clip-rate", 0.25, "largest change of the clip rate, beyond its intervals", 0.0, 1.0),
    ),
    judge=judge,
)
