"""``vanishing``: a layer whose gradient is next to nothing, by itself or beside the other layers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gradscope.check_results import Reading
from gradscope.health.evidence import Evidence
from gradscope.health.rule import Limit, Limits, Rule, Verdict
from gradscope.health.typical_gradients import TypicalGradient, TypicalGradients, typical_gradients
from gradscope.notation import number
from gradscope.roles import role_of

# Of fewer layers the median is none of what the others do.
FEWEST_LAYERS = 3


def judge(evidence: Evidence, limits: Limits) -> Verdict:
    """Look for layers of a tiny norm, and of a norm that is tiny beside those of the other layers."""
    typical = typical_gradients(evidence)
    if typical.missing is not None:
        return Verdict.cannot_tell(typical.missing)
    # A gradient of zero is no small one: that is for another rule.
    layers = [layer for layer in typical.by_layer() if layer.norm > 0.0]
    if not layers:
        return Verdict.cannot_tell("all gradients are zero")
    readings = [_absolute(typical, layer, limits.number("min")) for layer in layers]
    for part in _parts(layers):
        readings += _beside_others(typical, part, limits.number("min-ratio"))
    readings.sort(key=lambda reading: reading.over_limit)
    worst: dict[str | None, Reading] = {}
    for reading in readings:
        if reading.over_limit < 1.0:
            worst.setdefault(reading.where, reading)
    return Verdict.violated(list(worst.values())) if worst else Verdict.well(readings[0])


def _parts(layers: Sequence[TypicalGradient]) -> list[list[TypicalGradient]]:
    """Actor, critic, and what is neither, apart: their losses are of different size."""
    parts: dict[str | None, list[TypicalGradient]] = {}
    for layer in layers:
        parts.setdefault(role_of(layer.name), []).append(layer)
    return list(parts.values())


def _absolute(typical: TypicalGradients, layer: TypicalGradient, least: float) -> Reading:
    message = f"Layer {layer.name} has a {typical.word} gradient norm of {number(layer.norm)}"
    if layer.norm < least:
        message += ": too small to train it"
    return Reading(layer.norm, least, layer.name, typical.steps, f"{message}.", "least")


def _beside_others(typical: TypicalGradients, layers: Sequence[TypicalGradient], least: float) -> list[Reading]:
    """Gradient over weight, or per element where weights are not known of all, over the median of that."""
    weighed = [layer for layer in layers if layer.weight is not None and layer.weight > 0.0]
    by_weight = len(weighed) >= FEWEST_LAYERS
    if not by_weight and len(layers) < FEWEST_LAYERS:
        return []
    judged = weighed if by_weight else layers
    sizes = [layer.norm / layer.weight if by_weight and layer.weight else layer.rms for layer in judged]
    middle = float(np.median(sizes))
    measure = "relative to its weights" if by_weight else "per element"
    return [
        Reading(
            size / middle,
            least,
            layer.name,
            typical.steps,
            f"Layer {layer.name} has a {typical.word} gradient norm of {number(layer.norm)}: {measure}, "
            f"{number(size / middle)} times that of the median layer.",
            "least",
        )
        for layer, size in zip(judged, sizes, strict=True)
    ]


VANISHING = Rule(
    name="vanishing",
    severity="error",
    about="A layer's gradient is next to nothing, by itself or beside the other layers.",
    formula=(
        "median over the steps of a layer's gradient norm; and that norm over the norm of its weights (or over the "
        "root of its number of elements, where those are not known) / the median of this over the layers of the same "
        "part (actor, critic, others)"
    ),
    source=(
        "Hochreiter 1991, Untersuchungen zu dynamischen neuronalen Netzen; Glorot & Bengio 2010, Understanding the "
        "difficulty of training deep feedforward neural networks"
    ),
    limits=(
        Limit("min", 1e-12, "smallest median norm of a layer"),
        Limit("min-ratio", 1e-6, "smallest size beside the median layer"),
    ),
    judge=judge,
)
