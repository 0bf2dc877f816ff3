"""Tables of what policies would have done: side by side, over the run, by clip group, by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from gradscope import results
from gradscope.findings import policy_words, step_word
from gradscope.notation import angle, count, names, number, percent
from gradscope.views.cells import factor, known
from gradscope.views.screen import Column, Row, Table

MOST_LAYERS = 8
# In so few cells the policies come before what else a table tells of a phase or a clip group.
NARROW = 60
# An interval narrower than this is not worth a column: the angles are printed with three digits.
WORTHWHILE_ERROR_DEG = 0.005
_LAYERWISE_POLICIES = {"value", "agc", "per-layer-norm", "per-tensor-norm", "block-rms"}
_DIRECTION_KEPT_DEG = 1e-6
_SCALE = "scale: the share of the gradient's own direction that is kept, (g·c)/‖g‖²"
_UNKNOWN = "–"


@dataclass(frozen=True, slots=True)
class Field:
    """A column of a table of policies and how a policy fills it."""

    column: Column
    text: Callable[[results.PolicyResult], str]


def policy_table(simulation: results.Simulation) -> Table:
    """One row per policy: how often it clips, what it leaves of the length, how far it turns the direction."""
    policies = simulation.results
    fields = [_NAME, *_rate_fields(simulation), _LENGTH, _DIRECTION, _LARGEST_ANGLE]
    if any(policy.direction_change_error_deg >= WORTHWHILE_ERROR_DEG for policy in policies):
        fields.append(Field(Column("±", spare=6), lambda policy: angle(policy.direction_change_error_deg)))
    fields += _update_fields(policies)
    fields.append(Field(Column("scale", spare=7, note=_SCALE), lambda policy: factor(policy.scale.p50)))
    if any(policy.clipped_elements for policy in policies):
        fields.append(_ELEMENTS)
    fields.append(Field(Column("independent", spare=9), lambda policy: count(policy.recent.effective_steps)))
    return _table(fields, policies)


def one_step_table(policies: Sequence[results.PolicyResult]) -> Table:
    """One row per policy for a single gradient: what became of it, with five digits."""
    fields = [
        _NAME,
        Field(Column("clipped"), lambda policy: "yes" if policy.clipped_steps else "no"),
        Field(Column("length kept", spare=2), lambda policy: f"{number(policy.norm_ratio.max, 5)}×"),
        Field(Column("scale", spare=1, note=_SCALE), lambda policy: f"{number(policy.scale.max, 5)}×"),
        Field(Column("direction"), lambda policy: _angle(policy, "max", lambda degrees: f"{number(degrees, 5)}°")),
        Field(Column("±", spare=3), lambda policy: angle(policy.direction_change_error_deg)),
        *_update_fields(policies),
    ]
    return _table(fields, policies)


def _table(fields: Sequence[Field], policies: Sequence[results.PolicyResult]) -> Table:
    rows = tuple(Row(tuple(field.text(policy) for field in fields)) for policy in policies)
    return Table(tuple(field.column for field in fields), rows)


def _rate_fields(simulation: results.Simulation) -> list[Field]:
    length = simulation.recent_steps
    whole = length >= simulation.steps
    recent = Field(
        Column("clipped" if whole else f"last {count(length)}"), lambda policy: percent(policy.recent.clip_rate)
    )
    interval = Field(Column("95 %", spare=4), lambda policy: _interval(policy.recent.clip_rate_ci95))
    overall = Field(Column("overall", spare=3), lambda policy: percent(policy.clip_rate))
    return [recent, interval] if whole else [recent, interval, overall]


def _interval(bounds: tuple[float, float] | None) -> str:
    return _UNKNOWN if bounds is None else f"{100 * bounds[0]:.0f}–{100 * bounds[1]:.0f} %"


def _angle(policy: results.PolicyResult, of: Literal["p50", "max"], text: Callable[[float], str] = angle) -> str:
    change = policy.direction_change_deg
    if change is None:
        return _UNKNOWN
    return text(change.p50 if of == "p50" else change.max)


def _update_fields(policies: Sequence[results.PolicyResult]) -> list[Field]:
    """The turn of Adam's update, where it is known of any policy."""
    known_of_any = any(policy.update_direction_change_deg is not None for policy in policies)
    return [_UPDATE] if known_of_any else []


def _updated(policy: results.PolicyResult) -> str:
    change = policy.update_direction_change_deg
    return _UNKNOWN if change is None else angle(change.p50)


def _clipped_elements(clipped: results.PolicyResult | results.PolicyLayer) -> str:
    return f"{'≈ ' if clipped.clipped_elements_error else ''}{count(clipped.clipped_elements)}"


def _policy_elements(policy: results.PolicyResult) -> str:
    """A policy that multiplies whole tensors clips no single element."""
    return _clipped_elements(policy) if policy.policy.startswith("value:") else _UNKNOWN


_NAME = Field(Column("policy", "left"), lambda policy: policy_words(policy.policy))
_LENGTH = Field(
    Column("length", spare=2, note="length: median share of the norm that is kept"),
    lambda policy: factor(policy.norm_ratio.p50),
)
_DIRECTION = Field(Column("direction", spare=1, note="direction: median change"), lambda policy: _angle(policy, "p50"))
_LARGEST_ANGLE = Field(Column("at most", spare=5), lambda policy: _angle(policy, "max"))
_UPDATE = Field(
    Column("update turned", spare=2, note="update turned: median change of direction of Adam's next update"), _updated
)
_ELEMENTS = Field(Column("elements clipped", spare=8), _policy_elements)


# --- over the run ----------------------------------------------------------------------------------------------------


def phase_table(simulation: results.Simulation, width: int) -> Table:
    """The run in phases: norm and length for one policy, the clip rates side by side for several."""
    policies = simulation.results
    spans = [phase.steps for phase in policies[0].phases]
    steps = Column(step_word(simulation.source))
    if len(policies) > 1:
        alike = [policy for policy in policies if [phase.steps for phase in policy.phases] == spans]
        rates = [(policy, [phase.clip_rate for phase in policy.phases]) for policy in alike]
        rows = [[_span(phase.steps), number(phase.norm.p50)] for phase in policies[0].phases]
        return _side_by_side([steps, Column("median norm", spare=1)], rows, rates, width)
    kept = _keeps_direction(policies[0])
    last = Column("length kept", spare=1) if kept else Column("scale", spare=1, note=_SCALE)
    rows = [
        [_span(phase.steps), percent(phase.clip_rate), number(phase.norm.p50), factor(phase.scale.p50)]
        for phase in policies[0].phases
    ]
    columns = (steps, Column("clipped"), Column("median norm", spare=2), last)
    return Table(columns, tuple(Row(tuple(cells)) for cells in rows))


def _keeps_direction(policy: results.PolicyResult) -> bool:
    change = policy.direction_change_deg
    return change is not None and change.max < _DIRECTION_KEPT_DEG


def _span(steps: tuple[int, int]) -> str:
    return f"{count(steps[0])}–{count(steps[1])}"


def group_table(simulation: results.Simulation, width: int) -> Table:
    """The clip groups: all of one policy, or the clip rates of several side by side."""
    policies = simulation.results
    first = policies[0].groups
    counted = any(group.steps not in (None, simulation.steps - simulation.nonfinite_steps) for group in first)
    steps = Column(step_word(simulation.source), spare=1)
    if len(policies) > 1:
        titles = [group.name for group in first]
        alike = [policy for policy in policies if [group.name for group in policy.groups] == titles]
        rates = [(policy, [group.clip_rate for group in policy.groups]) for policy in alike]
        rows = [
            [group.name, *[known(group.steps, count)] * counted, percent(group.share), _or_none(group.norm.p50, number)]
            for group in first
        ]
        shown = [steps] * counted
        columns = [Column("clip group", "left"), *shown, Column("share", spare=1), Column("median norm", spare=2)]
        return _side_by_side(columns, rows, rates, width)
    columns = [
        Column("clip group", "left"),
        *[steps] * counted,
        Column("clipped"),
        Column("median norm", spare=2),
        Column("scale", spare=3),
        Column("direction", spare=4),
        Column("share", spare=1),
    ]
    lines = [
        Row(
            (
                group.name,
                *[known(group.steps, count)] * counted,
                _or_none(group.clip_rate, percent),
                _or_none(group.norm.p50, number),
                _or_none(group.scale.p50, factor),
                _or_none(group.direction_change_deg.p50, angle),
                percent(group.share),
            ),
            bar=group.share,
        )
        for group in first
    ]
    return Table(
        tuple(columns), tuple(lines), caption=_sampled(simulation, policies[0].group_steps, "scale and direction")
    )


def _or_none(value: float, text: Callable[[float], str]) -> str:
    """What is not known because there was no gradient has no number."""
    return _UNKNOWN if math.isnan(value) else text(value)


def _sampled(simulation: results.Simulation, steps: int | None, what: str) -> str:
    """From which steps an effect is known, where those are not all."""
    if steps is None or steps >= simulation.steps - simulation.nonfinite_steps:
        return ""
    which = f"{count(steps)} {step_word(simulation.source)}"
    return f"{what}: over the {which} whose tensors' spectra were recorded"


def _side_by_side(
    columns: list[Column],
    rows: list[list[str]],
    rates: Sequence[tuple[results.PolicyResult, Sequence[float]]],
    width: int,
) -> Table:
    """``rows`` continued by the clip rates of as many policies as fit into ``width``, at least one."""
    titles = [policy_words(policy.policy) for policy, _ in rates]
    fitting = _fitting(titles, width - _width(columns, rows))
    while width <= NARROW and fitting < len(titles) and columns[-1].spare:
        columns, rows = columns[:-1], [row[:-1] for row in rows]
        fitting = _fitting(titles, width - _width(columns, rows))
    for title, (_, values) in zip(titles[:fitting], rates, strict=False):
        columns = [*columns, Column(title)]
        rows = [[*row, _or_none(value, percent)] for row, value in zip(rows, values, strict=True)]
    caption = ["under each policy: clipped", *_with_csv("", titles[fitting:])]
    return Table(tuple(columns), tuple(Row(tuple(row)) for row in rows), caption="; ".join(caption))


def _width(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> int:
    return sum(max(len(column.title), *(len(row[i]) for row in rows)) + len("  ") for i, column in enumerate(columns))


def _fitting(titles: Sequence[str], room: int) -> int:
    """How many columns of these titles fit side by side; the first is there in any case."""
    for i, title in enumerate(titles):
        room -= max(len(title), len("< 0.01 %")) + 2
        if room < 0:
            return max(1, i)
    return len(titles)


def _with_csv(what: str, titles: Sequence[str]) -> list[str]:
    return [f"{what}{names(list(titles))} with --format csv"] if titles else []


# --- by layer --------------------------------------------------------------------------------------------------------


def layer_table(simulation: results.Simulation) -> Table | None:
    """The layers that the first policy which treats layers apart changes most."""
    policies = simulation.results
    layerwise = [policy for policy in policies if policy.policy.split(":")[0] in _LAYERWISE_POLICIES and policy.layers]
    if not layerwise:
        return None
    policy = layerwise[0]
    met = [layer for layer in policy.layers if layer.steps != 0]
    changed = sorted(met, key=lambda layer: (math.isnan(layer.scale), -layer.direction_change_deg, layer.scale))
    columns = [Column("layer", "left"), Column("clipped"), Column("scale", spare=1, note=_SCALE), Column("direction")]
    by_element = any(layer.clipped_elements for layer in policy.layers)
    columns += [Column("elements clipped", spare=2)] if by_element else []
    rows = []
    for layer in changed[:MOST_LAYERS]:
        changes = [_or_none(layer.scale, factor), _or_none(layer.direction_change_deg, angle)]
        cells = [layer.name, percent(layer.clip_rate), *changes]
        rows.append(Row((*cells, *[_clipped_elements(layer)] * by_element)))
    hidden = len(changed) - MOST_LAYERS
    sampled = _sampled(simulation, policy.layer_steps, "scale, direction and elements")
    captions = [sampled] if sampled else []
    captions += [f"{hidden} more layer{'s' * (hidden > 1)} with --format csv"] if hidden > 0 else []
    captions += _with_csv("layers under ", [policy_words(other.policy) for other in layerwise[1:]])
    title = f"Layers under {policy_words(policy.policy)}"
    return Table(tuple(columns), tuple(rows), title=title, caption="; ".join(captions))
