"""``update-ratio``: how much of a layer's weights an optimizer step changes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradscope.check_results import Reading
from gradscope.health.evidence import Evidence
from gradscope.health.rule import Limit, Limits, Rule, Verdict
from gradscope.notation import number
from gradscope.optimizer_state import AdamMoments
from gradscope.selection import recent_part

FEWEST_MEASURED = 3


@dataclass(frozen=True, slots=True)
class _Ratio:
    layer: str
    value: float
    steps: tuple[int, int] | None


def judge(evidence: Evidence, limits: Limits) -> Verdict:
    """Compare the median of each layer with both limits."""
    most, least = limits.number("max"), limits.number("min")
    if evidence.table is not None and evidence.table.measured is not None:
        ratios, found = _recorded(evidence), "recent updates"
    else:
        moments = evidence.source.adam_moments()
        if moments is None:
            return Verdict.cannot_tell("neither a recorded run nor Adam's state beside its weights")
        ratios, found = _stored(moments), "Adam update for its stored moments"
    if not ratios:
        return Verdict.cannot_tell("no update of a layer with a matrix is known at enough steps")
    high = sorted((ratio for ratio in ratios if ratio.value > most), key=lambda ratio: -ratio.value)
    low = sorted((ratio for ratio in ratios if ratio.value < least), key=lambda ratio: ratio.value)
    if high or low:
        return Verdict.violated(
            [
                *(_reading(ratio, most, found, "lower the learning rate") for ratio in high),
                *(_reading(ratio, least, found, "it next to does not learn") for ratio in low),
            ]
        )
    return Verdict.well(_reading(max(ratios, key=lambda ratio: ratio.value), most, found, None))


def _reading(ratio: _Ratio, limit: float, found: str, advice: str | None) -> Reading:
    said = f"The {found} of {ratio.layer}" if advice else f"The largest, of {ratio.layer}: the {found}"
    message = f"{said} change {number(ratio.value)} of its weights a step" + (f": {advice}." if advice else ".")
    return Reading(ratio.value, limit, ratio.layer, ratio.steps, message)


def _recorded(evidence: Evidence) -> list[_Ratio]:
    """The median over the newest part of the run, of each layer that holds a matrix."""
    table = evidence.table
    assert table is not None and table.measured is not None
    assert table.weight_norm is not None and table.update_norm is not None
    newest = table.measured >= recent_part(len(table.index)).start
    measured = table.measured[newest]
    ratios = []
    for layer, members in evidence.layers.items():
        matrices = [place for place in members if _is_matrix(evidence.tensors[place].shape)]
        if not matrices:
            continue
        floor = math.sqrt(sum(_default_energy(evidence.tensors[place].shape) for place in matrices))
        values = _ratios(table.weight_norm[newest][:, matrices], table.update_norm[newest][:, matrices], floor)
        known = ~np.isnan(values)
        if known.sum() >= FEWEST_MEASURED:
            ratios.append(_Ratio(layer, float(np.median(values[known])), evidence.steps_of(measured[known])))
    return ratios


def _ratios(weights: NDArray[np.float64], updates: NDArray[np.float64], floor: float) -> NDArray[np.float64]:
    size = np.maximum(np.sqrt(np.square(weights).sum(axis=1)), floor)
    return np.asarray(np.sqrt(np.square(updates).sum(axis=1)) / size)


def _stored(moments: Mapping[str, AdamMoments]) -> list[_Ratio]:
    """The last update of Adam's, of each layer that holds a matrix."""
    energies: dict[str, list[float]] = {}
    for name, held in moments.items():
        if held.weight is None or held.exp_avg is None or held.exp_avg_sq is None or held.step < 1:
            continue
        weight = held.weight()
        if not _is_matrix(weight.shape):
            continue
        sums = energies.setdefault(name.rsplit(".", 1)[0], [0.0, 0.0, 0.0])
        sums[0] += float(np.square(adam_update(held)).sum())
        sums[1] += float(np.square(weight.astype(np.float64)).sum())
        sums[2] += _default_energy(weight.shape)
    ratios = [
        _Ratio(layer, math.sqrt(update / max(weight, floor)), None)
        for layer, (update, weight, floor) in energies.items()
    ]
    return [ratio for ratio in ratios if not math.isnan(ratio.value)]


def adam_update(held: AdamMoments) -> NDArray[np.float64]:
    """lr·m̂/(√v̂ + eps), float64 of the parameter's shape: the last update, without decoupled weight decay.

    Source: Kingma & Ba 2015, algorithm 1.
    """
    assert held.exp_avg is not None and held.exp_avg_sq is not None
    beta1, beta2 = held.betas
    first = held.exp_avg().astype(np.float64) / (1.0 - beta1**held.step)
    second = held.exp_avg_sq().astype(np.float64) / (1.0 - beta2**held.step)
    return np.asarray(held.lr * first / (np.sqrt(second) + held.eps))


def _is_matrix(shape: Sequence[int]) -> bool:
    return len(shape) >= 2 and shape[0] > 1 and math.prod(shape[1:]) > 1


def _default_energy(shape: Sequence[int]) -> float:
    """‖θ‖² of torch's default initialisation: variance 1/(3·fan_in), so that it is a third of the rows.

    Weights that start at zero or near it (LoRA's B, the last layer of a policy) are measured against this.
    """
    return shape[0] / 3.0


UPDATE_RATIO = Rule(
    name="update-ratio",
    severity="error",
    about="A step changes too much (or, with min, too little) of a layer's weights.",
    formula="median over the newest part of the run of |update| / max(|weights|, sqrt(rows / 3)) of a layer's "
    "matrices; of an Adam checkpoint |lr * m_hat / (sqrt(v_hat) + eps)| / the same",
    source="Karpathy's rule of thumb, about 1e-3; You et al. 2017 (LARS: trust ratio)",
    limits=(
        Limit("max", 0.1, "largest share of a layer's weights that a step changes"),
        Limit("min", 0.0, "smallest share of a layer's weights that a step changes"),
    ),
    judge=judge,
)
