"""A captured batch as a source: one gradient step for each minibatch, computed when it is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from gradscope.backward.captured import CapturedBatch, read_batch
from gradscope.backward.engine import Engine
from gradscope.backward.library_training import seeded
from gradscope.backward.options import BatchOptions, as_arguments
from gradscope.backward.placement import device_of, dtype_of
from gradscope.errors import GradscopeError
from gradscope.gradients import GradientSource, GradientStep, Progress, Weights
from gradscope.optimizer_state import AdamMoments, OptimizerState
from gradscope.sources.arrays import tree_of
from gradscope.sources.checkpoints import CheckpointSource
from gradscope.sources.formats.numpy_arrays import BITS
from gradscope.sources.stored import MemoryTensor, read, scan
from gradscope.tensors import TensorInfo

Rows = NDArray[np.int64]

MOST_NAMED = 3

MODEL_AND_LOSS = (
    "--model MODULE:FACTORY builds the model, --loss MODULE:FUNCTION takes (model, batch) and returns its loss"
)


def open_batch(checkpoint: GradientSource, options: BatchOptions) -> BatchGradients:
    """The gradients that the training of ``checkpoint`` would compute on a captured batch.

    Raises:
        GradscopeError: the batch or the checkpoint does not serve, or neither names a model and a loss.
    """
    if not isinstance(checkpoint, CheckpointSource):
        raise GradscopeError("--batch", f"goes with a checkpoint, and {checkpoint.info.path} is {_kind(checkpoint)}")
    # Told before anything is loaded.
    device_of(options)
    dtype_of(options)
    batch = read_batch(options.batch)
    engine = _engine(checkpoint, batch, options)
    size = options.minibatch_size or engine.minibatch_size
    if size > engine.rows:
        raise GradscopeError(f"--minibatch-size {size}", f"is more than the {engine.rows:,} rows of {batch.path}")
    return BatchGradients.of(engine, size, checkpoint, options)


def _engine(checkpoint: CheckpointSource, batch: CapturedBatch, options: BatchOptions) -> Engine:
    path, family = Path(checkpoint.info.path), checkpoint.info.format.split()[0]
    if options.model is not None or options.loss is not None:
        from gradscope.backward.generic import open_generic

        return open_generic(path, checkpoint, batch, options)
    if family == "SB3":
        from gradscope.backward.sb3 import open_sb3

        return open_sb3(path, checkpoint, batch, options)
    if family == "rsl_rl":
        from gradscope.backward.rsl_rl import open_rsl_rl

        return open_rsl_rl(path, checkpoint, batch, options)
    raise GradscopeError(
        str(path), f"does not say what model and loss it belongs to ({checkpoint.info.format})", MODEL_AND_LOSS
    )


def _kind(source: GradientSource) -> str:
    kinds = {"trace": "a recorded run", "norm-log": "a log of norms", "gradients": "no checkpoint"}
    return f"{kinds.get(source.info.kind, source.info.kind)} ({source.info.format})"


@dataclass(eq=False)
class BatchGradients(GradientSource):
    """The gradient of each minibatch; weights and optimizer states are the checkpoint's."""

    engine: Engine = field(kw_only=True, repr=False)
    checkpoint: GradientSource = field(kw_only=True, repr=False)
    minibatches: tuple[Rows, ...] = field(kw_only=True, repr=False)
    # Disjoint, as those of the first epoch are.
    independent: int = field(kw_only=True)
    reached: NDArray[np.bool_] = field(init=False, repr=False)
    read_unit: ClassVar[str] = "rows"
    in_time: ClassVar[bool] = False

    @classmethod
    def of(cls, engine: Engine, size: int, checkpoint: GradientSource, options: BatchOptions) -> BatchGradients:
        """Minibatches of ``size`` rows, in the order in which the engine's training takes them."""
        with seeded(options.seed):
            epochs = engine.shuffled(options.epochs)
        cut = [[rows[start : start + size] for start in range(0, len(rows), size)] for rows in epochs]
        minibatches = tuple(rows for epoch in cut for rows in epoch)
        format_ = f"{engine.format}, {engine.rows:,} captured rows"
        return cls(
            info=replace(
                checkpoint.info,
                kind="gradients",
                format=format_,
                steps=len(minibatches),
                arguments=as_arguments(options),
            ),
            tensors=tuple(
                TensorInfo(name, tuple(parameter.shape), str(parameter.dtype).removeprefix("torch."))
                for name, parameter in engine.parameters.items()
            ),
            groups=engine.groups,
            notes=engine.notes,
            lint=checkpoint.lint,
            engine=engine,
            checkpoint=checkpoint,
            minibatches=minibatches,
            independent=len(cut[0]),
        )

    def __post_init__(self) -> None:
        self.reached = np.zeros(len(self.tensors), dtype=np.bool_)

    def read_steps(self, steps: range, progress: Progress | None = None) -> Iterator[GradientStep]:
        """The gradients of these minibatches, computed one at a time; the progress is told in rows.

        Raises:
            GradscopeError: a loss fails or is not finite; the step is named.
        """
        done, total = 0, sum(len(self.minibatches[position]) for position in steps)
        for position in steps:
            yield self._step(position)
            done += len(self.minibatches[position])
            if progress is not None:
                progress(done, total)

    def weights(self, progress: Progress | None = None) -> Weights | None:
        """The parameters of the checkpoint."""
        return self.checkpoint.weights()

    def optimizers(self, progress: Progress | None = None) -> tuple[OptimizerState, ...]:
        """The optimizer states of the checkpoint."""
        return self.checkpoint.optimizers()

    def adam_moments(self) -> Mapping[str, AdamMoments] | None:
        """What the checkpoint's optimizers of the Adam family hold."""
        return self.checkpoint.adam_moments()

    def _step(self, position: int) -> GradientStep:
        rows = self.minibatches[position]
        try:
            self.engine.backward(rows)
        except GradscopeError as error:
            if len(self.minibatches) == 1:
                raise
            raise GradscopeError(error.what, f"{error.why} (at step {position})", error.hint) from error
        gradients = [_take_gradient(parameter) for parameter in self.engine.parameters.values()]
        present = np.array([gradient is not None for gradient in gradients], dtype=np.bool_)
        self.reached |= present
        self._note_unreached()
        tensors = [_stored(info, gradient) for info, gradient in zip(self.tensors, gradients, strict=True)]
        step = GradientStep.from_spectra(position, f"minibatch {position}", scan(tensors), lambda i: read(tensors[i]))
        return replace(
            step,
            present=None if present.all() else present,
            samples=len(rows) if position < self.independent else None,
        )

    def _note_unreached(self) -> None:
        """Name the parameters that had a gradient at none of the steps read so far."""
        names = [info.name for info, reached in zip(self.tensors, self.reached, strict=True) if not reached]
        self.notes = self.engine.notes
        if names:
            more = f" and {len(names) - MOST_NAMED:,} more" if len(names) > MOST_NAMED else ""
            self.notes += (f"No gradient reaches {', '.join(names[:MOST_NAMED])}{more}.",)


def _take_gradient(parameter: torch.nn.Parameter) -> torch.Tensor | None:
    """The gradient, which the parameter gives up: no later minibatch is to write into it."""
    gradient, parameter.grad = parameter.grad, None
    return gradient.to_dense() if gradient is not None and gradient.layout != torch.strided else gradient


def _stored(info: TensorInfo, gradient: torch.Tensor | None) -> MemoryTensor:
    if gradient is None:
        # Clipping sees it as zero.
        return MemoryTensor(info, np.zeros(info.shape, BITS[info.dtype]))
    leaf: Any = tree_of(gradient, info.name)
    return MemoryTensor(TensorInfo(info.name, info.shape, leaf.info.dtype), leaf.array)
