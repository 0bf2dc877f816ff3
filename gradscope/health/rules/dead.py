"""``dead``: tensors whose gradient is zero, step after step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gradscope.check_results import Reading
from gradscope.health.embeddings import is_embedding
from gradscope.health.evidence import Evidence
from gradscope.health.rule import Limit, Limits, Rule, Verdict
from gradscope.notation import count, names, percent

# One step proves little: behind a layer that starts at zero, gradients are zero before its first update.
FEWEST_STEPS = 3
# Over how much of a run, up to its end, a tensor must have been zero, and over how many steps at least.
LAST_PART = 0.25
FEWEST_LAST_STEPS = 16
# A unit that is as good as dead may answer to one input of many.
LIVE_STEPS = 0.05
# Zeros that change places from step to step are many by chance; dead ones are about as many at every step.
FEWEST_STEPS_OF_SHARE = 16
UNSTEADY_SHARE = 0.02
# The share of a bias, or of what follows, that is zero from which on units are what zeroes a matrix, not its inputs.
DEAD_UNITS = 0.5


def judge(evidence: Evidence, limits: Limits) -> Verdict:
    """Look for tensors, and for shares of tensors, that have no gradient but zero."""
    if evidence.source.info.kind == "norm-log":
        return Verdict.cannot_tell("a log of norms does not tell tensors apart")
    if evidence.table is None:
        return _remembered(evidence)
    rows = np.flatnonzero(evidence.finite)
    if len(rows) < FEWEST_STEPS:
        return Verdict.cannot_tell(f"it takes at least {FEWEST_STEPS} finite steps: a gradient may be zero once")
    return _of_steps(evidence, rows, limits.number("max-share"))


def _of_steps(evidence: Evidence, rows: NDArray[np.int64], most: float) -> Verdict:
    table = evidence.table
    assert table is not None
    zero: dict[str, tuple[int, int, bool]] = {}
    shares: list[Reading] = []
    steady: dict[int, float] = {}
    judged: dict[int, NDArray[np.int64]] = {}
    for place, tensor in enumerate(evidence.tensors):
        there = rows[table.present[rows, place]]
        if not tensor.numel or len(there) < FEWEST_STEPS:
            continue
        silent = _silent_part(there, table.max_abs[there, place], evidence.source.in_time)
        if silent is not None:
            seldom = bool((table.max_abs[silent, place] > 0.0).any())
            zero[tensor.name] = (int(table.index[silent[0]]), int(table.index[silent[-1]]), seldom)
        elif not is_embedding(tensor.name):
            steady[place] = _steady_zeros(table.zeros[there, place], tensor.numel) / tensor.numel
            judged[place] = there
    for place, there in judged.items():
        share = 0.0 if _inputs_explain(evidence, steady, place) else steady[place]
        shares.append(_share_reading(evidence, there, evidence.tensors[place].name, share, most))
    shares.sort(key=lambda reading: -(reading.value or 0.0))
    beyond = [reading for reading in shares if (reading.value or 0.0) > most]
    readings = [*_zero_readings(evidence, zero, most), *beyond]
    if readings:
        return Verdict.violated(readings)
    if not shares:
        return Verdict.cannot_tell(f"no tensor had a gradient at {FEWEST_STEPS} steps")
    return Verdict.well(shares[0])


def _inputs_explain(evidence: Evidence, steady: dict[int, float], place: int) -> bool:
    """Whether a matrix may be zero where its inputs are: words of a bag, one-hot states, rows that nobody looks up.

    A dead unit shows elsewhere, too: in its bias or, where the layer has none, in a vector behind it (a norm's) or in
    the columns of the matrix that it feeds.
    """
    tensor = evidence.tensors[place]
    if len(tensor.shape) < 2:
        return False
    biases = [steady[i] for i in evidence.layers[tensor.layer] if len(evidence.tensors[i].shape) == 1 and i in steady]
    if biases:
        return max(biases) < DEAD_UNITS
    told = [steady[i] for i in steady if i != place and _of_units(evidence.tensors[i].shape, tensor.shape[0])]
    return max(told, default=0.0) < DEAD_UNITS


def _of_units(shape: Sequence[int], units: int) -> bool:
    """Whether a tensor may have an element, or columns (several, behind convolutions), for each of so many units."""
    return shape[0] == units if len(shape) == 1 else len(shape) > 1 and shape[1] % units == 0


def _silent_part(rows: NDArray[np.int64], largest: NDArray[np.float64], in_time: bool) -> NDArray[np.int64] | None:
    """The rows from which on a tensor is zero, but at a few of them, where they are enough of the run to count."""
    live = largest > 0.0
    if not live.any() or not in_time:
        return None if live.any() else rows
    length = np.arange(len(rows), 0, -1)
    silent = ~live & (np.cumsum(live[::-1])[::-1] <= LIVE_STEPS * length)
    silent &= (length == len(rows)) | (length >= max(FEWEST_LAST_STEPS, LAST_PART * len(rows)))
    return rows[int(np.argmax(silent)) :] if silent.any() else None


def _steady_zeros(zeros: NDArray[np.int64], numel: int) -> int:
    """How many elements seem to be zero at every step: the fewest zeros of a step, if most steps have about as many."""
    fewest = int(zeros.min())
    steady = len(zeros) >= FEWEST_STEPS_OF_SHARE and float(np.median(zeros)) - fewest <= UNSTEADY_SHARE * numel
    return fewest if steady else 0


def _zero_readings(evidence: Evidence, zero: dict[str, tuple[int, int, bool]], most: float) -> list[Reading]:
    """One reading for each stretch of steps at which tensors are zero, the one with most tensors first."""
    by_steps: dict[tuple[int, int, bool], list[str]] = {}
    for name, steps in zero.items():
        by_steps.setdefault(steps, []).append(name)
    ordered = sorted(by_steps.items(), key=lambda item: (-len(item[1]), item[0]))
    return [
        Reading(
            1.0, most, tensors[0], (first, last), _zero_message(tensors, first, last, seldom, len(evidence.tensors))
        )
        for (first, last, seldom), tensors in ordered
    ]


def _zero_message(tensors: Sequence[str], first: int, last: int, seldom: bool, total: int) -> str:
    if len(tensors) == total > 1:
        who = f"All {count(total)} tensors have"
    else:
        who = f"{names(list(tensors))} {'has' if len(tensors) == 1 else 'have'}"
    return (
        f"{who} a gradient of exactly zero at {'nearly ' if seldom else ''}every step from {first} to {last}: "
        "dead units (a large negative bias, too high a learning rate), or a part that does not reach the loss."
    )


def _share_reading(evidence: Evidence, rows: NDArray[np.int64], name: str, share: float, most: float) -> Reading:
    if share == 0.0:
        message = "No tensor has elements that are seen to have a gradient of zero at every step."
        return Reading(0.0, most, None, evidence.steps_of(rows), message)
    message = f"{percent(share)} of the elements of {name} have a gradient of zero at every step"
    if share > most:
        message += ": dead units (a large negative bias, too high a learning rate)"
    return Reading(share, most, name, evidence.steps_of(rows), f"{message}.")


def _remembered(evidence: Evidence) -> Verdict:
    """Tensors of which an optimizer that took steps remembers nothing but zero."""
    known = [
        (tensor.name, tensor.recent_norm)
        for report in evidence.reports
        if (report.steps or 0) >= FEWEST_STEPS
        for tensor in report.tensors
        if tensor.recent_norm is not None
    ]
    if not known:
        return Verdict.cannot_tell("the source holds no gradients, and no optimizer state that tells their size")
    zero = [name for name, norm in known if norm == 0.0]
    if not zero:
        message = f"All {count(len(known))} tensors that the optimizer holds have had a gradient other than zero."
        return Verdict.well(Reading(0.0, 0.0, None, None, message))
    message = f"{names(zero)} had no gradient but zero in any step that the optimizer remembers."
    return Verdict.violated([Reading(len(zero) / len(known), 0.0, zero[0], None, message)])


DEAD = Rule(
    name="dead",
    severity="error",
    about="Tensors, or most of a tensor, have a gradient of zero step after step.",
    formula=(
        "tensors that are zero at 95 % of the steps at which they have a gradient, or of those from one on to the "
        "end (a quarter of the run and 16 steps at least); share of a tensor's elements that are zero at every step: "
        "the fewest zeros of a step, where the median has about as many; embeddings left out, and matrices most of "
        "whose units have a gradient: in their biases or, without those, in what follows"
    ),
    source="Maas, Hannun & Ng 2013, Rectifier nonlinearities improve neural network acoustic models; Lu et al. 2020, "
    "Dying ReLU and initialization",
    limits=(Limit("max-share", 0.9, "largest share of a tensor's elements that are zero at every step", most=1.0),),
    judge=judge,
)
