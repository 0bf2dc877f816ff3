"""A checkpoint's weights in a model that somebody's own code made: by name, a common prefix aside."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn

from gradscope.backward.stored_elements import as_torch, elements_of
from gradscope.errors import GradscopeError
from gradscope.sources.checkpoints import CheckpointSource
from gradscope.sources.stored import StoredTensor

MOST_NAMED = 3
# More than one, because of tied parameters a checkpoint may keep one name.
FIRST_NAMES = 8


@dataclass(frozen=True, slots=True)
class FittedWeights:
    """``prefix`` is what the checkpoint writes before the model's names; ``notes`` say what was not used, and why."""

    prefix: str
    notes: tuple[str, ...]


def load_weights(model: nn.Module, checkpoint: CheckpointSource) -> FittedWeights:
    """Copy the checkpoint's weights and buffers into ``model``, one at a time.

    A prefix of the checkpoint's names (``model.`` of Lightning, ``module.`` of DDP) is stripped where what it leaves
    is exactly what the model has.

    Raises:
        GradscopeError: tensors are missing, are unknown to the model, or have other shapes; up to three are named.
    """
    path = checkpoint.info.path
    stored = {tensor.info.name: tensor for tensor in (*checkpoint.model, *checkpoint.others)}
    wanted = _wanted(model, path)
    prefix, notes = _prefix(stored, wanted, checkpoint)
    pairs = [(stored[prefix + name], tensor) for name, tensor in wanted.items() if prefix + name in stored]
    _check_shapes(pairs, path)
    with torch.no_grad():
        for source, target in pairs:
            target.copy_(as_torch(elements_of(source, path)))
    return FittedWeights(prefix, notes)


def _wanted(model: nn.Module, path: str) -> dict[str, Tensor]:
    """The model's parameters and buffers by the names of its state dict."""
    wanted = {name: t for name, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    lazy = next((name for name, tensor in wanted.items() if nn.parameter.is_lazy(tensor)), None)
    if lazy is not None:
        raise GradscopeError(path, f"does not fit a lazy model ({lazy} has no shape)", "let the factory run it once")
    return wanted


def _prefix(
    stored: Mapping[str, StoredTensor], wanted: Mapping[str, Tensor], checkpoint: CheckpointSource
) -> tuple[str, tuple[str, ...]]:
    """The prefix under which the checkpoint has exactly what the model wants, and notes on what lies elsewhere."""
    fitting = [prefix for prefix in _prefixes(stored, wanted) if _fits(prefix, stored, wanted)]
    if not fitting:
        raise _misfit(stored, wanted, checkpoint.info.path)
    trained = {parameter.name for optimizer in checkpoint.stored_optimizers for parameter in optimizer.parameters}
    prefix = max(fitting, key=lambda prefix: sum(name.startswith(prefix) for name in trained))
    notes = []
    if len(fitting) > 1:
        others = _listed([other for other in fitting if other != prefix])
        notes.append(f"The model's weights are those under {prefix!r}; {others} would fit it as well.")
    rest = [name for name in stored if not name.startswith(prefix)]
    if rest:
        notes.append(f"Of the checkpoint, {len(rest):,} tensors are not the model's: {_listed(rest)}.")
    return prefix, tuple(notes)


def _prefixes(stored: Iterable[str], wanted: Iterable[str]) -> list[str]:
    """Every beginning that the checkpoint's names have before one of the model's first names; none comes first."""
    found = {"": None}
    for want in islice(wanted, FIRST_NAMES):
        found |= {name.removesuffix(want): None for name in stored if name.endswith(f".{want}")}
    return list(found)


def _fits(prefix: str, stored: Mapping[str, StoredTensor], wanted: Mapping[str, Tensor]) -> bool:
    missing, unknown = _differences(prefix, stored, wanted)
    return not missing and not unknown


def _differences(
    prefix: str, stored: Mapping[str, StoredTensor], wanted: Mapping[str, Tensor]
) -> tuple[list[str], list[str]]:
    """What the model wants and the checkpoint lacks, and what the checkpoint has under ``prefix`` besides."""
    # Of tied parameters a checkpoint may keep one name.
    there = {id(tensor) for name, tensor in wanted.items() if prefix + name in stored}
    missing = [name for name, tensor in wanted.items() if id(tensor) not in there]
    unknown = [name for name in stored if name.startswith(prefix) and name[len(prefix) :] not in wanted]
    return missing, unknown


def _misfit(stored: Mapping[str, StoredTensor], wanted: Mapping[str, Tensor], path: str) -> GradscopeError:
    """The error for the prefix under which least is amiss."""
    closest = min(
        (_differences(prefix, stored, wanted) for prefix in _prefixes(stored, wanted)),
        key=lambda amiss: len(amiss[0] + amiss[1]),
    )
    missing, unknown = closest
    said = [f"of the model's tensors it lacks {len(missing):,}: {_listed(missing)}"] if missing else []
    said += [f"of its tensors the model lacks {len(unknown):,}: {_listed(unknown)}"] if unknown else []
    return GradscopeError(path, f"does not fit the model: {'; '.join(said)}")


def _check_shapes(pairs: list[tuple[StoredTensor, Tensor]], path: str) -> None:
    amiss = [
        f"{source.info.name} is {_shape(source.info.shape)}, in the model {_shape(tuple(target.shape))}"
        for source, target in pairs
        if source.info.shape != tuple(target.shape)
    ]
    if amiss:
        count = "1 shape differs" if len(amiss) == 1 else f"{len(amiss):,} shapes differ"
        raise GradscopeError(path, f"does not fit the model: {count}: {_listed(amiss, '; ')}")


def _shape(shape: tuple[int, ...]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def _listed(names: list[str], between: str = ", ") -> str:
    more = f" and {len(names) - MOST_NAMED:,} more" if len(names) > MOST_NAMED else ""
    return between.join(names[:MOST_NAMED]) + more
