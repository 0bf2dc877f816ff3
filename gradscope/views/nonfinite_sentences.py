"""The steps that hold NaN or Inf, one line each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gradscope import results
from gradscope.findings import step_name
from gradscope.notation import count, names
from gradscope.views.screen import Sentence

MOST_STEPS = 5


def nonfinite_sentences(steps: Sequence[results.NonfiniteStep]) -> Iterator[Sentence]:
    """Each step, its tensors, and the last finite tensors before them; the first MOST_STEPS steps.

    A single step is none of these lines' business: the findings have named it.
    """
    if len(steps) < 2:
        return
    for step in steps[:MOST_STEPS]:
        before = f"; last finite before: {names(step.last_finite_before)}" if step.last_finite_before else ""
        yield Sentence(f"S{step_name(step)[1:]}: NaN or Inf in {names(step.tensors)}{before}", tone="alarm")
    if len(steps) > MOST_STEPS:
        yield Sentence(f"and {count(len(steps) - MOST_STEPS)} more steps with NaN or Inf", tone="alarm")
