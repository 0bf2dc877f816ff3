"""``update-ratio``: how much of a layer's weights an optimizer step changes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradscope.check_results import Reading
from gradscope.health.evidence import Evidence
from gradscope.health.rule import Limit, Limits, Rule, Verdict
from gradscope.notation import number
from gradscope.optimizer_state import AdamMoments
from gradscope.selection import recent_part

FloatArray = NDArray[np.float64]

FEWEST_MEASURED = 3
# Into how many parts a run is split, as far as so many updates were measured.
MOST_PARTS = 8


@dataclass(frozen=True, slots=True)
class _Ratio:
    layer: str
    value: float
    steps: tuple[int, int] | None
    said: str


def judge(evidence: Evidence, limits: Limits) -> Verdict:
    """Compare each layer's largest sustained updates, and its recent ones, with the limits."""
    most, least = limits.number("max"), limits.number("min")
    if evidence.table is not None and evidence.table.measured is not None:
        large, recent = _sustained(evidence), _recent(evidence)
    else:
        moments = evidence.source.adam_moments()
        if moments is None:
            return Verdict.cannot_tell("neither a recorded run nor Adam's state beside its weights")
        large = recent = _stored(moments)
    if not large:
        return Verdict.cannot_tell("no update of a layer with a matrix is known at enough steps")
    large.sort(key=lambda ratio: -ratio.value)
    beyond = [_reading(ratio, most, "; lower the learning rate") for ratio in large if ratio.value > most]
    low = sorted((ratio for ratio in recent if ratio.value < least), key=lambda ratio: ratio.value)
    beyond += [_reading(ratio, least, ": it hardly learns") for ratio in low]
    return Verdict.violated(beyond) if beyond else Verdict.well(_reading(large[0], most, ""))


def _reading(ratio: _Ratio, limit: float, remedy: str) -> Reading:
    return Reading(ratio.value, limit, ratio.layer, ratio.steps, f"{ratio.said}{remedy}.")


def _recent(evidence: Evidence) -> list[_Ratio]:
    """‖update‖/‖θ‖ of each layer that holds a matrix: the median over the newest part of the run."""
    table = evidence.table
    assert table is not None and table.measured is not None
    newest = np.flatnonzero(table.measured >= recent_part(len(table.index)).start)
    if len(newest) < FEWEST_MEASURED:
        newest = np.arange(len(table.measured))
    ratios = []
    for layer, updates, weights, default in _measured(evidence):
        values = (updates / np.maximum(weights, default))[newest]
        known = np.isfinite(values)
        if known.sum() < FEWEST_MEASURED:
            continue
        value = float(np.median(values[known]))
        said = f"A recent step changes {layer} by {number(value)} of its weights in the median"
        ratios.append(_Ratio(layer, value, evidence.steps_of(table.measured[newest][known]), said))
    return ratios


def _sustained(evidence: Evidence) -> list[_Ratio]:
    """‖update‖/‖θ‖ of each layer that holds a matrix: the largest median of a part of the run, but the first.

    Adam's updates are as long however long the weights have become, so that too high a learning rate hides itself
    towards the end; in the first steps of a training any layer may change much.
    """
    table = evidence.table
    assert table is not None and table.measured is not None
    parts = min(MOST_PARTS, len(table.measured) // FEWEST_MEASURED)
    if parts < 2:
        return []
    windows = np.array_split(np.arange(len(table.measured)), parts)[1:]
    ratios = []
    for layer, updates, weights, default in _measured(evidence):
        values = updates / np.maximum(weights, default)
        medians = [(_median(values[window]), window) for window in windows]
        known = [(value, window) for value, window in medians if value is not None]
        if not known:
            continue
        value, window = max(known, key=lambda pair: pair[0])
        steps = evidence.steps_of(table.measured[window])
        said = f"For a part of the run a step changes {layer} by {number(value)} of its weights in the median"
        ratios.append(_Ratio(layer, value, steps, said))
    return ratios


def _median(values: FloatArray) -> float | None:
    """Of the finite values; None where there are too few."""
    known = values[np.isfinite(values)]
    return float(np.median(known)) if len(known) >= FEWEST_MEASURED else None


def _measured(evidence: Evidence) -> Iterator[tuple[str, FloatArray, FloatArray, float]]:
    """Each layer's matrices together: update and weight norms at the steps measured, and their default norm."""
    table = evidence.table
    assert table is not None and table.weight_norm is not None and table.update_norm is not None
    for layer, members in evidence.layers.items():
        matrices = [place for place in members if _is_matrix(evidence.tensors[place].shape)]
        if matrices:
            default = math.sqrt(sum(_default_energy(evidence.tensors[place].shape) for place in matrices))
            yield layer, _norms(table.update_norm[:, matrices]), _norms(table.weight_norm[:, matrices]), default


def _norms(each: FloatArray) -> FloatArray:
    return np.asarray(np.sqrt(np.square(each).sum(axis=1)))


def _stored(moments: Mapping[str, AdamMoments]) -> list[_Ratio]:
    """The last update of Adam's, of each layer that holds a matrix."""
    energies: dict[str, list[float]] = {}
    for name, held in moments.items():
        if held.weight is None or held.exp_avg is None or held.exp_avg_sq is None or held.step < 1:
            continue
        values = held.weight()
        if not _is_matrix(values.shape):
            continue
        sums = energies.setdefault(name.rsplit(".", 1)[0], [0.0, 0.0, 0.0])
        sums[0] += float(np.square(adam_update(held)).sum())
        sums[1] += float(np.square(values.astype(np.float64)).sum())
        sums[2] += _default_energy(values.shape)
    ratios = []
    for layer, (update, weight, default) in energies.items():
        value = math.sqrt(update / max(weight, default))
        said = f"Adam's last update changed {layer} by {number(value)} of its weights"
        if math.isfinite(value):
            ratios.append(_Ratio(layer, value, None, said))
    return ratios


def adam_update(held: AdamMoments) -> FloatArray:
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
    formula="|update| / max(|weights|, d) of a layer's matrices, d = sqrt(rows / 3) their norm in torch's default "
    "initialisation: max is for the largest median of an eighth of the run, the first left out, min for the median "
    "of its newest part; of an Adam checkpoint |lr * m_hat / (sqrt(v_hat) + eps)| / max(|weights|, d)",
    source="Karpathy's rule of thumb, about 1e-3; You et al. 2017 (LARS: trust ratio)",
    limits=(
        Limit("max", 0.03, "largest share of a layer's weights that a step changes"),
        Limit("min", 0.0, "smallest share of a layer's weights that a step changes"),
    ),
    judge=judge,
)
