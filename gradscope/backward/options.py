"""What a user says about a captured batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

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
