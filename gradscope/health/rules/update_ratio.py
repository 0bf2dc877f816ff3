"""``update-ratio``: how much an optimizer step changes a layer, against its weights now and as such a layer starts.

Too high a learning rate makes weights grow until its updates are small beside them: against the weights as they are by
then, PPO at a hundred times its learning rate looks like a healthy recurrent network.  So the same updates are
compared with what torch initialises such a layer with, too, for a part of the run and, less strictly, briefly.

Measured on the largest of every training, over about a hundred healthy ones: at most 0.029 of the weights, 0.086 of
what they start with (a graph network at Adam's 1e-2; most below 0.04), 0.107 briefly (momentum SGD).  At a hundred
times their learning rate PPO, transformers, CNNs, MLPs and LSTMs exceed at least one limit by 10 % or, most, by far.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradscope.check_results import Bound, Reading
from gradscope.gradients import Weights
from gradscope.health.evidence import Evidence
from gradscope.health.rule import Limit, Limits, Rule, Verdict
from gradscope.notation import number, percent
from gradscope.optimizer_state import AdamMoments
from gradscope.selection import recent_part
from gradscope.step_table import StepTable

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

ITS_WEIGHTS, INITIAL_SIZE = "its weights", "the size that its weights start with"

FEWEST_MEASURED = 3
# In a run of which no more are known.
FEWEST_BRIEFLY = 2
# How many inputs of a matrix count: these in any case, and so many per output, as behind a feed-forward block.
MOST_INPUTS, MOST_PER_OUTPUT = 64, 4
# Into how many parts a run is split, as far as so many updates were measured.
MOST_PARTS = 8


@dataclass(frozen=True, slots=True)
class _Layer:
    """The updates of one layer: ‖update‖ over ‖weights‖, and over ``initial``; float64, the same length.

    ``initial`` is the norm as torch initialises such matrices.  Weights smaller than that count as that: what starts
    at zero has to change by more than itself.
    """

    name: str
    of_weights: FloatArray
    of_initial: FloatArray


@dataclass(frozen=True, slots=True)
class _Largest:
    """What a layer's updates sustained at most, at which rows of the measured ones."""

    layer: str
    value: float
    rows: IntArray


@dataclass(frozen=True, slots=True)
class _Updates:
    """The updates of all layers, and which of the measured ones count as a part of the run, as brief, as newest."""

    layers: tuple[_Layer, ...]
    parts: tuple[IntArray, ...]
    windows: tuple[IntArray, ...]
    newest: IntArray
    said: str

    @classmethod
    def of(cls, evidence: Evidence) -> _Updates | None:
        """Those of a recorded run, or the one that Adam's state tells; None where neither is there."""
        table = evidence.table
        if table is not None and table.measured is not None:
            measured = np.arange(len(table.measured))
            layers = tuple(_measured(table, evidence))
            return cls(layers, _parts(measured), _windows(measured), _newest(table), "Steps changed")
        moments = evidence.source.adam_moments()
        if moments is None:
            return None
        only = np.arange(1)
        return cls(tuple(_stored(moments, evidence.weights)), (only,), (), only, "Adam's last update changed")

    def of_weights(self, at: Sequence[IntArray]) -> list[_Largest]:
        """The largest median of each layer over ``at``, of the weights as they were then."""
        return _largest([(layer.name, layer.of_weights) for layer in self.layers], at)

    def of_initial(self, at: Sequence[IntArray]) -> list[_Largest]:
        """The same, of the weights as they start."""
        return _largest([(layer.name, layer.of_initial) for layer in self.layers], at)


def judge(evidence: Evidence, limits: Limits) -> Verdict:
    """Compare each layer's largest updates, sustained and brief, and its recent ones, with the limits."""
    updates = _Updates.of(evidence)
    if updates is None:
        return Verdict.cannot_tell("neither a recorded run nor Adam's state")
    held: list[tuple[str, str, list[_Largest]]] = [
        ("max", ITS_WEIGHTS, updates.of_weights(updates.parts)),
        ("max-of-initial", INITIAL_SIZE, updates.of_initial(updates.parts)),
        ("max-briefly", INITIAL_SIZE, updates.of_initial(updates.windows)),
    ]
    known = [(limit, of, largest) for limit, of, largest in held if largest]
    if not known:
        return Verdict.cannot_tell("no update of a layer with a matrix is known at enough steps")
    beyond: dict[str, Reading] = {}
    for limit, of, largest in known:
        for one in largest:
            if one.value > limits.number(limit):
                reading = _reading(evidence, updates, one, limits, limit, of, "; lower the learning rate")
                beyond.setdefault(one.layer, reading)
    slow = [one for one in updates.of_weights([updates.newest]) if one.value < limits.number("min")]
    found = [
        *beyond.values(),
        *(_reading(evidence, updates, one, limits, "min", ITS_WEIGHTS, ": it hardly learns") for one in reversed(slow)),
    ]
    if (idle := _idle(evidence, updates.newest)) is not None:
        found.append(idle)
    if found:
        return Verdict.violated(found)
    limit, of, largest = known[0]
    return Verdict.well(_reading(evidence, updates, largest[0], limits, limit, of, ""))


def _reading(
    evidence: Evidence, updates: _Updates, largest: _Largest, limits: Limits, limit: str, of: str, remedy: str
) -> Reading:
    table = evidence.table
    steps = None if table is None or table.measured is None else evidence.steps_of(table.measured[largest.rows])
    when = "" if steps is None else f" at steps {steps[0]:,} to {steps[1]:,} (median)"
    how_much = percent(largest.value) if largest.value <= 1.0 else f"{number(largest.value)} times"
    of_what = f"of {of}" if largest.value <= 1.0 else of
    message = f"{updates.said} layer {largest.layer} by {how_much} {of_what}{when}{remedy}."
    bound: Bound = "least" if limit == "min" else "most"
    return Reading(largest.value, limits.number(limit), largest.layer, steps, message, bound)


def _parts(measured: IntArray) -> tuple[IntArray, ...]:
    """The parts of a run but its first, in which any layer may change much."""
    parts = min(MOST_PARTS, len(measured) // FEWEST_MEASURED)
    return tuple(np.array_split(measured, parts)[1:]) if parts >= 2 else ()


def _windows(measured: IntArray) -> tuple[IntArray, ...]:
    """A few neighbours each, from the second on: an optimizer's first step is often its largest."""
    length = min(FEWEST_MEASURED, len(measured) - 1)
    if length < FEWEST_BRIEFLY:
        return ()
    return tuple(measured[start : start + length] for start in range(1, len(measured) - length + 1))


def _idle(evidence: Evidence, newest: IntArray) -> Reading | None:
    """Steps that all had a gradient and of which none changed anything; None where one did.

    One layer alone may be kept as it is on purpose.
    """
    table = evidence.table
    if table is None or table.measured is None or table.history is None:
        return None
    assert table.update_norm is not None
    judged = table.measured[newest]
    joint = evidence.joint[judged]
    # A gradient that is clipped to nothing is another fault.
    to_nothing = (table.history.max_norm[judged] <= 0.0).any(axis=1)
    stepped = (table.history.stepped[judged] == 1).any(axis=1)
    rows = newest[np.isfinite(joint) & (joint > 0.0) & stepped & ~to_nothing]
    updates = table.update_norm[rows]
    if len(rows) < FEWEST_MEASURED or not (updates == 0.0).any(axis=1).all() or np.nanmax(updates) > 0.0:
        return None
    steps = evidence.steps_of(table.measured[rows])
    assert steps is not None
    message = (
        f"Steps {steps[0]:,} to {steps[1]:,} had gradients and changed nothing at all: a learning rate of zero, or "
        "one too small for the number format of the weights."
    )
    return Reading(None, None, None, steps, message)


def _newest(table: StepTable) -> IntArray:
    assert table.measured is not None
    newest = np.flatnonzero(table.measured >= recent_part(len(table.index)).start)
    return newest if len(newest) >= FEWEST_MEASURED else np.arange(len(table.measured))


def _largest(layers: Sequence[tuple[str, FloatArray]], parts: Sequence[IntArray]) -> list[_Largest]:
    """The largest median of each layer over ``parts``, the largest first; not of one whose updates are not known."""
    largest = []
    for name, values in layers:
        known = [(median, part) for part in parts if (median := _median(values[part])) is not None]
        if known:
            value, part = max(known, key=lambda pair: pair[0])
            largest.append(_Largest(name, value, part))
    return sorted(largest, key=lambda one: -one.value)


def _median(values: FloatArray) -> float | None:
    """Of the finite values, of two the smaller; None where there are too few."""
    known = values[np.isfinite(values)]
    if len(known) < min(FEWEST_MEASURED, len(values)) or not len(known):
        return None
    return float(known.min() if len(known) == FEWEST_BRIEFLY else np.median(known))


def _measured(table: StepTable, evidence: Evidence) -> Iterator[_Layer]:
    """Each layer's matrices together, at the steps measured."""
    assert table.update_norm is not None and table.weight_norm is not None
    for layer, members in evidence.layers.items():
        matrices = [place for place in members if _is_matrix(evidence.tensors[place].shape)]
        if matrices:
            initial = math.sqrt(sum(_initial_energy(evidence.tensors[place].shape) for place in matrices))
            updates = np.sqrt(np.square(table.update_norm[:, matrices]).sum(axis=1))
            weights = np.sqrt(np.square(table.weight_norm[:, matrices]).sum(axis=1))
            yield _Layer(layer, updates / np.maximum(weights, initial), updates / initial)


def _stored(moments: Mapping[str, AdamMoments], parameters: Weights | None) -> Iterator[_Layer]:
    """The last update of Adam's, of each layer that holds a matrix, as series of one."""
    stored = zip(parameters.tensors, parameters.spectra, strict=True) if parameters is not None else ()
    weights = {info.name: spectrum.sum_squares for info, spectrum in stored}
    energies: dict[str, FloatArray] = {}
    for name, held in moments.items():
        if held.exp_avg is None or held.exp_avg_sq is None or held.step < 1:
            continue
        update = adam_update(held)
        if _is_matrix(update.shape):
            initial = _initial_energy(update.shape)
            sums = energies.setdefault(name.rsplit(".", 1)[0], np.zeros(3))
            sums += (float(np.square(update).sum()), weights.get(name, initial), initial)
    for layer, sums in energies.items():
        update_norm, weight_norm, initial_norm = np.sqrt(sums)
        of_weights, of_initial = update_norm / max(weight_norm, initial_norm), update_norm / initial_norm
        yield _Layer(layer, np.array([of_weights]), np.array([of_initial]))


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


def _initial_energy(shape: Sequence[int]) -> float:
    """‖θ‖² as torch initialises by default: variance 1/(3·fan_in) (He et al. 2015), so a third of the rows.

    Optimizers that step by element, as Adam does, move a matrix by √fan_in times more of that.  Far more inputs than
    outputs are words of a bag, pixels, or what an adapter sums up, and no sign of a high rate: not all of them count.
    """
    rows, inputs = shape[0], math.prod(shape[1:])
    return rows / 3.0 * max(1.0, inputs / max(MOST_INPUTS, MOST_PER_OUTPUT * rows))


UPDATE_RATIO = Rule(
    name="update-ratio",
    severity="error",
    about="Steps change a layer too much, as with too high a learning rate (or nothing at all; with min, too little).",
    formula="|update| / |weights| of a layer's matrices, the largest median over an eighth of the run (the first left "
    "out); weights smaller than d count as d = sqrt(rows / 3), their norm as torch initialises them (of more than 64 "
    "inputs, at most 4 an output count); max-of-initial: the same against d; max-briefly: the largest median of three "
    "measured steps, the first left out, against d; min: the median over the newest part, and whether any of its steps "
    "changed anything; of an Adam checkpoint its last update, lr * m_hat / (sqrt(v_hat) + eps)",
    source="Karpathy's rule of thumb, about 1e-3 of the weights; You et al. 2017 (LARS: trust ratio); Kingma & Ba 2015",
    limits=(
        Limit("max", 0.035, "largest share of its weights that a step may change of a layer"),
        Limit("max-of-initial", 0.1, "the same, of the weights as torch initialises them"),
        Limit("max-briefly", 0.15, "the same, for a few steps"),
        Limit("min", 0.0, "smallest share of its weights that a step may change of a layer"),
    ),
    judge=judge,
)
