"""Clip policies replayed on recorded gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
from numpy.typing import NDArray

from gradscope import results
from gradscope.clipping.effect import Effect, Series
from gradscope.clipping.layout import Partition, TensorLayout
from gradscope.clipping.moments import Moments
from gradscope.clipping.parsing import parse_policy
from gradscope.clipping.policy import Convention, ElementPolicy, Policy, Replay, ScalePolicy, limit_norm
from gradscope.errors import GradscopeError
from gradscope.findings import FLOAT32_NORM_OVERFLOW, FLOAT32_RANGE, simulation_findings
from gradscope.gradients import SAVE_GRADIENTS, GradientSource, GradientStep, GroupTotals, Progress
from gradscope.intervals import clip_rate_interval
from gradscope.ladders import norm_histogram, round_ladder
from gradscope.noise_scale import MinibatchMeter
from gradscope.nonfinite import name_fault
from gradscope.notation import setting
from gradscope.phases import find_phases
from gradscope.roles import role_of
from gradscope.selection import first_groups, recent_part, regroup, select_steps
from gradscope.spread import Spread
from gradscope.update_direction import update_meter

FloatArray = NDArray[np.float64]

SCHEMA = "gradscope.simulate/1"
POLICY_HINT = 'policies are written like "norm:0.5" or "value:0.01"'
SUGGESTED_PERCENT = (50, 10, 5, 1)
NEED_MORE_THAN_NORMS = frozenset({"per-layer-norm", "per-tensor-norm", "value", "block-rms", "agc"})


def simulate(
    source: GradientSource,
    policies: Sequence[Policy | str] | str,
    *,
    steps: str | slice | None = None,
    groups: Mapping[str, str] | None = None,
    convention: Convention = "exact",
    sweep: bool = False,
    progress: Progress | None = None,
) -> results.Simulation:
    """Read ``source`` once and tell what each of ``policies`` would have done to it.

    ``policies`` are objects or their notation (``"norm:0.5"``), several or a single one; ``steps`` (``"A:B"``) picks
    steps and ``groups`` (name → glob) redefines the clip groups.  ``convention`` is how a norm is clipped: ``"exact"``,
    min(1, υ/n), or ``"torch"``, min(1, υ/(n + 1e-6)).  ``sweep`` adds a ladder of max_norm.  Steps that hold NaN or Inf
    are named and left out of everything else.

    Raises GradscopeError for unusable options, for a source without gradients, for a policy that needs more than
    the source holds, and for whatever the source finds wrong with its files.
    """
    if convention not in ("exact", "torch"):
        raise GradscopeError(f"--convention {convention}", "must be exact or torch")
    chosen = chosen_policies(policies)
    _require_gradients(source, chosen)
    own = tuple[str, ...]()
    if not chosen:
        chosen, own = _own_policies(source)
    selected = select_steps(steps, source.info.steps)
    layout = TensorLayout.of(source.tensors, regroup(source.tensors, groups) if groups else source.groups)
    replays = {policy: policy.replay(source, layout) for policy in chosen if isinstance(policy, ElementPolicy)}
    turned = update_meter(source, list(dict.fromkeys(chosen)), layout, convention)
    minibatches = MinibatchMeter(source, layout)
    sees = [replay.see for replay in replays.values()] + ([turned.see] if turned is not None else [])
    run = _Run.read(source, selected, layout, sees, minibatches, progress, regrouped=bool(groups))
    effects = {policy: _effect(policy, replays, run, convention) for policy in dict.fromkeys(chosen)}
    phases = find_phases(run.joint_norms) if source.in_time else [range(len(run.joint_norms))]
    simulation = results.Simulation(
        schema=SCHEMA,
        source=results.Source(**asdict(source.info)),
        convention=convention,
        findings=(),
        notes=source.notes + own,
        skipped=source.skipped,
        steps=len(run.index),
        nonfinite_steps=len(run.nonfinite),
        nonfinite=run.nonfinite,
        norm=Spread.of(run.joint_norms),
        norm_histogram=norm_histogram(run.largest_norms),
        results=tuple(
            replace(
                _policy_result(policy, effects[policy], run, phases),
                update_direction_change_deg=turned.change(policy) if turned is not None else None,
            )
            for policy in chosen
        ),
        sweep=_sweep(chosen, run, convention) if sweep else (),
        suggested_max_norm=_suggest(run, run.recent),
        suggested_max_norm_overall=_suggest(run, slice(0, len(run.index))),
        recent_steps=run.recent.stop - run.recent.start,
        float32_overflow=_float32_overflow(source, run),
        nonfinite_skipped=run.nonfinite_skipped,
        batch=minibatches.report(progress),
    )
    return replace(simulation, findings=source.findings + simulation_findings(simulation))


def chosen_policies(policies: object) -> tuple[Policy, ...]:
    """Policies, or one, as objects or in their notation.

    Raises GradscopeError for what is none.
    """
    given = [policies] if isinstance(policies, str | Policy) else policies
    if not isinstance(given, Iterable):
        raise GradscopeError("policies", f"must be a list of policies, not {given!r}", POLICY_HINT)
    return tuple(_policy(policy) for policy in given)


def _policy(given: object) -> Policy:
    if isinstance(given, str):
        return parse_policy(given)
    if not isinstance(given, ScalePolicy | ElementPolicy):
        raise GradscopeError("policies", f"{given!r} is no policy", POLICY_HINT)
    return given


def _own_policies(source: GradientSource) -> tuple[tuple[Policy, ...], tuple[str, ...]]:
    """What to simulate where nothing was asked for: the max_norm that the source names, and a word on it."""
    limits = dict.fromkeys(group.max_norm for group in source.groups)
    known = [limit for limit in limits if limit is not None and 0.0 < limit < math.inf]
    if not known:
        return (), ()
    named = ", ".join(setting(limit) for limit in known)
    return tuple(parse_policy(f"norm:{setting(limit)}") for limit in known), (
        f"max_norm {named} is what the run itself clipped with; --max-norm, --clip-value and --policy try others.",
    )


def _require_gradients(source: GradientSource, policies: Sequence[Policy]) -> None:
    if not source.tensors:
        raise GradscopeError(
            source.info.path,
            "a bare checkpoint holds no gradients",
            "--batch FILE computes them from a captured batch; gradscope inspect tells what its optimizer knows; "
            f"{SAVE_GRADIENTS}",
        )
    if source.info.kind == "norm-log":
        for policy in policies:
            if policy.name in NEED_MORE_THAN_NORMS:
                raise GradscopeError(
                    f"--policy {policy.label}",
                    f"{source.info.path} is a log of norms; this policy needs the gradients themselves",
                    SAVE_GRADIENTS,
                )


def _float32_overflow(source: GradientSource, run: _Run) -> results.Float32Overflow | None:
    dtypes = [tensor.dtype for tensor in source.tensors]
    groups = run.groups
    members = [{dtypes[i] for i in held} for held in groups.members]
    limit = FLOAT32_NORM_OVERFLOW**2
    tensors = (run.energies >= limit) & np.array([dtype in FLOAT32_RANGE for dtype in dtypes])
    whole = (groups.norms >= FLOAT32_NORM_OVERFLOW) & np.array([dtypes <= FLOAT32_RANGE for dtypes in members])
    steps = int((tensors.any(axis=1) | whole.any(axis=1)).sum())
    if not steps:
        return None
    return results.Float32Overflow(
        steps,
        tuple(source.tensors[i].name for i in np.flatnonzero(tensors.any(axis=0))),
        tuple(groups.names[i] for i in np.flatnonzero(whole.any(axis=0))),
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Groups:
    """The clip groups and the ``norms`` that they met, float64 [finite steps, groups], NaN where one was not there.

    ``members`` are the places of their tensors.  ``overlap`` says whether groups share tensors, as those of two clip
    calls do: then ``first`` (bool [groups]) marks the groups that share none with one before them, and only of those
    is known what their tensors did.
    """

    names: tuple[str, ...]
    members: tuple[NDArray[np.intp], ...]
    norms: FloatArray
    first: NDArray[np.bool_]

    @classmethod
    def of(cls, layout: TensorLayout, energies: FloatArray, present: NDArray[np.bool_] | None) -> _Groups:
        """The groups of ``layout``; ``energies`` and what was ``present`` are [finite steps, tensors]."""
        sets = layout.groups
        norms = np.sqrt(sets.total(energies))
        if present is not None:
            norms[~sets.any(present)] = np.nan
        members = tuple(np.flatnonzero(sets.owner == group) for group in range(len(sets)))
        return cls(sets.names, members, norms, np.ones(len(sets), dtype=np.bool_))

    @classmethod
    def met(cls, source: GradientSource, totals: Sequence[GroupTotals]) -> _Groups:
        """The groups of ``source``, by what they met at each finite step."""
        position = {tensor.name: i for i, tensor in enumerate(source.tensors)}
        members = tuple(np.array([position[name] for name in group.tensors], np.intp) for group in source.groups)
        there = np.array([step.present & (step.nonfinite == 0) for step in totals])
        norms = np.sqrt(np.array([step.sum_squares for step in totals]))
        return cls(
            tuple(group.name for group in source.groups),
            members,
            np.where(there, norms, np.nan),
            first_groups(source.groups),
        )

    @property
    def overlap(self) -> bool:
        return not self.first.all()

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True, slots=True, eq=False)
class _Run:
    """The steps as read.  ``finite`` (bool) and ``index`` (int64) are [steps]; the norms are those of finite steps.

    ``present`` (bool [finite steps, tensors]) says what had a gradient; None: everything throughout.
    """

    layout: TensorLayout
    index: NDArray[np.int64]
    finite: NDArray[np.bool_]
    energies: FloatArray
    present: NDArray[np.bool_] | None
    groups: _Groups
    joint_norms: FloatArray
    nonfinite: tuple[results.NonfiniteStep, ...]
    nonfinite_skipped: int
    has_layers: bool
    in_time: bool

    @classmethod
    def read(
        cls,
        source: GradientSource,
        selected: range,
        layout: TensorLayout,
        sees: Sequence[Callable[[GradientStep], None]],
        minibatches: MinibatchMeter,
        progress: Progress | None,
        regrouped: bool = False,
    ) -> _Run:
        """Stream the steps once; only their energies and what those who see the finite ones keep stay in memory."""
        names = [tensor.name for tensor in source.tensors]
        index: list[int] = []
        finite: list[bool] = []
        nonfinite: list[results.NonfiniteStep] = []
        energies = np.empty((len(selected), len(names)))
        present: NDArray[np.bool_] | None = None
        totals: list[GroupTotals] | None = None if regrouped or first_groups(source.groups).all() else []
        kept = skipped = 0
        for position, step in zip(selected, source.read_steps(selected, progress), strict=False):
            index.append(step.index)
            # A float64 gradient beyond 1e154 is finite, but its square is not.
            with np.errstate(over="ignore"):
                finite.append(step.finite and math.isfinite(step.sum_squares.sum()))
            if not finite[-1]:
                faults = step.nan + step.inf
                faults = faults if faults.any() else (step.sum_squares >= step.sum_squares.max()).astype(np.int64)
                skipped += step.recorded is not None and step.recorded.skipped
                nonfinite.append(name_fault(step.index, step.label, names, faults))
                continue
            energies[kept] = step.sum_squares
            if step.present is not None and not step.present.all():
                present = np.ones(energies.shape, dtype=np.bool_) if present is None else present
                present[kept] = step.present
            if totals is not None and step.recorded is not None and step.recorded.totals is not None:
                totals.append(step.recorded.totals)
            kept += 1
            seen = _with_spectra(step) if len(sees) > 1 else step
            for see in sees:
                see(seen)
            minibatches.see(position, step)
        if not index:
            raise GradscopeError(source.info.path, "holds no gradient steps")
        energies = energies[:kept]
        present = None if present is None else present[:kept]
        return cls(
            layout=layout,
            index=np.array(index, dtype=np.int64),
            finite=np.array(finite, dtype=np.bool_),
            energies=energies,
            present=present,
            groups=_Groups.met(source, totals)
            if totals and len(totals) == kept
            else _Groups.of(layout, energies, present),
            joint_norms=np.sqrt(layout.groups.total(energies).sum(axis=1)),
            nonfinite=tuple(nonfinite),
            nonfinite_skipped=skipped,
            has_layers=source.info.kind != "norm-log",
            in_time=source.in_time,
        )

    @property
    def largest_norms(self) -> FloatArray:
        """The norm of each finite step's largest clip group: what decides whether max_norm clips the step."""
        return np.asarray(np.fmax.reduce(self.groups.norms, axis=1, initial=0.0))

    @property
    def recent(self) -> slice:
        """The newest part, as positions among the steps; all of steps that are no run."""
        return recent_part(len(self.index)) if self.in_time else slice(0, len(self.index))

    def finite_in(self, part: slice) -> slice:
        """The same part, as positions among the finite steps."""
        before = int(self.finite[: part.start].sum())
        return slice(before, before + int(self.finite[part].sum()))

    def bounds(self, part: slice) -> tuple[int, int]:
        """The index of the first and of the last step of ``part``."""
        return int(self.index[part.start]), int(self.index[part.stop - 1])


def _with_spectra(step: GradientStep) -> GradientStep:
    """The step with its spectra at hand: a trace decodes one each time that it is asked for it."""
    return replace(step, spectra=tuple(step.spectra), group_spectra=tuple(step.group_spectra))


def _effect(policy: Policy, replays: Mapping[ElementPolicy, Replay], run: _Run, convention: Convention) -> Effect:
    if isinstance(policy, ScalePolicy):
        effect = policy.effect(run.energies, run.layout, convention, run.present)
        return _of_overlapping(policy, effect, run, convention) if run.groups.overlap else effect
    assert isinstance(policy, ElementPolicy)
    effect = replays[policy].effect()
    return _of_overlapping(policy, effect, run, convention) if run.groups.overlap else effect


def _of_overlapping(policy: Policy, effect: Effect, run: _Run, convention: Convention) -> Effect:
    """The ``effect`` where clip groups share tensors: each by the gradient that it met, a step by any of them."""
    groups, met = run.groups, effect.met
    if isinstance(policy, ScalePolicy) and policy.unit == "group":
        numel = np.array([run.layout.numel[held].sum() for held in groups.members], dtype=np.int64)
        factors = policy.factors(groups.norms, numel, convention)
        turned = np.where(factors.scale > 0.0, 0.0, np.nan)
        met = Series(factors.triggered, factors.scale, factors.scale, turned).where(~np.isnan(groups.norms))
    if met is None:
        return replace(effect, groups=_known_groups(effect.groups, run))
    triggered = effect.joint.triggered | met.triggered.any(axis=1, keepdims=True)
    return replace(effect, groups=met, met=met, joint=replace(effect.joint, triggered=triggered))


def _known_groups(series: Series, run: _Run) -> Series:
    """The columns of all clip groups, NaN for those of which nothing but the norm is known."""
    names = run.layout.groups.names
    columns = [
        names.index(name) if first else -1 for name, first in zip(run.groups.names, run.groups.first, strict=True)
    ]
    nothing = np.full((len(series.scale), 1), np.nan)
    never = np.zeros((len(series.triggered), 1), dtype=np.bool_)
    known = Series(
        np.hstack([series.triggered, never])[:, columns],
        np.hstack([series.scale, nothing])[:, columns],
        np.hstack([series.norm_ratio, nothing])[:, columns],
        np.hstack([series.angle, nothing])[:, columns],
    )
    there = ~np.isnan(run.groups.norms)
    return known.where(there) if there.shape == known.scale.shape else known


def _policy_result(policy: Policy, effect: Effect, run: _Run, phases: Sequence[range]) -> results.PolicyResult:
    clipped = effect.joint.triggered[:, 0]
    interval, effective = clip_rate_interval(clipped, run.largest_norms)
    layers = effect.layers
    return results.PolicyResult(
        policy=policy.label,
        threshold=policy.threshold,
        clip_rate=_share(clipped),
        clip_rate_ci95=interval,
        effective_steps=effective,
        clipped_steps=int(clipped.sum()),
        scale=Spread.of(effect.joint.scale),
        norm_ratio=Spread.of(effect.joint.norm_ratio),
        direction_change_deg=Spread.of(_not_nan(effect.joint.angle[:, 0])) if _has_direction(effect.joint) else None,
        direction_change_error_deg=effect.angle_error,
        clipped_elements=effect.clipped.likely,
        clipped_elements_error=effect.clipped.error,
        groups=_policy_groups(effect.groups, run, all_known=effect.met is not None),
        phases=tuple(_phase(phase, effect, run, last=phase is phases[-1]) for phase in phases),
        recent=_recent_clipping(clipped, run),
        layers=tuple(
            results.PolicyLayer(
                name=name,
                clip_rate=float(layers.clip_rate[i]),
                scale=float(layers.scale[i]),
                direction_change_deg=float(layers.angle[i]),
                clipped_elements=layers.clipped[i].likely,
                clipped_elements_error=layers.clipped[i].error,
                steps=int(layers.present[i]),
            )
            for i, name in enumerate(run.layout.layers.names)
            if (layers.steps or not len(clipped)) and run.has_layers
        ),
        roles=_roles(policy, run) if policy.name in ("norm", "joint-norm") else (),
        group_steps=len(effect.groups.scale),
        layer_steps=layers.steps,
    )


def _policy_groups(series: Series, run: _Run, all_known: bool) -> tuple[results.PolicyGroup, ...]:
    """Each clip group over the steps at which it was there.

    Of a group that shares tensors with one before it what its tensors did is not known: its rate is NaN, unless what
    the policy does to it is known without (``all_known``).
    """
    shares = _energy_shares(run)
    there = ~np.isnan(run.groups.norms)
    return tuple(
        results.PolicyGroup(
            name=name,
            clip_rate=_share(series.triggered[there[:, i], i]) if all_known or run.groups.first[i] else math.nan,
            norm=Spread.of(run.groups.norms[there[:, i], i]),
            scale=Spread.of(_not_nan(series.scale[:, i])),
            direction_change_deg=Spread.of(_not_nan(series.angle[:, i])),
            share=shares[i],
            steps=int(there[:, i].sum()),
        )
        for i, name in enumerate(run.groups.names)
    )


def _roles(policy: Policy, run: _Run) -> tuple[results.RoleClipping, ...]:
    """Actor and critic, where ``policy`` takes one norm over both; they are told by name."""
    named = [role_of(name) for name in run.layout.tensors.names]
    members = {role: [i for i, found in enumerate(named) if found == role] for role in ("actor", "critic")}
    total = float(run.energies.sum())
    one_norm = policy.name == "joint-norm" or len(run.groups) == 1
    if not (one_norm and all(members.values()) and 0.0 < total < math.inf and policy.threshold):
        return ()
    energies = {role: _there(run, held).sum(axis=1) for role, held in members.items()}
    return tuple(
        results.RoleClipping(
            name=role,
            share=float(energy.sum()) / total,
            clip_rate_alone=_share(np.sqrt(energy) > policy.threshold),
        )
        for role, energy in energies.items()
    )


def _there(run: _Run, tensors: list[int]) -> FloatArray:
    """The energies of ``tensors`` at the steps at which any of them had a gradient."""
    energies = run.energies[:, tensors]
    return energies if run.present is None else energies[run.present[:, tensors].any(axis=1)]


def _energy_shares(run: _Run) -> list[float]:
    """Each clip group's share of the squared norm, summed over the finite steps."""
    norms = np.nan_to_num(run.groups.norms, nan=0.0)
    if not len(norms):
        return [math.nan] * len(run.groups)
    largest = float(norms.max())
    energies = np.square(norms / largest).sum(axis=0) if largest > 0.0 else np.zeros(len(run.groups))
    return [float(energy) for energy in energies / max(1.0, float(energies.sum()))]


def _has_direction(series: Series) -> bool:
    return not len(series.angle) or bool(np.isfinite(series.angle).any())


def _not_nan(values: FloatArray) -> FloatArray:
    return values[~np.isnan(values)]


def _share(clipped: NDArray[np.bool_]) -> float:
    return float(clipped.mean()) if len(clipped) else math.nan


def _phase(phase: range, effect: Effect, run: _Run, last: bool) -> results.Phase:
    """One phase under one policy; steps that are not finite belong to the phase before them."""
    part = slice(phase.start, phase.stop)
    positions = np.flatnonzero(run.finite)
    first = positions[phase.start] if phase.start else 0
    stop = len(run.index) if last else positions[phase.stop]
    return results.Phase(
        steps=run.bounds(slice(int(first), int(stop))),
        clip_rate=_share(effect.joint.triggered[part, 0]),
        norm=Spread.of(run.joint_norms[part]),
        scale=Spread.of(effect.joint.scale[part]),
    )


def _recent_clipping(clipped: NDArray[np.bool_], run: _Run) -> results.RecentClipping:
    part = run.finite_in(run.recent)
    interval, effective = clip_rate_interval(clipped[part], run.largest_norms[part])
    return results.RecentClipping(
        steps=run.bounds(run.recent),
        clip_rate=_share(clipped[part]),
        clip_rate_ci95=interval,
        effective_steps=effective,
        length=run.recent.stop - run.recent.start,
    )


def _suggest(run: _Run, part: slice) -> dict[str, float | tuple[int, int]]:
    """For each percentage the smallest norm seen that, as max_norm, clips no larger share of the part's steps."""
    norms = np.sort(run.largest_norms[run.finite_in(part)])
    suggested: dict[str, float | tuple[int, int]] = {"steps": run.bounds(part)}
    for percent in SUGGESTED_PERCENT:
        # Integers, so that 1 % of 700 steps is 7 and no rounding makes it 6.
        above = len(norms) * percent // 100
        suggested[f"{percent / 100:.2f}"] = float(norms[len(norms) - 1 - above]) if len(norms) else math.nan
    return suggested


def _sweep(policies: Sequence[Policy], run: _Run, convention: Convention) -> tuple[results.SweepRow, ...]:
    given = [policy.arguments[0] for policy in policies if policy.name == "norm"]
    norms = np.nan_to_num(run.groups.norms, nan=0.0)
    energies = np.square(norms)
    joint = Partition.by(["all"] * energies.shape[1])
    recent = run.finite_in(run.recent)
    rows = []
    for max_norm in round_ladder(run.largest_norms, given):
        factors = limit_norm(norms, max_norm, convention)
        clipped = np.asarray(factors.triggered.any(axis=1))
        scale = Moments(energies, factors.scale, np.zeros_like(energies)).merge(joint).mean
        rows.append(
            results.SweepRow(
                max_norm=max_norm,
                clip_rate=_share(clipped),
                recent_clip_rate=_share(clipped[recent]),
                scale=float(scale.mean()) if len(scale) else math.nan,
            )
        )
    return tuple(rows)
