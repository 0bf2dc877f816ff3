"""Lightning checkpoints (``.ckpt``): one ``state_dict``, a list of ``optimizer_states``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from gradscope.gradients import GradientSource, SourceInfo
from gradscope.sources.checkpoints.checkpoint_source import CheckpointSource, parameters_in
from gradscope.sources.checkpoints.parameter_names import InOrder, top_level_parts
from gradscope.sources.checkpoints.scalars import mapping_of
from gradscope.sources.checkpoints.stored_optimizer import is_optimizer_state, stored_optimizer, whole_clip_group
from gradscope.sources.formats.tree import Tree


def recognise(path: Path, tree: Tree) -> GradientSource | None:
    """The Lightning checkpoint in ``tree``; None if it is none."""
    content = mapping_of(tree)
    if content is None or "pytorch-lightning_version" not in content:
        return None
    if mapping_of(content.get("state_dict")) is None:
        return None
    model = parameters_in(content["state_dict"], str(path))
    naming = InOrder(model.infos, top_level_parts(model.infos))
    states = content.get("optimizer_states")
    states = [state for state in states if is_optimizer_state(state)] if isinstance(states, list | tuple) else []
    optimizers = []
    for i, state in enumerate(states):
        optimizer = stored_optimizer("optimizer" if len(states) == 1 else f"optimizer[{i}]", state, naming, str(path))
        optimizers.append(replace(optimizer, clip_groups=whole_clip_group(optimizer, "all", None)))
    return CheckpointSource(
        info=SourceInfo(str(path), "checkpoint", "Lightning checkpoint", 0),
        skipped=model.skipped,
        notes=("Lightning does not keep gradient_clip_val in its checkpoints.",) if optimizers else (),
        model=model.tensors,
        others=model.others,
        stored_optimizers=tuple(optimizers),
    )
