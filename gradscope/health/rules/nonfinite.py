"""``nonfinite``: NaN or Inf in a gradient that reached the optimizer, in the weights, or in the optimizer's state."""

from __future__ import annotations

import numpy as np

from gradscope.check_results import Reading
from gradscope.health.evidence import Evidence
from gradscope.health.rule import Limit, Limits, Rule, Verdict


def judge(evidence: Evidence, limits: Limits) -> Verdict:
    """Count the steps that hold NaN or Inf."""
    if evidence.table is None:
        return Verdict.cannot_tell("the source holds no gradients")
    broken = np.flatnonzero(evidence.table.nonfinite.any(axis=1))
    share = len(broken) / max(1, len(evidence.table.index))
    reading = Reading(share, limits.number("max"), None, evidence.steps_of(broken), f"{len(broken)} steps hold NaN.")
    return Verdict.violated([reading]) if share > limits.number("max") else Verdict.well(reading)


NONFINITE = Rule(
    name="nonfinite",
    severity="error",
    about="NaN or Inf in a gradient",
    formula="steps that hold NaN or Inf / steps",
    source="IEEE 754",
    limits=(Limit("max", 0.0, "largest share of such steps", most=1.0),),
    judge=judge,
)
