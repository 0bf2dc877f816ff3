"""A checkpoint as a source: weights and optimizer states, no gradients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gradscope.errors import GradscopeError
from gradscope.gradients import SAVE_GRADIENTS, GradientSource, GradientStep, Progress, SourceInfo, Weights
from gradscope.optimizer_state import AdamMoments, OptimizerState, ParameterState, StoredMoment
from gradscope.sources.checkpoints.adam_state import adam_moments
from gradscope.sources.checkpoints.parameter_names import is_buffer, is_float
from gradscope.sources.checkpoints.stored_optimizer import SQUARES, StoredOptimizer
from gradscope.sources.formats.tree import Leaf, UnreadableTensor, named_leaves, same_storage
from gradscope.sources.signs import holds_negative
from gradscope.sources.stored import StoredTensor, read, scan
from gradscope.tensors import TensorInfo


@dataclass(frozen=True, slots=True, eq=False)
class ModelParameters:
    """The parameters of a model in its state dict's order.

    ``skipped`` says what else was there and why it is no parameter, ``others`` are those tensors: buffers, integers,
    and tied parameters under their further names.  ``alias_of`` maps these to the name under which the tensor is kept.
    """

    tensors: tuple[StoredTensor, ...] = ()
    skipped: tuple[str, ...] = ()
    others: tuple[StoredTensor, ...] = ()
    alias_of: Mapping[str, str] = field(default_factory=dict)

    @property
    def infos(self) -> list[TensorInfo]:
        """What the tensors are, without their elements."""
        return [tensor.info for tensor in self.tensors]


def model_parameters(leaves: Iterable[tuple[str, Leaf]]) -> ModelParameters:
    """The parameters among the named tensors of a model: no integers, no known buffers, tied tensors once."""
    kept: dict[object, StoredTensor] = {}
    skipped: list[str] = []
    others: list[StoredTensor] = []
    alias_of: dict[str, str] = {}
    for name, leaf in leaves:
        if leaf is None:
            continue
        if isinstance(leaf, UnreadableTensor):
            skipped.append(f"{name}: {leaf.reason}")
            continue
        tensor, key = replace(leaf, info=replace(leaf.info, name=name)), same_storage(leaf)
        if not is_float(leaf.info):
            skipped.append(f"{name}: {leaf.info.dtype}")
        elif is_buffer(name):
            skipped.append(f"{name}: buffer")
        elif key in kept and leaf.info.numel:
            alias_of[name] = kept[key].info.name
            skipped.append(f"{name}: the same tensor as {kept[key].info.name}")
        else:
            kept[key if leaf.info.numel else name] = tensor
            continue
        others.append(tensor)
    return ModelParameters(tuple(kept.values()), tuple(skipped), tuple(others), alias_of)


def parameters_in(tree: object, what: str, prefix: str = "") -> ModelParameters:
    """The parameters in a state dict, or in several nested ones; ``prefix`` goes before every name."""
    return model_parameters((f"{prefix}{name}", leaf) for name, leaf in named_leaves(tree, what))


def picked_newest(info: SourceInfo, checkpoints: Sequence[Path], directory: Path) -> SourceInfo:
    """``info`` of the last of ``checkpoints``, which were found in ``directory``, oldest first."""
    which = f"newest of {len(checkpoints)}" if len(checkpoints) > 1 else "the only checkpoint"
    return replace(info, picked=f"{checkpoints[-1].name}, {which} in {directory}")


@dataclass(eq=False)
class CheckpointSource(GradientSource):
    """Weights and optimizer states; each is read when it is asked for.

    ``others`` are the model's tensors that are no parameters, or are the same as one.
    """

    model: tuple[StoredTensor, ...] = ()
    others: tuple[StoredTensor, ...] = ()
    stored_optimizers: tuple[StoredOptimizer, ...] = ()

    def read_steps(self, steps: range, progress: Progress | None = None) -> Iterator[GradientStep]:
        """A checkpoint has no steps.

        Raises:
            GradscopeError: always; the hint says what does have them.
        """
        raise GradscopeError(
            self.info.path,
            f"is a checkpoint ({self.info.format}) and holds no gradients",
            f"--batch FILE computes them from a captured batch; or {SAVE_GRADIENTS}",
        )

    def weights(self, progress: Progress | None = None) -> Weights | None:
        """The model's parameters, scanned now; None where the checkpoint holds none."""
        if not self.model:
            return None
        by_name = {tensor.info.name: tensor for tensor in self.model}

        def read_whole(name: str) -> NDArray[np.floating]:
            if name not in by_name:
                raise GradscopeError(self.info.path, f"holds no weights of {name}")
            return read(by_name[name])

        return Weights(tuple(tensor.info for tensor in self.model), tuple(scan(self.model, progress)), read_whole)

    def optimizers(self, progress: Progress | None = None) -> tuple[OptimizerState, ...]:
        """The optimizer states, their moments scanned now, in one pass."""
        stored = [
            tensor
            for optimizer in self.stored_optimizers
            for parameter in optimizer.parameters
            for tensor in parameter.moments.values()
        ]
        spectra = iter(scan(stored, progress))
        shapes = {tensor.info.name: tensor.info.shape for tensor in self.model}
        return tuple(
            OptimizerState(
                name=optimizer.name,
                type=optimizer.type,
                param_groups=optimizer.param_groups,
                parameters=tuple(
                    ParameterState(
                        name=parameter.name,
                        shape=shapes.get(parameter.name, parameter.shape),
                        param_group=parameter.param_group,
                        step=parameter.step,
                        moments={
                            key: StoredMoment(
                                tensor.info.shape,
                                tensor.info.dtype,
                                next(spectra),
                                negative=key in SQUARES and holds_negative(tensor),
                            )
                            for key, tensor in parameter.moments.items()
                        },
                    )
                    for parameter in optimizer.parameters
                ),
                clip_groups=optimizer.clip_groups,
            )
            for optimizer in self.stored_optimizers
        )

    def adam_moments(self) -> Mapping[str, AdamMoments] | None:
        """The moments of each parameter, read when they are asked for; None where an optimizer is not Adam or AdamW."""
        weights = {tensor.info.name: tensor for tensor in self.model}
        moments: dict[str, AdamMoments] = {}
        for optimizer in self.stored_optimizers:
            for parameter in optimizer.parameters:
                held = adam_moments(optimizer, parameter, weights.get(parameter.name))
                if held is None:
                    return None
                moments[parameter.name] = held
        return moments or None
