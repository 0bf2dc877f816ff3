"""Tables of what policies would have done: side by side, over the run, by clip group, by layer."""

from __future__ import annotations

from collections.abc import Sequence

from gradscope import results
from gradscope.findings import policy_words
from gradscope.notation import angle, count, number
from gradscope.views.cells import factor, share
from gradscope.views.screen import Column, Row, Table

MOST_LAYERS = 8
MOST_GROUP_ROWS = 12
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


def _interval(bounds: tuple[float, float] | None) -> str:
    return "–" if bounds is None else f"{100 * bounds[0]:.0f}–{100 * bounds[1]:.0f} %"


def phase_table(policies: Sequence[results.PolicyResult], width: int) -> Table:
    """The run in phases: norm and length for one policy, the clip rates side by side for several."""
    phases = policies[0].phases
    columns = [Column("updates"), Column("median norm")]
    rows = [[_span(phase.steps), number(phase.norm.p50)] for phase in phases]
    beside = [policy for policy in policies if [p.steps for p in policy.phases] == [p.steps for p in phases]]
    if len(policies) == 1:
        change = policies[0].direction_change_deg
        kept = change is not None and change.max < _DIRECTION_KEPT_DEG
        columns = [columns[0], Column("clipped"), columns[1], Column("length kept" if kept else "scale")]
        rows = [
            [_span(p.steps), share(p.clip_rate), number(p.norm.p50), factor(p.scale.p50)] for p in policies[0].phases
        ]
        return Table(tuple(columns), tuple(Row(tuple(cells)) for cells in rows))
    shown = _fitting([policy_words(policy.policy) for policy in beside], width - 34)
    for policy in beside[:shown]:
        columns.append(Column(policy_words(policy.policy)))
        for cells, phase in zip(rows, policy.phases, strict=True):
            cells.append(share(phase.clip_rate))
    more = len(policies) - shown
    caption = "clipped" + (f"; {more} more policies with --format csv" if more else "")
    return Table(tuple(columns), tuple(Row(tuple(cells)) for cells in rows), caption=caption)


def _span(steps: tuple[int, int]) -> str:
    return f"{count(steps[0])}–{count(steps[1])}"


def _fitting(titles: Sequence[str], room: int) -> int:
    """How many columns of these titles fit side by side."""
    for i, title in enumerate(titles):
        room -= max(len(title), len("< 0.01 %")) + 2
        if room < 0:
            return i
    return len(titles)


def group_table(policies: Sequence[results.PolicyResult]) -> Table:
    """The clip groups under each policy."""
    several = len(policies) > 1
    pairs = [(policy, group) for policy in policies for group in policy.groups]
    columns = (
        Column("clip group", "left"),
        Column("clipped"),
        Column("median norm"),
        Column("scale"),
        Column("direction", spare=1),
        Column("share"),
    )
    rows = [
        Row(
            (
                f"{policy_words(policy.policy)}, {group.name}" if several else group.name,
                share(group.clip_rate),
                number(group.norm.p50),
                factor(group.scale.p50),
                angle(group.direction_change_deg.p50),
                share(group.share),
            ),
            bar=group.share,
        )
        for policy, group in pairs[:MOST_GROUP_ROWS]
    ]
    more = len(pairs) - MOST_GROUP_ROWS
    return Table(columns, tuple(rows), caption=f"{more} more rows with --format csv" if more > 0 else "")


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
    captions = [f"{hidden} more layers"] if hidden > 0 else []
    captions += [f"{len(layerwise) - 1} more policies"] if len(layerwise) > 1 else []
    caption = f"{' and '.join(captions)} with --format csv" if captions else ""
    return Table(columns, tuple(rows), title=f"Layers under {policy_words(policy.policy)}", caption=caption)
