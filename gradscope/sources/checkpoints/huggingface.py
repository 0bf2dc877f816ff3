"""Hugging Face directories: a Trainer's ``checkpoint-N`` (weights, ``optimizer.pt``, ``training_args.bin``) or a model.

The Trainer gives its optimizer two groups of parameters, those that decay and those that do not
(``Trainer.create_optimizer``), each in the model's order.  Safetensors files are sorted by name and do not keep it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gradscope.errors import GradscopeError
from gradscope.gradients import GradientSource, SourceInfo
from gradscope.sources.checkpoints.checkpoint_source import (
    CheckpointSource,
    ModelParameters,
    parameters_in,
    picked_newest,
)
from gradscope.sources.checkpoints.parameter_names import (
    Candidate,
    InOrder,
    Shape,
    decay_split,
    names_by_shape,
    names_in_order,
)
from gradscope.sources.checkpoints.scalars import attributes_of, max_norm_of, number_of
from gradscope.sources.checkpoints.stored_optimizer import (
    Naming,
    StoredOptimizer,
    is_optimizer_state,
    stored_optimizer,
    whole_clip_group,
)
from gradscope.sources.formats.contents import read_contents

_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
)
_OPTIMIZERS = ("optimizer.pt", "optimizer.bin")
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# Trainer.get_decay_parameter_names; modules of class LayerNorm, whatever their name, hold vectors only.
_NO_DECAY = r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)"


def recognise_directory(directory: Path) -> GradientSource | None:
    """The Trainer checkpoint or model in ``directory``, or the newest ``checkpoint-N`` in it; None if there is none."""
    weights, optimizer = _first(directory, _WEIGHTS), _first(directory, _OPTIMIZERS)
    if optimizer is None and (checkpoints := _checkpoints(directory)):
        source = recognise_directory(checkpoints[-1])
        if source is not None:
            source.info = picked_newest(source.info, checkpoints, directory)
        return source
    if weights is None or not (optimizer or (directory / "config.json").is_file()):
        return None
    model = parameters_in(read_contents(weights).tree, str(weights))
    stored, notes = _optimizers(directory, optimizer, model, in_order=weights.name.startswith("pytorch_model"))
    return CheckpointSource(
        info=SourceInfo(str(directory), "checkpoint", f"Hugging Face {'Trainer checkpoint' if stored else 'model'}", 0),
        skipped=model.skipped,
        notes=notes,
        model=model.tensors,
        others=model.others,
        stored_optimizers=stored,
    )


def _first(directory: Path, names: Sequence[str]) -> Path | None:
    return next((directory / name for name in names if (directory / name).is_file()), None)


def _checkpoints(directory: Path) -> list[Path]:
    """The ``checkpoint-N`` that hold an optimizer, the highest number last."""
    numbered = [
        (int(match[1]), path)
        for path in directory.iterdir()
        if (match := _CHECKPOINT.fullmatch(path.name)) and _first(path, _OPTIMIZERS) is not None
    ]
    return [path for _, path in sorted(numbered)]


def _optimizers(
    directory: Path, path: Path | None, model: ModelParameters, in_order: bool
) -> tuple[tuple[StoredOptimizer, ...], tuple[str, ...]]:
    if path is None:
        return (), ()
    tree = read_contents(path).tree
    if not is_optimizer_state(tree):
        return (), (f"{path.name} holds no optimizer state that gradscope reads.",)
    max_norm, notes = max_grad_norm(directory)
    naming: Naming = _InDecayGroups(model.infos, in_order)
    optimizer = stored_optimizer("optimizer", tree, naming, str(path))
    if optimizer.unnamed:
        notes += (
            f"{optimizer.unnamed:,} of {len(optimizer.parameters):,} optimizer states are left unnamed: "
            "their order in the model is not in these files.",
        )
    return (replace(optimizer, clip_groups=whole_clip_group(optimizer, "model", max_norm)),), notes


def max_grad_norm(directory: Path) -> tuple[float | None, tuple[str, ...]]:
    """``max_grad_norm`` of the pickled TrainingArguments, or a note that says why it is unknown."""
    path = directory / "training_args.bin"
    if not path.is_file():
        return None, ("There is no training_args.bin, so max_norm is unknown (the Trainer's default is 1.0).",)
    try:
        stored = attributes_of(read_contents(path).tree).get("max_grad_norm")
    except GradscopeError as error:
        return None, (f"max_norm is unknown: {error.what}: {error.why}.",)
    if stored is None:
        return None, ("training_args.bin names no max_grad_norm.",)
    value = number_of(stored)
    if value is None:
        return max_norm_of(stored, "training_args.bin")
    if not 0.0 < value < math.inf:
        return None, (f"max_grad_norm {value:g} in training_args.bin means no clipping.",)
    return value, ()


@dataclass(frozen=True, slots=True)
class _InDecayGroups:
    """Names for parameters that are grouped by whether they decay; ``in_order`` if ``model`` is in module order."""

    model: Candidate
    in_order: bool

    def __call__(self, shapes: Sequence[Sequence[Shape]]) -> Sequence[str | None] | None:
        if len(shapes) != 2:
            return InOrder(self.model)(shapes) if self.in_order else self._unordered(shapes, [(self.model,)])
        splits = [decay_split(self.model, pattern) for pattern in (_NO_DECAY, None)]
        if not self.in_order:
            return self._unordered(shapes, splits)
        flat = [shape for group in shapes for shape in group]
        first, second = ([*decaying, *rest] for decaying, rest in splits)
        return names_in_order(flat, first, [second])

    @staticmethod
    def _unordered(
        shapes: Sequence[Sequence[Shape]], splits: Sequence[Sequence[Candidate]]
    ) -> Sequence[str | None] | None:
        """What is certain by shape; where two splits of the model fit, what both say."""
        fitting = []
        for split in splits:
            if len(split) != len(shapes):
                continue
            named = [names_by_shape(group, part) for group, part in zip(shapes, split, strict=True)]
            if all(names is not None for names in named):
                fitting.append([name for names in named for name in names or ()])
        if not fitting:
            return None
        return [names[0] if len(set(names)) == 1 else None for names in zip(*fitting, strict=True)]
