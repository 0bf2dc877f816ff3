"""The smallest nouns: a named tensor, and the tensors that are clipped together."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One named tensor: its parameter's name, shape and dtype (``"float32"``, ``"bfloat16"``, ``"float8_e4m3fn"``…)."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def layer(self) -> str:
        """The module that owns the parameter: the name without its last dotted part."""
        return self.name.rsplit(".", 1)[0]


@dataclass(frozen=True, slots=True)
class ClipGroup:
    """The tensors over which one clip call takes its norm, and the ``max_norm`` the source knows for it."""

    name: str
    tensors: tuple[str, ...]
    max_norm: float | None = None


def places_by_layer(tensors: Iterable[TensorInfo]) -> dict[str, list[int]]:
    """The places of the tensors of each layer, in the order in which layers come."""
    layers: dict[str, list[int]] = {}
    for place, tensor in enumerate(tensors):
        layers.setdefault(tensor.layer, []).append(place)
    return layers
