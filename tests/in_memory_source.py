"""A gradient source made of arrays, and clipping written out in plain float64: what the tests compare with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from gradscope.gradients import GradientSource, GradientStep, Progress, SourceInfo, Weights
from gradscope.spectrum import MagnitudeSpectrum
from gradscope.tensors import ClipGroup, TensorInfo

Arrays = dict[str, NDArray[np.floating]]


class InMemorySource(GradientSource):
    """``steps`` holds one mapping name -> array per step; ``groups`` maps a clip group to its tensors."""

    def __init__(
        self,
        steps: Sequence[Arrays],
        groups: dict[str, Sequence[str]] | None = None,
        weights: Arrays | None = None,
        elements: bool = True,
    ) -> None:
        names = list(steps[0])
        super().__init__(
            info=SourceInfo("memory", "gradients", "arrays", len(steps)),
            tensors=tuple(TensorInfo(name, steps[0][name].shape, str(steps[0][name].dtype)) for name in names),
            groups=tuple(ClipGroup(name, tuple(members)) for name, members in (groups or {"all": names}).items()),
        )
        self._steps = steps
        self._weights = weights
        self._elements = elements

    def read_steps(self, steps: range, progress: Progress | None = None) -> Iterator[GradientStep]:
        for position in steps:
            arrays = list(self._steps[position].values())
            yield GradientStep.from_spectra(
                position,
                f"step {position}",
                [spectrum_of(array) for array in arrays],
                (lambda i, arrays=arrays: arrays[i].astype(np.float64)) if self._elements else None,
            )

    def weights(self, progress: Progress | None = None) -> Weights | None:
        if self._weights is None:
            return None
        held = self._weights
        return Weights(
            tensors=tuple(TensorInfo(name, array.shape, str(array.dtype)) for name, array in held.items()),
            spectra=tuple(spectrum_of(array) for array in held.values()),
            read=held.__getitem__,
        )


class NormSource(GradientSource):
    """Steps of which only norms are known: ``norms`` is [steps, tensors], the tensors ``t0.w``, ``t1.w`` …"""

    def __init__(self, norms: NDArray[np.float64], groups: dict[str, Sequence[str]] | None = None) -> None:
        names = [f"t{i}.w" for i in range(norms.shape[1])]
        super().__init__(
            info=SourceInfo("norms", "gradients", "norms", len(norms)),
            tensors=tuple(TensorInfo(name, (4,), "float32") for name in names),
            groups=tuple(ClipGroup(name, tuple(members)) for name, members in (groups or {"all": names}).items()),
        )
        self._norms = norms

    def read_steps(self, steps: range, progress: Progress | None = None) -> Iterator[GradientStep]:
        for position in steps:
            norms = self._norms[position]
            none = np.zeros(len(norms), dtype=np.int64)
            nan = np.isnan(norms).astype(np.int64)
            known = np.nan_to_num(norms)
            yield GradientStep(position, f"{position}", known**2, known, none, nan, none, (None,) * len(norms))


def spectrum_of(array: NDArray[np.floating]) -> MagnitudeSpectrum:
    if array.dtype.name == "bfloat16":
        return MagnitudeSpectrum.of(array.view(np.uint16), dtype="bfloat16")
    return MagnitudeSpectrum.of(array)


def flatten(arrays: Sequence[NDArray[np.floating]]) -> NDArray[np.float64]:
    return np.concatenate([array.astype(np.float64).ravel() for array in arrays])


def angle_deg(before: NDArray[np.float64], after: NDArray[np.float64]) -> float:
    """The angle between two vectors, by the component of one across the other, so that small angles are exact."""
    size = np.linalg.norm(before)
    if size == 0.0:
        return 0.0
    direction = before / size
    along = float(direction @ after)
    return float(np.degrees(np.arctan2(np.linalg.norm(after - along * direction), along)))
