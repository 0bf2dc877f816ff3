"""``layer-dominance``: one layer that holds next to all of the squared norm, and alone decides what is clipped."""

from __future__ import annotations

import numpy as np

from gradscope.check_results import Reading
from gradscope.health.evidence import Evidence
from gradscope.health.rule import Limit, Limits, Rule, Verdict
from gradscope.health.typical_gradients import typical_gradients
from gradscope.notation import percent
from gradscope.tensors import places_by_layer

# Of two layers one often has most.
FEWEST_LAYERS = 3


def judge(evidence: Evidence, limits: Limits) -> Verdict:
    """Take each layer's median share of the squared norm."""
    typical = typical_gradients(evidence)
    if typical.missing is not None:
        return Verdict.cannot_tell(typical.missing)
    layers = places_by_layer(typical.tensors)
    if len(layers) < FEWEST_LAYERS:
        return Verdict.cannot_tell(f"it takes at least {FEWEST_LAYERS} layers")
    shares = typical.shares()
    if not len(shares):
        return Verdict.cannot_tell("all gradients are zero")
    medians = {name: float(np.median(shares[:, places].sum(axis=1))) for name, places in layers.items()}
    most = limits.number("max")
    where = max(medians, key=medians.__getitem__)
    message = f"Layer {where} holds {percent(medians[where])} of the squared norm"
    if medians[where] > most:
        message += ": it decides alone how much a joint norm clips; clip it by itself, or scale its loss"
    return Verdict.by_value([Reading(medians[where], most, where, typical.steps, f"{message}.")])


LAYER_DOMINANCE = Rule(
    name="layer-dominance",
    severity="warn",
    about="One layer holds next to all of the squared norm, and alone decides how much is clipped.",
    formula="median over the steps of |g of the layer|^2 / |g|^2, or the same of what an optimizer remembers",
    source="Chen et al. 2018, GradNorm: gradient normalization for adaptive loss balancing, section 3",
    limits=(Limit("max", 0.999, "largest share of the squared norm in one layer", most=1.0),),
    judge=judge,
)
