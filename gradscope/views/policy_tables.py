"""Tables of what policies would have done: side by side, over the run, by clip group, by layer."""

from __future__ import annotations

from collections.abc import Sequence

from gradscope import results
from gradscope.findings import policy_words
from gradscope.notation import angle, count, number
from gradscope.views.cells import factor, share
from gradscope.views.screen import Column, Row, Table

MOST_LAYERS = 8
# An interval narrower than this is not worth a column: the angles are printed with three digits.
WORTHWHILE_ERROR_DEG = 0.005
_LAYERWISE_POLICIES = {"value", "agc", "per-layer-norm", "per-tensor-norm", "block-rms"}
_DIRECTION_KEPT_DEG = 1e-6


def policy_table(simulation: results.Simulation) -> Table:
    """One row per policy: how often it clips, what it leaves of the length, how far it turns the direction."""
    policies = simulation.results
    recent = policies[0].recent.steps
    length = recent[1] - recent[0] + 1
    whole = length >= simulation.steps
    columns = [Column("policy", "left"), Column("clipped" if whole else f"last {count(length)}"), Column("95 %")]
    columns += [] if whole else [Column("overall")]
    columns += [Column("length"), Column("direction"), Column("at most")]
    uncertain = any(policy.direction_change_error_deg >= WORTHWHILE_ERROR_DEG for policy in policies)
    columns += [Column("±", spare=3)] if uncertain else []
    columns += [Column("scale", spare=4), Column("elements clipped", spare=5), Column("independent", spare=6)]
    rows = []
    for policy in policies:
        change = policy.direction_change_deg
        cells = [policy_words(policy.policy), share(policy.recent.clip_rate), _interval(policy.recent.clip_rate_ci95)]
        cells += [] if whole else [share(policy.clip_rate)]
        cells += [factor(policy.norm_ratio.p50)]
        cells += [angle(change.p50), angle(change.max)] if change else ["–", "–"]
        cells += [angle(policy.direction_change_error_deg)] if uncertain else []
        cells += [factor(policy.scale.p50), count(policy.clipped_elements), count(policy.recent.effective_steps)]
        rows.append(Row(tuple(cells)))
    caption = "length: median share of the norm that is kept; direction: median change"
    return Table(tuple(columns), tuple(rows), caption=caption)


def one_step_table(policies: Sequence[results.PolicyResult]) -> Table:
    """One row per policy for a single gradient: what became of it, with five digits."""
    titles = ("clipped", "length kept", "scale", "direction", "±")
    rows = []
    for policy in policies:
        change = policy.direction_change_deg
        cells = [policy_words(policy.policy), "yes" if policy.clipped_steps else "no"]
        cells += [f"{number(policy.norm_ratio.max, 5)}×", f"{number(policy.scale.max, 5)}×"]
        cells += [f"{number(change.max, 5)}°" if change else "–", angle(policy.direction_change_error_deg)]
        rows.append(Row(tuple(cells)))
    return Table((Column("policy", "left"), *(Column(title) for title in titles)), tuple(rows))


def _interval(bounds: tuple[float, float] | None) -> str:
    return "–" if bounds is None else f"{100 * bounds[0]:.0f}–{100 * bounds[1]:.0f} %"


def phase_table(policies: Sequence[results.PolicyResult], width: int) -> Table:
    """The run in phases: norm and length for one policy, the clip rates side by side for several."""
    spans = [phase.steps for phase in policies[0].phases]
    rows = [[_span(phase.steps), number(phase.norm.p50)] for phase in policies[0].phases]
    columns = [Column("updates"), Column("median norm")]
    if len(policies) > 1:
        alike = [policy for policy in policies if [phase.steps for phase in policy.phases] == spans]
        rates = [(policy, [phase.clip_rate for phase in policy.phases]) for policy in alike]
        return _side_by_side(columns, rows, rates, width)
    kept = _keeps_direction(policies[0])
    columns = [Column("updates"), Column("clipped"), Column("median norm"), Column("length kept" if kept else "scale")]
    rows = [
        [_span(phase.steps), share(phase.clip_rate), number(phase.norm.p50), factor(phase.scale.p50)]
        for phase in policies[0].phases
    ]
    return Table(tuple(columns), tuple(Row(tuple(cells)) for cells in rows))


def _keeps_direction(policy: results.PolicyResult) -> bool:
    change = policy.direction_change_deg
    return change is not None and change.max < _DIRECTION_KEPT_DEG


def _span(steps: tuple[int, int]) -> str:
    return f"{count(steps[0])}–{count(steps[1])}"


def group_table(policies: Sequence[results.PolicyResult], width: int) -> Table:
    """The clip groups: all of one policy, or the clip rates of several side by side."""
    first = policies[0].groups
    if len(policies) > 1:
        names = [group.name for group in first]
        alike = [policy for policy in policies if [group.name for group in policy.groups] == names]
        rates = [(policy, [group.clip_rate for group in policy.groups]) for policy in alike]
        rows = [[group.name, share(group.share), number(group.norm.p50)] for group in first]
        columns = [Column("clip group", "left"), Column("share"), Column("median norm")]
        return _side_by_side(columns, rows, rates, width)
    columns = [
        Column("clip group", "left"),
        Column("clipped"),
        Column("median norm"),
        Column("scale"),
        Column("direction", spare=1),
        Column("share"),
    ]
    lines = [
        Row(
            (
                group.name,
                share(group.clip_rate),
                number(group.norm.p50),
                factor(group.scale.p50),
                angle(group.direction_change_deg.p50),
                share(group.share),
            ),
            bar=group.share,
        )
        for group in first
    ]
    return Table(tuple(columns), tuple(lines))


def _side_by_side(
    columns: list[Column],
    rows: list[list[str]],
    rates: Sequence[tuple[results.PolicyResult, Sequence[float]]],
    width: int,
) -> Table:
    """``rows`` continued by the clip rates of as many policies as fit into ``width``."""
    titles = [policy_words(policy.policy) for policy, _ in rates]
    room = width - sum(max(len(column.title), *(len(row[i]) for row in rows)) + 2 for i, column in enumerate(columns))
    fitting = _fitting(titles, room)
    for title, (_, values) in zip(titles[:fitting], rates, strict=False):
        columns = [*columns, Column(title)]
        rows = [[*row, share(value)] for row, value in zip(rows, values, strict=True)]
    hidden = len(rates) - fitting
    caption = f"under each policy: clipped{_more(hidden, '; ')}"
    return Table(tuple(columns), tuple(Row(tuple(row)) for row in rows), caption=caption)


def _fitting(titles: Sequence[str], room: int) -> int:
    """How many columns of these titles fit side by side."""
    for i, title in enumerate(titles):
        room -= max(len(title), len("< 0.01 %")) + 2
        if room < 0:
            return i
    return len(titles)


def _more(policies: int, before: str = "") -> str:
    if policies <= 0:
        return ""
    return f"{before}{policies} more polic{'y' if policies == 1 else 'ies'} with --format csv"


def layer_table(policies: Sequence[results.PolicyResult]) -> Table | None:
    """The layers that the first policy which treats layers apart changes most."""
    layerwise = [policy for policy in policies if policy.policy.split(":")[0] in _LAYERWISE_POLICIES and policy.layers]
    if not layerwise:
        return None
    policy = layerwise[0]
    changed = sorted(policy.layers, key=lambda layer: (-layer.direction_change_deg, layer.scale))
    columns = (
        Column("layer", "left"),
        Column("clipped"),
        Column("scale"),
        Column("direction"),
        Column("elements clipped", spare=1),
    )
    rows = [
        Row(
            (
                layer.name,
                share(layer.clip_rate),
                factor(layer.scale),
                angle(layer.direction_change_deg),
                count(layer.clipped_elements),
            )
        )
        for layer in changed[:MOST_LAYERS]
    ]
    hidden = len(changed) - MOST_LAYERS
    captions = [f"{hidden} more layer{'s' * (hidden > 1)} with --format csv"] if hidden > 0 else []
    captions += [_more(len(layerwise) - 1)] if len(layerwise) > 1 else []
    title = f"Layers under {policy_words(policy.policy)}"
    return Table(columns, tuple(rows), title=title, caption="; ".join(captions))
