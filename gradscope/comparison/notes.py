"""What the reader of a comparison should know beside what differs."""

from __future__ import annotations

from collections.abc import Sequence

from gradscope.clipping.policy import Policy
from gradscope.comparison.clip_rates import unanswered
from gradscope.comparison.side import Side
from gradscope.comparison_results import Comparison
from gradscope.findings import policy_words
from gradscope.notation import count


def comparison_notes(a: Side, b: Side, comparison: Comparison, policies: Sequence[Policy]) -> tuple[str, ...]:
    """What was not compared, how, and what the sources say of themselves; ``comparison`` needs no notes yet."""
    notes = [
        f"{policy_words(policy.label)} is not compared: {why}."
        for policy in policies
        if (why := unanswered(a, policy) or unanswered(b, policy))
    ]
    notes += _measure_notes(a, b, comparison)
    notes += _step_notes(a, b)
    if comparison.measure == "norm" and comparison.verdict == "differs" and _may_be_seeds(comparison):
        notes.append(
            "Noise is that within each run. Two seeds of one training differ by more: a third of such pairs have "
            "global norms that differ beyond it. check --baseline, of several seeds, knows how far seeds differ."
        )
    for letter, side in (("A", a), ("B", b)):
        notes += [f"{letter}: {note}" for note in side.source.notes]
    return tuple(dict.fromkeys(notes))


def _may_be_seeds(comparison: Comparison) -> bool:
    """Whether the runs are other than the same run, changed in one thing."""
    return not comparison.paired and (comparison.constant_ratio is None or not comparison.constant_ratio.exact)


def _measure_notes(a: Side, b: Side, comparison: Comparison) -> list[str]:
    notes = []
    if comparison.measure == "recent_norm":
        tables = [letter for letter, side in (("A", a), ("B", b)) if side.table is not None]
        if tables:
            notes.append(
                "The checkpoint holds no gradients but what its optimizer averaged of them, after clipping; "
                f"the steps of {tables[0]} are averaged in the same way, with the same window"
                f"{', after their own clipping' if _clips(a, b) else ''}."
            )
        else:
            notes.append("Checkpoints hold one number for each tensor: how much of a difference is noise is not known.")
    if comparison.measure == "weight_norm":
        notes.append("Both hold weights, and only one of them an optimizer's state or gradients: weights are compared.")
    if (a.kind == "norm-log") != (b.kind == "norm-log"):
        notes.append("A log of norms knows no layers: the global norm is compared.")
        log = a if a.kind == "norm-log" else b
        if len(log.tensors) > 1:
            notes.append(f"The {len(log.tensors)} series of the log are taken together; --tag picks one.")
    return notes


def _clips(a: Side, b: Side) -> bool:
    return any(side.table is not None and side.table.history is not None for side in (a, b))


def _step_notes(a: Side, b: Side) -> list[str]:
    one, other = a.table, b.table
    if one is None or other is None or not (a.source.in_time and b.source.in_time):
        return []
    spans = [int(table.index[-1]) - int(table.index[0]) + 1 for table in (one, other)]
    if max(spans) <= 1.1 * min(spans):
        return []
    return [
        f"A spans {count(spans[0])} step{'s' * (spans[0] > 1)} and B {count(spans[1])}: equal fractions of the two "
        "runs are compared, and may differ for that alone. --steps picks the same steps of both."
    ]
