"""How often each of two sources clips: as recorded, and by the policies that are asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from gradscope import results
from gradscope.clipping.policy import Convention, Policy
from gradscope.comparison.side import Side
from gradscope.comparison_results import Both, ClipComparison, ClipRate
from gradscope.gradients import Progress
from gradscope.simulation import NEED_MORE_THAN_NORMS, simulate
from gradscope.step_table import recorded_run


def recorded_rates(a: Side, b: Side) -> tuple[ClipComparison, ...]:
    """What both runs clipped themselves, overall and in the clip groups that both have."""
    runs = [None if side.table is None else recorded_run(side.source, side.table) for side in (a, b)]
    one, other = runs
    if one is None or other is None or not (one.overall.steps and other.overall.steps):
        return ()
    groups = {group.name: group for group in other.groups}
    pairs = [(one.overall, other.overall)]
    if len(one.groups) > 1:
        pairs += [(g, groups[g.name]) for g in one.groups if g.name in groups and g.steps and groups[g.name].steps]
    return tuple(_recorded_clip(mine, theirs) for mine, theirs in pairs)


def _recorded_clip(mine: results.RecordedClipping, theirs: results.RecordedClipping) -> ClipComparison:
    rates = Both(*(ClipRate(r.clip_rate, r.clip_rate_ci95, r.effective_steps, r.steps) for r in (mine, theirs)))
    between = rate_difference(rates.a, rates.b)
    return ClipComparison(
        policy=None,
        name=mine.name,
        max_norm=Both(mine.max_norm, theirs.max_norm),
        clip_value=Both(mine.clip_value, theirs.clip_value),
        rate=rates,
        difference_ci95=between,
        differs=_differs(between),
    )


def simulated_rates(
    a: Side,
    b: Side,
    policies: Sequence[Policy],
    steps: str | slice | None,
    groups: Mapping[str, str] | None,
    convention: Convention,
    progress: Progress | None,
) -> tuple[ClipComparison, ...]:
    """What each policy that both sides can answer would have done to them."""
    able = [policy for policy in policies if not unanswered(a, policy) and not unanswered(b, policy)]
    if not able:
        return ()
    both = [
        simulate(
            side.source,
            able,
            steps=steps,
            groups=groups if side.kind != "norm-log" else None,
            convention=convention,
            progress=progress,
        )
        for side in (a, b)
    ]
    return tuple(_policy(mine, theirs, both) for mine, theirs in zip(both[0].results, both[1].results, strict=True))


def _policy(
    mine: results.PolicyResult, theirs: results.PolicyResult, both: Sequence[results.Simulation]
) -> ClipComparison:
    rates = Both(
        *(
            ClipRate(r.clip_rate, r.clip_rate_ci95, r.effective_steps, simulation.steps - simulation.nonfinite_steps)
            for r, simulation in zip((mine, theirs), both, strict=True)
        )
    )
    between = rate_difference(rates.a, rates.b)
    changes = [None if r.direction_change_deg is None else r.direction_change_deg.p50 for r in (mine, theirs)]
    by_norm = mine.policy.split(":")[0] == "norm"
    by_value = mine.policy.split(":")[0] == "value"
    return ClipComparison(
        policy=mine.policy,
        name="all",
        max_norm=Both(*[mine.threshold if by_norm else None] * 2),
        clip_value=Both(*[mine.threshold if by_value else None] * 2),
        direction_change_deg=Both(*changes),
        scale=Both(mine.scale.mean, theirs.scale.mean),
        rate=rates,
        difference_ci95=between,
        differs=_differs(between),
    )


def rate_difference(a: ClipRate, b: ClipRate) -> tuple[float, float] | None:
    """The 95 % interval of B's rate minus A's, from the Wilson interval of each (Newcombe 1998, method 10).

    None where one of them has no interval.
    """
    if a.ci95 is None or b.ci95 is None:
        return None
    apart = b.clip_rate - a.clip_rate
    low = math.hypot(b.clip_rate - b.ci95[0], a.ci95[1] - a.clip_rate)
    high = math.hypot(b.ci95[1] - b.clip_rate, a.clip_rate - a.ci95[0])
    return apart - low, apart + high


def _differs(between: tuple[float, float] | None) -> bool | None:
    return None if between is None else not between[0] <= 0.0 <= between[1]


def unanswered(side: Side, policy: Policy) -> str | None:
    """Why this side says nothing of the policy; None where it does."""
    if side.table is None:
        return f"{side.source.info.path} holds no gradients"
    if side.kind == "norm-log" and policy.name in NEED_MORE_THAN_NORMS:
        return f"{side.source.info.path} is a log of norms"
    return None
