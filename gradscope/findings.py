"""What a result means, in sentences: the first lines of every output."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from gradscope import results
from gradscope.notation import angle, count, names, number, percent, setting
from gradscope.roles import role_of

DOMINANT_SHARE = 0.9
# A table tells of more.
MOST_GROUPS_SAID = 3
# A float32 norm squares and sums in float32: it is infinite from the square root of the largest float32 on.
FLOAT32_NORM_OVERFLOW = math.sqrt(3.4028234663852886e38)
FLOAT32_RANGE = frozenset({"float32", "bfloat16"})
KEPT_DEG = 1e-6
# Where one of signal and noise has this many times the energy of the other.
MOSTLY = 2.0
_AT_LIMIT = 1e-4


class _Shared(Protocol):
    @property
    def name(self) -> str: ...


def inspection_findings(inspection: results.Inspection, steps_read: int | None = None) -> tuple[str, ...]:
    """The sentences for an inspection of ``steps_read`` steps (None: all), most important first."""
    found: list[str] = []
    gradients = inspection.gradients
    if gradients is not None:
        total = inspection.source.steps if steps_read is None else steps_read
        skipped = inspection.recorded.nonfinite_skipped if inspection.recorded else None
        found += _nonfinite(gradients.nonfinite, total, alone=gradients.at is not None, skipped=skipped or 0)
        found += _overflow(_float32_overflow(gradients))
        found += _recorded(inspection)
        shares = [(group.name, group.share) for group in gradients.groups]
        # Groups that share tensors are no parts of a whole.
        apart = sum(group.numel or 0 for group in gradients.groups) <= (gradients.global_.numel or math.inf)
        found += _dominance(shares) if apart else []
        found += _dominance([(layer.name, layer.share) for layer in gradients.layers])
        found += _dead(gradients)
        found += _minibatch_noise(inspection.batch, _exceeded(inspection))
    if inspection.weights is not None:
        found += _broken_weights(inspection.weights)
    for optimizer in inspection.optimizers:
        found += _saturation(optimizer, len(inspection.optimizers) > 1, gradients is not None)
        shares = [(tensor.name, tensor.share) for tensor in optimizer.tensors if tensor.share is not None]
        # Beside the gradients of a batch it has been said, of these.
        found += _dominance(shares) if gradients is None else []
    return tuple(dict.fromkeys(found))


def _nonfinite(steps: Sequence[results.NonfiniteStep], total: int, alone: bool = False, skipped: int = 0) -> list[str]:
    """What is broken in ``steps``, of ``total``; ``alone`` where one of them is all that is looked at.

    At ``skipped`` of them the optimizer is known not to have stepped.
    """
    if not steps:
        return []
    first = steps[0]
    before = f"; the last finite tensor before it is {first.last_finite_before[0]}" if first.last_finite_before else ""
    tensors = f"{names(first.tensors, most=2)}{before}"
    step = step_name(first)
    if alone:
        said = f"S{step[1:]} holds NaN or Inf, in {tensors}."
    elif total == 1:
        said = f"The step holds NaN or Inf, in {tensors}."
    elif len(steps) == 1:
        said = f"1 of {count(total)} steps holds NaN or Inf: {step}, in {tensors}."
    else:
        said = f"{count(len(steps))} of {count(total)} steps hold NaN or Inf, first {step}, in {tensors}."
    if not alone and len(steps) < total:
        said += f" {'It is' if len(steps) == 1 else 'They are'} left out of every rate and quantile."
    if skipped == len(steps):
        return [said, f"The optimizer did not step at {'it' if skipped == 1 else 'any of them'}."]
    return [
        said,
        "PyTorch's default clip_grad_norm_ would have made every gradient of the group NaN where there is a NaN; "
        "an Inf would have become NaN itself and zeroed all the others.",
    ]


def _float32_overflow(gradients: results.GradientSummary) -> results.Float32Overflow | None:
    huge = [t.name for t in gradients.tensors if t.dtype in FLOAT32_RANGE and _overflows(t.l2_norm.max)]
    members = {group.name: {t.dtype for t in gradients.tensors if t.group == group.name} for group in gradients.groups}
    groups = [g.name for g in gradients.groups if _overflows(g.l2_norm.max) and members[g.name] <= FLOAT32_RANGE]
    return results.Float32Overflow(None, tuple(huge), tuple(groups)) if huge or groups else None


def _overflows(norm: float) -> bool:
    return FLOAT32_NORM_OVERFLOW <= norm < math.inf


def _overflow(overflow: results.Float32Overflow | None, steps: int = 1) -> list[str]:
    if overflow is None:
        return []
    held = names(overflow.tensors) if overflow.tensors else f"the clip group {names(overflow.groups)} together"
    when = f" in {count(overflow.steps)} of {count(steps)} steps" if overflow.steps and steps > 1 else ""
    return [
        f"The squares of {held} overflow float32{when} although every element is finite: PyTorch's norm would be "
        "infinite and clip_grad_norm_ would zero the whole update."
    ]


def _dominance(shares: Sequence[tuple[str, float]]) -> list[str]:
    """Say it when one role, else one layer, holds nearly all of the squared norm."""
    known = [(name, share) for name, share in shares if not math.isnan(share)]
    if len(known) < 2:
        return []
    roles = {role: math.fsum(share for name, share in known if role_of(name) == role) for role in ("actor", "critic")}
    if min(roles.values()) > 0 and max(roles.values()) >= DOMINANT_SHARE:
        first, second = sorted(roles, key=lambda role: roles[role], reverse=True)
        return [
            f"The {first} dominates: {percent(roles[first])} of the squared norm; "
            f"the {second} has {percent(roles[second])}."
        ]
    name, share = max(known, key=lambda pair: pair[1])
    if share < DOMINANT_SHARE or not any(other > 0 for other_name, other in known if other_name != name):
        return []
    return [f"{name} dominates: {percent(share)} of the squared norm; all the rest has {percent(1 - share)}."]


def _exceeded(inspection: results.Inspection) -> dict[str, list[str]]:
    """For each clip group the max_norm that the checkpoint names for it, in words, where some step is above it."""
    if inspection.gradients is None:
        return {}
    limits = {group.name: group.max_norm for optimizer in inspection.optimizers for group in optimizer.groups}
    named = {optimizer.max_norm for optimizer in inspection.optimizers}
    alone = named.pop() if len(named) == 1 else None
    exceeded = {}
    for group in inspection.gradients.groups:
        limit = limits.get(group.name, alone)
        exceeded[group.name] = [f"max_norm {setting(limit)}"] if limit is not None and limit < group.l2_norm.max else []
    return exceeded


def _minibatch_noise(batch: results.MinibatchNoise | None, cutting: Mapping[str, Sequence[str]]) -> Iterable[str]:
    """How much of a minibatch's gradient is noise, and so of what is cut; ``cutting`` names for each group by what."""
    if batch is None:
        return
    if not 1 < len(batch.groups) <= MOST_GROUPS_SAID:
        everything = tuple(dict.fromkeys(policy for policies in cutting.values() for policy in policies))
        yield from _noise(batch, batch.noise_scale, everything)
        return
    for group in batch.groups:
        for said in _noise(batch, group.noise_scale, cutting.get(group.name, ())):
            yield f"{_group_name(group.name)}: {said[0].lower()}{said[1:]}"


def _noise(batch: results.MinibatchNoise, scale: results.NoiseScale, cutting: Sequence[str]) -> Iterable[str]:
    if scale.noise is None or scale.noise <= 0.0:
        return
    size = batch.minibatch_size
    what = f"what {names(list(cutting))} {'cut' if len(cutting) > 1 else 'cuts'}" if cutting else "its gradient"
    has = f"and a minibatch has {count(size)}"
    if scale.ci95 is None and scale.at_least is not None:
        # No interval, but one that has no upper end.
        bound = f"the noise scale is at least {number(scale.at_least)} samples {has}"
        verdict = f"{bound}: {what} is mostly noise" if scale.at_least >= MOSTLY * size else f"{bound}"
        yield f"{count(batch.minibatches)} minibatches do not tell the true gradient apart from zero; {verdict}."
    elif scale.estimate is not None:
        interval = f" [{number(scale.ci95[0])}–{number(scale.ci95[1])}]" if scale.ci95 else ""
        few = "" if scale.ci95 else " (too few minibatches for an interval)"
        low, high = scale.ci95 or (scale.estimate, scale.estimate)
        kind = (
            "mostly noise" if low >= MOSTLY * size else "mostly signal" if high * MOSTLY <= size else "signal and noise"
        )
        yield f"The noise scale is {number(scale.estimate)}{interval} samples{few} {has}: {what} is {kind}."


def _dead(gradients: results.GradientSummary) -> list[str]:
    dead = [t.name for t in gradients.tensors if t.numel and t.max_abs == 0 and t.nonfinite == 0 and t.steps != 0]
    if not dead:
        return []
    if len(dead) == len(gradients.tensors):
        return ["Every gradient is zero."]
    verb = "is" if len(dead) == 1 else "are"
    return [f"{names(dead)} {verb} zero in every step."]


# --- what a recorded run did -----------------------------------------------------------------------------------------


def _recorded(inspection: results.Inspection) -> Iterable[str]:
    run = inspection.recorded
    if run is None:
        return
    steps = step_word(inspection.source)
    clipping = [group for group in run.groups if group.steps]
    if not clipping:
        yield "The run did not clip its gradients."
    if len(clipping) > MOST_GROUPS_SAID:
        limits = _limits(run.overall) or "max_norm"
        yield f"{limits} clipped {_how_often(run.overall, steps)}; each counts where one of {len(clipping)} groups was."
    else:
        for group in clipping:
            owner = f"{_group_name(group.name)}: " if len(run.groups) > 1 else ""
            yield f"{owner}{_limits(group)} clipped {_how_often(group, steps)}."
    spared = [_group_name(group.name) for group in run.groups if not group.steps]
    if clipping and spared:
        yield f"{names(spared)} {'was' if len(spared) == 1 else 'were'} not clipped."
    if run.overall.decisions_differ:
        yield (
            f"At {count(run.overall.decisions_differ)} of {count(run.overall.steps)} {steps} the norm that the library "
            "computed is on the other side of max_norm than the exact one."
        )
    # A GradScaler skips steps that are not finite: that has been said.
    if run.steps_skipped and run.steps_skipped != run.nonfinite_skipped:
        yield f"The optimizer skipped {count(run.steps_skipped)} of the {steps}."
    if len(run.phases) > 1:
        before, last = run.phases[-2:]
        trend = "shrank" if last.median_norm < before.median_norm else "grew"
        yield (
            f"The gradients {trend}: since {steps[:-1]} {count(last.steps[0])} their median norm is "
            f"{number(last.median_norm)}; before that it was {number(before.median_norm)}."
        )


def _group_name(name: str) -> str:
    """A clip group named like its module may have nothing but that module's number."""
    return f"clip group {name}" if name.isdigit() else name


def threshold(value: float) -> str:
    """A threshold that was in force: as somebody typed it, else (divided by a loss scale, say) in three digits."""
    return setting(value) if len(setting(value)) <= len("0.00001") else number(value)


def _limits(group: results.RecordedClipping) -> str:
    """What a clip group met: ``max_norm 0.5``, ``max_norm (from 1 to 0.5 in 3 changes) and clip_value 0.1``."""
    limits = []
    if group.max_norm is not None and group.max_norm_changes and group.first_max_norm is not None:
        changes = "1 change" if group.max_norm_changes == 1 else f"{count(group.max_norm_changes)} changes"
        limits.append(f"max_norm (from {threshold(group.first_max_norm)} to {threshold(group.max_norm)} in {changes})")
    elif group.max_norm is not None:
        limits.append(f"max_norm {threshold(group.max_norm)}")
    if group.clip_value is not None:
        limits.append(f"clip_value {threshold(group.clip_value)}")
    return " and ".join(limits)


def _how_often(group: results.RecordedClipping, steps: str) -> str:
    if group.steps == 1:
        return f"{'the' if group.clipped_steps else 'not the'} only {steps[:-1]}"
    if not group.clipped_steps:
        return f"none of the {count(group.steps)} {steps}"
    if group.clipped_steps == group.steps:
        return f"all {count(group.steps)} {steps}: it normalises the gradients; it is no safety net"
    overall = f"{percent(group.clip_rate)} of {count(group.steps)} {steps}"
    recent = group.recent
    if recent.length >= group.steps or math.isnan(recent.clip_rate):
        return overall
    return f"{overall} ({percent(recent.clip_rate)}{_bounds(recent.clip_rate_ci95)} of the last {count(recent.length)})"


def _bounds(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f" [{100 * interval[0]:.0f}–{100 * interval[1]:.0f}]"


def _broken_weights(weights: results.WeightSummary) -> list[str]:
    broken = [t.name for t in weights.tensors if t.nonfinite]
    return [f"The weights hold NaN or Inf, in {names(broken)}."] if broken else []


def _saturation(optimizer: results.OptimizerReport, several: bool, sizes_known: bool) -> list[str]:
    title = f"{optimizer.name}: " if several else ""
    if optimizer.unavailable:
        return [f"{title}Clip saturation is not available: {optimizer.unavailable}."]
    found = []
    for group in optimizer.groups:
        if group.saturation is None or group.max_norm is None:
            continue
        owner = f"{title}{group.name}: " if len(optimizer.groups) > 1 else title
        found.append(owner + _saturation_sentence(group, _window(optimizer), sizes_known))
        found += [f"{owner}{qualification}." for qualification in group.qualifications]
    if not found and optimizer.recent_norm is not None and optimizer.max_norm is None:
        apart = [f"{group.name} {number(group.recent_norm)}" for group in optimizer.groups if group.recent_norm]
        each = f" ({', '.join(apart)})" if len(optimizer.groups) > 1 else ""
        unnamed = "" if len(optimizer.groups) > 1 else "this file names no max_norm; "
        hint = f"{unnamed}with --max-norm its clip saturation can be told."
        found.append(
            f"{title}The recent gradient norm is {number(optimizer.recent_norm)}{each}. {hint[0].upper()}{hint[1:]}"
        )
    return found


def _window(optimizer: results.OptimizerReport) -> str:
    if optimizer.window is None:
        return "recent updates"
    if optimizer.steps is not None and optimizer.steps < optimizer.window:
        return f"{count(optimizer.steps)} updates so far"
    return f"last ~{count(optimizer.window)} updates"


def _saturation_sentence(group: results.OptimizerGroup, window: str, sizes_known: bool) -> str:
    assert group.saturation is not None and group.max_norm is not None
    limit = f"max_norm {setting(group.max_norm)}"
    if group.trained_max_norm is not None:
        return _other_limit_sentence(group, group.trained_max_norm, limit, window)
    if abs(group.saturation - 1) <= _AT_LIMIT:
        said = f"All of the {window} sat at the limit: {limit} normalises your gradients; it is no safety net."
        return said if sizes_known else f"{said} Their true size is not in this file."
    if group.saturation > 1:
        return f"The recent norm that the optimizer saw, {number(group.recent_norm or math.nan)}, is above {limit}."
    at_limit = (group.at_limit_share_at_least or {}).get("0.9", 0.0)
    most = f"at most {percent(group.clipped_share_at_most or 0.0, 'up')} of the {window} were clipped by {limit}"
    if at_limit <= 0:
        return f"{most[0].upper()}{most[1:]}."
    return f"{most[0].upper()}{most[1:]}; at least {percent(at_limit, 'down')} came within 10 % of it or were clipped."


def _other_limit_sentence(group: results.OptimizerGroup, trained: float, limit: str, window: str) -> str:
    """Where the threshold asked about is not the one in force, what the optimizer saw tells less of it."""
    assert group.max_norm is not None
    said = f"This file was trained with max_norm {setting(trained)}, "
    if group.max_norm > trained:
        said += f"so what {limit} would have clipped reached the optimizer as {setting(trained)}"
    else:
        said += f"so {limit} was not in force and gradients above it reached the optimizer"
    most = group.clipped_share_at_most or 0.0
    bound = (
        f"at most {percent(most, 'up')} of the {window} were above {limit}"
        if most < 1
        else f"how many of the {window} were above {limit} cannot be told"
    )
    return f"{said}: {bound}. Their recent norm is {number(group.recent_norm or math.nan)}."


def simulation_findings(simulation: results.Simulation) -> tuple[str, ...]:
    """The sentences for a simulation, most important first."""
    found = _nonfinite(simulation.nonfinite, simulation.steps, skipped=simulation.nonfinite_skipped)
    found += _overflow(simulation.float32_overflow, simulation.steps)
    for result in simulation.results:
        found += _clipping(simulation, result)
    found += _directions(simulation.results)
    found += _updates(simulation.results)
    found += _minibatch_noise(simulation.batch, _cutting(simulation.results))
    over_both = [result for result in simulation.results if result.roles]
    return (*dict.fromkeys(found), *(_role_dominance(simulation, over_both[0]) if over_both else ()))


def _clipping(simulation: results.Simulation, result: results.PolicyResult) -> Iterable[str]:
    if math.isnan(result.clip_rate):
        return
    policy = policy_words(result.policy)
    if simulation.steps == 1:
        yield _one_step(policy, simulation, result)
        return
    recent = result.recent
    length = recent.length
    if recent.clip_rate_ci95 is None:
        interval = " (too few independent steps for an interval)"
    else:
        interval = _bounds(recent.clip_rate_ci95)
    whole = length == simulation.steps
    overall = "" if whole else f" ({percent(result.clip_rate)} overall)"
    which = f"the {'' if whole else 'last '}{count(length)} {step_word(simulation.source)}"
    if is_skip(result):
        yield f"{policy} drops {percent(recent.clip_rate)}{interval} of {which} whole{overall}."
    else:
        yield f"{policy} clips {percent(recent.clip_rate)}{interval} of {which}{overall}."


def _one_step(policy: str, simulation: results.Simulation, result: results.PolicyResult) -> str:
    norm = number(simulation.norm.max, 4)
    if not result.clipped_steps:
        return f"{policy} leaves this gradient alone: its norm is {norm}."
    if is_skip(result):
        return f"{policy} drops this gradient whole: its norm is {norm}."
    return f"{policy} clips this gradient: its norm {norm} becomes {number(norm_after(simulation, result), 4)}."


def norm_after(simulation: results.Simulation, result: results.PolicyResult) -> float:
    """The norm of a single step's gradient after the policy."""
    return simulation.norm.max * result.norm_ratio.max


def _directions(policies: Sequence[results.PolicyResult]) -> Iterable[str]:
    """What becomes of the direction: one sentence for all policies that keep it, one for each that does not."""
    kept = []
    for result in policies:
        change = result.direction_change_deg
        # What skip drops has no direction, and what it leaves is not touched.
        if change is None or math.isnan(change.max) or result.clipped_steps == 0 or is_skip(result):
            continue
        name = policy_words(result.policy)
        if change.max < KEPT_DEG:
            kept.append(name)
        elif change.min == change.max:
            yield f"{name} changes the direction by {number(change.max, 5)}°."
        else:
            yield f"{name} changes the direction by {angle(change.p50)} in the median, up to {angle(change.max)}."
    if kept:
        by = f" by {', '.join(kept)}" if len(policies) > 1 else ""
        yield f"Direction is kept (0°){by}; only the length changes."


def _updates(policies: Sequence[results.PolicyResult]) -> Iterable[str]:
    """How far each policy turns what Adam makes of the gradient."""
    turned = []
    for result in policies:
        change = result.update_direction_change_deg
        if change is None or change.max < KEPT_DEG:
            continue
        name = policy_words(result.policy)
        most = "" if change.min == change.max else f" in the median, up to {angle(change.max)}"
        turned.append(f"{name} by {angle(change.p50)}{most}")
    if turned:
        yield f"Adam's next update turns, since its moments keep their size: {'; '.join(turned)}."


def _cutting(policies: Sequence[results.PolicyResult]) -> dict[str, list[str]]:
    """For each clip group the policies that shorten its gradient at some step."""
    cutting: dict[str, list[str]] = {}
    for result in policies:
        for group in result.groups:
            cutting.setdefault(group.name, []).extend(
                [policy_words(result.policy)] * (group.clip_rate > 0.0 and not is_skip(result))
            )
    return cutting


def _role_dominance(simulation: results.Simulation, result: results.PolicyResult) -> Iterable[str]:
    """Where one norm covers actor and critic and one of them decides it: what the other would have met alone."""
    if not result.roles:
        return
    minor, major = sorted(result.roles, key=lambda role: role.share)
    if major.share < DOMINANT_SHARE:
        return
    alone = ""
    if simulation.steps == 1:
        alone = "" if minor.clip_rate_alone else f"; by itself the {minor.name} would not have been clipped"
    elif round(100 * minor.clip_rate_alone) != round(100 * result.clip_rate):
        alone = (
            f"; by itself the {minor.name} would have been clipped in {percent(minor.clip_rate_alone)} "
            f"of the {step_word(simulation.source)} instead of {percent(result.clip_rate)}"
        )
    yield f"The {major.name} dominates: it holds {percent(major.share)} of the squared norm{alone}."


def step_word(source: results.Source) -> str:
    """What the steps of ``source`` are called: a trace follows the updates, dumps are those that somebody recorded."""
    return "updates" if source.kind == "trace" else "steps"


def step_name(step: results.NonfiniteStep) -> str:
    """The number of a step, and its label where that says more."""
    numbered = f"step {step.step}"
    return numbered if step.label == numbered else f"{numbered} ({step.label})"


def run_words(source: results.Source) -> str:
    """What ``source`` is, where its steps have been called updates: of "recorded SB3 PPO run" the middle says it."""
    words = source.format.removeprefix("recorded ").removesuffix(" run")
    return words if source.kind == "trace" and words != "run" else source.format


def is_skip(result: results.PolicyResult) -> bool:
    """Whether the policy drops whole steps and leaves the others as they are."""
    return result.policy.startswith("skip:")


def policy_words(policy: str) -> str:
    """A policy as its reader thinks of it: ``max_norm 0.5``, ``clip_value 0.1``, else its own name."""
    name, _, arguments = policy.partition(":")
    known = {"norm": "max_norm", "value": "clip_value"}
    return f"{known[name]} {arguments}" if name in known else policy
