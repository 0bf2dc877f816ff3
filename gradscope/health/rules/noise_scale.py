"""``noise-scale``: minibatches far smaller than the gradient noise scale, told by a captured batch."""

from __future__ import annotations

from gradscope.check_results import Reading
from gradscope.health.evidence import Evidence
from gradscope.health.rule import Limit, Limits, Rule, Verdict
from gradscope.notation import number


def judge(evidence: Evidence, limits: Limits) -> Verdict:
    """Compare the lower end of the noise scale's 95 % interval, in minibatches."""
    batch = evidence.minibatches
    if batch is None:
        return Verdict.cannot_tell("only minibatches of a captured batch tell signal from noise (--batch)")
    noise = batch.noise_scale
    least = noise.at_least if noise.at_least is not None else noise.ci95[0] if noise.ci95 is not None else None
    if least is None:
        return Verdict.cannot_tell(f"{batch.minibatches} minibatches are too few to tell signal from noise")
    value, most = least / batch.minibatch_size, limits.number("max")
    said = (
        f"The gradient noise scale is at least {number(least)} samples, {number(value)} times the minibatch "
        f"of {batch.minibatch_size:,}"
    )
    remedy = ": a step is almost all noise; use larger minibatches" if value > most else ""
    return Verdict.by_value([Reading(value, most, None, None, f"{said}{remedy}.")])


NOISE_SCALE = Rule(
    name="noise-scale",
    severity="warn",
    about="The minibatch is far smaller than the gradient noise scale: a step is almost all noise.",
    formula="tr(Sigma) / |G|^2 / minibatch size, at the lower end of its 95 % interval",
    source="McCandlish et al. 2018, An Empirical Model of Large-Batch Training",
    limits=(Limit("max", 1000.0, "largest noise scale, in minibatches"),),
    judge=judge,
)
