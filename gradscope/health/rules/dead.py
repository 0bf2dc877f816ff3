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
# Zeros that change places from step to step are many by chance; dead ones are as many at most steps.
FEWEST_STEPS_OF_SHARE = 16
STEADY_SHARE = 0.5


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
    zero: dict[str, tuple[int, int]] = {}
    shares: list[Reading] = []
    for place, tensor in enumerate(evidence.tensors):
        there = rows[table.present[rows, place]]
        if not tensor.numel or len(there) < FEWEST_STEPS:
            continue
        silent = _silent_part(there, table.max_abs[there, place], evidence.source.in_time)
        if silent is not None:
            zero[tensor.name] = (int(table.index[silent[0]]), int(table.index[silent[-1]]))
        elif not is_embedding(tensor.name):
            share = _steady_zeros(table.zeros[there, place]) / tensor.numel
            shares.append(_share_reading(evidence, there, tensor.name, share, most))
    shares.sort(key=lambda reading: -(reading.value or 0.0))
    beyond = [reading for reading in shares if (reading.value or 0.0) > most]
    readings = [*_zero_readings(evidence, zero, most), *beyond]
    if readings:
        return Verdict.violated(readings)
    if not shares:
        return Verdict.cannot_tell(f"no tensor had a gradient at {FEWEST_STEPS} steps")
    return Verdict.well(shares[0])


def _silent_part(rows: NDArray[np.int64], largest: NDArray[np.float64], in_time: bool) -> NDArray[np.int64] | None:
    """The rows from which on a tensor is zero, where they are enough of the run to count."""
    live = np.flatnonzero(largest > 0.0)
    start = int(live[-1]) + 1 if len(live) else 0
    enough = max(FEWEST_LAST_STEPS, LAST_PART * len(rows)) if in_time else len(rows)
    return rows[start:] if start == 0 or len(rows) - start >= enough else None


def _steady_zeros(zeros: NDArray[np.int64]) -> int:
    """How many elements seem to be zero at every step: the fewest zeros of a step, if most steps have as many."""
    fewest = int(zeros.min())
    steady = len(zeros) >= FEWEST_STEPS_OF_SHARE and float((zeros == fewest).mean()) >= STEADY_SHARE
    return fewest if steady else 0


def _zero_readings(evidence: Evidence, zero: dict[str, tuple[int, int]], most: float) -> list[Reading]:
    """One reading for each stretch of steps at which tensors are zero, the one with most tensors first."""
    by_steps: dict[tuple[int, int], list[str]] = {}
    for name, steps in zero.items():
        by_steps.setdefault(steps, []).append(name)
    ordered = sorted(by_steps.items(), key=lambda item: (-len(item[1]), item[0]))
    return [
        Reading(1.0, most, tensors[0], steps, _zero_message(tensors, steps, len(evidence.tensors)))
        for steps, tensors in ordered
    ]


def _zero_message(tensors: Sequence[str], steps: tuple[int, int], total: int) -> str:
    if len(tensors) == total > 1:
        who = f"All {count(total)} tensors have"
    else:
        who = f"{names(list(tensors))} {'has' if len(tensors) == 1 else 'have'}"
    return (
        f"{who} a gradient of exactly zero at every step from {steps[0]} to {steps[1]}: "
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
        "tensors that are zero at every step at which they have a gradient, or from some step on to the end (a quarter "
        "of the run and 16 steps at least); share of a tensor's elements that are zero at every step: the fewest zeros "
        "of a step, where half the steps have as many; embeddings left out"
    ),
    source="Maas, Hannun & Ng 2013, Rectifier nonlinearities improve neural network acoustic models; Lu et al. 2020, "
    "Dying ReLU and initialization",
    limits=(Limit("max-share", 0.9, "largest share of a tensor's elements that are zero at every step", most=1.0),),
    judge=judge,
)
