"""``nonfinite``: NaN or Inf in a gradient that reached the optimizer, in the weights, or in the optimizer's state."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from gradscope.check_results import Reading
from gradscope.health.evidence import Evidence
from gradscope.health.rule import Limit, Limits, Rule, Verdict
from gradscope.intervals import wilson_interval
from gradscope.nonfinite import name_fault
from gradscope.notation import count, names, percent
from gradscope.step_table import StepTable, members_of

# A loss scale that starts at 2^16 and is halved until nothing overflows (torch.amp.GradScaler) is below 2^-8 by then.
SETTLING_STEPS = 24


def judge(evidence: Evidence, limits: Limits) -> Verdict:
    """Count the steps that hold NaN or Inf, and such elements in what a checkpoint stores."""
    most, most_skipped = limits.number("max"), limits.number("max-skipped")
    found = [*_of_steps(evidence, most, most_skipped), *_of_state(evidence, most)]
    if not found:
        return Verdict.cannot_tell("the source holds no gradients, weights or optimizer state")
    beyond = [reading for reading, violated in found if violated]
    return Verdict.violated(beyond) if beyond else Verdict.well(found[0][0])


def _of_steps(evidence: Evidence, most: float, most_skipped: float) -> Iterator[tuple[Reading, bool]]:
    """Each reading, and whether it is beyond its limit."""
    table = evidence.table
    if table is None or not len(table.index):
        return
    faulty = table.nonfinite > 0
    harmful = (faulty & ~_held_back(evidence, table)).any(axis=1)
    skipped = faulty.any(axis=1) & ~harmful
    share = float(harmful.mean())
    if share > most or not skipped.any():
        yield _reached(evidence, table, np.flatnonzero(harmful), most), share > most
    if skipped.any():
        yield _skipped(evidence, np.flatnonzero(skipped), len(table.index), most_skipped)


def _held_back(evidence: Evidence, table: StepTable) -> NDArray[np.bool_]:
    """Which gradients no optimizer took, bool [steps, tensors]: of its groups one is known so, and none stepped."""
    held = np.zeros(table.present.shape, dtype=np.bool_)
    if table.history is None:
        return held
    taken = np.zeros_like(held)
    groups = members_of(evidence.tensors, evidence.source.groups).values()
    for stepped, members in zip(table.history.stepped.T, groups, strict=True):
        held[:, members] |= (stepped == 0)[:, None]
        taken[:, members] |= (stepped == 1)[:, None]
    return held & ~taken


def _reached(evidence: Evidence, table: StepTable, rows: NDArray[np.int64], most: float) -> Reading:
    total = len(table.index)
    if not len(rows):
        said = "the step" if total == 1 else f"any of {count(total)} steps"
        return Reading(0.0, most, None, evidence.steps_of(range(total)), f"No NaN or Inf in {said}.")
    first = rows[0]
    tensor_names = [tensor.name for tensor in evidence.tensors]
    fault = name_fault(int(table.index[first]), table.labels[first], tensor_names, table.nonfinite[first])
    before = f"; last finite before: {names(fault.last_finite_before)}" if fault.last_finite_before else ""
    everywhere = len(fault.tensors) == len(tensor_names) > 1
    where = f"all {count(len(tensor_names))} tensors" if everywhere else names(fault.tensors)
    known = table.history is not None and bool((table.history.stepped[first] == 1).any())
    reached = " and the optimizer stepped" if known else ""
    message = f"Step {fault.step} holds NaN or Inf in {where}{before}{reached}"
    if len(rows) > 1:
        message += f"; so do {count(len(rows) - 1)} more of {count(total)} steps ({percent(len(rows) / total)} in all)"
    return Reading(len(rows) / total, most, fault.tensors[0], evidence.steps_of(rows), f"{message}.")


def _skipped(evidence: Evidence, rows: NDArray[np.int64], total: int, most: float) -> tuple[Reading, bool]:
    """Of steps that a loss scaler skipped; those of its search for a first scale are none of them."""
    leading = np.flatnonzero(rows == np.arange(len(rows)))
    searched = len(leading) if len(leading) <= SETTLING_STEPS and len(leading) < total else 0
    late, judged = rows[searched:], total - searched
    share = len(late) / judged
    at_least = wilson_interval(share, judged)[0]
    said = f"A loss scaler skipped {count(len(late))} of {count(judged)} steps ({percent(share)}) for NaN or Inf"
    if searched:
        said += f", beside {count(searched)} at the start, where it looked for a scale"
    violated = at_least > most
    if violated:
        said += f"; more than {percent(most)} is no search for a loss scale but an overflow that comes back"
    return Reading(share, most, None, evidence.steps_of(rows), f"{said}."), violated


def _of_state(evidence: Evidence, most: float) -> Iterator[tuple[Reading, bool]]:
    """Readings of the weights and of each optimizer: the share of elements that are NaN or infinite."""
    if evidence.weights is not None:
        pairs = zip(evidence.weights.tensors, evidence.weights.spectra, strict=True)
        yield _elements("weights", [(t.name, s.nonfinite, s.numel) for t, s in pairs], most)
    for state in evidence.optimizers:
        held = [
            (f"{parameter.name} ({key})", moment.spectrum.nonfinite, moment.spectrum.numel)
            for parameter in state.parameters
            for key, moment in parameter.moments.items()
        ]
        if held:
            yield _elements(f"state of {state.name}", held, most)


def _elements(what: str, held: list[tuple[str, int, int]], most: float) -> tuple[Reading, bool]:
    broken = [(name, faulty) for name, faulty, _ in held if faulty]
    total = sum(numel for _, _, numel in held)
    if not broken:
        return Reading(0.0, most, None, None, f"No NaN or Inf in the {what}."), False
    faulty = sum(elements for _, elements in broken)
    message = (
        f"{count(faulty)} of {count(total)} elements of the {what} are NaN or infinite, "
        f"in {names([name for name, _ in broken])}."
    )
    return Reading(faulty / total, most, broken[0][0], None, message), faulty / total > most


NONFINITE = Rule(
    name="nonfinite",
    severity="error",
    about="NaN or Inf in gradients that reached an optimizer, in weights, or in an optimizer's state.",
    formula=(
        "steps with NaN or Inf at which the optimizer was not kept from stepping / steps; elements of weights and "
        "state likewise; lower end of the 95 % Wilson interval of the share of steps that a loss scaler skipped"
    ),
    source="IEEE 754-2019; Micikevicius et al. 2018, Mixed Precision Training, section 3.2; torch.amp.GradScaler",
    limits=(
        Limit("max", 0.0, "largest share of steps, or of stored elements, with NaN or Inf", most=1.0),
        Limit("max-skipped", 0.05, "largest share of steps that a loss scaler may skip", most=1.0),
    ),
    judge=judge,
)
