"""Checkpoints: one file for each family of them; here they are tried in order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from gradscope.gradients import GradientSource
from gradscope.sources.checkpoints import huggingface, lightning, pytorch, rsl_rl, sb3
from gradscope.sources.checkpoints.checkpoint_source import CheckpointSource, picked_newest
from gradscope.sources.checkpoints.pytorch import weights_only
from gradscope.sources.formats.contents import read_contents
from gradscope.sources.formats.tree import Tree

__all__ = ["CheckpointSource", "recognise", "recognise_directory", "weights_only"]

_FAMILIES: tuple[Callable[[Path, Tree], GradientSource | None], ...] = (
    sb3.recognise,
    rsl_rl.recognise,
    lightning.recognise,
    pytorch.recognise,
)


def recognise(path: Path, tree: Tree) -> GradientSource | None:
    """The checkpoint that the file at ``path`` holds as ``tree``; None if it is no checkpoint.

    Raises:
        GradscopeError: it is a checkpoint, and damaged.
    """
    for recognise_family in _FAMILIES:
        source = recognise_family(path, tree)
        if source is not None:
            return source
    return None


def recognise_directory(directory: Path) -> GradientSource | None:
    """The checkpoint in ``directory``: Hugging Face's, or the newest of an rsl_rl run; None if it holds none.

    Raises:
        GradscopeError: it holds one, and it is damaged.
    """
    source = huggingface.recognise_directory(directory)
    if source is not None:
        return source
    run = rsl_rl.checkpoints_of_run(directory)
    source = rsl_rl.recognise(run[-1], read_contents(run[-1]).tree) if run else None
    if source is not None:
        source.info = picked_newest(source.info, run, directory)
    return source
