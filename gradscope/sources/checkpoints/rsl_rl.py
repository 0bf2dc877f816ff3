"""rsl_rl checkpoints: ``model_*.pt`` of Isaac Lab and legged_gym, with ``params/agent.yaml`` beside them.

Up to 3.x one ``model_state_dict`` holds the whole policy, which one ``clip_grad_norm_`` covers; since 4.0 actor and
critic have a state dict and a clip each, under one optimizer (``algorithms/ppo.py``, ``save`` and ``update``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gradscope.errors import GradscopeError
from gradscope.gradients import GradientSource, SourceInfo
from gradscope.sources.checkpoints.checkpoint_source import CheckpointSource, ModelParameters, model_parameters
from gradscope.sources.checkpoints.parameter_names import InOrder, with_prefix
from gradscope.sources.checkpoints.scalars import mapping_of, max_norm_of, unusable_limit
from gradscope.sources.checkpoints.stored_optimizer import (
    StoredOptimizer,
    is_optimizer_state,
    stored_optimizer,
    whole_clip_group,
)
from gradscope.sources.formats.file_region import FileRegion
from gradscope.sources.formats.tree import Tree, named_leaves
from gradscope.tensors import ClipGroup
from gradscope.trace.schema import LintFinding

MAX_YAML_BYTES = 1 << 18
_MODELS = ("model", "actor", "critic", "student", "teacher", "rnd")
_RUN_FILE = re.compile(r"model_(\d+)\.pt")


def recognise(path: Path, tree: Tree) -> GradientSource | None:
    """The rsl_rl checkpoint in ``tree``; None if it is none."""
    content = mapping_of(tree)
    if content is None or not {"optimizer_state_dict", "iter", "infos"} <= content.keys():
        return None
    models = {name: state for name in _MODELS if (state := mapping_of(content.get(f"{name}_state_dict"))) is not None}
    if not models or not is_optimizer_state(content["optimizer_state_dict"]):
        return None
    model = _parameters(models, str(path))
    max_norm, notes, lint = _max_norm(path)
    algorithm = _algorithm(models, model)
    # Its distillation takes 0 for no clipping, its PPO clips at it.
    lint = () if algorithm == "Distillation" and max_norm is None and not notes else lint
    optimizers = [_policy_optimizer(str(path), content["optimizer_state_dict"], models, model, max_norm)]
    if is_optimizer_state(content.get("rnd_optimizer_state_dict")):
        optimizers.append(_rnd_optimizer(str(path), content["rnd_optimizer_state_dict"], model))
    return CheckpointSource(
        info=SourceInfo(str(path), "checkpoint", f"rsl_rl {algorithm}", 0),
        skipped=model.skipped,
        notes=notes,
        findings=tuple(found.message for found in lint),
        lint=lint,
        model=model.tensors,
        others=model.others,
        stored_optimizers=tuple(optimizers),
    )


def checkpoints_of_run(directory: Path) -> list[Path]:
    """The ``model_*.pt`` of a run's directory, the highest number last."""
    numbered = [(int(match[1]), path) for path in directory.iterdir() if (match := _RUN_FILE.fullmatch(path.name))]
    return [path for _, path in sorted(numbered)]


def _parameters(models: Mapping[str, Mapping[Any, Any]], what: str) -> ModelParameters:
    """All models' parameters under one set of names; up to 3.x the policy's own names already tell its parts."""
    return model_parameters(
        (name if model == "model" else f"{model}.{name}", leaf)
        for model, state in models.items()
        for name, leaf in named_leaves(state, what)
    )


def _algorithm(models: Mapping[str, Any], model: ModelParameters) -> str:
    students = "student" in models or any(info.name.startswith("student.") for info in model.infos)
    return "Distillation" if students else "PPO"


def _policy_optimizer(
    what: str, state: Tree, models: Mapping[str, Any], model: ModelParameters, max_norm: float | None
) -> StoredOptimizer:
    if "student" in models or _algorithm(models, model) == "Distillation":
        optimizer = stored_optimizer("optimizer", state, InOrder(with_prefix(model.infos, "student.")), what)
        return replace(optimizer, clip_groups=whole_clip_group(optimizer, "student", max_norm))
    trained = [info for info in model.infos if not info.name.startswith(("rnd.", "teacher."))]
    optimizer = stored_optimizer("optimizer", state, InOrder(trained), what)
    if "model" in models:
        return replace(optimizer, clip_groups=whole_clip_group(optimizer, "policy", max_norm))
    return replace(optimizer, clip_groups=_actor_and_critic(optimizer.names, model, max_norm))


def _actor_and_critic(names: Sequence[str], model: ModelParameters, max_norm: float | None) -> tuple[ClipGroup, ...]:
    """The two clips since 4.0.  An encoder that both networks hold is in both of them."""
    groups = []
    for part in ("actor", "critic"):
        shared = {kept for alias, kept in model.alias_of.items() if alias.startswith(f"{part}.")}
        members = tuple(name for name in names if name.startswith(f"{part}.") or name in shared)
        groups.append(ClipGroup(part, members, max_norm))
    # Without names it cannot be told which state is whose.
    return tuple(groups) if all(group.tensors for group in groups) else ()


def _rnd_optimizer(what: str, state: Tree, model: ModelParameters) -> StoredOptimizer:
    """Random network distillation: rsl_rl steps its own optimizer without a clip."""
    rnd = with_prefix(model.infos, "rnd.")
    optimizer = stored_optimizer("rnd_optimizer", state, InOrder(rnd, [with_prefix(rnd, "rnd.predictor.")]), what)
    return replace(optimizer, clip_groups=whole_clip_group(optimizer, "rnd", None))


# --- params/agent.yaml -----------------------------------------------------------------------------------------------


def _max_norm(checkpoint: Path) -> tuple[float | None, tuple[str, ...], tuple[LintFinding, ...]]:
    """``algorithm.max_grad_norm`` of the run that ``checkpoint`` lies in, or a note that says why it is unknown.

    And what is wrong with it, if it cannot be meant.
    """
    path = checkpoint.parent / "params" / "agent.yaml"
    if not path.is_file():
        said = "There is no params/agent.yaml beside it, so max_norm is unknown (rsl_rl's default is 1.0)."
        return None, (said,), ()
    try:
        value = max_grad_norm_in(path)
    except GradscopeError as error:
        return None, (f"max_norm is unknown: {error.what}: {error.why}.",), ()
    if value is None:
        return None, ("params/agent.yaml names no max_grad_norm.",), ()
    return *max_norm_of(value, "params/agent.yaml"), unusable_limit(value, "params/agent.yaml")


def max_grad_norm_in(path: Path) -> float | str | None:
    """``algorithm.max_grad_norm`` in an ``agent.yaml``; its text if it is no number, None if it is absent.

    The file is only parsed, never constructed: Isaac Lab's hold Python tags, which stay text.

    Raises:
        GradscopeError: it is too large, or no YAML.
    """
    import yaml

    region = FileRegion.whole(path)
    if region.size > MAX_YAML_BYTES:
        raise GradscopeError(str(path), f"is too large for a run's settings ({region.size:,} bytes)")
    try:
        root = yaml.compose(region.read(), Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError, UnicodeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise GradscopeError(str(path), f"is no YAML ({reason})") from None
    value = _entry(_entry(root, "algorithm"), "max_grad_norm")
    if value is None:
        return None
    text = value.value if isinstance(value, yaml.ScalarNode) else "no number"
    if text in ("", "~", "null"):
        return None
    try:
        # YAML writes .inf and .nan.
        return float(text.replace(".inf", "inf").replace(".nan", "nan"))
    except ValueError:
        return str(text)


def _entry(node: Any, key: str) -> Any:
    """The value of ``key`` in a YAML mapping node; None if there is none."""
    import yaml

    if not isinstance(node, yaml.MappingNode):
        return None
    return next((value for name, value in node.value if name.value == key), None)
