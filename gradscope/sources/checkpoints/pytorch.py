"""PyTorch training checkpoints of any making: a mapping with state dicts of models and of optimizers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gradscope.gradients import GradientSource, SourceInfo
from gradscope.sources.checkpoints.checkpoint_source import CheckpointSource, ModelParameters, model_parameters
from gradscope.sources.checkpoints.parameter_names import InOrder, Shape, names_in_order, top_level_parts
from gradscope.sources.checkpoints.scalars import mapping_of
from gradscope.sources.checkpoints.stored_optimizer import is_optimizer_state, stored_optimizer, whole_clip_group
from gradscope.sources.formats.tree import Tree, named_leaves
from gradscope.sources.stored import FileTensor, MemoryTensor, StreamTensor

MAX_OPTIMIZERS = 64
_MAIN_MODELS = ("model", "model_state_dict", "state_dict", "net", "network")
# Without an optimizer beside it, only a mapping under such a name is surely a model's weights.
_WEIGHTS_SUFFIX = "state_dict"


def recognise(path: Path, tree: Tree) -> GradientSource | None:
    """The training checkpoint in ``tree``; None if it holds neither an optimizer's nor a model's ``state_dict()``."""
    content = mapping_of(tree)
    if content is None:
        return None
    if is_optimizer_state(content):
        return _source(path, {}, {"optimizer": content})
    states = dict(_optimizer_states(content))
    models = dict(_models(content, needs_suffix=not states))
    return _source(path, models, states) if states or models else None


def weights_only(path: Path, tree: Tree, format_: str) -> CheckpointSource:
    """The tensors of ``tree`` as a model's weights, with no optimizer."""
    model = model_parameters(named_leaves(tree, str(path)))
    info = SourceInfo(str(path), "checkpoint", format_, 0)
    return CheckpointSource(info=info, skipped=model.skipped, model=model.tensors, others=model.others)


def _optimizer_states(content: Mapping[Any, Any]) -> Iterator[tuple[str, Tree]]:
    """Optimizer states at the top, or one mapping or list below it, by a name for each."""
    found = 0
    for key, node in content.items():
        for name, state in _named(str(key), node):
            if is_optimizer_state(state) and found < MAX_OPTIMIZERS:
                found += 1
                yield name, state


def _named(key: str, node: Tree) -> Iterator[tuple[str, Tree]]:
    if is_optimizer_state(node):
        yield key, node
    elif (content := mapping_of(node)) is not None:
        yield from ((f"{key}.{name}", state) for name, state in content.items())
    elif isinstance(node, list | tuple):
        yield from ((key if len(node) == 1 else f"{key}[{i}]", state) for i, state in enumerate(node))


def _models(content: Mapping[Any, Any], needs_suffix: bool) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    for key, node in content.items():
        state = mapping_of(node)
        if state is None or not isinstance(key, str) or is_optimizer_state(state):
            continue
        if _is_state_dict(state) and (key.endswith(_WEIGHTS_SUFFIX) or not needs_suffix):
            yield key, state


def _is_state_dict(state: Mapping[Any, Any]) -> bool:
    tensors = sum(isinstance(value, FileTensor | MemoryTensor | StreamTensor) for value in state.values())
    return tensors > 0 and all(isinstance(key, str) for key in state)


def _source(path: Path, models: Mapping[str, Mapping[Any, Any]], states: Mapping[str, Tree]) -> CheckpointSource:
    what = str(path)
    # One model keeps its own names; several are told apart by their keys.
    model = model_parameters(
        (name if len(models) == 1 else f"{_stem(key)}.{name}", leaf)
        for key, state in models.items()
        for name, leaf in named_leaves(state, what)
    )
    optimizers = []
    for name, state in states.items():
        optimizer = stored_optimizer(name, state, _Naming(_stem(name), tuple(models), model), what)
        optimizers.append(replace(optimizer, clip_groups=whole_clip_group(optimizer, "all", None)))
    return CheckpointSource(
        info=SourceInfo(what, "checkpoint", "PyTorch checkpoint", 0),
        skipped=model.skipped,
        model=model.tensors,
        others=model.others,
        stored_optimizers=tuple(optimizers),
    )


@dataclass(frozen=True, slots=True)
class _Naming:
    """Names for one of a checkpoint's optimizers: of the model or part that bears its name, else of any."""

    stem: str
    models: Sequence[str]
    model: ModelParameters

    def __call__(self, shapes: Sequence[Sequence[Shape]]) -> Sequence[str | None] | None:
        everything = self.model.infos
        parts = top_level_parts(everything)
        # Several models often are one and its moving average: the plain name is the one that is trained.
        main = next((_stem(key) for key in _MAIN_MODELS if key in self.models), "")
        owner = self.stem or (main if len(self.models) > 1 else "")
        own = next((part for part in parts if part[0].name.split(".")[0] == owner), None)
        flat = [shape for group in shapes for shape in group]
        if own is not None and (names := names_in_order(flat, own)) is not None:
            return names
        return InOrder(everything, parts)(shapes)


def _stem(key: str) -> str:
    """``"actor"`` from ``"actor_optimizer_state_dict"``: what a state dict's key says about whose it is."""
    words = [word for word in key.replace(".", "_").replace("-", "_").split("_") if word]
    rest = [word for word in words if word.lower() not in _GENERIC]
    return "_".join(rest) or (key if not words or words[0].lower() not in _OPTIMIZER_WORDS else "")


_OPTIMIZER_WORDS = frozenset({"optimizer", "optimizers", "optim", "opt", "optims"})
_GENERIC = _OPTIMIZER_WORDS | {"state", "states", "dict", "dicts"}
