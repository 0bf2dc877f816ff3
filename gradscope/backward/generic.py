"""Any model and any loss: ``--model`` builds the one, ``--loss`` is the other, the weights are the checkpoint's."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gradscope.backward.captured import CapturedBatch
from gradscope.backward.fitting_weights import load_weights
from gradscope.backward.imported import imported, their_code
from gradscope.backward.library_training import minibatch_seed, seeded
from gradscope.backward.options import BatchOptions
from gradscope.backward.placement import device_of, dtype_of
from gradscope.errors import GradscopeError
from gradscope.sources.checkpoints import CheckpointSource
from gradscope.tensors import ClipGroup

GROUP = "all"
MOST_NAMED = 3
DEPEND = "no .item(), .detach(), .numpy() or torch.no_grad() may lie between the parameters and the loss"


def open_generic(path: Path, source: CheckpointSource, batch: CapturedBatch, options: BatchOptions) -> GenericEngine:
    """The model of ``options`` with the weights of ``source``, its loss, and the batch.

    Raises:
        GradscopeError: model or loss is missing or no such thing, the factory fails, or the weights do not fit.
    """
    if options.model is None or options.loss is None:
        given, missing = (
            ("--loss", "--model MODULE:FACTORY") if options.model is None else ("--model", "--loss MODULE:FUNCTION")
        )
        raise GradscopeError(given, f"goes with {missing}")
    device, dtype = device_of(options), dtype_of(options)
    loss, loss_name = _resolved(options.loss, "--loss")
    if not callable(loss):
        raise GradscopeError(loss_name, f"is no function, but {_kind(loss)}")
    model, model_name = _model(options)
    fitted = load_weights(model, source)
    with their_code(model_name):
        model.to(device=device, dtype=dtype)
    parameters, notes = trained_parameters(model, model_name)
    named = {fitted.prefix + name: parameter for name, parameter in parameters.items()}
    return GenericEngine(
        format=f"{type(model).__name__} from {source.info.format}",
        parameters=named,
        groups=(ClipGroup(GROUP, tuple(named)),),
        rows=batch.rows,
        minibatch_size=batch.rows,
        notes=(*fitted.notes, *notes),
        model=model,
        loss=loss,
        loss_name=loss_name,
        columns=_cast(batch.tensors(), dtype),
        device=device,
        options=options,
    )


@dataclass(eq=False)
class GenericEngine:
    """The loss of the model on rows of the batch, in train mode; each minibatch has random numbers of its own."""

    format: str
    parameters: Mapping[str, nn.Parameter]
    groups: tuple[ClipGroup, ...]
    rows: int
    minibatch_size: int
    notes: tuple[str, ...]
    model: nn.Module = field(repr=False)
    loss: Callable[[nn.Module, Any], Any] = field(repr=False)
    loss_name: str
    columns: Mapping[str, Tensor] = field(repr=False)
    device: torch.device
    options: BatchOptions
    _buffers: list[tuple[nn.Module, str, Tensor, Tensor]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._buffers = [
            (module, name, buffer, buffer.clone())
            for module in self.model.modules()
            for name, buffer in module.named_buffers(recurse=False)
        ]

    def shuffled(self, epochs: int) -> list[NDArray[np.int64]]:
        """A random permutation for each epoch; the rows as they stand where one minibatch holds them all."""
        if (self.options.minibatch_size or self.rows) >= self.rows:
            return [np.arange(self.rows, dtype=np.int64)] * epochs
        return [torch.randperm(self.rows).numpy() for _ in range(epochs)]

    def backward(self, rows: NDArray[np.int64]) -> None:
        """Leave the gradient of the loss on these rows in the parameters.

        Raises:
            GradscopeError: the loss fails, is no finite scalar, or does not depend on the parameters.
        """
        minibatch = self.minibatch(rows)
        before = [parameter._version for parameter in self.parameters.values()]
        self.put_into_train_mode()
        self.model.zero_grad(set_to_none=True)
        try:
            with seeded(minibatch_seed(self.options.seed, rows)), torch.enable_grad():
                self._differentiate(minibatch, len(rows))
        finally:
            self._restore_buffers()
        if before != [parameter._version for parameter in self.parameters.values()]:
            raise GradscopeError(self.loss_name, "changed the model's weights", "it must not step an optimizer")

    def put_into_train_mode(self) -> None:
        """The whole model is trained."""
        self.model.train()

    def minibatch(self, rows: NDArray[np.int64]) -> Any:
        """These rows of the batch, as the loss is to get them."""
        index = torch.from_numpy(np.ascontiguousarray(rows))
        return {name: column[index].to(self.device) for name, column in self.columns.items()}

    def refuse_nonfinite(self, value: float) -> None:
        """Raises GradscopeError of a loss that is NaN or infinite."""
        if not math.isfinite(value):
            raise GradscopeError(self.loss_name, f"returned {value}")

    def _differentiate(self, minibatch: Any, rows: int) -> None:
        loss = self._scalar(self._returned(minibatch), rows)
        if any(parameter.grad is not None for parameter in self.parameters.values()):
            raise GradscopeError(self.loss_name, "called backward() itself", "it is to return the loss alone")
        self.refuse_nonfinite(float(loss.detach()))
        with their_code(f"{self.loss_name}: its backward()"):
            torch.autograd.backward(loss)
        if all(parameter.grad is None for parameter in self.parameters.values()):
            raise GradscopeError(self.loss_name, "no gradient of its loss reaches any parameter", DEPEND)

    def _returned(self, minibatch: Any) -> object:
        try:
            with their_code(self.loss_name):
                return self.loss(self.model, minibatch)
        except GradscopeError as error:
            key = error.__cause__.args[0] if isinstance(error.__cause__, KeyError) and error.__cause__.args else None
            if isinstance(key, str) and self.columns and key not in self.columns:
                error.hint = f"the batch has {_listed(list(self.columns))}"
            raise

    def _scalar(self, returned: object, rows: int) -> Tensor:
        if not isinstance(returned, Tensor):
            raise GradscopeError(self.loss_name, f"returned {_kind(returned)}, not a tensor")
        if returned.numel() != 1 and tuple(returned.shape) != (rows,):
            shape = ", ".join(map(str, returned.shape))
            raise GradscopeError(
                self.loss_name,
                f"returned a tensor of shape [{shape}], neither a scalar nor one loss for each of the {rows:,} rows",
            )
        if not returned.is_floating_point():
            raise GradscopeError(self.loss_name, f"returned {returned.dtype}, which has no gradient")
        if not returned.requires_grad:
            raise GradscopeError(self.loss_name, "its loss does not depend on the parameters", DEPEND)
        return returned.mean()

    def _restore_buffers(self) -> None:
        with torch.no_grad():
            for module, name, buffer, kept in self._buffers:
                buffer.copy_(kept)
                module._buffers[name] = buffer


def _model(options: BatchOptions) -> tuple[nn.Module, str]:
    factory, name = _resolved(options.model, "--model")
    if isinstance(factory, nn.Module):
        # The weights go into a copy: the module is somebody's own.
        with their_code(name):
            return copy.deepcopy(factory), name
    if not callable(factory):
        raise GradscopeError(name, f"is no function or class that makes a torch.nn.Module, but {_kind(factory)}")
    with seeded(options.seed), their_code(name):
        model = factory()
    if not isinstance(model, nn.Module):
        raise GradscopeError(name, f"returned {_kind(model)}, not a torch.nn.Module")
    return model, name


def _resolved(choice: Any, option: str) -> tuple[Any, str]:
    """What was chosen, and its name in errors."""
    if isinstance(choice, str):
        return imported(choice, option), f"{option} {choice}"
    return choice, f"{option[2:]} {getattr(choice, '__name__', type(choice).__name__)}"


def trained_parameters(model: nn.Module, name: str) -> tuple[dict[str, nn.Parameter], tuple[str, ...]]:
    """The parameters that are trained, and notes on the others."""
    everything = dict(model.named_parameters())
    trained = {n: p for n, p in everything.items() if p.requires_grad and p.is_floating_point()}
    if not trained:
        raise GradscopeError(name, "its model has no trainable parameters")
    frozen = [n for n, p in everything.items() if not p.requires_grad]
    complex_ = [n for n, p in everything.items() if p.requires_grad and not p.is_floating_point()]
    notes = [f"Frozen in the model, and so without gradient: {_listed(frozen)}."] if frozen else []
    notes += [f"Left out, not being real numbers: {_listed(complex_)}."] if complex_ else []
    return trained, tuple(notes)


def _cast(columns: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    return {n: c.to(dtype) if dtype is not None and c.is_floating_point() else c for n, c in columns.items()}


def _kind(value: object) -> str:
    name = type(value).__name__
    return "nothing (None)" if value is None else f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - MOST_NAMED:,} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more
