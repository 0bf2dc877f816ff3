"""Two sources side by side: what differs, by how much, and whether that is more than noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
from numpy.typing import NDArray

from gradscope import forensics, results
from gradscope.clipping.policy import Convention, Policy
from gradscope.comparison.familiar_ratios import EXACT, familiar_ratios
from gradscope.comparison.findings import comparison_findings
from gradscope.comparison.matched_names import MatchedTensors, match_tensors
from gradscope.comparison.spectrum_shapes import Shape
from gradscope.comparison.unit_comparison import (
    ROUNDING,
    Change,
    Reading,
    Unit,
    compare_units,
    constant_change,
    follow_each_other,
)
from gradscope.comparison_results import (
    Both,
    ClipComparison,
    ClipRate,
    Comparison,
    ConstantRatio,
    Measure,
    OptimizerSide,
    UnitComparison,
    Verdict,
)
from gradscope.errors import GradscopeError
from gradscope.findings import policy_words
from gradscope.gradients import GradientSource, GradientStep, Progress
from gradscope.notation import count
from gradscope.optimizer_state import OptimizerState
from gradscope.selection import first_groups, regroup, select_steps
from gradscope.simulation import NEED_MORE_THAN_NORMS, chosen_policies, simulate
from gradscope.step_table import StepTable, members_of, recorded_run
from gradscope.tensors import ClipGroup, TensorInfo

FloatArray = NDArray[np.float64]

SCHEMA = "gradscope.compare/1"
# The shape of a distribution needs no more steps than these.
MOST_SAMPLED = 64
# A common ratio that is known less well than this is no particular number.
WIDEST_CONSTANT = 1.25
# Seeds take a ratio that far from a power of two; other numbers lie too close together to be told apart so.
SEEDS = 1.05
# Of the ratios of single steps and tensors, so many must be the same.
NEARLY_ALL = 0.99


def compare(
    a: GradientSource,
    b: GradientSource,
    *,
    policies: Sequence[Policy | str] | str = (),
    steps: str | slice | None = None,
    groups: Mapping[str, str] | None = None,
    convention: Convention = "exact",
    progress: Progress | None = None,
) -> Comparison:
    """Read both sources and tell how they differ; what one of them lacks is left out, and said.

    ``steps`` (``"A:B"``) picks gradient steps of both, ``groups`` (name → glob) redefines the clip groups of both, and
    ``policies`` are simulated on both.  The ratio of a norm is that of its geometric means, with an interval by
    Student's t that is corrected for autocorrelation (see ``gradscope.differences``).

    Raises GradscopeError for unusable options, for two sources that have nothing in common, and for whatever a source
    finds wrong with its files.
    """
    chosen = chosen_policies(policies)
    if steps is not None and not (a.tensors or b.tensors):
        raise GradscopeError(a.info.path, "holds no gradient steps to choose from, nor does the other source")
    if groups and a.info.kind == b.info.kind == "norm-log":
        raise GradscopeError("--groups", "takes tensors, and logs of norms name none")
    sides = [_Side.read(source, steps, groups, progress) for source in (a, b)]
    measure = _measure(*sides)
    one, other = _comparable(sides[0], sides[1], measure)
    matched = _match(one, other)
    whole = _whole(one, other, matched)
    paired = measure == "norm" and follow_each_other(one.reading, other.reading, whole)
    overall, _ = compare_units(one.reading, other.reading, [whole], measure, paired)
    divided = {
        kind: compare_units(one.reading, other.reading, units, measure, paired)
        for kind, units in _units(one, other, matched).items()
    }
    every = [unit for units, _ in divided.values() for unit in units]
    told = divided["layers"][0] or divided["tensors"][0]
    comparison = Comparison(
        schema=SCHEMA,
        sources=Both(*(results.Source(**asdict(source.info)) for source in (a, b))),
        verdict=_verdict(one, other, matched, [*overall, *every], [*overall, *told]),
        findings=(),
        notes=(),
        measure=measure,
        paired=paired,
        steps=Both(*(0 if side.reading.table is None else len(side.reading.table.index) for side in (one, other))),
        nonfinite_steps=Both(*(_nonfinite(side) for side in (one, other))),
        overall=overall[0],
        groups=tuple(divided["groups"][0]),
        layers=tuple(divided["layers"][0]),
        tensors=tuple(divided["tensors"][0]),
        only=Both(matched.only_a, matched.only_b),
        reshaped=tuple(_reshaped(one.reading.tensors[i], other.reading.tensors[j]) for i, j in matched.reshaped),
        renamed=matched.renamed,
        constant_ratio=_constant(one, other, matched, divided, measure, paired),
        recorded=_recorded(one, other),
        policies=_simulated(one, other, chosen, steps, groups, convention, progress),
        optimizers=Both(*(tuple(map(_optimizer, side.reports)) for side in (one, other))),
    )
    comparison = replace(comparison, notes=_notes(one, other, comparison, chosen))
    return replace(comparison, findings=comparison_findings(comparison))


@dataclass(frozen=True, slots=True, eq=False)
class _Side:
    source: GradientSource
    reading: Reading
    groups: tuple[ClipGroup, ...]
    reports: tuple[results.OptimizerReport, ...]

    @classmethod
    def read(
        cls,
        source: GradientSource,
        steps: str | slice | None,
        groups: Mapping[str, str] | None,
        progress: Progress | None,
    ) -> _Side:
        """Read all that the source holds, once."""
        states = source.optimizers(progress)
        reports = tuple(forensics.analyse(state) for state in states)
        weights = source.weights(progress)
        held = {} if weights is None else dict(zip((t.name for t in weights.tensors), weights.spectra, strict=True))
        recent = {tensor.name: tensor.recent_norm for report in reports for tensor in report.tensors}
        tensors = source.tensors or _parameters(source, weights, recent)
        table, shapes = None, tuple[tuple[Shape, Shape], ...]()
        if source.tensors:
            selected = select_steps(steps, source.info.steps)
            sample = _ShapeSample(len(tensors), len(selected))
            table = StepTable.read(source, selected, progress, [sample.see])
            shapes = sample.halves()
        unknown = np.full(len(tensors), np.nan)
        weight_norm = np.array([held[t.name].norm if t.name in held else math.nan for t in tensors])
        if table is not None and table.weight_norm is not None and np.isnan(weight_norm).all():
            weight_norm = table.weight_norm[-1]
        norms = [recent.get(tensor.name) for tensor in tensors]
        known = np.array([math.nan if norm is None else norm for norm in norms]) if norms else unknown
        return cls(
            source,
            Reading(tensors, table, known, weight_norm, shapes),
            regroup(tensors, groups)
            if groups and source.info.kind != "norm-log"
            else _own_groups(source, states, tensors),
            reports,
        )

    @property
    def kind(self) -> str:
        return self.source.info.kind


def _parameters(source: GradientSource, weights: object, recent: Mapping[str, object]) -> tuple[TensorInfo, ...]:
    """What a checkpoint's numbers are of: its parameters, else those that its optimizers name."""
    tensors: tuple[TensorInfo, ...] = getattr(weights, "tensors", ())
    known = {tensor.name for tensor in tensors}
    return (*tensors, *(TensorInfo(name, (0,), "") for name in recent if name not in known))


def _own_groups(
    source: GradientSource, states: Sequence[OptimizerState], tensors: Sequence[TensorInfo]
) -> tuple[ClipGroup, ...]:
    if source.tensors:
        return source.groups
    known = {tensor.name for tensor in tensors}
    groups = [group for state in states for group in state.clip_groups]
    return tuple(replace(group, tensors=tuple(name for name in group.tensors if name in known)) for group in groups)


class _ShapeSample:
    """The shapes of tensors in the first and the second half of the steps; an observer of steps as they are read."""

    def __init__(self, tensors: int, steps: int) -> None:
        self._tensors = tensors
        self._steps = steps
        self._shapes: list[tuple[list[Shape], list[Shape]]] = []
        self._seen = self._taken = 0

    def see(self, position: int, step: GradientStep) -> None:
        """Take in a step while it is in memory."""
        row, self._seen = self._seen, self._seen + 1
        if len(step.spectra) != self._tensors or row * MOST_SAMPLED < self._taken * self._steps:
            return
        self._shapes = self._shapes or [([], []) for _ in range(self._tensors)]
        self._taken += 1
        half = int(2 * row >= self._steps)
        for i, kept in enumerate(self._shapes):
            spectrum = step.spectra[i]
            if spectrum is not None and (step.present is None or step.present[i]):
                kept[half].append(Shape.of(spectrum))

    def halves(self) -> tuple[tuple[Shape, Shape], ...]:
        """For each tensor its two shapes; none where no step held spectra."""
        return tuple((Shape.merge(early), Shape.merge(late)) for early, late in self._shapes)


# --- what is compared -------------------------------------------------------------------------------------------------


def _measure(a: _Side, b: _Side) -> Measure:
    """What both sides hold; gradients first.

    Raises GradscopeError where there is nothing.
    """
    if a.reading.table is not None and b.reading.table is not None:
        return "norm"
    recent = [side.reading.table is not None or not np.isnan(side.reading.recent).all() for side in (a, b)]
    if all(recent):
        return "recent_norm"
    if not (np.isnan(a.reading.weight_norm).all() or np.isnan(b.reading.weight_norm).all()):
        return "weight_norm"
    lacks = a if not recent[0] else b
    raise GradscopeError(
        lacks.source.info.path,
        "holds neither gradients nor an optimizer's state to compare with the other's",
        "--as gradients takes a bare mapping of tensors for gradients",
    )


def _comparable(a: _Side, b: _Side, measure: Measure) -> tuple[_Side, _Side]:
    """Both with recent norms, where one holds gradients and the other an optimizer's state."""
    if measure != "recent_norm":
        return a, b
    windows = [report.window for side in (a, b) for report in side.reports if report.window is not None]
    window = windows[0] if windows else 1.0
    sides = [
        side
        if side.reading.table is None
        else replace(side, reading=replace(side.reading, recent=recent_norms(side.source, side.reading, window)))
        for side in (a, b)
    ]
    return sides[0], sides[1]


def recent_norms(source: GradientSource, reading: Reading, window: float) -> FloatArray:
    """What an optimizer's state would hold of these steps: √ of the mean of ‖g‖² that is weighted by β₂ to the age.

    1 − β₂ = 1/``window`` (Kingma & Ba 2015).  Where a recording tells max_norm, of the gradients as clipped by it.
    Float64 [tensors].
    """
    table = reading.table
    assert table is not None
    energy = table.energy.copy()
    members = list(members_of(source.tensors, source.groups).values())
    if table.history is not None:
        for g, (held, first) in enumerate(zip(members, first_groups(source.groups), strict=True)):
            limit, norm = table.history.max_norm[:, g], table.norms(held)
            clipped = (norm > limit) & first
            energy[np.ix_(clipped, held)] *= np.square(limit[clipped] / norm[clipped])[:, None]
    age = (table.index[-1] - table.index).astype(np.float64)
    weight = np.exp(age * math.log1p(-1.0 / window)) if window > 1.0 else (age == 0).astype(np.float64)
    weight = np.where(reading.finite, weight, 0.0)
    if not weight.sum() > 0.0:
        return np.full(energy.shape[1], np.nan)
    return np.asarray(np.sqrt(weight @ np.where(reading.finite[:, None], energy, 0.0) / weight.sum()))


def _match(a: _Side, b: _Side) -> MatchedTensors:
    """The tensors of both; of a log of norms only another log has the series."""
    if (a.kind == "norm-log") != (b.kind == "norm-log"):
        return MatchedTensors((), (), (), (), None)
    matched = match_tensors(a.reading.tensors, b.reading.tensors)
    if not matched.pairs and a.kind != "norm-log":
        if matched.reshaped:
            shapes = _reshaped(*(side.reading.tensors[i] for side, i in zip((a, b), matched.reshaped[0], strict=True)))
            raise GradscopeError(
                b.source.info.path, f"shares no tensor of the same shape with {a.source.info.path}", shapes
            )
        raise GradscopeError(
            b.source.info.path,
            f"shares no tensor with {a.source.info.path}",
            f"the first names {a.reading.tensors[0].name}, the second {b.reading.tensors[0].name}",
        )
    return matched


def _reshaped(a: TensorInfo, b: TensorInfo) -> str:
    return f"{a.name}: {_shape(a)} in A, {_shape(b)} in B"


def _shape(tensor: TensorInfo) -> str:
    return "×".join(map(str, tensor.shape)) or "a scalar"


def _whole(a: _Side, b: _Side, matched: MatchedTensors) -> Unit:
    """All tensors that both have; everything where one side is a log of norms."""
    if not matched.pairs:
        return Unit("all", "all", tuple(range(len(a.reading.tensors))), tuple(range(len(b.reading.tensors))))
    return Unit("all", "all", tuple(i for i, _ in matched.pairs), tuple(j for _, j in matched.pairs))


def _units(a: _Side, b: _Side, matched: MatchedTensors) -> dict[str, list[Unit]]:
    tensors_a, tensors_b = a.reading.tensors, b.reading.tensors
    tensors = [Unit(tensors_a[i].name, tensors_b[j].name, (i,), (j,)) for i, j in matched.pairs]
    layers: dict[str, list[tuple[int, int]]] = {}
    for i, j in matched.pairs:
        layers.setdefault(tensors_a[i].layer, []).append((i, j))
    log = "norm-log" in (a.kind, b.kind)
    return {
        "tensors": tensors,
        "layers": []
        if log
        else [
            Unit(name, tensors_b[held[0][1]].layer, tuple(i for i, _ in held), tuple(j for _, j in held))
            for name, held in layers.items()
        ],
        "groups": [] if log else _group_units(a, b, matched),
    }


def _group_units(a: _Side, b: _Side, matched: MatchedTensors) -> list[Unit]:
    """Clip groups of the same name, by the tensors that both hold in them; or the only group on each side."""
    own = members_of(a.reading.tensors, a.groups), members_of(b.reading.tensors, b.groups)
    if len(own[0]) == len(own[1]) == 1:
        names = [(next(iter(own[0])), next(iter(own[1])))]
    else:
        names = [(name, name) for name in own[0] if name in own[1]]
    units = []
    for name, other in names:
        held = [(i, j) for i, j in matched.pairs if i in set(own[0][name]) and j in set(own[1][other])]
        if held:
            units.append(Unit(name, other, tuple(i for i, _ in held), tuple(j for _, j in held)))
    return units


# --- what is told -----------------------------------------------------------------------------------------------------


def _nonfinite(side: _Side) -> int:
    return 0 if side.reading.table is None else int((~side.reading.finite).sum())


def _verdict(
    a: _Side, b: _Side, matched: MatchedTensors, every: Sequence[UnitComparison], told: Sequence[UnitComparison]
) -> Verdict:
    """Of the whole and what the sentences tell of, so that clip groups and tensors are no further chances of error."""
    verdicts = [unit.verdict for unit in told]
    if {unit.verdict for unit in every} == {"identical"} and not (matched.only_a or matched.only_b or matched.reshaped):
        return "identical" if _same_weights(a, b, matched) else "differs"
    if "differs" in verdicts or any(unit.zeros_differ or unit.shape_differs for unit in told):
        return "differs"
    return "unknown" if told[0].verdict == "unknown" else "within noise"


def _same_weights(a: _Side, b: _Side, matched: MatchedTensors) -> bool:
    places = [i for i, _ in matched.pairs], [j for _, j in matched.pairs]
    weights = a.reading.weight_norm[places[0]], b.reading.weight_norm[places[1]]
    return bool(np.allclose(*weights, rtol=ROUNDING, atol=0.0, equal_nan=True))


def _constant(
    a: _Side,
    b: _Side,
    matched: MatchedTensors,
    divided: Mapping[str, tuple[list[UnitComparison], list[Change | None]]],
    measure: Measure,
    paired: bool,
) -> ConstantRatio | None:
    """The one number that all ratios are, if it is not 1."""
    ranks = a.source.ranks, b.source.ranks
    exact = _exact_ratio(a, b, matched, measure)
    if exact is not None:
        near = (exact * (1.0 - EXACT), exact * (1.0 + EXACT))
        return (
            ConstantRatio(exact, True, None, familiar_ratios(exact, *near, ranks, exact=True))
            if abs(exact - 1.0) > EXACT
            else None
        )
    units, changes = divided["layers"]
    if measure != "norm" or len(units) < 2 or None in changes:
        return None
    common = constant_change(changes)
    if common is None or common[1] <= 0.0 <= common[2] or common[2] - common[1] > math.log(WIDEST_CONSTANT):
        return None
    if not all(unit.verdict == "differs" for unit in units):
        return None
    ratio, low, high = (math.exp(change) for change in common)
    explanations = familiar_ratios(ratio, low, high, ranks)
    power = 2.0 ** round(math.log2(ratio))
    if not explanations and power != 1.0 and abs(math.log(ratio / power)) <= math.log(SEEDS):
        explanations = familiar_ratios(power, power, power, ranks, exact=True)
    return ConstantRatio(ratio, False, (low, high), explanations)


def _exact_ratio(a: _Side, b: _Side, matched: MatchedTensors, measure: Measure) -> float | None:
    """The ratio that nearly every tensor has at nearly every step; None where there is none."""
    if measure == "weight_norm" or not matched.pairs:
        return None
    i, j = [i for i, _ in matched.pairs], [j for _, j in matched.pairs]
    one, other = a.reading, b.reading
    if measure == "recent_norm":
        if one.table is not None or other.table is not None:
            return None
        norms = one.recent[i], other.recent[j]
    else:
        assert one.table is not None and other.table is not None
        if not np.array_equal(one.table.index, other.table.index):
            return None
        both = (one.finite & other.finite)[:, None]
        norms = (
            np.sqrt(np.where(both, one.table.energy[:, i], np.nan)),
            np.sqrt(np.where(both, other.table.energy[:, j], np.nan)),
        )
    there = (norms[0] > 0.0) & (norms[1] > 0.0)
    if np.count_nonzero(there) < 2:
        return None
    ratios = norms[1][there] / norms[0][there]
    middle = float(np.median(ratios))
    near = np.abs(ratios / middle - 1.0) <= EXACT
    return middle if near.mean() >= NEARLY_ALL else None


def _optimizer(report: results.OptimizerReport) -> OptimizerSide:
    names = OptimizerSide.__dataclass_fields__
    return OptimizerSide(**{name: getattr(report, name) for name in names})


def _recorded(a: _Side, b: _Side) -> tuple[ClipComparison, ...]:
    """What both runs clipped themselves, overall and in the clip groups that both have."""
    runs = [None if side.reading.table is None else recorded_run(side.source, side.reading.table) for side in (a, b)]
    one, other = runs
    if one is None or other is None or not (one.overall.steps and other.overall.steps):
        return ()
    groups = {group.name: group for group in other.groups}
    pairs = [(one.overall, other.overall)]
    if len(one.groups) > 1:
        pairs += [(g, groups[g.name]) for g in one.groups if g.name in groups and g.steps and groups[g.name].steps]
    return tuple(_recorded_clip(mine, theirs) for mine, theirs in pairs)


def _recorded_clip(mine: results.RecordedClipping, theirs: results.RecordedClipping) -> ClipComparison:
    rates = Both(*(ClipRate(r.clip_rate, r.clip_rate_ci95, r.effective_steps, r.steps) for r in (mine, theirs)))
    between = rate_difference(rates.a, rates.b)
    return ClipComparison(
        policy=None,
        name=mine.name,
        max_norm=Both(mine.max_norm, theirs.max_norm),
        clip_value=Both(mine.clip_value, theirs.clip_value),
        rate=rates,
        difference_ci95=between,
        differs=_differs(between),
    )


def _differs(between: tuple[float, float] | None) -> bool | None:
    return None if between is None else not between[0] <= 0.0 <= between[1]


def rate_difference(a: ClipRate, b: ClipRate) -> tuple[float, float] | None:
    """The 95 % interval of B's rate minus A's, from the Wilson interval of each (Newcombe 1998, method 10).

    None where one of them has no interval.
    """
    if a.ci95 is None or b.ci95 is None:
        return None
    apart = b.clip_rate - a.clip_rate
    low = math.hypot(b.clip_rate - b.ci95[0], a.ci95[1] - a.clip_rate)
    high = math.hypot(b.ci95[1] - b.clip_rate, a.clip_rate - a.ci95[0])
    return apart - low, apart + high


def _simulated(
    a: _Side,
    b: _Side,
    policies: Sequence[Policy],
    steps: str | slice | None,
    groups: Mapping[str, str] | None,
    convention: Convention,
    progress: Progress | None,
) -> tuple[ClipComparison, ...]:
    """What each policy that both sides can answer would have done to them."""
    able = [policy for policy in policies if not _unanswered(a, policy) and not _unanswered(b, policy)]
    if not able:
        return ()
    both = [
        simulate(
            side.source,
            able,
            steps=steps,
            groups=groups if side.kind != "norm-log" else None,
            convention=convention,
            progress=progress,
        )
        for side in (a, b)
    ]
    return tuple(_policy(mine, theirs, both) for mine, theirs in zip(both[0].results, both[1].results, strict=True))


def _policy(
    mine: results.PolicyResult, theirs: results.PolicyResult, both: Sequence[results.Simulation]
) -> ClipComparison:
    rates = Both(
        *(
            ClipRate(r.clip_rate, r.clip_rate_ci95, r.effective_steps, simulation.steps - simulation.nonfinite_steps)
            for r, simulation in zip((mine, theirs), both, strict=True)
        )
    )
    between = rate_difference(rates.a, rates.b)
    changes = [None if r.direction_change_deg is None else r.direction_change_deg.p50 for r in (mine, theirs)]
    by_norm = mine.policy.split(":")[0] == "norm"
    by_value = mine.policy.split(":")[0] == "value"
    return ClipComparison(
        policy=mine.policy,
        name="all",
        max_norm=Both(*[mine.threshold if by_norm else None] * 2),
        clip_value=Both(*[mine.threshold if by_value else None] * 2),
        direction_change_deg=Both(*changes),
        scale=Both(mine.scale.mean, theirs.scale.mean),
        rate=rates,
        difference_ci95=between,
        differs=_differs(between),
    )


def _unanswered(side: _Side, policy: Policy) -> str | None:
    """Why this side says nothing of the policy; None where it does."""
    if side.reading.table is None:
        return f"{side.source.info.path} holds no gradients"
    if side.kind == "norm-log" and policy.name in NEED_MORE_THAN_NORMS:
        return f"{side.source.info.path} is a log of norms"
    return None


def _notes(a: _Side, b: _Side, comparison: Comparison, policies: Sequence[Policy]) -> tuple[str, ...]:
    notes = [
        f"{policy_words(policy.label)} is not compared: {why}."
        for policy in policies
        if (why := _unanswered(a, policy) or _unanswered(b, policy))
    ]
    notes += _measure_notes(a, b, comparison)
    notes += _step_notes(a, b)
    if comparison.measure == "norm" and comparison.verdict == "differs" and _may_be_seeds(comparison):
        notes.append(
            "Noise is that within each run. Two seeds of one training differ by more: a third of such pairs have "
            "global norms that differ beyond it. check --baseline, of several seeds, knows how far seeds differ."
        )
    for letter, side in (("A", a), ("B", b)):
        notes += [f"{letter}: {note}" for note in side.source.notes]
    return tuple(dict.fromkeys(notes))


def _may_be_seeds(comparison: Comparison) -> bool:
    """Whether the runs are other than the same run, changed in one thing."""
    return not comparison.paired and (comparison.constant_ratio is None or not comparison.constant_ratio.exact)


def _measure_notes(a: _Side, b: _Side, comparison: Comparison) -> list[str]:
    notes = []
    if comparison.measure == "recent_norm":
        tables = [letter for letter, side in (("A", a), ("B", b)) if side.reading.table is not None]
        if tables:
            notes.append(
                "The checkpoint holds no gradients but what its optimizer averaged of them, after clipping; "
                f"the steps of {tables[0]} are averaged in the same way, with the same window"
                f"{', after their own clipping' if _clips(a, b) else ''}."
            )
        else:
            notes.append("Checkpoints hold one number for each tensor: how much of a difference is noise is not known.")
    if comparison.measure == "weight_norm":
        notes.append("Both hold weights, and only one of them an optimizer's state or gradients: weights are compared.")
    if (a.kind == "norm-log") != (b.kind == "norm-log"):
        notes.append("A log of norms knows no layers: the global norm is compared.")
        log = a if a.kind == "norm-log" else b
        if len(log.reading.tensors) > 1:
            notes.append(f"The {len(log.reading.tensors)} series of the log are taken together; --tag picks one.")
    return notes


def _clips(a: _Side, b: _Side) -> bool:
    return any(side.reading.table is not None and side.reading.table.history is not None for side in (a, b))


def _step_notes(a: _Side, b: _Side) -> list[str]:
    one, other = a.reading.table, b.reading.table
    if one is None or other is None or not (a.source.in_time and b.source.in_time):
        return []
    spans = [int(table.index[-1]) - int(table.index[0]) + 1 for table in (one, other)]
    if max(spans) <= 1.1 * min(spans):
        return []
    return [
        f"A spans {count(spans[0])} step{'s' * (spans[0] > 1)} and B {count(spans[1])}: equal fractions of the two "
        "runs are compared, and may differ for that alone. --steps picks the same steps of both."
    ]
