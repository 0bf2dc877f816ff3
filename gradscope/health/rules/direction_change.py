"""``direction-change``: how far clipping turns the gradient, where it does more than shorten it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from gradscope.check_results import Reading
from gradscope.clipping.parsing import check_notation
from gradscope.errors import GradscopeError
from gradscope.health.evidence import Evidence
from gradscope.health.rule import Limit, Limits, Rule, Verdict
from gradscope.notation import angle, setting


def judge(evidence: Evidence, limits: Limits) -> Verdict:
    """Replay the policy asked for, or the value clipping in force, and compare each clip group's median angle."""
    asked, most = limits.text("policy").strip(), limits.number("max")
    if evidence.table is None:
        return Verdict.cannot_tell("the source holds no gradients")
    if asked:
        try:
            readings = _replayed(evidence, asked, None, most)
        except GradscopeError as error:
            return Verdict.cannot_tell(f"{error.what}: {error.why}")
        return _verdict(readings)
    return _in_force(evidence, most)


def _verify(policy: str) -> None:
    if policy.strip():
        check_notation(policy)


def _in_force(evidence: Evidence, most: float) -> Verdict:
    if evidence.recorded is None:
        return Verdict.cannot_tell("it is not known how the run clips; direction-change.policy names a policy to try")
    readings = []
    by_value: dict[float, list[str]] = {}
    for group in evidence.recorded.groups:
        if group.clip_value is not None and group.clip_value > 0.0:
            by_value.setdefault(group.clip_value, []).append(group.name)
        elif group.max_norm is not None:
            gradient = "the gradient" if group.name == "all" else f"the gradient of {group.name}"
            said = f"max_norm shortens {gradient} and keeps its direction."
            readings.append(Reading(0.0, most, group.name, None, said))
    for value, groups in by_value.items():
        try:
            readings += _replayed(evidence, f"value:{setting(value)}", groups, most)
        except GradscopeError as error:
            return Verdict.cannot_tell(f"{error.what}: {error.why}")
    return _verdict(readings) if readings else Verdict.cannot_tell("the run clips nothing")


def _verdict(readings: Sequence[Reading]) -> Verdict:
    return Verdict.by_value(readings) if readings else Verdict.cannot_tell("the angle is not known at any step")


def _replayed(evidence: Evidence, policy: str, groups: list[str] | None, most: float) -> list[Reading]:
    from gradscope.simulation import simulate

    assert evidence.table is not None
    result = simulate(evidence.source, [policy], steps=_steps_read(evidence)).results[0]
    whole = evidence.steps_of(range(len(evidence.table.index)))
    return [
        Reading(
            group.direction_change_deg.p50,
            most,
            group.name,
            whole,
            f"{policy} turns the gradient of {group.name} by {angle(group.direction_change_deg.p50)} in the median"
            + ("; clip by norm, which keeps the direction." if group.direction_change_deg.p50 > most else "."),
        )
        for group in result.groups
        if (groups is None or group.name in groups) and math.isfinite(group.direction_change_deg.p50)
    ]


def _steps_read(evidence: Evidence) -> slice:
    """The positions of the table's steps in the source."""
    assert evidence.table is not None
    numbers = np.asarray(evidence.source.step_numbers)
    places = np.searchsorted(numbers, evidence.table.index)
    stride = int(places[1] - places[0]) if len(places) > 1 else 1
    return slice(int(places[0]), int(places[-1]) + 1, max(1, stride))


DIRECTION_CHANGE = Rule(
    name="direction-change",
    severity="error",
    about="Clipping turns the gradient, as clip by value does, instead of shortening it.",
    formula="median over the steps of the angle between the gradient before and after the policy, per clip group; 0 "
    "for clip by norm",
    source="Pascanu et al. 2013: clip by norm keeps the direction; torch.nn.utils.clip_grad_value_ does not",
    limits=(
        Limit("max", 30.0, "largest median angle in degrees", most=180.0),
        Limit("policy", "", 'the policy to judge, such as "value:0.5"; empty: the one in force', verify=_verify),
    ),
    judge=judge,
)
