"""What is in a source: norms of its gradients and weights, and what its optimizers know."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from fnmatch import fnmatchcase

import numpy as np
from numpy.typing import NDArray

from gradscope import forensics, results
from gradscope.clipping.layout import TensorLayout
from gradscope.errors import GradscopeError
from gradscope.findings import inspection_findings
from gradscope.gradients import GradientSource, Progress, Weights
from gradscope.noise_scale import MinibatchMeter
from gradscope.nonfinite import name_fault
from gradscope.notation import setting
from gradscope.optimizer_state import OptimizerState
from gradscope.selection import place_of_step, regroup, select_steps
from gradscope.spectrum import MagnitudeSpectrum
from gradscope.spread import Spread
from gradscope.step_table import StepTable, members_of, recorded_run
from gradscope.tensors import TensorInfo, places_by_layer

SCHEMA = "gradscope.inspect/1"
NEIGHBOURHOOD = 20


def inspect(
    source: GradientSource,
    *,
    steps: str | slice | None = None,
    groups: Mapping[str, str] | None = None,
    max_norm: float | None = None,
    at: int | None = None,
    progress: Progress | None = None,
) -> results.Inspection:
    """Read ``source`` once and describe it.

    ``steps`` (``"A:B"``) picks gradient steps; ``at`` picks one, and adds the 20 before it; ``groups`` (name → glob)
    redefines the clip groups; ``max_norm`` is the υ for clip saturation, in place of what the checkpoint names.

    Raises GradscopeError for unusable options and for whatever the source finds wrong with its files.
    """
    if max_norm is not None and not (isinstance(max_norm, int | float) and 0 < max_norm < math.inf):
        given = f"{max_norm:g}" if isinstance(max_norm, float) else f"{max_norm}"
        raise GradscopeError(f"--max-norm {given}", "must be a positive, finite number")
    if (steps is not None or at is not None) and not source.tensors:
        raise GradscopeError(source.info.path, "holds no gradient steps to choose from")
    selected = select_steps(steps, source.info.steps) if source.tensors else range(0)
    weights = source.weights(progress)
    optimizers, regrouping = source.optimizers(progress), tuple[str, ...]()
    if groups and not source.tensors:
        optimizers, regrouping = _regrouped(optimizers, groups, source.info.path, max_norm)
    summary, recorded, minibatches = None, None, None
    if source.tensors:
        summary, recorded, minibatches = _gradients(source, selected, groups, at, progress)
    inspection = results.Inspection(
        schema=SCHEMA,
        source=results.Source(**asdict(source.info)),
        findings=(),
        notes=source.notes + regrouping,
        skipped=source.skipped,
        gradients=summary,
        weights=_weights(weights) if weights else None,
        optimizers=tuple(forensics.analyse(state, max_norm) for state in optimizers),
        recorded=recorded,
        batch=minibatches,
    )
    return replace(inspection, findings=source.findings + inspection_findings(inspection, len(selected)))


def _regrouped(
    optimizers: Sequence[OptimizerState], groups: Mapping[str, str], path: str, max_norm: float | None
) -> tuple[tuple[OptimizerState, ...], tuple[str, ...]]:
    """The optimizers with other clip groups than those in force, whose max_norm does not apply to these."""
    if not any(state.parameters for state in optimizers):
        raise GradscopeError(path, "holds neither gradients nor an optimizer's state that --groups could divide")
    infos = [[TensorInfo(p.name, p.shape or (), "") for p in state.parameters] for state in optimizers]
    # A glob may match in one optimizer only, but must match in one.
    regroup([info for own in infos for info in own], groups)
    regrouped = []
    for state, own in zip(optimizers, infos, strict=True):
        held = {name: glob for name, glob in groups.items() if any(fnmatchcase(info.name, glob) for info in own)}
        regrouped.append(replace(state, clip_groups=regroup(own, held)))
    known = {g.name: g.max_norm for state in optimizers for g in state.clip_groups if g.max_norm is not None}
    if not known:
        return tuple(regrouped), ()
    trained = ", ".join(f"{name} (max_norm {setting(limit)})" for name, limit in known.items())
    bounds = (
        "for other groups --max-norm gives the threshold of the saturation"
        if max_norm is None
        else f"the bounds are those of a run that clipped each of these groups at {setting(max_norm)}"
    )
    return tuple(regrouped), (f"The run clipped {trained}; {bounds}.",)


def _gradients(
    source: GradientSource,
    selected: range,
    groups: Mapping[str, str] | None,
    at: int | None,
    progress: Progress | None,
) -> tuple[results.GradientSummary, results.RecordedRun | None, results.MinibatchNoise | None]:
    if at is not None:
        place = place_of_step(at, selected, source.step_numbers)
        selected = selected[max(0, place - NEIGHBOURHOOD) : place + 1]
    clip_groups = regroup(source.tensors, groups) if groups else source.groups
    minibatches = MinibatchMeter(source, TensorLayout.of(source.tensors, clip_groups))
    columns = StepTable.read(source, selected, progress, [minibatches.see])
    shown = columns if at is None else columns.last()
    summary = _summary(source.tensors, members_of(source.tensors, clip_groups), shown, regrouped=bool(groups))
    if source.info.kind == "norm-log":
        summary = _without_elements(summary)
    if at is not None:
        return replace(summary, at=_step_rows(columns, elements=source.info.kind != "norm-log")), None, None
    return summary, recorded_run(source, columns), minibatches.report(progress)


def _without_elements(summary: results.GradientSummary) -> results.GradientSummary:
    """What a log of norms tells: its series stand where tensors would; of layers and elements it knows nothing."""
    return replace(
        summary,
        global_=replace(summary.global_, max_abs=None, numel=None, zeros=None, nonfinite=None),
        groups=tuple(replace(group, numel=None) for group in summary.groups),
        layers=(),
        tensors=tuple(
            replace(tensor, shape=None, dtype=None, numel=None, rms=None, max_abs=None, zeros=None, nonfinite=None)
            for tensor in summary.tensors
        ),
    )


def _summary(
    tensors: tuple[TensorInfo, ...], groups: Mapping[str, list[int]], columns: StepTable, regrouped: bool
) -> results.GradientSummary:
    finite_steps = ~columns.nonfinite.any(axis=1)
    # Where no step is finite, the finite tensors of the broken ones are still worth their numbers.
    counted = np.asarray(finite_steps if finite_steps.any() else np.ones_like(finite_steps))
    group_of = {i: name for name, members in reversed(list(groups.items())) for i in members}
    layers = places_by_layer(tensors)
    tensor_energy = columns.energy[finite_steps].sum(axis=0)
    total_energy = float(tensor_energy.sum())

    def numel(members: Sequence[int]) -> int:
        return sum(tensors[i].numel for i in members)

    def norms(members: Sequence[int]) -> NDArray[np.float64]:
        return columns.norms(members)[counted & columns.there(members)]

    def share(members: Sequence[int]) -> float:
        if not finite_steps.any():
            return math.nan
        return float(tensor_energy[members].sum()) / total_energy if total_energy > 0 else 0.0

    everything = range(len(tensors))
    group_norms = _group_norms(groups, columns, counted, regrouped)
    overlap = len({i for members in groups.values() for i in members}) < sum(map(len, groups.values()))
    shares = _shares(group_norms) if overlap and finite_steps.any() else {}
    names = [tensor.name for tensor in tensors]
    return results.GradientSummary(
        global_=results.GradientTotals(
            l2_norm=Spread.of(columns.norms(everything)[counted]),
            max_abs=float(columns.max_abs.max(initial=0.0)),
            numel=numel(everything),
            zeros=int(columns.zeros.sum()),
            nonfinite=int(columns.nonfinite.sum()),
            nonfinite_steps=int((~finite_steps).sum()),
            steps=int(counted.sum()),
        ),
        groups=tuple(
            results.GroupNorm(
                name, Spread.of(met), numel(groups[name]), shares.get(name, share(groups[name])), len(met)
            )
            for name, met in group_norms.items()
        ),
        layers=tuple(
            results.LayerNorm(name, Spread.of(own), numel(m), share(m), columns.update_ratio(m), len(own))
            for name, m in layers.items()
            for own in [norms(m)]
        ),
        tensors=tuple(
            results.TensorNorm(
                name=tensor.name,
                layer=tensor.layer,
                group=group_of[i],
                shape=tensor.shape,
                dtype=tensor.dtype,
                numel=tensor.numel,
                l2_norm=Spread.of(own),
                rms=_rms(own, tensor.numel),
                max_abs=float(columns.max_abs[:, i].max(initial=0.0)),
                zeros=int(columns.zeros[:, i].sum()),
                nonfinite=int(columns.nonfinite[:, i].sum()),
                share=share([i]),
                update_ratio=columns.update_ratio([i]),
                steps=len(own),
            )
            for i, tensor in enumerate(tensors)
            for own in [norms([i])]
        ),
        nonfinite=tuple(
            name_fault(int(columns.index[row]), columns.labels[row], names, columns.nonfinite[row])
            for row in np.flatnonzero(~finite_steps)
        ),
        at=None,
    )


def _group_norms(
    groups: Mapping[str, list[int]], columns: StepTable, counted: NDArray[np.bool_], regrouped: bool
) -> dict[str, NDArray[np.float64]]:
    """The norms of each clip group at those of the ``counted`` steps at which it was there."""
    history = columns.history
    if regrouped or history is None or not history.met:
        return {name: columns.norms(members)[counted & columns.there(members)] for name, members in groups.items()}
    norms = {}
    for group, (name, members) in enumerate(groups.items()):
        there = counted & history.present[:, group]
        # What a group met of tensors that one before it holds is not what the columns hold.
        norms[name] = columns.norms(members)[there]
        if not history.first[group]:
            met = history.norm[there, group]
            norms[name] = met[~np.isnan(met)]
    return norms


def _shares(norms: Mapping[str, NDArray[np.float64]]) -> dict[str, float]:
    """The share of each series in the sum of all squares."""
    energy = {name: float(np.square(series).sum()) for name, series in norms.items()}
    total = math.fsum(energy.values())
    return {name: part / total if total > 0.0 else 0.0 for name, part in energy.items()}


def _rms(norms: NDArray[np.float64], numel: int) -> float:
    """Root of the mean square over all elements of all steps, from the steps' L2 ``norms``."""
    if numel == 0 or not len(norms):
        return 0.0
    return float(np.sqrt(np.mean(np.square(norms)) / numel))


def _step_rows(columns: StepTable, elements: bool) -> tuple[results.StepRow, ...]:
    norms = columns.norms(range(columns.energy.shape[1]))
    return tuple(
        results.StepRow(
            step=int(columns.index[row]),
            label=columns.labels[row],
            l2_norm=float(norms[row]),
            max_abs=float(columns.max_abs[row].max(initial=0.0)) if elements else None,
            zeros=int(columns.zeros[row].sum()) if elements else None,
            nonfinite=int(columns.nonfinite[row].sum()),
        )
        for row in range(len(columns.labels))
    )


def _weights(weights: Weights) -> results.WeightSummary:
    energy: dict[str, list[float]] = {}
    numel: dict[str, int] = {}
    for info, spectrum in zip(weights.tensors, weights.spectra, strict=True):
        energy.setdefault(info.layer, []).append(_whole_norm(spectrum) ** 2)
        numel[info.layer] = numel.get(info.layer, 0) + info.numel
    return results.WeightSummary(
        global_=results.WeightTotals(
            l2_norm=math.sqrt(math.fsum(e for layer in energy.values() for e in layer)), numel=sum(numel.values())
        ),
        layers=tuple(
            results.LayerWeights(name, math.sqrt(math.fsum(values)), numel[name]) for name, values in energy.items()
        ),
        tensors=tuple(
            results.TensorWeights(
                name=info.name,
                shape=info.shape,
                dtype=info.dtype,
                numel=info.numel,
                l2_norm=_whole_norm(spectrum),
                rms=_whole_norm(spectrum) / math.sqrt(info.numel) if info.numel else 0.0,
                max_abs=spectrum.max_abs,
                zeros=spectrum.zeros,
                nonfinite=spectrum.nan + spectrum.inf,
            )
            for info, spectrum in zip(weights.tensors, weights.spectra, strict=True)
        ),
    )


def _whole_norm(spectrum: MagnitudeSpectrum) -> float:
    if spectrum.nan:
        return math.nan
    return math.inf if spectrum.inf else spectrum.norm
