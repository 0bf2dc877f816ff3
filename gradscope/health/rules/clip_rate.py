"""``clip-rate``: how often a recorded run's own clipping is in force, lately."""

from __future__ import annotations

import math

from gradscope.check_results import Reading
from gradscope.health.evidence import Evidence
from gradscope.health.rule import Limit, Limits, Rule, Verdict
from gradscope.notation import percent
from gradscope.results import RecordedClipping
from gradscope.selection import FEWEST_FOR_RECENT


def judge(evidence: Evidence, limits: Limits) -> Verdict:
    """Compare the 95 % interval of each clip group's recent clip rate with both limits."""
    if evidence.recorded is None:
        return Verdict.cannot_tell("only a recorded run tells what it clipped")
    clipped = [group for group in evidence.recorded.groups if not math.isnan(group.recent.clip_rate)]
    if not clipped:
        return Verdict.cannot_tell("the run clips nothing")
    clipped = [group for group in clipped if group.max_norm is None or group.max_norm > 0.0]
    if not clipped:
        return Verdict.cannot_tell("max_norm is not positive")
    alone = len(clipped) == 1
    readings = [_reading(group, None if alone else group.name, limits) for group in clipped]
    beyond = [reading for reading, excess in readings if excess > 0.0]
    if beyond:
        return Verdict.violated(
            sorted(beyond, key=lambda reading: -abs((reading.value or 0.0) - (reading.limit or 0.0)))
        )
    return Verdict.well(max(readings, key=lambda pair: pair[1])[0])


def _reading(group: RecordedClipping, name: str | None, limits: Limits) -> tuple[Reading, float]:
    """The group's rate, and how far its whole interval is beyond a limit (negative: within)."""
    recent, most, least = group.recent, limits.number("max"), limits.number("min")
    subject = f"{name} was" if name else "The gradient was"
    if recent.clip_rate == 1.0 > most and recent.length >= FEWEST_FOR_RECENT:
        # No noise makes a share of all there were.
        said = f"{subject} clipped at every one of the last {recent.length:,} steps: max_norm acts as a learning rate."
        return Reading(1.0, most, name, recent.steps, said), 1.0 - most
    said = f"{subject} clipped at {percent(recent.clip_rate)} of the last {recent.length:,} steps"
    interval = recent.clip_rate_ci95
    if interval is None:
        said += f"; {recent.effective_steps:.0f} independent steps are too few to tell how often it is in the long run."
        return Reading(recent.clip_rate if recent.clip_rate <= most else None, most, name, recent.steps, said), -1.0
    low, high = interval
    said += f" (95 % interval {percent(low)} to {percent(high)})"
    if high < least:
        said += f", less than {percent(least)}: the limit hardly acts."
        return Reading(recent.clip_rate, least, name, recent.steps, said, "least"), least - high
    if low > most:
        said += ": clipped so often, max_norm acts as a learning rate."
        return Reading(recent.clip_rate, most, name, recent.steps, said), low - most
    # What is told of a pass is what was held against the limit: the end of the interval, where the rate is beyond it.
    value = low if recent.clip_rate > most else recent.clip_rate
    return Reading(value, most, name, recent.steps, f"{said}."), low - most


CLIP_RATE = Rule(
    name="clip-rate",
    severity="warn",
    about="The gradient is clipped at almost every step, or (with min) at almost none.",
    formula="clipped steps / steps over the newest part of the run (half of it, 20 to 1000 steps); the whole 95 % "
    "Wilson interval, corrected for autocorrelation, must lie beyond the limit, or every step be clipped",
    source="Pascanu et al. 2013 (clip by norm); Wilson 1927 and Geyer 1992 (interval)",
    limits=(
        Limit("max", 0.95, "largest share of recent steps that are clipped", most=1.0),
        Limit("min", 0.0, "smallest share of recent steps that are clipped", most=1.0),
    ),
    judge=judge,
)
