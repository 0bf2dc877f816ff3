"""Stable-Baselines3 and sb3-contrib checkpoints: a zip of ``data`` (JSON) and one state dict per member.

``BaseAlgorithm.save`` writes ``policy.pth``, ``<attribute>.optimizer.pth`` and ``pytorch_variables.pth``.  ``data``
holds pickles in base64 besides its plain values; only the plain values are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from gradscope.gradients import GradientSource, SourceInfo
from gradscope.sources.checkpoints.checkpoint_source import CheckpointSource, ModelParameters, parameters_in
from gradscope.sources.checkpoints.optimizer_types import class_name
from gradscope.sources.checkpoints.parameter_names import Candidate, InOrder, with_prefix
from gradscope.sources.checkpoints.scalars import mapping_of, max_norm_of, unusable_limit
from gradscope.sources.checkpoints.stored_optimizer import (
    StoredOptimizer,
    is_optimizer_state,
    stored_optimizer,
    whole_clip_group,
)
from gradscope.sources.formats.tree import Tree

# What only one algorithm keeps in ``data``, the more particular first.
_ALGORITHM_MARKS: tuple[tuple[str, str], ...] = (
    ("cg_max_steps", "TRPO"),
    ("n_delta", "ARS"),
    ("top_quantiles_to_drop_per_net", "TQC"),
    ("n_quantiles", "QR-DQN"),
    ("clip_range", "PPO"),
    ("exploration_fraction", "DQN"),
    ("target_policy_noise", "TD3"),
    ("ent_coef", "SAC"),
)
_POLICY_MODULES = {
    "sb3_contrib.common.recurrent.policies": "RecurrentPPO",
    "sb3_contrib.common.maskable.policies": "MaskablePPO",
    "sb3_contrib.crossq.policies": "CrossQ",
    "sb3_contrib.qrdqn.policies": "QR-DQN",
    "sb3_contrib.tqc.policies": "TQC",
    "sb3_contrib.ars.policies": "ARS",
}
_NEVER_CLIP = frozenset({"SAC", "TD3", "DDPG", "TQC", "CrossQ", "TRPO"})


def recognise(path: Path, tree: Tree) -> GradientSource | None:
    """The checkpoint whose zip members ``tree`` holds by name; None if SB3 did not write it."""
    if not isinstance(tree, dict) or not isinstance(tree.get("data"), dict) or not _states(tree):
        return None
    data: dict[str, Any] = tree["data"]
    algorithm = _algorithm(data)
    model = parameters_in(tree.get("policy.pth", {}), str(path))
    optimizers = tuple(
        _optimizer(str(path), name, state, tree, model)
        for name, state in _states(tree).items()
        if is_optimizer_state(state)
    )
    _, doubt = max_norm_of(data.get("max_grad_norm"), "data")
    # What clips at all does so at whatever max_grad_norm is, 0 too; TRPO inherits one and never looks at it.
    lint = () if algorithm in _NEVER_CLIP else unusable_limit(data.get("max_grad_norm"), "data")
    told = not doubt and not lint and ("max_grad_norm" in data or algorithm in _NEVER_CLIP)
    return CheckpointSource(
        info=SourceInfo(str(path), "checkpoint", f"SB3 {algorithm}", 0),
        skipped=model.skipped,
        notes=(*_notes(algorithm, optimizers, told), *doubt),
        findings=tuple(found.message for found in lint),
        lint=lint,
        trained_otherwise=f"{algorithm} trains its actor without the optimizer" if algorithm == "TRPO" else None,
        model=model.tensors,
        others=model.others,
        stored_optimizers=optimizers,
    )


def _states(tree: dict[str, Tree]) -> dict[str, Tree]:
    return {str(name)[: -len(".pth")]: state for name, state in tree.items() if str(name).endswith(".pth")}


def _algorithm(data: Mapping[str, Any]) -> str:
    policy = data.get("policy_class")
    module = policy.get("__module__") if isinstance(policy, dict) else None
    if isinstance(module, str) and module in _POLICY_MODULES:
        return _POLICY_MODULES[module]
    marked = (name for key, name in _ALGORITHM_MARKS if key in data)
    algorithm = next(marked, None)
    if algorithm == "TD3" and data.get("policy_delay") == 1 and data.get("target_noise_clip") == 0.0:
        return "DDPG"
    if algorithm == "SAC" and "gae_lambda" in data:
        return "A2C"
    return algorithm or "policy"


def _optimizer(what: str, name: str, state: Tree, tree: dict[str, Tree], model: ModelParameters) -> StoredOptimizer:
    data: dict[str, Any] = tree["data"]
    owner = name.removesuffix("optimizer").rstrip("._")
    if owner in ("policy", ""):
        # The optimizer trains the whole policy, or of a value network and its target the former.
        parts = [with_prefix(model.infos, "q_net."), with_prefix(model.infos, "quantile_net.")]
        naming = InOrder(model.infos, parts)
    elif owner == "ent_coef":
        naming = InOrder(_variables(tree, what))
    else:
        whole = with_prefix(model.infos, f"{owner}.")
        naming = InOrder(whole, [[info for info in whole if "features_extractor" not in info.name]])
    optimizer = stored_optimizer(name, state, naming, what, _optimizer_class(data) if owner != "ent_coef" else None)
    limit, _ = max_norm_of(data.get("max_grad_norm"), "data")
    return replace(optimizer, clip_groups=whole_clip_group(optimizer, owner or "policy", limit))


def _optimizer_class(data: Mapping[str, Any]) -> str | None:
    policy = data.get("policy_kwargs")
    return class_name(policy.get("optimizer_class")) if isinstance(policy, dict) else None


def _variables(tree: dict[str, Tree], what: str) -> Candidate:
    """The variables beside the policy: the logarithm of the entropy coefficient."""
    for name in ("pytorch_variables.pth", "tensors.pth"):
        if (variables := mapping_of(tree.get(name))) is not None:
            return parameters_in(variables, what).infos
    return []


def _notes(algorithm: str, optimizers: tuple[StoredOptimizer, ...], told: bool) -> tuple[str, ...]:
    if not optimizers:
        return (f"{algorithm} keeps no optimizer in its checkpoints, so nothing is known of its gradients.",)
    if told and all(group.max_norm is None for optimizer in optimizers for group in optimizer.clip_groups):
        return (f"This {algorithm} did not clip its gradients.",)
    return ()
