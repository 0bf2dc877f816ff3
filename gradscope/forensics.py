"""Optimizer state -> what its recent gradients were, and how many of them a clip by norm held back.

The optimizer saw the gradients after clipping.  With r² the weighted mean of ‖g‖² that its state keeps (see
gradient_energy.py) and υ the clip's ``max_norm``, the **saturation** of a clip group is ρ = r²/υ².  No clipped norm
exceeds υ, and a clipped one is υ, so in the window's own weights

    clipped share ≤ ρ                                   (Markov's inequality)
    share of norms of at least c·υ ≥ (ρ − c²)/(1 − c²)  (the others contribute less than c²υ² each)

whatever the distribution of the norms.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from gradscope.gradient_energy import NO_ENERGY, GradientEnergy, gradient_energy
from gradscope.optimizer_state import OptimizerState, ParameterState
from gradscope.results import OptimizerGroup, OptimizerReport, OptimizerTensor
from gradscope.tensors import ClipGroup

# Rounding, and the 1e-6 in PyTorch's clip coefficient, keep a fully saturated ρ this close to 1.
SATURATION_TOLERANCE = 1e-4
# How far rounding may move an energy before that is said.
TOLERATED_ROUNDING = 1e-3
AT_LIMIT = {"0.99": 0.99, "0.9": 0.9}


def analyse(state: OptimizerState, max_norm: float | None = None) -> OptimizerReport:
    """What ``state`` tells about the gradients that its optimizer took in.

    ``max_norm`` is the υ of every clip group, in place of what the checkpoint names.  Where that names another, what
    the optimizer saw had been clipped at the file's, and only what holds for both is reported.  Norms are L2, in the
    units of the loss per parameter.  ``steps`` is the largest step count of any parameter; ``lr`` is None where the
    parameter groups differ in it, and so are ``max_norm`` and the saturation where there are several clip groups that
    do.

    Sources: Kingma & Ba 2015 (bias correction); Pascanu et al. 2013 (clip by norm).  Never raises for what a
    checkpoint holds or lacks: the number is then None, and ``unavailable`` or ``qualifications`` say why.
    """
    tensors = [_tensor(state, parameter) for parameter in state.parameters]
    stepped = [tensor for tensor in tensors if tensor.stepped]
    total = _join(stepped)
    groups = tuple(
        _group(group, max_norm, members, total.recent, _overlap(group, state.clip_groups))
        for group, members in _clip_groups(state.clip_groups, stepped)
    )
    only = groups[0] if len(groups) == 1 and len(groups[0].names) == len(stepped) else None
    return OptimizerReport(
        name=state.name,
        type=state.type,
        steps=_whole(max((t.parameter.step for t in tensors if t.parameter.step is not None), default=None)),
        lr=_common(_number(group.get("lr")) for group in state.param_groups),
        max_norm=_common(group.report.max_norm for group in groups),
        recent_norm=_root(total.recent),
        mean_norm=_root(total.mean),
        momentum_norm=_root(total.momentum),
        consistency=_consistency(total),
        window=total.window,
        mean_window=total.mean_window,
        saturation=only.report.saturation if only else None,
        clipped_share_at_most=only.report.clipped_share_at_most if only else None,
        at_limit_share_at_least=only.report.at_limit_share_at_least if only else None,
        groups=tuple(group.report for group in groups),
        tensors=tuple(_tensor_report(tensor, total.recent) for tensor in tensors),
        qualifications=_unique(
            (*total.qualifications, *(said for group in groups for said in group.report.qualifications))
        ),
        unavailable=_unavailable(state, tensors, stepped, total),
    )


@dataclass(frozen=True, slots=True)
class _Tensor:
    parameter: ParameterState
    energy: GradientEnergy

    @property
    def stepped(self) -> bool:
        return bool(self.parameter.moments) or (self.parameter.step or 0.0) >= 1.0


def _tensor(state: OptimizerState, parameter: ParameterState) -> _Tensor:
    hyper = state.param_groups[parameter.param_group] if parameter.param_group < len(state.param_groups) else {}
    return _Tensor(parameter, gradient_energy(state.type, parameter, hyper))


def _tensor_report(tensor: _Tensor, total: float | None) -> OptimizerTensor:
    energy = _without_rounding(tensor.energy)
    return OptimizerTensor(
        name=tensor.parameter.name,
        recent_norm=_root(energy.recent),
        mean_norm=_root(energy.mean),
        consistency=_consistency(energy),
        share=_share(energy.recent, total),
    )


def _join(tensors: Sequence[_Tensor]) -> GradientEnergy:
    """The energy of several tensors together: a number that one of them lacks is None."""
    energies = [tensor.energy for tensor in tensors]
    joined = GradientEnergy(
        recent=_sum([e.recent for e in energies]),
        rounding=sum(e.rounding for e in energies),
        mean=_sum([e.mean for e in energies]),
        momentum=_sum([e.momentum for e in energies]),
        window=max((e.window for e in energies if e.window is not None), default=None),
        mean_window=max((e.mean_window for e in energies if e.mean_window is not None), default=None),
        noise_floor=_common(e.noise_floor for e in energies),
        qualifications=_unique(q for e in energies for q in e.qualifications) + _unequal_weights(tensors),
    )
    return _without_rounding(joined)


def _without_rounding(energy: GradientEnergy) -> GradientEnergy:
    """``energy`` without a ``recent`` that may be rounding only, and qualified where rounding shows."""
    if energy.recent is None or energy.rounding <= TOLERATED_ROUNDING * energy.recent:
        return energy
    if energy.rounding < energy.recent:
        said = "square_avg started at ones and still holds much of them, so the norms are rough"
        return replace(energy, qualifications=(*energy.qualifications, said))
    return replace(energy, recent=None, unavailable="square_avg started at ones and still holds little else")


def _unequal_weights(tensors: Sequence[_Tensor]) -> tuple[str, ...]:
    if len({tensor.energy.weighting for tensor in tensors if tensor.energy.weighting is not None}) <= 1:
        return ()
    steps = [tensor.parameter.step for tensor in tensors if tensor.parameter.step is not None]
    if steps and min(steps) != max(steps):
        return (
            f"The parameters have taken different numbers of steps ({min(steps):,.0f} to {max(steps):,.0f}), "
            "so their norms are not of the same steps",
        )
    return ("The parameters' averages run over windows of different lengths",)


def _unavailable(
    state: OptimizerState, tensors: Sequence[_Tensor], stepped: Sequence[_Tensor], total: GradientEnergy
) -> str | None:
    if total.recent is not None:
        return None
    if not tensors:
        return NO_ENERGY.get(state.type, "the optimizer holds no parameters")
    if total.unavailable is not None:
        return total.unavailable
    lacking = [tensor for tensor in stepped or tensors if tensor.energy.recent is None]
    reason = lacking[0].energy.unavailable or "its state holds no squared gradients"
    if len(lacking) == len(stepped or tensors):
        return reason
    return f"{reason} ({lacking[0].parameter.name}, {len(lacking):,} of {len(stepped):,} parameters)"


# --- clip groups and saturation --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Group:
    report: OptimizerGroup
    names: frozenset[str]


def _clip_groups(groups: Sequence[ClipGroup], stepped: Sequence[_Tensor]) -> list[tuple[ClipGroup, Sequence[_Tensor]]]:
    """Each clip group with its tensors; one over everything where the source names none."""
    if not groups:
        whole = ClipGroup("all", tuple(tensor.parameter.name for tensor in stepped))
        return [(whole, stepped)] if stepped else []
    members = [(group, frozenset(group.tensors)) for group in groups]
    return [(group, [t for t in stepped if t.parameter.name in names]) for group, names in members]


def _group(
    group: ClipGroup,
    max_norm: float | None,
    members: Sequence[_Tensor],
    total: float | None,
    overlap: tuple[str, ...],
) -> _Group:
    energy = _join(members)
    trained = _limit(group.max_norm)
    limit = trained if max_norm is None else _limit(max_norm)
    report = OptimizerGroup(
        name=group.name,
        max_norm=limit,
        recent_norm=_root(energy.recent),
        mean_norm=_root(energy.mean),
        consistency=_consistency(energy),
        saturation=None,
        clipped_share_at_most=None,
        at_limit_share_at_least=None,
        share=_share(energy.recent, total),
        qualifications=energy.qualifications + overlap,
        trained_max_norm=None if trained == limit else trained,
    )
    names = frozenset(tensor.parameter.name for tensor in members)
    if limit is None or energy.recent is None:
        return _Group(report, names)
    return _Group(_with_saturation(report, energy.recent / limit / limit), names)


def _with_saturation(report: OptimizerGroup, saturation: float) -> OptimizerGroup:
    counted = 1.0 if abs(saturation - 1.0) <= SATURATION_TOLERANCE else saturation
    report = replace(report, saturation=saturation, clipped_share_at_most=min(1.0, counted))
    if report.trained_max_norm is not None:
        return _under_another_limit(report, report.trained_max_norm)
    if counted > 1.0:
        said = "Gradients reached the optimizer unclipped, so it cannot be told how many sat at the limit"
        return replace(report, qualifications=(*report.qualifications, said))
    return replace(report, at_limit_share_at_least={name: at_limit_share(counted, c) for name, c in AT_LIMIT.items()})


def _under_another_limit(report: OptimizerGroup, trained: float) -> OptimizerGroup:
    """What holds at ``report.max_norm`` of gradients n that the optimizer saw as min(n, ``trained``).

    Those above the smaller of the two are as many in both, so Markov's inequality with that one bounds the clipped
    share.  How many were at a limit that none was held to cannot be told.
    """
    assert report.max_norm is not None and report.recent_norm is not None
    held = min(trained, report.max_norm)
    return replace(report, clipped_share_at_most=min(1.0, (report.recent_norm / held) ** 2))


def at_limit_share(saturation: float, c: float) -> float:
    """The least share of steps, weighted as the window weighs them, whose norm was at least ``c``·υ; 0 < c < 1."""
    return min(1.0, max(0.0, (saturation - c * c) / (1.0 - c * c)))


def _overlap(group: ClipGroup, groups: Sequence[ClipGroup]) -> tuple[str, ...]:
    names = frozenset(group.tensors)
    others = [other.name for other in groups if other is not group and not names.isdisjoint(other.tensors)]
    if not others:
        return ()
    sharing = " and ".join(sorted((group.name, *others)))
    return (f"The clip groups {sharing} share parameters, which are clipped more than once",)


def _limit(max_norm: float | None) -> float | None:
    """υ, where it is one: libraries write 0 or infinity for "no clipping"."""
    return max_norm if max_norm is not None and 0.0 < max_norm < math.inf else None


# --- arithmetic where a number may be missing ------------------------------------------------------------------------


def _consistency(energy: GradientEnergy) -> float | None:
    """(m²/r² − f)/(1 − f): 0 for independent noise, 1 for a gradient that never changes."""
    if energy.recent is None or energy.mean is None or energy.noise_floor is None or energy.recent == 0.0:
        return None
    return (energy.mean / energy.recent - energy.noise_floor) / (1.0 - energy.noise_floor)


def _sum(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known and len(known) == len(values) else None


def _root(square: float | None) -> float | None:
    return None if square is None else math.sqrt(square)


def _share(part: float | None, whole: float | None) -> float | None:
    if part is None or whole is None:
        return None
    return part / whole if whole > 0.0 else 0.0


def _common(values: Iterable[float | None]) -> float | None:
    """The value that all have, None where they differ."""
    distinct = set(values)
    return distinct.pop() if len(distinct) == 1 else None


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None


def _whole(steps: float | None) -> float | None:
    """PyTorch counts steps in a float32 tensor; a count is shown as one."""
    return int(steps) if steps is not None and float(steps).is_integer() else steps


def _unique(items: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(items))
