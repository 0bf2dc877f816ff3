"""Which tensors form a layer, a clip group, the joint gradient."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from gradscope.tensors import ClipGroup, TensorInfo

Level = Literal["joint", "group", "layer", "tensor"]


@dataclass(frozen=True, slots=True, eq=False)
class Partition:
    """``len(owner)`` columns divided into sets that are not empty: column c belongs to set ``owner[c]``.

    ``order`` lists the columns set by set and ``starts`` where each set begins in it.
    """

    names: tuple[str, ...]
    owner: NDArray[np.intp]
    order: NDArray[np.intp]
    starts: NDArray[np.intp]

    @classmethod
    def by(cls, keys: Sequence[Hashable]) -> Partition:
        """Columns with equal keys form a set; sets come in the order of their first column."""
        numbers: dict[Hashable, int] = {}
        owner = np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.intp)
        return cls.over(owner, tuple(str(key) for key in numbers))

    @classmethod
    def over(cls, owner: NDArray[np.intp], names: tuple[str, ...]) -> Partition:
        """Column c in the set ``owner[c]``; every one of the named sets has a column."""
        order = np.argsort(owner, kind="stable")
        return cls(names, owner, order, np.searchsorted(owner[order], np.arange(len(names))))

    def __len__(self) -> int:
        return len(self.names)

    @property
    def sizes(self) -> NDArray[np.intp]:
        """Columns in each set."""
        return np.bincount(self.owner, minlength=len(self.names))

    def total(self, columns: NDArray[np.float64]) -> NDArray[np.float64]:
        """Sums over the sets: [S, columns] to [S, sets]."""
        return np.add.reduceat(columns[:, self.order], self.starts, axis=1)

    def largest(self, columns: NDArray[np.float64]) -> NDArray[np.float64]:
        """Maxima of the sets: [S, columns] to [S, sets]."""
        return np.maximum.reduceat(columns[:, self.order], self.starts, axis=1)

    def any(self, columns: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Whether any column of the set is true: [S, columns] to [S, sets]."""
        return np.logical_or.reduceat(columns[:, self.order], self.starts, axis=1)


@dataclass(frozen=True, slots=True, eq=False)
class TensorLayout:
    """The tensors of a source (``numel`` elements each) and the three ways in which a report divides them."""

    numel: NDArray[np.int64]
    tensors: Partition
    layers: Partition
    groups: Partition
    joint: Partition

    @classmethod
    def of(cls, tensors: Sequence[TensorInfo], groups: Sequence[ClipGroup]) -> TensorLayout:
        """Divide ``tensors``; one in several groups counts for the first of them, one in none for "rest"."""
        group_of = {name: group.name for group in reversed(groups) for name in group.tensors}
        spare = "rest" if groups else "all"
        names = [tensor.name for tensor in tensors]
        return cls(
            numel=np.array([tensor.numel for tensor in tensors], dtype=np.int64),
            tensors=Partition.by(names),
            layers=Partition.by([tensor.layer for tensor in tensors]),
            groups=Partition.by([group_of.get(name, spare) for name in names]),
            joint=Partition.by(["all"] * len(names)),
        )

    def at(self, level: Level) -> Partition:
        """The division that ``level`` names."""
        return {"joint": self.joint, "group": self.groups, "layer": self.layers, "tensor": self.tensors}[level]

    def numel_in(self, sets: Partition) -> NDArray[np.int64]:
        """The number of elements in each of the sets."""
        return np.bincount(sets.owner, weights=self.numel, minlength=len(sets)).astype(np.int64)
