"""A result as one flat table in CSV (RFC 4180): full precision, one header line, empty where nothing is known.

Names are escaped as on the screen: a table may be shown by a terminal, too.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from dataclasses import asdict

from gradscope import results
from gradscope.check_results import Check
from gradscope.printable import printable
from gradscope.spread import Spread
from gradscope.views.choices import By, ViewChoices
from gradscope.views.norm_rows import NormRow, gradient_rows, optimizer_rows, ordered, weight_rows

# What a cell may hold; None is an empty cell.
Cell = str | float | int | None
Record = dict[str, Cell]

SIMULATION_COLUMNS = (
    "policy", "threshold", "scope", "name", "first_step", "last_step", "clip_rate", "clip_rate_low", "clip_rate_high",
    "effective_steps", "clipped_steps", "share", "norm_min", "norm_p50", "norm_p95", "norm_max", "scale_p50",
    "scale_mean", "norm_ratio_p50", "direction_change_deg_p50", "direction_change_deg_mean", "direction_change_deg_max",
    "direction_change_error_deg",
    "clipped_elements", "clipped_elements_error", "steps",
    "update_direction_change_deg_p50", "update_direction_change_deg_max",
)  # fmt: skip
CHECK_COLUMNS = (
    "source", "rule", "severity", "status", "value", "limit", "where", "first_step", "last_step", "message",
)  # fmt: skip


def inspection_csv(inspection: results.Inspection, choices: ViewChoices) -> str:
    """One row per tensor, layer or clip group: of the gradients, else of the optimizers, else of the weights."""
    if inspection.gradients is not None:
        # A log of norms knows neither layers nor what a clip group is.
        by: By = "tensor" if inspection.source.kind == "norm-log" else choices.by
        rows = _chosen(gradient_rows(inspection.gradients, by, inspection.batch), choices)
        updated = any(row.update_ratio is not None for row in rows)
        run = inspection.recorded if by == "group" else None
        clipped = {group.name: group for group in run.groups} if run is not None else {}
        clipped = clipped if all(row.name in clipped for row in rows) else {}
        return csv_text({**_gradient_record(row, updated), **_recorded(clipped.get(row.name))} for row in rows)
    known = [
        (optimizer.name, _chosen(optimizer_rows(optimizer, choices.by), choices)) for optimizer in inspection.optimizers
    ]
    if inspection.weights is None or any(rows for _, rows in known):
        return csv_text(_optimizer_record(name, row) for name, rows in known for row in rows)
    return csv_text(_weight_record(row) for row in _chosen(weight_rows(inspection.weights, choices.by), choices))


def _chosen(rows: list[NormRow], choices: ViewChoices) -> list[NormRow]:
    return ordered(rows, choices.sort)[: choices.top]


def _gradient_record(row: NormRow, updated: bool) -> Record:
    spread = row.spread or Spread.constant(float("nan"))
    norms: Record = {f"l2_norm_{name}": value for name, value in asdict(spread).items()}
    update: Record = {"update_ratio": row.update_ratio} if updated else {}
    known = {**norms, **update, **_tensor_record(row), "steps": row.steps, **_noise(row)}
    return {"name": row.name, "numel": row.numel, "share": row.share, **known}


def _noise(row: NormRow) -> Record:
    """Signal and noise, where the steps are minibatches."""
    scale = row.noise_scale
    if scale is None:
        return {}
    low, high = scale.ci95 or (scale.at_least, None)
    known: Record = {"noise_scale": scale.estimate, "noise_scale_low": low, "noise_scale_high": high}
    return {**known, "mean_cosine": row.mean_cosine}


def _recorded(group: results.RecordedClipping | None) -> Record:
    """What a run clipped of a clip group; nothing where these are not the groups that it clipped."""
    if group is None:
        return {}
    return {
        "max_norm": group.max_norm,
        "clip_value": group.clip_value,
        **_clipping(group.clip_rate if group.steps else None, group.clip_rate_ci95, group.effective_steps),
        "clipped_steps": group.clipped_steps,
        "limited_steps": group.steps,
        "recent_clip_rate": group.recent.clip_rate if group.steps else None,
    }


def _optimizer_record(optimizer: str, row: NormRow) -> Record:
    return {
        "optimizer": optimizer,
        "name": row.name,
        "recent_norm": row.norm,
        "mean_norm": row.mean_norm,
        "consistency": row.consistency,
        "share": row.share,
    }


def _weight_record(row: NormRow) -> Record:
    return {"name": row.name, "numel": row.numel, "share": row.share, "l2_norm": row.norm, **_tensor_record(row)}


def _tensor_record(row: NormRow) -> Record:
    tensor = row.tensor
    if tensor is None:
        return {}
    owner: Record = {"layer": tensor.layer, "group": tensor.group} if isinstance(tensor, results.TensorNorm) else {}
    return {
        **owner,
        "shape": None if tensor.shape is None else "x".join(map(str, tensor.shape)),
        "dtype": tensor.dtype,
        "rms": tensor.rms,
        "max_abs": tensor.max_abs,
        "zeros": tensor.zeros,
        "nonfinite": tensor.nonfinite,
    }


def simulation_csv(simulation: results.Simulation) -> str:
    """One row per policy and scope: overall, recent, group, phase, layer; then the ladder and the suggestions."""
    return csv_text(_simulation_records(simulation), SIMULATION_COLUMNS)


def _simulation_records(simulation: results.Simulation) -> Iterator[Record]:
    if not simulation.results:
        yield {"scope": "overall", **_whole_run(simulation), **_norms(simulation.norm)}
    for policy in simulation.results:
        for record in _policy_records(simulation, policy):
            yield {"policy": policy.policy, "threshold": policy.threshold, **record}
    for rung in simulation.sweep:
        label = _norm_policy(rung.max_norm)
        yield {**label, "scope": "sweep", "name": "overall", "clip_rate": rung.clip_rate}
        yield {**label, "scope": "sweep", "name": "recent", "clip_rate": rung.recent_clip_rate}
    suggestions = {"recent": simulation.suggested_max_norm, "overall": simulation.suggested_max_norm_overall}
    for name, suggested in suggestions.items():
        for share, threshold in suggested.items():
            if isinstance(threshold, float | int):
                label = _norm_policy(threshold)
                yield {**label, "scope": "suggested", "name": name, "clip_rate": float(share)}


def _policy_records(simulation: results.Simulation, policy: results.PolicyResult) -> Iterator[Record]:
    change = policy.direction_change_deg
    yield {
        "scope": "overall",
        **_whole_run(simulation),
        **_clipping(policy.clip_rate, policy.clip_rate_ci95, policy.effective_steps),
        "clipped_steps": policy.clipped_steps,
        "share": 1.0,
        **_norms(simulation.norm),
        "scale_p50": policy.scale.p50,
        "norm_ratio_p50": policy.norm_ratio.p50,
        **(_direction(change) if change else {}),
        "direction_change_error_deg": policy.direction_change_error_deg,
        "clipped_elements": policy.clipped_elements,
        "clipped_elements_error": policy.clipped_elements_error,
        **_update_direction(policy.update_direction_change_deg),
    }
    recent = policy.recent
    clipping = _clipping(recent.clip_rate, recent.clip_rate_ci95, recent.effective_steps)
    yield {"scope": "recent", **_steps(recent.steps), **clipping}
    for group in policy.groups:
        yield {
            "scope": "group",
            "name": group.name,
            "clip_rate": group.clip_rate,
            "share": group.share,
            **_norms(group.norm),
            "scale_p50": group.scale.p50,
            **_direction(group.direction_change_deg),
            "steps": group.steps,
        }
    for phase in policy.phases:
        phase_record: Record = {"scope": "phase", "clip_rate": phase.clip_rate, "scale_p50": phase.scale.p50}
        yield {**phase_record, **_steps(phase.steps), **_norms(phase.norm)}
    for layer in policy.layers:
        yield {
            "scope": "layer",
            "name": layer.name,
            "clip_rate": layer.clip_rate,
            "scale_mean": layer.scale,
            "direction_change_deg_mean": layer.direction_change_deg,
            "clipped_elements": layer.clipped_elements,
            "clipped_elements_error": layer.clipped_elements_error,
            "steps": layer.steps,
        }


def _norm_policy(max_norm: float) -> Record:
    return {"policy": f"norm:{max_norm!r}", "threshold": max_norm}


def _whole_run(simulation: results.Simulation) -> Record:
    """The first and the last step that were read, which ``--steps`` may have picked."""
    span = simulation.suggested_max_norm_overall["steps"]
    return _steps(span) if isinstance(span, tuple) else {}


def _steps(steps: tuple[int, int]) -> Record:
    return {"first_step": steps[0], "last_step": steps[1]}


def _clipping(rate: float | None, interval: tuple[float, float] | None, effective_steps: float) -> Record:
    low, high = interval or (None, None)
    return {"clip_rate": rate, "clip_rate_low": low, "clip_rate_high": high, "effective_steps": effective_steps}


def _norms(spread: Spread) -> Record:
    return {"norm_min": spread.min, "norm_p50": spread.p50, "norm_p95": spread.p95, "norm_max": spread.max}


def _direction(change: Spread) -> Record:
    return {"direction_change_deg_p50": change.p50, "direction_change_deg_max": change.max}


def _update_direction(change: Spread | None) -> Record:
    if change is None:
        return {}
    return {"update_direction_change_deg_p50": change.p50, "update_direction_change_deg_max": change.max}


def check_csv(check: Check) -> str:
    """One row per violation; of a rule without any, one row."""
    return csv_text(_check_records(check), CHECK_COLUMNS)


def _check_records(check: Check) -> Iterator[Record]:
    for outcome in check.rules:
        for reading in outcome.violations or (outcome,):
            yield {
                "source": outcome.path,
                "rule": outcome.rule,
                "severity": outcome.severity,
                "status": outcome.status,
                "value": reading.value,
                "limit": reading.limit,
                "where": reading.where,
                **(_steps(reading.steps) if reading.steps else {}),
                "message": reading.message,
            }


def _safe(cell: Cell) -> Cell:
    return printable(cell) if isinstance(cell, str) else cell


def csv_text(records: Iterable[Record], columns: Iterable[str] = ()) -> str:
    """``records`` under one header line: ``columns``, else the keys of the first."""
    rows = list(records)
    header = tuple(columns) or tuple(rows[0] if rows else ("name",))
    text = io.StringIO()
    writer = csv.DictWriter(text, header, lineterminator="\r\n")
    writer.writeheader()
    writer.writerows({key: _safe(cell) for key, cell in row.items()} for row in rows)
    return text.getvalue()
