"""Hand-made checks, as the engine would return them, for the tests of their views."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

from gradscope.check_results import Check, LimitInForce, Reading, RuleOutcome, RuleStatus, RuleText
from gradscope.results import Source

# What files and their authors may put into a name.
HOSTILE = (
    "a\nb\r\n::error::c",
    "\x1b[31mred\x1b[0m\x07",
    "<script>alert('x')</script>&amp;\"",
    "pipe|tick`star*{0}[link](1)",
    "layer." * 60,
    "caf\udce9/model.zip",
    "\u202egnp\x01\ufffe",
    "100%25: a, b",
)
# A path cannot hold NUL.
HOSTILE_PLACES = (*HOSTILE, "nul\0nul")

EXPLODING = (
    Reading(812.0, 100.0, "actor.2", (40, 80), "The norm of actor.2 grew 812-fold from step 40 to step 80; limit 100."),
    Reading(700.0, 100.0, "actor.0", (44, 80), "The norm of actor.0 grew 700-fold from step 44 to step 80; limit 100."),
    Reading(300.0, 100.0, "critic.0", (61, 80), "The norm of critic.0 grew 300-fold from step 61 on; limit 100."),
)
NONFINITE = Reading(0.01, 0.0, "actor.2.weight", (12, 12), "Step 12 holds NaN in actor.2.weight, and it was taken.")
COVERAGE = Reading(None, None, "critic", None, "Clipping covers half of the parameters: critic is in no clip group.")
CLIP_RATE = Reading(0.93, 0.9, "policy", (0, 99), "max_norm 0.5 clips 93 % of the steps of policy.")


def source(path: str = "runs/ppo.gradscope") -> Source:
    return Source(path, "trace", "recorded SB3 PPO run", 100)


def outcome(rule: str, status: RuleStatus, *readings: Reading, path: str = "runs/ppo.gradscope") -> RuleOutcome:
    """A rule that ended so; of a pass the one reading is the nearest to the limit."""
    first = readings[0]
    return RuleOutcome(
        rule=rule,
        severity="warn" if status == "warn" else "error",
        status=status,
        value=first.value,
        limit=first.limit,
        where=first.where,
        steps=first.steps,
        message=first.message,
        violations=readings if status in ("fail", "warn") else (),
        path=path,
        bound=first.bound,
    )


def passed(rule: str, value: float | None, limit: float | None, where: str | None = None, **more: str) -> RuleOutcome:
    return outcome(rule, "pass", Reading(value, limit, where, (0, 99), f"{rule} is well."), **more)


def skipped(rule: str, why: str, **more: str) -> RuleOutcome:
    return outcome(rule, "skipped", Reading(None, None, None, None, why), **more)


def check(*rules: RuleOutcome, sources: tuple[Source, ...] = (source(),), **more: object) -> Check:
    """A check of these outcomes, with a catalogue that describes their rules."""
    failed = sum(rule.status == "fail" for rule in rules)
    warned = any(rule.status == "warn" for rule in rules)
    texts = {rule.rule: rule_text(rule) for rule in rules}
    made = Check(
        schema="gradscope.check/1",
        status="fail" if failed else "warn" if warned else "pass",
        failed_because=f"{failed} failed" if failed else None,
        sources=sources,
        rules=rules,
        catalogue=tuple(texts.values()),
    )
    return replace(made, **more)  # type: ignore[arg-type]


def rule_text(rule: RuleOutcome) -> RuleText:
    limits = (LimitInForce("max", 0.5, "largest value"), LimitInForce("format", "float16", "what it is judged by"))
    return RuleText(rule.rule, rule.severity, f"What {rule.rule} finds", "a / b <= max", "A paper, 2019", limits)


def unhealthy() -> Check:
    """Three failures, which stand in another order than they happened in, a warning, passes and skipped rules."""
    return check(
        outcome("exploding", "fail", *EXPLODING),
        outcome("nonfinite", "fail", NONFINITE),
        passed("spike", 3.21, 12.0, "actor.0"),
        outcome("vanishing", "pass", Reading(1.2e-3, 1e-7, "critic.0", (0, 99), "vanishing is well.", "least")),
        passed("dead", 0.0, 0.5),
        skipped("depth-decay", "fewer than 5 layers with matrices"),
        skipped("saturation", "a recording tells its clip rate itself"),
        outcome("clip-rate", "warn", CLIP_RATE),
        outcome("coverage", "fail", COVERAGE),
        passed("scaled-clip", None, None),
        skipped("noise-scale", "no captured batch was given"),
        skipped("drift", "no baseline was given"),
    )


def healthy() -> Check:
    return check(passed("nonfinite", 0.0, 0.0), passed("spike", 3.21, 12.0, "actor.0"))


def hostile() -> Check:
    """Every status with every hostile name, as a place, in a message and as a path."""
    sources = tuple(source(name) for name in HOSTILE)
    statuses: tuple[RuleStatus, ...] = get_args(RuleStatus)
    rules = (
        outcome(
            f"rule-{status}",
            status,
            *[Reading(float("nan"), -1.0, n, (1, 2), f"In {n}.") for n in HOSTILE_PLACES],
            path=p,
        )
        for p in HOSTILE
        for status in statuses
    )
    return check(*rules, sources=sources)


def every_kind() -> tuple[Check, ...]:
    strict = check(*healthy().rules, skipped("drift", "no baseline"))
    return (
        unhealthy(),
        healthy(),
        check(),
        check(outcome("clip-rate", "warn", CLIP_RATE)),
        replace(
            check(outcome("clip-rate", "warn", CLIP_RATE)), status="fail", fail_on="warn", failed_because="1 warned"
        ),
        replace(strict, status="fail", strict=True, failed_because="1 skipped, which is a failure with --strict"),
        replace(unhealthy(), catalogue=()),
        two_sources(),
        hostile(),
    )


def two_sources() -> Check:
    first, second = "runs/a.gradscope", "runs/b.gradscope"
    return check(
        outcome("exploding", "fail", *EXPLODING, path=first),
        skipped("drift", "no baseline was given", path=first),
        passed("exploding", 1.3, 100.0, path=second),
        skipped("drift", "no baseline was given", path=second),
        sources=(source(first), source(second)),
    )
