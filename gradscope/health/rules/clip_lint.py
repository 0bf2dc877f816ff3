"""``coverage``, ``scaled-clip``, ``bad-threshold``, ``double-clip``: clipping that does not do what it is there for.

A recording notices most of it by itself, once per clip group; these rules give it a severity.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from gradscope.check_results import Reading
from gradscope.health.evidence import Evidence
from gradscope.health.rule import Limits, Rule, Verdict
from gradscope.notation import setting
from gradscope.trace.schema import LintFinding

CLIPS_NOTHING = "the run clips nothing"
ONLY_RECORDED = "only a recorded run tells"


def judge_coverage(evidence: Evidence, limits: Limits) -> Verdict:
    """Whether clipping reached everything that the optimizer updates."""
    well = "Every clip covers what its optimizer updates, before it does."
    return _noticed(evidence, ("coverage", "empty-clip", "clip-after-step"), well)


def judge_scaled_clip(evidence: Evidence, limits: Limits) -> Verdict:
    """Whether clipping met gradients that a loss scale was still multiplied into."""
    return _noticed(evidence, ("scaled-clip",), "No clip met gradients that a loss scale was still multiplied into.")


def judge_double_clip(evidence: Evidence, limits: Limits) -> Verdict:
    """Whether one gradient was clipped several times, in vain, or by a rounded norm."""
    well = "Every gradient is clipped once, and by an exact norm."
    return _noticed(evidence, ("clipped-twice", "normalised-anyway", "rounded-norm"), well)


def judge_bad_threshold(evidence: Evidence, limits: Limits) -> Verdict:
    """Whether a threshold is zero, negative or NaN; an infinite one asks for the norm alone."""
    if evidence.source.info.kind != "trace":
        return _stored_thresholds(evidence)
    bad = _bad_in_history(evidence)
    noted = [found for found in evidence.source.lint if found.rule == "bad-threshold"]
    # The history leaves NaN out, which stands for "no limit" there, and steps that were not recorded or not read.
    bad += [_reading(found) for found in noted if _is(found, "nan") or not (bad or _is(found, "inf"))]
    if bad:
        return Verdict.violated(bad)
    if not (_clips(evidence) or noted):
        return Verdict.cannot_tell(CLIPS_NOTHING)
    limit = evidence.recorded.overall.max_norm if evidence.recorded is not None else None
    if not _clips(evidence):
        said = "max_norm is infinite: only the norm is wanted."
    else:
        said = "Every threshold is positive." if limit is None else f"max_norm is {setting(limit)}."
    return Verdict.well(Reading(limit, None, None, None, said))


def _noticed(evidence: Evidence, rules: tuple[str, ...], well: str) -> Verdict:
    if evidence.source.info.kind != "trace":
        return Verdict.cannot_tell(ONLY_RECORDED)
    found = [finding for finding in evidence.source.lint if finding.rule in rules]
    if found:
        return Verdict.violated([_reading(finding) for finding in sorted(found, key=lambda f: rules.index(f.rule))])
    if not _clips(evidence):
        return Verdict.cannot_tell(CLIPS_NOTHING)
    return Verdict.well(Reading(None, None, None, None, well))


def _clips(evidence: Evidence) -> bool:
    history = evidence.table.history if evidence.table is not None else None
    return history is not None and bool(history.limited().any())


def _reading(finding: LintFinding) -> Reading:
    return Reading(None, None, finding.group, (finding.first_step, finding.first_step), finding.message)


def _is(finding: LintFinding, limit: str) -> bool:
    return finding.message.startswith((f"max_norm is {limit} ", f"clip_value is {limit} "))


def _bad_in_history(evidence: Evidence) -> list[Reading]:
    """The thresholds that a recording holds step by step."""
    table = evidence.table
    if table is None or table.history is None:
        return []
    readings = []
    for name, limits in (("max_norm", table.history.max_norm), ("clip_value", table.history.clip_value)):
        for place, group in enumerate(evidence.source.groups):
            rows = np.flatnonzero(limits[:, place] <= 0.0)
            if len(rows):
                worst = float(limits[rows, place].min())
                readings.append(_bad(name, worst, group.name, evidence.steps_of(rows)))
    return readings


def _stored_thresholds(evidence: Evidence) -> Verdict:
    """The max_norm that a checkpoint names for its clip groups."""
    noted = [found for found in evidence.source.lint if found.rule == "bad-threshold"]
    if noted:
        return Verdict.violated([Reading(None, None, found.group, None, found.message) for found in noted])
    named = [group for state in evidence.optimizers for group in state.clip_groups if group.max_norm is not None]
    if not named:
        return Verdict.cannot_tell("the source names no max_norm")
    bad = [
        _bad("max_norm", group.max_norm, group.name, None)
        for group in named
        if group.max_norm is not None and not group.max_norm > 0.0
    ]
    if bad:
        return Verdict.violated(bad)
    least = min(_known(group.max_norm for group in named))
    return Verdict.well(Reading(least, None, None, None, f"max_norm is {setting(least)}."))


def _known(limits: Iterable[float | None]) -> list[float]:
    return [limit for limit in limits if limit is not None]


def _bad(name: str, limit: float, group: str, steps: tuple[int, int] | None) -> Reading:
    if math.isnan(limit):
        effect = "it makes every gradient NaN"
    elif limit == 0.0:
        effect = "it zeroes every gradient and stops training"
    else:
        effect = "it turns every gradient around" if name == "max_norm" else "every element becomes the same number"
    when = "" if steps is None else f" from step {steps[0]:,} on" if steps[0] != steps[1] else f" at step {steps[0]:,}"
    of_group = "" if group == "all" else f" of {group}"
    return Reading(limit, 0.0, group, steps, f"{name}{of_group} is {setting(limit)}{when}: {effect}.")


COVERAGE = Rule(
    name="coverage",
    severity="error",
    about="A clip leaves out parameters that the optimizer updates, gets none, or runs after the step.",
    formula="parameters with a gradient that an optimizer updates and no clip call before its step was given, where "
    "one was made; clip calls without gradients; clip calls after optimizer.step()",
    source="torch.nn.utils.clip_grad_norm_: the norm is taken over the parameters given, and only they are scaled",
    limits=(),
    judge=judge_coverage,
)
SCALED_CLIP = Rule(
    name="scaled-clip",
    severity="error",
    about="A clip runs on gradients that are still multiplied by the loss scale.",
    formula="clip calls between scaler.scale(loss).backward() and scaler.unscale_(optimizer), loss scale not 1",
    source="PyTorch, Automatic Mixed Precision examples, Gradient clipping",
    limits=(),
    judge=judge_scaled_clip,
)
BAD_THRESHOLD = Rule(
    name="bad-threshold",
    severity="error",
    about="max_norm or clip_value is zero, negative or NaN.",
    formula="the threshold of every clip call (checkpoint: the max_norm that it names) > 0; infinity asks for the norm",
    source="torch.nn.utils.clip_grad_norm_: the gradient is multiplied by min(1, max_norm / (norm + 1e-6))",
    limits=(),
    judge=judge_bad_threshold,
)
DOUBLE_CLIP = Rule(
    name="double-clip",
    severity="warn",
    about="A gradient is clipped twice, before an optimizer that normalises it, or by a rounded norm.",
    formula="clip calls on a gradient that was clipped before; in front of an optimizer that normalises it; whose "
    "norm, as the library rounded it, is on another side of max_norm than the exact one",
    source="torch.nn.utils.clip_grad_norm_; Shazeer & Stern 2018 and Jordan et al. 2024 (optimizers that normalise)",
    limits=(),
    judge=judge_double_clip,
)
