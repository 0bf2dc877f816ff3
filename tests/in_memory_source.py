"""A gradient source made of arrays, and clipping written out in plain float64: what the tests compare with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from gradscope.gradients import GradientSource, GradientStep, Progress, RecordedClip, SourceInfo, Weights
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


class RecordedSource(InMemorySource):
    """What a trace holds of ``steps``: norms and the groups' spectra at every step, tensors' spectra at every 10th.

    ``limits`` (max_norm per step and group), ``returned`` norms and ``stepped`` are [steps, groups]; ``tensor_every``
    None leaves out all spectra.  ``updates`` maps a tensor to its weight norm and update norm.  ``apart`` is the
    distance between the numbers of two steps.
    """

    def __init__(
        self,
        steps: Sequence[Arrays],
        groups: dict[str, Sequence[str]] | None = None,
        *,
        limits: NDArray[np.float64] | float = np.nan,
        clip_value: float = np.nan,
        returned: NDArray[np.float64] | float = np.nan,
        stepped: NDArray[np.int8] | int = 1,
        norm_type: float = 2.0,
        tensor_every: int | None = 10,
        updates: dict[str, tuple[float, float]] | None = None,
        apart: int = 1,
    ) -> None:
        super().__init__(steps, groups, elements=False)
        shape = (len(steps), len(self.groups))
        self._limits = np.broadcast_to(np.asarray(limits, np.float64), shape)
        self._clip_value = clip_value
        self._returned = np.broadcast_to(np.asarray(returned, np.float64), shape)
        self._stepped = np.broadcast_to(np.asarray(stepped, np.int8), shape)
        self._norm_type = np.full(shape[1], norm_type)
        self._tensor_every = tensor_every
        self._updates = updates
        self._apart = apart
        self.info = SourceInfo("run.gradscope", "trace", "recorded SB3 PPO run", len(steps))
        self.groups = tuple(
            replace(group, max_norm=None if np.isnan(limit) else float(limit))
            for group, limit in zip(self.groups, self._limits[-1], strict=True)
        )

    def read_steps(self, steps: range, progress: Progress | None = None) -> Iterator[GradientStep]:
        names = [tensor.name for tensor in self.tensors]
        for step in super().read_steps(steps):
            spectra = dict(zip(names, step.spectra, strict=True))
            sampled = self._tensor_every is not None and step.index % self._tensor_every == 0
            merged = [MagnitudeSpectrum.merge([spectra[name] for name in g.tensors]) for g in self.groups]
            whole = tuple(spectrum if spectrum.numel else None for spectrum in merged)
            yield replace(
                step,
                index=step.index * self._apart,
                label=f"step {step.index * self._apart}",
                spectra=step.spectra if sampled else (None,) * len(names),
                group_spectra=whole if self._tensor_every is not None else (),
                recorded=self._recorded(step.index, names, sampled),
            )

    @property
    def step_numbers(self) -> range:
        return range(0, self.info.steps * self._apart, self._apart)

    def _recorded(self, index: int, names: list[str], sampled: bool) -> RecordedClip:
        unknown = (np.nan, np.nan)
        sizes = np.array([(self._updates or {}).get(name, unknown) for name in names])
        measured = sampled and self._updates is not None
        return RecordedClip(
            time=1e9 + index,
            max_norm=self._limits[index],
            clip_value=np.full(len(self.groups), self._clip_value),
            returned_norm=self._returned[index],
            stepped=self._stepped[index],
            weight_norm=sizes[:, 0] if measured else None,
            update_norm=sizes[:, 1] if measured else None,
            norm_type=self._norm_type,
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
