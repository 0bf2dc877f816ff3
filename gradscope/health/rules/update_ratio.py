"""``update-ratio``: how much an optimizer step changes a layer, against the weights that such a layer starts with.

Too high a learning rate makes weights grow until its updates are small beside them: against the weights as they are by
then, PPO at a hundred times its learning rate looks like a healthy recurrent network.  Against what torch initialises
them with, healthy trainings stayed below 0.04 (most below 0.01), those at a hundred times their rate above 0.1.
"""

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
            return Verdict.cannot_tell("neither a recorded run nor Adam's state")
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
    """The median of each layer that holds a matrix over the newest part of the run."""
    table = evidence.table
    assert table is not None and table.measured is not None
    newest = np.flatnonzero(table.measured >= recent_part(len(table.index)).start)
    if len(newest) < FEWEST_MEASURED:
        newest = np.arange(len(table.measured))
    ratios = []
    for layer, ratios_measured in _measured(evidence):
        values = ratios_measured[newest]
        known = np.isfinite(values)
        if known.sum() < FEWEST_MEASURED:
            continue
        value = float(np.median(values[known]))
        said = f"Recent steps change {layer} by {number(value)} of default weights in the median"
        ratios.append(_Ratio(layer, value, evidence.steps_of(table.measured[newest][known]), said))
    return ratios


def _sustained(evidence: Evidence) -> list[_Ratio]:
    """The largest median of a part of the run, but its first, in which any layer may change much."""
    table = evidence.table
    assert table is not None and table.measured is not None
    parts = min(MOST_PARTS, len(table.measured) // FEWEST_MEASURED)
    if parts < 2:
        return []
    windows = np.array_split(np.arange(len(table.measured)), parts)[1:]
    ratios = []
    for layer, values in _measured(evidence):
        medians = [(_median(values[window]), window) for window in windows]
        known = [(value, window) for value, window in medians if value is not None]
        if not known:
            continue
        value, window = max(known, key=lambda pair: pair[0])
        steps = evidence.steps_of(table.measured[window])
        said = f"For a part of the run steps change {layer} by {number(value)} of default weights in the median"
        ratios.append(_Ratio(layer, value, steps, said))
    return ratios


def _median(values: FloatArray) -> float | None:
    """Of the finite values; None where there are too few."""
    known = values[np.isfinite(values)]
    return float(np.median(known)) if len(known) >= FEWEST_MEASURED else None


def _measured(evidence: Evidence) -> Iterator[tuple[str, FloatArray]]:
    """Each layer's matrices together: ‖update‖ over their default norm, at the steps measured."""
    table = evidence.table
    assert table is not None and table.update_norm is not None
    for layer, members in evidence.layers.items():
        matrices = [place for place in members if _is_matrix(evidence.tensors[place].shape)]
        if matrices:
            default = math.sqrt(sum(_default_energy(evidence.tensors[place].shape) for place in matrices))
            yield layer, np.sqrt(np.square(table.update_norm[:, matrices]).sum(axis=1)) / default


def _stored(moments: Mapping[str, AdamMoments]) -> list[_Ratio]:
    """The last update of Adam's, of each layer that holds a matrix."""
    energies: dict[str, list[float]] = {}
    for name, held in moments.items():
        if held.exp_avg is None or held.exp_avg_sq is None or held.step < 1:
            continue
        update = adam_update(held)
        if _is_matrix(update.shape):
            sums = energies.setdefault(name.rsplit(".", 1)[0], [0.0, 0.0])
            sums[0] += float(np.square(update).sum())
            sums[1] += _default_energy(update.shape)
    ratios = []
    for layer, (update_energy, default) in energies.items():
        value = math.sqrt(update_energy / default)
        said = f"Adam's last update changed {layer} by {number(value)} of default weights"
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
    """‖θ‖² of torch's default initialisation: variance 1/(3·fan_in), so that it is a third of the rows."""
    return shape[0] / 3.0


UPDATE_RATIO = Rule(
    name="update-ratio",
    severity="error",
    about="Steps change a layer too much, as with too high a learning rate (or, with min, too little).",
    formula="|update| / d of a layer's matrices, d = sqrt(rows / 3) their norm as torch initialises them: max is for "
    "the largest median of an eighth of the run, the first left out, min for the median of its newest part; of an "
    "Adam checkpoint |lr * m_hat / (sqrt(v_hat) + eps)| / d",
    source="Karpathy's rule of thumb, about 1e-3 of the weights; You et al. 2017 (LARS: trust ratio); Kingma & Ba 2015",
    limits=(
        Limit("max", 0.07, "largest change of a layer by a step, in weights as torch initialises them"),
        Limit("min", 0.0, "smallest change of a layer by a step, likewise"),
    ),
    judge=judge,
)
