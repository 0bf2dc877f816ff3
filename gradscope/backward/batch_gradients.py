"""A captured batch as a source: one gradient step for each minibatch, computed when it is read."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gradscope.backward.captured import CapturedBatch, read_batch
from gradscope.backward.engine import Engine
from gradscope.backward.options import BatchOptions
from gradscope.errors import GradscopeError
from gradscope.gradients import GradientSource, GradientStep, Progress, SourceInfo, Weights
from gradscope.optimizer_state import OptimizerState
from gradscope.sources.arrays import tree_of
from gradscope.sources.checkpoints import CheckpointSource
from gradscope.sources.stored import MemoryTensor, read, scan
from gradscope.tensors import TensorInfo

Rows = NDArray[np.int64]

MODEL_AND_LOSS = (
    "--model MODULE:FACTORY builds the model, --loss MODULE:FUNCTION takes (model, batch) and returns its loss"
)


def open_batch(checkpoint: GradientSource, options: BatchOptions) -> BatchGradients:
    """The gradients that the training of ``checkpoint`` would compute on a captured batch.

    Raises:
        GradscopeError: the batch or the checkpoint does not serve, or neither names a model and a loss.
    """
    _check(options)
    if not isinstance(checkpoint, CheckpointSource):
        raise GradscopeError("--batch", f"goes with a checkpoint, and {checkpoint.info.path} is {_kind(checkpoint)}")
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


def _check(options: BatchOptions) -> None:
    if options.minibatch_size is not None and options.minibatch_size < 1:
        raise GradscopeError(f"--minibatch-size {options.minibatch_size}", "must be a whole number of at least 1")
    if options.epochs < 1:
        raise GradscopeError(f"--epochs {options.epochs}", "must be a whole number of at least 1")


def _kind(source: GradientSource) -> str:
    return source.info.format


@dataclass(eq=False)
class BatchGradients(GradientSource):
    """The gradient of each minibatch; weights and optimizer states are the checkpoint's."""

    engine: Engine | None = field(default=None, repr=False)
    checkpoint: GradientSource | None = field(default=None, repr=False)
    minibatches: tuple[Rows, ...] = field(default=(), repr=False)
    seed: int = 0

    @classmethod
    def of(cls, engine: Engine, size: int, checkpoint: GradientSource, options: BatchOptions) -> BatchGradients:
        """Minibatches of ``size`` rows, in the order in which the engine's training takes them."""
        with _seeded(options.seed):
            epochs = engine.shuffled(options.epochs)
        minibatches = tuple(rows[start : start + size] for rows in epochs for start in range(0, len(rows), size))
        return cls(
            info=SourceInfo(checkpoint.info.path, "gradients", engine.format, len(minibatches)),
            tensors=tuple(
                TensorInfo(name, tuple(parameter.shape), str(parameter.dtype).removeprefix("torch."))
                for name, parameter in engine.parameters.items()
            ),
            groups=engine.groups,
            notes=engine.notes,
            engine=engine,
            checkpoint=checkpoint,
            minibatches=minibatches,
            seed=options.seed,
        )

    def read_steps(self, steps: range, progress: Progress | None = None) -> Iterator[GradientStep]:
        """The gradients of these minibatches, computed one at a time."""
        for done, position in enumerate(steps, 1):
            yield self._step(position)
            if progress is not None:
                progress(done, len(steps))

    def _step(self, position: int) -> GradientStep:
        assert self.engine is not None
        with _seeded(self.seed + position):
            self.engine.backward(self.minibatches[position])
        gradients = [_take_gradient(parameter) for parameter in self.engine.parameters.values()]
        present = np.array([gradient is not None for gradient in gradients])
        tensors = [_stored(info, gradient) for info, gradient in zip(self.tensors, gradients, strict=True)]
        step = GradientStep.from_spectra(position, f"minibatch {position}", scan(tensors), lambda i: read(tensors[i]))
        return step if present.all() else _with_present(step, present)

    def weights(self, progress: Progress | None = None) -> Weights | None:
        """The parameters of the checkpoint."""
        return self.checkpoint.weights(progress) if self.checkpoint is not None else None

    def optimizers(self, progress: Progress | None = None) -> tuple[OptimizerState, ...]:
        """The optimizer states of the checkpoint."""
        return self.checkpoint.optimizers(progress) if self.checkpoint is not None else ()


def _with_present(step: GradientStep, present: NDArray[np.bool_]) -> GradientStep:
    from dataclasses import replace

    return replace(step, present=present)


def _take_gradient(parameter: torch.nn.Parameter) -> torch.Tensor | None:
    gradient, parameter.grad = parameter.grad, None
    if gradient is None:
        return None
    return gradient.to_dense() if gradient.layout != torch.strided else gradient


def _stored(info: TensorInfo, gradient: torch.Tensor | None) -> MemoryTensor:
    leaf: Any = tree_of(torch.zeros(info.shape) if gradient is None else gradient, info.name)
    return MemoryTensor(TensorInfo(info.name, info.shape, leaf.info.dtype), leaf.array)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The random number generators as after seeding them with ``seed``; afterwards what they were."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
