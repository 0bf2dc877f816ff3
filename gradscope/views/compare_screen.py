"""What ``gradscope compare`` shows: what differs between two sources, beyond noise, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from gradscope.comparison.findings import MEASURES, bounds, times
from gradscope.comparison_results import Both, ClipComparison, Comparison, UnitComparison
from gradscope.findings import policy_words, run_words, step_word
from gradscope.notation import angle, called, count, number, percent
from gradscope.results import Source
from gradscope.views.choices import By, ViewChoices
from gradscope.views.csv_view import Record, csv_text
from gradscope.views.screen import Block, Column, Row, Screen, Sentence, Table

# As many rows as are read at a glance; all that differ, up to twice as many.
USUAL_ROWS = 12
# Of narrower lines the other columns leave no room for a name.
NARROW = 72


def compare_screen(comparison: Comparison, choices: ViewChoices) -> Screen:
    """The screen of one comparison."""
    return Screen(tuple(_blocks(comparison, choices)))


def compare_csv(comparison: Comparison, choices: ViewChoices) -> str:
    """One row per tensor, layer or clip group; the whole first."""
    _, units = _rows(comparison, choices.by)
    overall = [comparison.overall] if comparison.overall is not None else []
    return csv_text(_record(unit) for unit in [*overall, *units[: choices.top]])


def _blocks(comparison: Comparison, choices: ViewChoices) -> Iterator[Block]:
    yield Sentence(f"A: {_opening(comparison.sources.a, comparison.steps.a)}", tone="strong")
    yield Sentence(f"B: {_opening(comparison.sources.b, comparison.steps.b)}", tone="strong")
    yield from (Sentence(finding, finding=True) for finding in comparison.findings)
    what, units = _rows(comparison, choices.by)
    if units or comparison.overall is not None:
        yield _table(comparison, what, units, choices)
    if len(comparison.recorded) + len(comparison.policies) > 1 and comparison.verdict != "identical":
        yield _clip_table([*comparison.recorded, *comparison.policies])
    yield from (Sentence(note, tone="quiet") for note in comparison.notes)
    yield Sentence(f"Next: {_next(comparison, choices)}")


def _opening(source: Source, steps: int) -> str:
    word = step_word(source)
    held = f"{count(steps)} {word.removesuffix('s') if steps == 1 else word}, " if steps else ""
    return f"{source.path}: {held}{run_words(source)}"


def _rows(comparison: Comparison, by: By) -> tuple[str, tuple[UnitComparison, ...]]:
    """The units that were asked for; of logs of norms there are series alone."""
    chosen = {"layer": comparison.layers, "tensor": comparison.tensors, "group": comparison.groups}
    if "norm-log" in (comparison.sources.a.kind, comparison.sources.b.kind):
        return "series", comparison.tensors
    return ("clip group" if by == "group" else by), chosen[by]


# --- the table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Field:
    column: Column
    text: Callable[[UnitComparison], str]


def _table(comparison: Comparison, what: str, units: Sequence[UnitComparison], choices: ViewChoices) -> Table:
    fields = _fields(comparison, what, units, choices.width)
    shown = units[: choices.top if choices.top is not None else _usual(units)]
    rows = [
        Row(tuple(field.text(unit) for field in fields), tone="quiet" if unit.verdict == "within noise" else "plain")
        for unit in shown
    ]
    if len(units) > len(shown):
        rest = units[len(shown) :]
        plural = what if what == "series" else f"{what}s"
        texts = (f"{count(len(rest))} more {plural}", *[""] * (len(fields) - 2), _verdicts(rest))
        rows.append(Row(texts, tone="quiet"))
    if comparison.overall is not None and len(units) != 1:
        rows.append(Row(tuple(field.text(comparison.overall) for field in fields), tone="strong"))
    return Table(tuple(field.column for field in fields), tuple(rows), caption=_caption(comparison, what, units))


def _usual(units: Sequence[UnitComparison]) -> int:
    differ = sum(unit.verdict == "differs" for unit in units)
    return max(USUAL_ROWS, min(differ, 2 * USUAL_ROWS))


def _verdicts(units: Sequence[UnitComparison]) -> str:
    verdicts = {unit.verdict for unit in units}
    return _word(verdicts.copy().pop()) if len(verdicts) == 1 else ""


def _word(verdict: str) -> str:
    return "cannot tell" if verdict == "unknown" else verdict


def _caption(comparison: Comparison, what: str, units: Sequence[UnitComparison]) -> str:
    if comparison.measure != "norm" or not any(unit.ratio_ci95 for unit in units) or comparison.verdict == "identical":
        return ""
    tested = sum(unit.p_value is not None for unit in units)
    several = f" of {count(tested)} {what if what == 'series' else what + 's'} together (Holm)" if tested > 1 else ""
    told = [*units, *([comparison.overall] if comparison.overall else [])]
    unknown = "; cannot tell: too few independent steps" if any(unit.verdict == "unknown" for unit in told) else ""
    how = "step by step" if comparison.paired else "corrected for autocorrelation"
    return (
        f"norms are geometric means over the steps; 95 %: interval of each B/A by itself, {how}; differs: at 5 %"
        f"{several}, beyond the noise within the two runs{unknown}"
    )


def _fields(comparison: Comparison, what: str, units: Sequence[UnitComparison], width: int) -> list[_Field]:
    measure = MEASURES[comparison.measure or "norm"]
    every = [*units, *([comparison.overall] if comparison.overall is not None else [])]
    fields = [
        _Field(Column(what, "left"), lambda unit: unit.name),
        _Field(Column(f"{measure} A"), lambda unit: _size(unit.typical.a)),
        _Field(Column("B"), lambda unit: _size(unit.typical.b)),
        _Field(Column("B/A"), lambda unit: "" if unit.ratio is None else times(unit.ratio)),
    ]
    if any(unit.ratio_ci95 and unit.ratio_ci95[0] < unit.ratio_ci95[1] * (1 - 1e-6) for unit in every):
        # A long name is shortened for it, as far as a name is left.
        fields.append(_Field(Column("95 %", spare=int(width < NARROW)), _interval))
    fields += _spare_fields(every)
    if any(unit.verdict != "unknown" for unit in every):
        fields.append(_Field(Column("", "left"), lambda unit: _word(unit.verdict)))
    return fields


def _spare_fields(units: Sequence[UnitComparison]) -> list[_Field]:
    """What else is known of some of ``units`` and is not the same throughout."""
    fields = []
    if any(unit.shape_distance is not None for unit in units):
        note = "shape: how far the distributions of |g|/rms are apart, in octaves"
        if any(unit.shape_differs for unit in units):
            note += " (!: over three times what halves of one run are)"
        fields.append(_Field(Column("shape", spare=4, note=note), _shape))
    if any(unit.zeros is not None and (unit.zeros.a or unit.zeros.b) for unit in units):
        fields.append(_Field(Column("zeros", spare=5), lambda unit: _pair(unit.zeros, percent)))
    if any(unit.update_ratio is not None for unit in units):
        fields.append(_Field(Column("update/weight", spare=6), lambda unit: _pair(unit.update_ratio, number)))
    if any(unit.weight_norm is not None for unit in units):
        fields.append(_Field(Column("weight norm", spare=3), lambda unit: _pair(unit.weight_norm, number)))
    if any(unit.share is not None for unit in units):
        fields.append(_Field(Column("share", spare=7), lambda unit: _pair(unit.share, percent)))
    return fields


def _interval(unit: UnitComparison) -> str:
    return "" if unit.ratio_ci95 is None else bounds(unit.ratio_ci95, "–")


def _size(norm: float | None) -> str:
    return "" if norm is None else number(norm)


def _shape(unit: UnitComparison) -> str:
    if unit.shape_distance is None:
        return ""
    return (
        f"{number(unit.shape_distance, 2) if unit.shape_distance >= 0.005 else '0'}{' !' if unit.shape_differs else ''}"
    )


def _pair(both: Both[float] | None, text: Callable[[float], str]) -> str:
    if both is None:
        return ""
    one, other = text(both.a), text(both.b)
    return one if one == other else f"{one} → {other}"


def _clip_table(clips: Sequence[ClipComparison]) -> Table:
    turned = any(clip.direction_change_deg is not None for clip in clips)
    columns = [Column("clipped", "left"), Column("A (95 %)", "left"), Column("B (95 %)", "left")]
    columns += [Column("direction", spare=1)] if turned else []
    columns.append(Column("", "left"))
    return Table(tuple(columns), tuple(Row(tuple(_clip_cells(clip, turned))) for clip in clips))


def _clip_cells(clip: ClipComparison, turned: bool) -> Iterator[str]:
    yield (
        policy_words(clip.policy) if clip.policy else "as recorded" if clip.name == "all" else f"recorded, {clip.name}"
    )
    for rate in (clip.rate.a, clip.rate.b):
        low, high = (percent(end).removesuffix(" %") for end in rate.ci95 or (0.0, 0.0))
        yield percent(rate.clip_rate) + ("" if rate.ci95 is None else f" ({low}–{high})")
    if turned:
        yield _direction(clip)
    if clip.rate.a.clip_rate == clip.rate.b.clip_rate:
        yield "the same"
    else:
        yield "" if clip.differs is None else "differs" if clip.differs else "within noise"


def _direction(clip: ClipComparison) -> str:
    change = clip.direction_change_deg
    if change is None or change.a is None or change.b is None or math.isnan(change.a + change.b):
        return ""
    return _pair(Both(change.a, change.b), angle)


# --- what to do next --------------------------------------------------------------------------------------------------


def _next(comparison: Comparison, choices: ViewChoices) -> str:
    differ = [unit for unit in comparison.layers if unit.verdict == "differs"]
    if comparison.verdict == "identical":
        return "nothing to settle; gradscope inspect tells what they hold."
    if comparison.constant_ratio is not None and comparison.constant_ratio.explanations:
        return "settle which of these it is; until then one max_norm means two different limits."
    few = min(comparison.steps.a, comparison.steps.b)
    if comparison.measure == "norm" and comparison.verdict == "unknown" and few:
        return "record more steps, and noise can be told from difference: gradscope record -- python train.py"
    if comparison.measure != "norm":
        return "recorded runs tell what is noise: gradscope record -- python train.py"
    if differ and choices.by == "layer":
        return f"--by tensor shows which parameters of {called(differ[0].name)} they are; --steps A:B, when in the run."
    if not comparison.policies:
        return "--max-norm X compares how often a threshold would clip each; --steps A:B looks at a part of both."
    tensors = "; --by tensor at single parameters" if comparison.layers and choices.by != "tensor" else ""
    return f"--steps A:B looks at a part of both{tensors}."


# --- CSV --------------------------------------------------------------------------------------------------------------


def _record(unit: UnitComparison) -> Record:
    low, high = unit.ratio_ci95 or (None, None)
    record: Record = {"name": unit.name, "name_in_b": unit.name_in_b}
    record |= {"typical_a": unit.typical.a, "typical_b": unit.typical.b, "ratio": unit.ratio}
    record |= {"ratio_low": low, "ratio_high": high, "p_value": unit.p_value, "verdict": unit.verdict}
    for name, both in (
        ("effective_steps", unit.effective_steps),
        ("steps", unit.steps),
        ("share", unit.share),
        ("zeros", unit.zeros),
        ("update_ratio", unit.update_ratio),
        ("weight_norm", unit.weight_norm),
    ):
        record |= {f"{name}_a": None if both is None else both.a, f"{name}_b": None if both is None else both.b}
    for letter, spread in (("a", unit.l2_norm and unit.l2_norm.a), ("b", unit.l2_norm and unit.l2_norm.b)):
        record |= {f"median_norm_{letter}": spread.p50 if spread else None}
    return record | {"shape_distance": unit.shape_distance, "shape_noise": unit.shape_noise}
