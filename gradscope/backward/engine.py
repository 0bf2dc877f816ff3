"""What a training's own code does, for ``batch_gradients``: one way to turn rows of a batch into gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from gradscope.tensors import ClipGroup

if TYPE_CHECKING:
    import torch


class Engine(Protocol):
    """A model with its weights, a loss, and a captured batch.

    ``format`` is for people (``"SB3 PPO"``).  ``parameters`` are those that are trained, in the model's order, named as
    in the checkpoint; ``groups`` the clip groups with the max_norm that the training uses.  The batch has ``rows``
    samples, of which the training takes ``minibatch_size`` at a time.  ``notes`` are sentences for the reader.
    """

    format: str
    groups: tuple[ClipGroup, ...]
    rows: int
    minibatch_size: int
    notes: tuple[str, ...]

    @property
    def parameters(self) -> Mapping[str, torch.nn.Parameter]:
        """The trained parameters by name."""

    def shuffled(self, epochs: int) -> list[NDArray[np.int64]]:
        """The order in which the training's own shuffling takes the rows, an int64 [rows] for each epoch.

        Called once, after the random number generators were seeded.
        """

    def backward(self, rows: NDArray[np.int64]) -> None:
        """Leave the gradient of a minibatch of these rows in the parameters, before any clipping; None where it has

        none.  The weights, buffers and targets stay what they were, however often it is called.

        Raises GradscopeError where the loss is no finite number or no gradient comes of it.
        """
