"""What a user says about a captured batch."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from gradscope.errors import GradscopeError

if TYPE_CHECKING:
    import torch

# ``MODULE:NAME``, or in Python the thing itself: a module, or a class or function that makes one.
ModelChoice: TypeAlias = "str | torch.nn.Module | Callable[[], torch.nn.Module]"
LossChoice: TypeAlias = "str | Callable[[torch.nn.Module, dict[str, torch.Tensor]], torch.Tensor]"


@dataclass(frozen=True, slots=True)
class BatchOptions:
    """A captured batch (a file, or a mapping of names to arrays), and how gradients come of it.

    ``model`` and ``loss`` are for models that no library makes from the checkpoint; ``minibatch_size`` None is that of
    the training, or all rows at once.  ``trust`` allows to unpickle what the checkpoint holds.  ``device`` and
    ``dtype`` (None: the model's own) are torch's, by name.
    """

    batch: Path | Mapping[str, Any]
    model: ModelChoice | None = None
    loss: LossChoice | None = None
    minibatch_size: int | None = None
    epochs: int = 1
    seed: int = 0
    trust: bool = False
    device: str = "cpu"
    dtype: str | None = None


def batch_options(batch: str | os.PathLike[str] | Mapping[str, Any] | None, **given: Any) -> BatchOptions | None:
    """The options of a captured batch; None without one.

    Raises:
        GradscopeError: there is none, and an option that needs one was given; or a number is below 1.
    """
    if batch is None:
        for option in fields(BatchOptions):
            if option.name in given and given[option.name] != option.default:
                raise GradscopeError(f"--{option.name.replace('_', '-')}", "goes with --batch FILE")
        return None
    options = BatchOptions(batch if isinstance(batch, Mapping) else Path(batch), **given)
    for name, number in (("--minibatch-size", options.minibatch_size), ("--epochs", options.epochs)):
        if number is not None and not (isinstance(number, int) and number >= 1):
            raise GradscopeError(f"{name} {number}", "must be a whole number of at least 1")
    if not (isinstance(options.seed, int) and 0 <= options.seed < 1 << 32):
        raise GradscopeError(f"--seed {options.seed}", "must be a whole number from 0 to 4294967295")
    return options


def as_arguments(options: BatchOptions) -> str | None:
    """The options as a command line has them; None where they hold objects, which none can name."""
    words = []
    for option in fields(BatchOptions):
        value = getattr(options, option.name)
        if value == option.default:
            continue
        if not isinstance(value, str | int | Path):
            return None
        words.append(f"--{option.name.replace('_', '-')}")
        if value is not True:
            words.append(shlex.quote(str(value)))
    return " ".join(words)
