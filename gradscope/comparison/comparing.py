"""Two sources → ``Comparison``: what differs, by how much, and whether that is more than noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

import numpy as np

from gradscope import results
from gradscope.clipping.policy import Convention, Policy
from gradscope.comparison.change import ROUNDING
from gradscope.comparison.clip_rates import recorded_rates, simulated_rates
from gradscope.comparison.constant_ratio import constant_ratio
from gradscope.comparison.findings import comparison_findings
from gradscope.comparison.matched_names import MatchedTensors
from gradscope.comparison.measure import common_measure, with_recent_norms
from gradscope.comparison.notes import comparison_notes
from gradscope.comparison.side import Side
from gradscope.comparison.unit_comparison import compare_units, follow_each_other
from gradscope.comparison.units import divided_units, matched_sides, reshaped_words, whole_unit
from gradscope.comparison_results import Both, Comparison, OptimizerSide, UnitComparison, Verdict
from gradscope.errors import GradscopeError
from gradscope.gradients import GradientSource, Progress
from gradscope.simulation import chosen_policies

SCHEMA = "gradscope.compare/1"


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
    one, other = (Side.read(source, steps, groups, progress) for source in (a, b))
    measure = common_measure(one, other)
    if measure == "recent_norm":
        one, other = with_recent_norms(one, other)
    matched = matched_sides(one, other)
    whole = whole_unit(one, other, matched)
    paired = measure == "norm" and follow_each_other(one, other, whole)
    overall, _ = compare_units(one, other, [whole], measure, paired)
    divided = {
        kind: compare_units(one, other, units, measure, paired)
        for kind, units in divided_units(one, other, matched).items()
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
        steps=Both(*(0 if side.table is None else len(side.table.index) for side in (one, other))),
        nonfinite_steps=Both(*(_nonfinite(side) for side in (one, other))),
        overall=overall[0],
        groups=tuple(divided["groups"][0]),
        layers=tuple(divided["layers"][0]),
        tensors=tuple(divided["tensors"][0]),
        only=Both(matched.only_a, matched.only_b),
        reshaped=tuple(reshaped_words(one.tensors[i], other.tensors[j]) for i, j in matched.reshaped),
        renamed=matched.renamed,
        constant_ratio=constant_ratio(one, other, matched, divided["layers"], measure),
        recorded=recorded_rates(one, other),
        policies=simulated_rates(one, other, chosen, steps, groups, convention, progress),
        optimizers=Both(*(tuple(map(_optimizer, side.reports)) for side in (one, other))),
    )
    comparison = replace(comparison, notes=comparison_notes(one, other, comparison, chosen))
    return replace(comparison, findings=comparison_findings(comparison))


def _nonfinite(side: Side) -> int:
    return 0 if side.table is None else int((~side.finite).sum())


def _verdict(
    a: Side, b: Side, matched: MatchedTensors, every: Sequence[UnitComparison], told: Sequence[UnitComparison]
) -> Verdict:
    """Of the whole and what the sentences tell of, so that clip groups and tensors are no further chances of error."""
    verdicts = [unit.verdict for unit in told]
    if {unit.verdict for unit in every} == {"identical"} and not (matched.only_a or matched.only_b or matched.reshaped):
        return "identical" if _same_weights(a, b, matched) else "differs"
    if "differs" in verdicts or any(unit.zeros_differ or unit.shape_differs for unit in told):
        return "differs"
    return "unknown" if told[0].verdict == "unknown" else "within noise"


def _same_weights(a: Side, b: Side, matched: MatchedTensors) -> bool:
    places = [i for i, _ in matched.pairs], [j for _, j in matched.pairs]
    weights = a.weight_norm[places[0]], b.weight_norm[places[1]]
    return bool(np.allclose(*weights, rtol=ROUNDING, atol=0.0, equal_nan=True))


def _optimizer(report: results.OptimizerReport) -> OptimizerSide:
    names = OptimizerSide.__dataclass_fields__
    return OptimizerSide(**{name: getattr(report, name) for name in names})
