"""``unused``: parameters that an optimizer holds and that never had a gradient."""

from __future__ import annotations

from gradscope.check_results import Reading
from gradscope.health.evidence import Evidence
from gradscope.health.rule import Limit, Limits, Rule, Verdict
from gradscope.notation import names
from gradscope.optimizer_state import OptimizerState, ParameterState


def judge(evidence: Evidence, limits: Limits) -> Verdict:
    """Count them per optimizer: a recording saw them, a checkpoint holds no state for them."""
    most = limits.number("max")
    if evidence.source.info.kind == "trace":
        readings = [
            Reading(float(len(found.tensors)), most, found.group, (found.first_step, found.first_step), found.message)
            for found in evidence.source.lint
            if found.rule == "unused"
        ]
    elif not evidence.optimizers:
        return Verdict.cannot_tell("only a recorded run or an optimizer's state tells what an optimizer holds")
    else:
        if evidence.source.trained_otherwise is not None:
            return Verdict.cannot_tell(evidence.source.trained_otherwise)
        told = [(state, _unused(state, evidence)) for state in evidence.optimizers]
        readings = [_reading(state, unused, most) for state, unused in told if unused is not None]
        if not readings:
            return Verdict.cannot_tell("no optimizer keeps a state of its parameters")
    nothing = Reading(0.0, most, None, None, "Every parameter that an optimizer holds had a gradient.")
    return Verdict.by_value(readings or [nothing])


def _unused(state: OptimizerState, evidence: Evidence) -> list[str] | None:
    """By the optimizer's state or, where it has none (it has not stepped, or keeps none), by the gradients read."""
    if any(map(_used, state.parameters)):
        return [parameter.name for parameter in state.parameters if not _used(parameter)]
    if evidence.table is None:
        return None
    had = {
        tensor.name: bool(seen.any()) for tensor, seen in zip(evidence.tensors, evidence.table.present.T, strict=True)
    }
    # What the gradients do not name may get one elsewhere.
    known = [parameter.name for parameter in state.parameters if parameter.name in had]
    return [name for name in known if not had[name]] if any(had[name] for name in known) else None


def _reading(state: OptimizerState, unused: list[str], most: float) -> Reading:
    if not unused:
        said = f"Every parameter that {state.name} holds had a gradient."
        return Reading(0.0, most, state.name, None, said)
    said = (
        f"{len(unused)} of the {len(state.parameters)} parameters of {state.name} never had a gradient: "
        f"{names(unused)}; take them out of the optimizer, or into the loss."
    )
    return Reading(float(len(unused)), most, state.name, None, said)


def _used(parameter: ParameterState) -> bool:
    # Some optimizers make their state when they are built; the count of steps then stays at 0.
    return bool(parameter.moments) if parameter.step is None else parameter.step > 0.0


UNUSED = Rule(
    name="unused",
    severity="error",
    about="A parameter that the optimizer holds never had a gradient.",
    formula="parameters of an optimizer without a gradient at any step (checkpoint: without state, while others have; "
    "without any state, those of the batch's gradients)",
    source="torch.optim: a parameter whose .grad is None is passed over, and no state is made for it",
    limits=(Limit("max", 0.0, "most such parameters of one optimizer"),),
    judge=judge,
)
