"""A model in memory with a batch and a loss, as a test has them: gradient steps, and all left as it was."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gradscope.backward.batch_gradients import BatchGradients
from gradscope.backward.batch_parts import BATCH, Parts, batches_of, rows_of, rows_picked
from gradscope.backward.generic import GROUP, GenericEngine, trained_parameters
from gradscope.backward.library_training import seeded, unchanged
from gradscope.backward.options import BatchOptions, batch_options
from gradscope.errors import GradscopeError
from gradscope.sources.arrays import tree_of
from gradscope.sources.checkpoints.checkpoint_source import CheckpointSource
from gradscope.sources.checkpoints.pytorch import weights_only
from gradscope.sources.checkpoints.stored_optimizer import StoredOptimizer, stored_optimizer, whole_clip_group
from gradscope.tensors import ClipGroup

if TYPE_CHECKING:
    from gradscope.gradients import GradientSource

IN_MEMORY = "in memory"
CRITERIA = "torch.nn.functional"
CALLED_WITH = "a loss is called with (model, batch); a criterion of (output, target) is an nn.Module or of " + CRITERIA


@contextmanager
def gradients_in_memory(
    model: nn.Module,
    batch: Any,
    loss: Callable[..., Any],
    *,
    optimizer: torch.optim.Optimizer | None = None,
    minibatch_size: int | None = None,
    epochs: int = 1,
    seed: int = 0,
) -> Iterator[GradientSource]:
    """The gradients that ``loss`` has on ``batch``, at the weights that ``model`` has, to be read within the context.

    ``batch`` is what a training loop has of it, [rows, ...] each: a tensor, a mapping or a sequence of tensors, the
    file of a captured batch; or a data loader (or whatever gives batches), of which each batch is a step.  A batch is
    one step, or one for each ``minibatch_size`` of its rows, shuffled ``epochs`` times from ``seed``.

    ``loss`` is a criterion, called as ``loss(model(inputs), targets)``, where it is a module or a function of
    ``torch.nn.functional`` (``functools.partial`` of one, too); the batch is then a pair.  Any other function is called
    as ``loss(model, batch)``.  It gives a scalar, or a loss per row.  A model in eval mode is put into train mode for
    it; the modes of a model in train mode are left to it.

    What the optimizer holds is read as a checkpoint's would be.  Afterwards weights, buffers, gradients, modes and
    random number generators are what they were.

    Raises:
        GradscopeError: model, batch or loss is no such thing, or does not fit; at a step: the loss fails.
    """
    if not isinstance(model, nn.Module):
        raise GradscopeError("model", f"is no torch.nn.Module, but {type(model).__name__}")
    if not callable(loss):
        raise GradscopeError("loss", f"is no function or module, but {type(loss).__name__}")
    options = batch_options({}, minibatch_size=minibatch_size, epochs=epochs, seed=seed)
    assert options is not None
    # A loader that shuffles draws from the generators, too.
    with seeded(seed):
        batches, notes = batches_of(batch)
    engine = _engine(model, batches, loss, options, notes)
    parts = [model, loss] if isinstance(loss, nn.Module) else [model]
    with _gradients_kept(parts), unchanged(parts, _parameters(parts)):
        if not model.training:
            model.train()
        yield _source(engine, _stored(model, optimizer), options)


@dataclass(eq=False)
class InMemoryEngine(GenericEngine):
    """The batches as they were given; rows are counted through all of them."""

    batches: list[Parts] = field(kw_only=True, repr=False)
    starts: NDArray[np.int64] = field(kw_only=True, repr=False)

    def put_into_train_mode(self) -> None:
        """The modes are settled before the first step."""

    def minibatch(self, rows: NDArray[np.int64]) -> Parts:
        """These rows, nested as the batch that holds them all."""
        which = int(np.searchsorted(self.starts, rows[0], side="right")) - 1
        index = torch.from_numpy(np.ascontiguousarray(rows - self.starts[which]))
        return rows_picked(self.batches[which], index, self.device)

    def _returned(self, minibatch: Any) -> object:
        try:
            return super()._returned(minibatch)
        except GradscopeError as error:
            if error.hint is None and isinstance(error.__cause__, TypeError | AttributeError):
                error.hint = CALLED_WITH
            raise

    def refuse_nonfinite(self, value: float) -> None:
        """A loss that is NaN has gradients that are, which is for the rules to find."""


def _engine(
    model: nn.Module, batches: list[Parts], loss: Callable[..., Any], options: BatchOptions, notes: tuple[str, ...]
) -> InMemoryEngine:
    label = type(model).__name__
    if lazy := [name for name, parameter in model.named_parameters() if nn.parameter.is_lazy(parameter)]:
        raise GradscopeError(f"model {label}", f"is lazy ({lazy[0]} has no shape yet)", "run it once before")
    parameters, about = trained_parameters(model, f"model {label}")
    if len(batches) > 1 and (options.minibatch_size is not None or options.epochs > 1):
        raise GradscopeError("minibatch_size and epochs", "go with one batch; of several each is a step")
    sizes = [rows_of(batch) for batch in batches]
    if options.minibatch_size is not None and options.minibatch_size > sizes[0]:
        raise GradscopeError(f"minibatch_size {options.minibatch_size}", f"is more than the {sizes[0]:,} rows of batch")
    return InMemoryEngine(
        format=IN_MEMORY,
        parameters=parameters,
        groups=(ClipGroup(GROUP, tuple(parameters)),),
        rows=sum(sizes),
        minibatch_size=sum(sizes),
        notes=(*notes, *about),
        model=model,
        loss=_called_with_batch(loss, batches),
        loss_name=f"loss {getattr(_innermost(loss), '__name__', type(loss).__name__)}",
        columns=batches[0] if isinstance(batches[0], dict) else {},
        device=next(iter(parameters.values())).device,
        options=options,
        batches=batches,
        starts=np.cumsum([0, *sizes[:-1]], dtype=np.int64),
    )


def _called_with_batch(loss: Callable[..., Any], batches: list[Parts]) -> Callable[[nn.Module, Any], Any]:
    """``loss`` as a function of model and batch."""
    if not isinstance(loss, nn.Module) and getattr(_innermost(loss), "__module__", None) != CRITERIA:
        return loss
    if not all(isinstance(batch, tuple | list) and len(batch) == 2 for batch in batches):
        name = getattr(_innermost(loss), "__name__", type(loss).__name__)
        raise GradscopeError(BATCH, f"is no pair (inputs, targets), with which the criterion {name} goes", CALLED_WITH)

    def of_output(model: nn.Module, batch: Any) -> Any:
        inputs, targets = batch
        return loss(model(inputs), targets)

    return of_output


def _innermost(function: Callable[..., Any]) -> Callable[..., Any]:
    while isinstance(function, functools.partial):
        function = function.func
    return function


def _source(engine: InMemoryEngine, stored: CheckpointSource, options: BatchOptions) -> BatchGradients:
    source = BatchGradients.of(engine, options.minibatch_size or engine.rows, stored, options)
    if len(engine.batches) == 1:
        return source
    ends = [*engine.starts[1:].tolist(), engine.rows]
    each = tuple(np.arange(start, end) for start, end in zip(engine.starts.tolist(), ends, strict=True))
    info = replace(source.info, steps=len(each), format=f"{engine.format}, {len(each)} batches")
    return replace(source, info=info, minibatches=each, independent=len(each))


# --- what stays as it was --------------------------------------------------------------------------------------------


def _parameters(parts: list[nn.Module]) -> list[nn.Parameter]:
    return [parameter for part in parts for parameter in part.parameters()]


@contextmanager
def _gradients_kept(parts: list[nn.Module]) -> Iterator[None]:
    before = [(parameter, parameter.grad) for parameter in _parameters(parts)]
    for parameter, _ in before:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in before:
            parameter.grad = gradient


# --- weights and optimizer -------------------------------------------------------------------------------------------


def _stored(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> CheckpointSource:
    """What a checkpoint of model and optimizer would hold, where it lies in memory."""
    label = type(model).__name__
    weights: Mapping[str, Tensor] = {name: parameter.detach() for name, parameter in model.named_parameters()}
    source = weights_only(Path(label), tree_of(weights, label), IN_MEMORY)
    if optimizer is not None:
        source.stored_optimizers = (_stored_optimizer(model, optimizer),)
    return source


def _stored_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> StoredOptimizer:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise GradscopeError("optimizer", f"is no torch.optim.Optimizer, but {type(optimizer).__name__}")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    state = optimizer.state_dict()
    groups = [
        {**group, "param_names": [names.get(id(p), f"param[{i}]") for i, p in zip(group["params"], live, strict=True)]}
        for group, live in zip(state["param_groups"], (g["params"] for g in optimizer.param_groups), strict=True)
    ]
    tree = tree_of({"state": state["state"], "param_groups": groups}, "optimizer")
    stored = stored_optimizer("optimizer", tree, lambda shapes: None, "optimizer")
    return replace(stored, clip_groups=whole_clip_group(stored, GROUP, None))
