"""What ``gradscope inspect`` shows: what it is, what matters, the norms that prove it, what to do next."""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

from gradscope import results
from gradscope.findings import run_words, step_word, threshold
from gradscope.notation import count, names, number, percent, setting
from gradscope.views.cells import consistency, known
from gradscope.views.choices import By, ViewChoices
from gradscope.views.nonfinite_sentences import nonfinite_sentences
from gradscope.views.norm_rows import (
    NormRow,
    gradient_rows,
    optimizer_rows,
    ordered,
    shown_and_folded,
    weight_rows,
)
from gradscope.views.norm_tables import gradient_fields, norm_table, optimizer_fields, series_fields, weight_fields
from gradscope.views.recorded_table import recorded_table
from gradscope.views.screen import Block, Column, Row, Screen, Sentence, Table

_LABELS = {"gradients": "file", "trace": "time"}


def inspect_screen(inspection: results.Inspection, choices: ViewChoices) -> Screen:
    """The screen of one inspection."""
    return Screen(tuple(_blocks(inspection, choices)))


def _blocks(inspection: results.Inspection, choices: ViewChoices) -> Iterator[Block]:
    yield Sentence(_opening(inspection, choices), tone="strong")
    yield from (Sentence(finding, finding=True) for finding in inspection.findings)
    # That a log is a sample, and of what, comes before its numbers.
    log = inspection.source.kind == "norm-log"
    notes = [Sentence(note, tone="plain" if log else "quiet") for note in inspection.notes]
    if log:
        yield from notes
    if inspection.gradients is not None:
        yield from _gradient_blocks(inspection, inspection.gradients, choices)
    yield from _optimizer_blocks(inspection, choices)
    if inspection.weights is not None and not any(optimizer.tensors for optimizer in inspection.optimizers):
        yield _weights_table(inspection.weights, choices)
    if not log:
        yield from notes
    if inspection.skipped:
        yield Sentence(f"Skipped: {names(inspection.skipped, most=5)}.", tone="quiet")
    yield Sentence(_next(inspection, choices))


def _opening(inspection: results.Inspection, choices: ViewChoices) -> str:
    parts = [inspection.source.picked] if inspection.source.picked else []
    parts.append(run_words(inspection.source))
    if inspection.gradients is not None:
        parts += [_counted(inspection.source.steps, step_word(inspection.source)[:-1])] * (inspection.source.steps > 0)
        numel = inspection.gradients.global_.numel
        if numel is not None:
            parts.append(_counted(len(inspection.gradients.tensors), "gradient tensor"))
            parts.append(_counted(numel, "element"))
    elif inspection.weights is not None:
        parts.append(_counted(len(inspection.weights.tensors), "tensor"))
        parts.append(_counted(inspection.weights.global_.numel, "parameter"))
    kinds = Counter(_optimizer_words(optimizer) for optimizer in inspection.optimizers)
    parts += [f"{n} × {kind}" if n > 1 else kind for kind, n in kinds.items()]
    what = " · ".join(parts)
    return f"{choices.opening}: {what}" if choices.opening else what


def _counted(n: int, noun: str) -> str:
    return f"{count(n)} {noun}{'s' * (n != 1)}"


def _optimizer_words(optimizer: results.OptimizerReport) -> str:
    return optimizer.type if optimizer.steps is None else f"{optimizer.type}, {count(optimizer.steps)} updates"


def _next(inspection: results.Inspection, choices: ViewChoices) -> str:
    if inspection.gradients is None:
        return "Next: gradscope record -- python train.py"
    path = "" if choices.opening else f"{shlex.quote(inspection.source.path)} "
    arguments = f"{inspection.source.arguments} " if inspection.source.arguments else ""
    return f"Next: gradscope simulate {path}{arguments}--max-norm {_limits(inspection)}"


def _limits(inspection: results.Inspection) -> str:
    """The thresholds that were in force, else one to start with."""
    groups = inspection.recorded.groups if inspection.recorded else ()
    known = dict.fromkeys(group.max_norm for group in groups if group.max_norm is not None)
    known |= dict.fromkeys(o.max_norm for o in inspection.optimizers if o.max_norm is not None) if not known else {}
    return " ".join(threshold(limit) for limit in known) or "0.5"


# --- gradients -------------------------------------------------------------------------------------------------------


def _gradient_blocks(
    inspection: results.Inspection, gradients: results.GradientSummary, choices: ViewChoices
) -> Iterator[Block]:
    yield from nonfinite_sentences(gradients.nonfinite)
    if gradients.at is not None:
        yield _step_table(gradients.at, _LABELS.get(inspection.source.kind, ""))
    if inspection.source.kind == "norm-log":
        yield _series_table(gradients, choices)
        return
    recorded, by_group = inspection.recorded, choices.by == "group"
    own = recorded is not None and [g.name for g in recorded.groups] == [g.name for g in gradients.groups]
    if recorded is not None and len(recorded.groups) > 1:
        yield recorded_table(recorded, gradients if own and not by_group else None)
    if len(gradients.groups) > 1 and not by_group and not own:
        yield _gradient_table(
            inspection, gradients, gradient_rows(gradients, "group", inspection.batch), None, "clip group"
        )
    rows = ordered(gradient_rows(gradients, choices.by, inspection.batch), choices.sort)
    shown, rest = shown_and_folded(rows, choices.top, choices.by)
    yield _gradient_table(inspection, gradients, shown, rest, _heading(choices.by))


def _series_table(gradients: results.GradientSummary, choices: ViewChoices) -> Table:
    rows = ordered(gradient_rows(gradients, "tensor"), choices.sort)[: choices.top]
    if len(gradients.tensors) == 1:
        return norm_table(series_fields(rows), [replace(row, share=None) for row in rows], None, None)
    return norm_table(series_fields(rows), rows, None, replace(_whole(gradients), name="together"))


def _whole(gradients: results.GradientSummary) -> NormRow:
    total = gradients.global_
    return NormRow("whole gradient", total.l2_norm.p50, None, total.numel, total.l2_norm, steps=total.steps)


def _heading(by: By) -> str:
    return "clip group" if by == "group" else by


def _gradient_table(
    inspection: results.Inspection,
    gradients: results.GradientSummary,
    rows: Sequence[NormRow],
    rest: NormRow | None,
    what: str,
) -> Table:
    several = gradients.global_.l2_norm.min < gradients.global_.l2_norm.max
    fields = gradient_fields(what, rows, several, gradients.global_.steps, step_word(inspection.source))
    whole = _whole(gradients)
    if inspection.batch is not None:
        noise = inspection.batch.noise_scale
        whole = replace(whole, noise_scale=noise, mean_cosine=inspection.batch.mean_cosine)
    return norm_table(fields, rows, rest, whole)


def _step_table(steps: Sequence[results.StepRow], label: str) -> Table:
    """The steps; ``label`` heads what they are labelled by, where that says more than their number."""
    largest = max((step.l2_norm for step in steps if math.isfinite(step.l2_norm)), default=0.0)
    # A log of norms knows nothing of elements.
    elements = any(step.max_abs is not None for step in steps)
    columns = (
        Column("step", "left"),
        Column("norm"),
        *[Column("max |g|"), Column("zeros", spare=1)] * elements,
        Column("NaN/Inf"),
        *[Column(label, "left", spare=2)] * bool(label),
    )
    rows = [
        Row(
            (
                count(step.step),
                number(step.l2_norm),
                *[known(step.max_abs, number), known(step.zeros, count)] * elements,
                count(step.nonfinite) if step.nonfinite else "",
                *[step.label] * bool(label),
            ),
            bar=step.l2_norm / largest if largest > 0 and math.isfinite(step.l2_norm) else None,
            tone="alarm" if step.nonfinite else "strong" if step is steps[-1] else "plain",
        )
        for step in steps
    ]
    return Table(columns, tuple(rows))


# --- optimizers ------------------------------------------------------------------------------------------------------


def _optimizer_blocks(inspection: results.Inspection, choices: ViewChoices) -> Iterator[Block]:
    optimizers = inspection.optimizers
    groups = [(optimizer, group) for optimizer in optimizers for group in optimizer.groups]
    if len(groups) > 1 and any(group.max_norm is not None for _, group in groups):
        yield _clip_group_table(groups, several=len(optimizers) > 1)
    for optimizer in optimizers:
        said = " ".join(inspection.findings)
        yield from (Sentence(f"{q}.", tone="quiet") for q in optimizer.qualifications if q not in said)
        yield from _optimizer_table(optimizer, choices, titled=len(optimizers) > 1)


def _clip_group_table(groups: Sequence[tuple[results.OptimizerReport, results.OptimizerGroup]], several: bool) -> Table:
    columns = (
        Column("clip group", "left"),
        Column("max_norm"),
        Column("recent norm"),
        Column("clipped at most"),
        Column("within 10 % at least", spare=1),
        Column("mean norm", spare=3),
        Column("consistency", spare=2),
    )
    rows = [
        Row(
            (
                f"{optimizer.name}: {group.name}" if several else group.name,
                known(group.max_norm, setting),
                known(group.recent_norm, number),
                known(group.clipped_share_at_most, lambda most: percent(most, "up")),
                known((group.at_limit_share_at_least or {}).get("0.9"), lambda least: percent(least, "down")),
                known(group.mean_norm, number),
                known(group.consistency, consistency),
            )
        )
        for optimizer, group in groups
    ]
    return Table(columns, tuple(rows))


def _optimizer_table(optimizer: results.OptimizerReport, choices: ViewChoices, titled: bool) -> Iterator[Block]:
    rows = ordered(optimizer_rows(optimizer, choices.by), choices.sort)
    if not rows:
        yield from [Sentence(f"{_windows(optimizer)}.")] if _windows(optimizer) else []
        return
    shown, rest = shown_and_folded(rows, choices.top, choices.by)
    whole = NormRow(
        "all", optimizer.recent_norm, None, mean_norm=optimizer.mean_norm, consistency=optimizer.consistency
    )
    fields = optimizer_fields(_heading(choices.by), rows)
    title = f"{optimizer.name}: {_optimizer_words(optimizer)}" if titled else ""
    yield norm_table(fields, shown, rest, whole, title=title, caption=_windows(optimizer))


def _windows(optimizer: results.OptimizerReport) -> str:
    """What the two norms are averages of, so that nobody compares them unawares."""
    parts = []
    if optimizer.window is not None:
        short = optimizer.steps is not None and optimizer.steps < optimizer.window
        span = (
            f"the {count(optimizer.steps or 0)} updates so far"
            if short
            else f"the last ~{count(optimizer.window)} updates"
        )
        parts.append(f"recent norm: root mean square over {span}")
    if optimizer.mean_norm is not None and optimizer.mean_window is not None:
        mean = f"mean norm: norm of the mean gradient over ~{count(optimizer.mean_window)}"
        parts.append(mean)
        if optimizer.consistency is not None:
            told = consistency(optimizer.consistency)
            parts.append(f"consistency: {told}, of two windows that differ in length")
    if optimizer.momentum_norm is not None:
        parts.append(f"momentum buffer: {number(optimizer.momentum_norm)}")
    text = "; ".join(parts)
    return text[:1].upper() + text[1:]


# --- weights ---------------------------------------------------------------------------------------------------------


def _weights_table(weights: results.WeightSummary, choices: ViewChoices) -> Table:
    rows = ordered(weight_rows(weights, choices.by), choices.sort)
    shown, rest = shown_and_folded(rows, choices.top, choices.by)
    whole = NormRow("all weights", weights.global_.l2_norm, None, weights.global_.numel)
    return norm_table(weight_fields(_heading(choices.by), shown), shown, rest, whole)
