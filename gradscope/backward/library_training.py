"""Running a library's own training step for its gradients alone: clipping is noted, the optimizers' step withheld."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from gradscope.errors import GradscopeError


@dataclass(frozen=True, eq=False)
class ClipCall:
    """One call of ``clip_grad_norm_``: the tensors over which it would have taken one norm, and its ``max_norm``."""

    parameters: tuple[Tensor, ...]
    max_norm: float


@dataclass(eq=False)
class TrainingNotes:
    """What a withheld training did: its clip calls in order, and the optimizers that wanted to step, in order."""

    clip_calls: list[ClipCall] = field(default_factory=list)
    stepped: list[Optimizer] = field(default_factory=list)


@contextmanager
def withheld_training(
    modules: Iterable[nn.Module], optimizers: Iterable[Optimizer], variables: Iterable[Tensor] = ()
) -> Iterator[TrainingNotes]:
    """Let a library's training step run inside, and keep nothing of it but the gradients.

    ``modules`` are all that the step may change, targets and normalisers included; ``variables`` are parameters that
    are trained beside them.  Afterwards ``.grad`` of every parameter is what its optimizer saw at its last ``step()``,
    unclipped, and None where no optimizer stepped: what later losses added to it is gone, as it would be at the
    optimizer's next ``zero_grad``.  Weights, buffers, training modes and the optimizers' settings are what they were.
    """
    parts, steppers = list(modules), list(optimizers)
    parameters = _distinct([*(p for part in parts for p in part.parameters()), *variables])
    notes, seen = TrainingNotes(), dict[Tensor, Tensor]()
    with ExitStack() as undo:
        undo.enter_context(unchanged(parts, parameters))
        for optimizer in steppers:
            undo.enter_context(_step_withheld(optimizer, notes, seen))
        undo.enter_context(_clipping_noted(notes))
        for parameter in parameters:
            parameter.grad = None
        undo.callback(_leave_gradients, parameters, seen)
        with torch.enable_grad():
            yield notes


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers of torch, NumPy and Python that depend on ``seed`` alone; outside nothing is drawn from."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)


def minibatch_seed(seed: int, rows: NDArray[np.int64]) -> int:
    """The seed (below 2³²) of the random numbers that a loss draws on a minibatch of these rows.

    It depends on nothing else, so a minibatch that is computed again has the same gradient, and two of them have
    independent noise.
    """
    return zlib.crc32(np.ascontiguousarray(rows, dtype="<i8").tobytes(), seed & 0xFFFFFFFF)


@contextmanager
def foreign_code(what: str) -> Iterator[None]:
    """Turn whatever the code inside raises into one line that begins with ``what``.

    Raises:
        GradscopeError: with the exception's own message; the exception stays its cause.
    """
    try:
        yield
    except GradscopeError:
        raise
    except Exception as error:
        raise raised(what, error) from error


def raised(what: str, error: BaseException) -> GradscopeError:
    """One line on ``error``, which somebody's code raised, with its own message where it has one."""
    try:
        said = " ".join(str(error).split())[:300]
    except Exception:  # noqa: BLE001 - somebody's own __str__
        said = ""
    return GradscopeError(what, f"raised {type(error).__name__}" + (f": {said}" if said else ""))


def _distinct(tensors: Iterable[Tensor]) -> list[Tensor]:
    return list({id(tensor): tensor for tensor in tensors}.values())


def _leave_gradients(parameters: list[Tensor], seen: dict[Tensor, Tensor]) -> None:
    for parameter in parameters:
        parameter.grad = seen.get(parameter)


@contextmanager
def unchanged(modules: Sequence[nn.Module], parameters: Sequence[Tensor]) -> Iterator[None]:
    """Afterwards these parameters, and the buffers and training modes of ``modules``, are what they were."""
    tensors = _distinct([*parameters, *(buffer for part in modules for buffer in part.buffers())])
    with torch.no_grad():
        before = [(tensor, tensor.detach().clone()) for tensor in tensors]
    every = [module for part in modules for module in part.modules()]
    modes = [(module, module.training) for module in every]
    # A training step may put others in their place, as rsl_rl's normaliser does.
    buffers = [(module, dict(module._buffers)) for module in every]
    try:
        yield
    finally:
        for module, held in buffers:
            module._buffers.update(held)
        with torch.no_grad():
            for tensor, kept in before:
                tensor.copy_(kept)
        for module, training in modes:
            module.training = training


@contextmanager
def _step_withheld(optimizer: Optimizer, notes: TrainingNotes, seen: dict[Tensor, Tensor]) -> Iterator[None]:
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]

    def step(closure: Callable[[], Any] | None = None) -> Any:
        loss = closure() if closure is not None else None
        notes.stepped.append(optimizer)
        # What two networks share, rsl_rl gives its optimizer twice.
        for parameter in _distinct(parameter for group in optimizer.param_groups for parameter in group["params"]):
            # Taken away, so that a later loss that also flows through this parameter adds nothing to it.
            if parameter.grad is not None:
                seen[parameter], parameter.grad = parameter.grad, None
            else:
                seen.pop(parameter, None)
        return loss

    with _exchanged(optimizer.__dict__, "step", step):
        try:
            yield
        finally:
            for group, kept in zip(optimizer.param_groups, settings, strict=True):
                group.update(kept)


@contextmanager
def _clipping_noted(notes: TrainingNotes) -> Iterator[None]:
    def clip_grad_norm_(parameters: Any, max_norm: Any, norm_type: Any = 2.0, *rest: Any, **options: Any) -> Tensor:
        listed = (parameters,) if isinstance(parameters, Tensor) else tuple(parameters)
        notes.clip_calls.append(ClipCall(listed, float(max_norm)))
        gradients = [parameter.grad for parameter in listed if parameter.grad is not None]
        norms = [torch.linalg.vector_norm(gradient, float(norm_type)) for gradient in gradients]
        return torch.linalg.vector_norm(torch.stack(norms), float(norm_type)) if norms else torch.tensor(0.0)

    def clip_grad_value_(parameters: Any, clip_value: Any, *rest: Any, **options: Any) -> None:
        return None

    with ExitStack() as undo:
        for name, stand_in in (("clip_grad_norm_", clip_grad_norm_), ("clip_grad_value_", clip_grad_value_)):
            for module in (torch.nn.utils, torch.nn.utils.clip_grad):
                undo.enter_context(_exchanged(module.__dict__, name, stand_in))
        yield


@contextmanager
def _exchanged(names: dict[str, Any], name: str, value: Any) -> Iterator[None]:
    missing = object()
    before = names.get(name, missing)
    names[name] = value
    try:
        yield
    finally:
        if before is missing:
            del names[name]
        else:
            names[name] = before
