"""The nouns of an optimizer's state, as a checkpoint keeps it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradscope.spectrum import MagnitudeSpectrum
from gradscope.tensors import ClipGroup


@dataclass(frozen=True, slots=True, eq=False)
class StoredMoment:
    """One state tensor of one parameter (``exp_avg_sq``, ``square_avg``…).

    ``negative``: whether it holds a number below zero; looked for in averages of squares only.
    """

    shape: tuple[int, ...]
    dtype: str
    spectrum: MagnitudeSpectrum
    negative: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class ParameterState:
    """What the optimizer holds for one parameter.

    ``name`` is the parameter's name where it could be told, else ``param[i]``; ``shape`` likewise, else that of the
    state (None where that has none).  ``param_group`` indexes ``OptimizerState.param_groups``.  ``step`` counts its
    updates.
    """

    name: str
    shape: tuple[int, ...] | None
    param_group: int
    step: float | None
    moments: Mapping[str, StoredMoment]


@dataclass(frozen=True, slots=True, eq=False)
class OptimizerState:
    """One optimizer of a checkpoint.

    ``type`` is its class name in PyTorch's spelling (``"Adam"``, ``"RMSpropTFLike"``…), as told by the file or from
    the state's own keys.  ``param_groups`` are the hyper-parameters as stored (numbers, strings, bools, tuples).
    ``clip_groups`` name parameters of ``parameters``.
    """

    name: str
    type: str
    param_groups: tuple[Mapping[str, Any], ...]
    parameters: tuple[ParameterState, ...]
    clip_groups: tuple[ClipGroup, ...]


@dataclass(frozen=True, slots=True, eq=False)
class AdamMoments:
    """What Adam or AdamW holds for one parameter, of which its next update can be computed.

    ``exp_avg`` and ``exp_avg_sq`` read the moments, float32 or float64 of the parameter's shape, when they are called;
    before the first of its ``step`` updates both are None.  ``weight_decay`` is how much of the parameter, which
    ``weight`` reads, is added to its gradient: 0 for AdamW, which decays the weights apart from the update.
    """

    exp_avg: Callable[[], NDArray[np.floating]] | None
    exp_avg_sq: Callable[[], NDArray[np.floating]] | None
    step: float
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float = 0.0
    weight: Callable[[], NDArray[np.floating]] | None = None
