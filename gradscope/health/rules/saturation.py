"""``saturation``: how near the gradients behind a bare checkpoint's optimizer state were to ``max_norm``."""

from __future__ import annotations

from gradscope.check_results import Reading
from gradscope.forensics import SATURATION_TOLERANCE
from gradscope.health.evidence import Evidence
from gradscope.health.rule import Limit, Limits, Rule, Verdict
from gradscope.notation import number, setting
from gradscope.results import OptimizerGroup, OptimizerReport


def judge(evidence: Evidence, limits: Limits) -> Verdict:
    """Compare the saturation of every clip group whose max_norm is known."""
    if evidence.source.info.kind == "trace":
        return Verdict.cannot_tell("a recorded run tells its clip rate itself")
    if not evidence.optimizers:
        return Verdict.cannot_tell("the source holds no optimizer state")
    most = limits.number("max")
    readings = [
        _reading(report, group, group.saturation, most)
        for report in evidence.reports
        for group in report.groups
        if group.saturation is not None
    ]
    if not readings:
        return Verdict.cannot_tell(_why_none(evidence.reports))
    return Verdict.by_value(readings)


def _reading(report: OptimizerReport, group: OptimizerGroup, saturation: float, most: float) -> Reading:
    assert group.max_norm is not None
    over = f" over the last {report.window:,.0f} steps" if report.window else ""
    limit = setting(group.max_norm)
    said = f"The saturation of {group.name} is {number(saturation)}{over}"
    if saturation > 1.0 + SATURATION_TOLERANCE:
        said += f": gradients above max_norm {limit} reached the optimizer unclipped"
    elif saturation > most:
        said += f": nearly every gradient was clipped at max_norm {limit}, which acts as a learning rate"
    qualified = f" ({group.qualifications[0].rstrip('.')})" if group.qualifications else ""
    return Reading(saturation, most, group.name, None, f"{said}{qualified}.")


def _why_none(reports: tuple[OptimizerReport, ...]) -> str:
    limited = [report for report in reports if any(group.max_norm is not None for group in report.groups)]
    if not limited:
        return "the checkpoint names no max_norm"
    return next((report.unavailable for report in limited if report.unavailable), "its norms are not known")


SATURATION = Rule(
    name="saturation",
    severity="warn",
    about="The optimizer's state holds gradients that sat at max_norm throughout, or were above it.",
    formula="rho = r^2 / max_norm^2, r^2 the weighted mean of the squared norm that the optimizer's state keeps",
    source="Kingma & Ba 2015 (second moment, bias correction); Markov's inequality: clipped share <= rho",
    limits=(Limit("max", 0.99, "largest saturation of a clip group"),),
    judge=judge,
)
