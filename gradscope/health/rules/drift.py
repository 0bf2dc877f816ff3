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

import numpy as np

from gradscope.check_results import Reading
from gradscope.health.baselines import Baseline
from gradscope.health.evidence import Evidence
from gradscope.health.layer_changes import EVERYWHERE, LayerChange, layer_changes
from gradscope.health.rule import Limit, Limits, Rule, Verdict
from gradscope.health.run_courses import RunCourses
from gradscope.holm import holm
from gradscope.layer_series import QUANTITIES, Quantity
from gradscope.notation import called, count, names, number, percent, setting
from gradscope.printable import printable

# Fewer steps have no course.
FEWEST_STEPS = 16
# Equal fractions of runs of very different lengths are no longer the same part of a training.
LARGEST_STEPS_RATIO = 2.0
# Of a clip rate whose steps are too few, or hang together too much, for an interval.
WIDEST_HALF = 0.25


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
    everywhere, layers = layer_changes(run, baseline, limits.number("ratio"), _assumed_spreads(limits))
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


def _assumed_spreads(limits: Limits) -> dict[Quantity, float]:
    # Adaptive optimizers take the size out of a gradient, which in reinforcement learning goes with the rewards.
    updates, others = limits.number("update-spread"), limits.number("seed-spread")
    return {quantity: updates if quantity in ("update", "update-ratio") else others for quantity in QUANTITIES}


def _readings(evidence: Evidence, tested: Sequence[LayerChange], alpha: float) -> list[Reading]:
    """One for each place at which something has drifted (Holm 1979), the worst first."""
    drifted: dict[str, list[LayerChange]] = {}
    known = [change for change in tested if change.known]
    for change, fell in zip(known, holm([change.probability for change in known], alpha), strict=True):
        if fell:
            drifted.setdefault(change.where, []).append(change)
    each = alpha / max(1, len(known))
    worst = [max(changes, key=lambda change: change.excess) for changes in drifted.values()]
    worst.sort(key=lambda change: change.excess, reverse=True)
    return [_reading(evidence, change, each, [c for c in drifted[change.where] if c is not change]) for change in worst]


def _nearest(evidence: Evidence, families: Sequence[tuple[Sequence[LayerChange], float]]) -> Reading:
    tried = [(change, alpha / max(1, len(tested))) for tested, alpha in families for change in tested if change.known]
    if not tried:
        return _said(evidence, None, "too little is known of the layers to tell drift from noise.")
    return _reading(
        evidence, *max(tried, key=lambda one: abs(one[0].change) / (one[0].margin + 4.0 * one[0].spread + 1e-9)), []
    )


def _reading(evidence: Evidence, change: LayerChange, alpha: float, others: Sequence[LayerChange]) -> Reading:
    # A baseline that somebody made up may hold what no factor is.
    times, reach = math.exp(max(-700.0, min(change.change, 700.0))), math.exp(min(change.reach(alpha), 700.0))
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
