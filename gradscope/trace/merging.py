"""The rows of all ranks merged into steps: shards add, replicas count once.

The gradient as it was stored is divided by the loss scale that was still in it, and with it what goes with it: the
thresholds and the returned norm, so that comparing them means what it meant to the training.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradscope.errors import GradscopeError
from gradscope.spectrum import MagnitudeSpectrum
from gradscope.trace.bins import decode
from gradscope.trace.measurement import Bins
from gradscope.trace.ranks import CountingRank, RecordedRun
from gradscope.trace.rows import PER_TENSOR, FloatArray, IntArray, Rows

BoolArray = NDArray[np.bool_]

# What is merged at a time, in bytes of the streams and in entries of a [steps, tensors] array.
MERGED_BYTES = 4 << 20
MERGED_ENTRIES = 1 << 18

_GIVEN = ("max_norm", "clip_value", "norm_type", "returned_norm")


@dataclass(frozen=True, slots=True, eq=False)
class MergedSteps:
    """Consecutive steps of a run.

    ``step`` (int64) and ``time`` (float64, seconds since the epoch) are [steps], and ``has_tensor_spectra``.

    [steps, tensors]: ``sum_squares``, ``max_abs`` (float64), ``zeros``, ``nan`` and ``inf`` (int64); ``has_gradient``
    says where there was one, elsewhere all are zero.  Of a tensor that several clip groups of a step hold, the first
    counts: its gradient before any of them clipped it.  ``weight_norm`` and ``update_norm`` (float64) are NaN where
    they were not measured; ``measured`` ([steps]) says at which steps any was.

    [steps, groups]: ``has_row``; ``group_sum_squares``, ``group_max_abs``, ``group_zeros`` and ``group_nonfinite`` of
    what each clip call was given; ``grad_scale``, ``max_norm``, ``clip_value``, ``norm_type`` and ``returned_norm``,
    NaN where there was none, which ``given`` tells from a recorded NaN; ``stepped`` (int8; -1: not known).
    """

    step: IntArray
    time: FloatArray
    has_tensor_spectra: BoolArray
    sum_squares: FloatArray
    max_abs: FloatArray
    zeros: IntArray
    nan: IntArray
    inf: IntArray
    has_gradient: BoolArray
    weight_norm: FloatArray
    update_norm: FloatArray
    measured: BoolArray
    has_row: BoolArray
    group_sum_squares: FloatArray
    group_max_abs: FloatArray
    group_zeros: IntArray
    group_nonfinite: IntArray
    grad_scale: FloatArray
    max_norm: FloatArray
    clip_value: FloatArray
    norm_type: FloatArray
    returned_norm: FloatArray
    stepped: NDArray[np.int8]
    given: dict[str, BoolArray]
    parts: tuple[_Part, ...]

    def group_spectrum(self, place: int, group: int) -> MagnitudeSpectrum | None:
        """The spectrum of a clip group at the step at ``place``; None where none was recorded, or no gradient."""
        spectra: list[MagnitudeSpectrum] = []
        for part in self.parts:
            for row in part.rows_at(place):
                if part.run_group[row] == group:
                    found = part.group_spectra(row)
                    if found is None:
                        return None
                    spectra += found
        return MagnitudeSpectrum.merge(spectra) if spectra else None

    def tensor_spectrum(self, place: int, tensor: int) -> MagnitudeSpectrum | None:
        """The spectrum of a tensor at the step at ``place``; None where none was recorded, or no gradient."""
        spectra = []
        for part in self.parts:
            for row in part.rows_at(place):
                for position in np.flatnonzero(part.tensors_of(row) == tensor):
                    found = part.tensor_spectrum(row, int(position))
                    if found is None:
                        return None
                    spectra.append(found)
        return MagnitudeSpectrum.merge(spectra) if spectra else None


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """One rank's rows of these steps: where each belongs (``place``, -1: nowhere), and to which group of the run.

    One entry per tensor of each row: its row, the run's tensor (-1: counts elsewhere) and whether it counts for the
    row's group.
    """

    rank: CountingRank
    rows: Rows
    place: IntArray
    run_group: IntArray
    entry_row: IntArray
    entry_tensor: IntArray
    entry_counts: BoolArray

    @classmethod
    def of(cls, rank: CountingRank, rows: Rows, steps: IntArray) -> _Part:
        step, group = rows.single["step"], rows.single["group"]
        place = np.minimum(np.searchsorted(steps, step), len(steps) - 1)
        place = np.where(steps[place] == step, place, -1)
        place[_repeated(place * len(rank.group) + group, place >= 0)] = -1
        column = rows.lists["sum_squares"]
        entry_row = np.repeat(np.arange(len(rows)), column.lengths)
        position = np.arange(len(entry_row)) - (column.offsets[:-1] - column.offsets[0])[entry_row]
        tensor = rank.tensor[rank.starts[group[entry_row]] + position]
        counts = (tensor >= 0) & (place[entry_row] >= 0)
        tensor = np.where(counts, tensor, -1)
        there = counts & ~np.isnan(column.values[column.offsets[0] : column.offsets[-1]])
        width = int(tensor.max(initial=0)) + 1
        tensor[_repeated(place[entry_row] * width + tensor, there)] = -1
        return cls(rank, rows, place, rank.group[group], entry_row, tensor, counts)

    def rows_at(self, place: int) -> NDArray[np.intp]:
        return np.flatnonzero(self.place == place)

    def tensors_of(self, row: int) -> IntArray:
        """The run's tensors that the entries of a row are, -1 for those that do not count."""
        offsets = self.rows.lists["sum_squares"].offsets
        return self.entry_tensor[offsets[row] - offsets[0] : offsets[row + 1] - offsets[0]]

    def values(self, name: str) -> NDArray[np.generic]:
        """A list column whose lists are as long as ``sum_squares``: one entry per tensor of each row."""
        column = self.rows.lists[name]
        return column.values[column.offsets[0] : column.offsets[-1]]

    def scale(self) -> FloatArray:
        """What each row is divided by; a loss scale that grew to infinity or shrank to 0 divides nothing."""
        scale = self.rows.single["grad_scale"]
        return np.where((scale > 0.0) & (scale < np.inf), scale, 1.0)

    def group_spectra(self, row: int) -> list[MagnitudeSpectrum] | None:
        """The spectra that make up what counts of a row; None where they were not taken."""
        if self.rank.counts_whole(int(self.rows.single["group"][row])):
            bins = self.rows.group_bins(row)
            return None if bins is None else [self._decoded(bins, row, slice(None))]
        counting = np.flatnonzero(self.tensors_of(row) >= 0)
        found = [self.tensor_spectrum(row, int(position)) for position in counting]
        return None if any(spectrum is None for spectrum in found) else [s for s in found if s is not None]

    def tensor_spectrum(self, row: int, position: int) -> MagnitudeSpectrum | None:
        bins = self.rows.tensor_bins(row, position)
        return None if bins is None else self._decoded(bins, row, slice(position, position + 1))

    def _decoded(self, bins: Bins, row: int, tensors: slice) -> MagnitudeSpectrum:
        sum_squares, max_abs, zeros, nan, inf = (self.rows.lists[name].of(row)[tensors] for name in PER_TENSOR)
        try:
            return decode(
                bins,
                float(np.nansum(sum_squares)),
                float(max_abs.max(initial=0.0)),
                int(zeros.sum()),
                int(nan.sum()),
                int(inf.sum()),
                float(self.scale()[row]),
            )
        except ValueError as error:
            raise GradscopeError(str(self.rank.trace.stream.path), f"is damaged: {error}") from None


def merged_steps(run: RecordedRun, places: range) -> Iterator[MergedSteps]:
    """The steps at these ``places`` (into ``run.steps``, without gaps), some at a time.

    Raises GradscopeError where a stream is no longer what it was.
    """
    at_once = _steps_at_once(run)
    for start in range(places.start, places.stop, at_once):
        steps = run.steps[start : min(start + at_once, places.stop)]
        yield _merged(run, steps, tuple(_parts(run.ranks, steps)))


def _steps_at_once(run: RecordedRun) -> int:
    bytes_per_step = sum(rank.trace.stream.nbytes for rank in run.ranks) / max(1, len(run.steps))
    return max(1, min(int(MERGED_BYTES / max(1.0, bytes_per_step)), MERGED_ENTRIES // max(1, len(run.tensors))))


def _parts(ranks: Sequence[CountingRank], steps: IntArray) -> Iterator[_Part]:
    for rank in ranks:
        start = int(np.searchsorted(rank.trace.step, steps[0], side="left"))
        stop = int(np.searchsorted(rank.trace.step, steps[-1], side="right"))
        if stop > start:
            yield _Part.of(rank, rank.trace.rows(start, stop), steps)


def _merged(run: RecordedRun, steps: IntArray, parts: tuple[_Part, ...]) -> MergedSteps:
    shape = (len(steps), len(run.tensors))
    tensors = _TensorSums(shape)
    groups = _GroupValues((len(steps), len(run.groups)))
    time = np.full(len(steps), np.nan)
    has_tensor_spectra = np.zeros(len(steps), dtype=np.bool_)
    # The first rank's values last, so that they stand where ranks disagree.
    for part in reversed(parts):
        tensors.add(part)
        groups.add(part)
        placed = part.place >= 0
        time[part.place[placed]] = part.rows.single["time"][placed]
        has_tensor_spectra[part.place[placed & (part.rows.lists["tensor_bin_counts"].lengths > 0)]] = True
    for group, recorded in enumerate(run.groups):
        if recorded.returned_partial:
            groups.values["returned_norm"][:, group] = _whole_norm(parts, group, len(steps))
    return MergedSteps(
        step=steps,
        time=time,
        **tensors.results(),
        **groups.results(),
        has_tensor_spectra=has_tensor_spectra,
        parts=parts,
    )


class _TensorSums:
    """[steps, tensors] arrays that parts are added to."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self._shape = shape
        size = shape[0] * shape[1]
        self._sums = {name: np.zeros(size) for name in ("sum_squares", "weight_norm", "update_norm")}
        self._counts = {name: np.zeros(size, dtype=np.int64) for name in ("zeros", "nan", "inf")}
        self._max_abs = np.zeros(size)
        self._has_gradient = np.zeros(size, dtype=np.bool_)
        self._normed = {name: np.zeros(size, dtype=np.bool_) for name in ("weight_norm", "update_norm")}

    def add(self, part: _Part) -> None:
        counting = part.entry_tensor >= 0
        at = part.place[part.entry_row] * self._shape[1] + part.entry_tensor
        there = counting & ~np.isnan(part.values("sum_squares"))
        scale = part.scale()[part.entry_row]
        with np.errstate(over="ignore", under="ignore"):
            energy = part.values("sum_squares")[there] / scale[there] / scale[there]
            largest = part.values("max_abs")[there] / scale[there]
        self._sums["sum_squares"] += np.bincount(at[there], energy, minlength=len(self._max_abs))
        np.maximum.at(self._max_abs, at[there], largest)
        for name, total in self._counts.items():
            np.add.at(total, at[there], part.values(name)[there])
        self._has_gradient[at[there]] = True
        for name, normed in self._normed.items():
            self._add_norms(name, normed, part)

    def _add_norms(self, name: str, normed: BoolArray, part: _Part) -> None:
        column = part.rows.lists[name]
        if column.offsets[0] == column.offsets[-1]:
            return
        taken = (column.lengths > 0)[part.entry_row]
        at = (part.place[part.entry_row] * self._shape[1] + part.entry_tensor)[taken]
        counting = part.entry_tensor[taken] >= 0
        values = column.values[column.offsets[0] : column.offsets[-1]][counting]
        self._sums[name] += np.bincount(at[counting], values * values, minlength=len(normed))
        normed[at[counting]] = True

    def results(self) -> dict[str, Any]:
        """The fields of ``MergedSteps``."""
        norms = {name: np.where(normed, np.sqrt(self._sums[name]), np.nan) for name, normed in self._normed.items()}
        arrays = {
            "sum_squares": self._sums["sum_squares"],
            "max_abs": self._max_abs,
            **self._counts,
            "has_gradient": self._has_gradient,
            **norms,
        }
        shaped = {name: array.reshape(self._shape) for name, array in arrays.items()}
        measured = self._normed["weight_norm"] | self._normed["update_norm"]
        return {**shaped, "measured": np.asarray(measured.reshape(self._shape).any(axis=1))}


class _GroupValues:
    """[steps, groups] arrays of what the clip calls were given and gave."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self._shape = shape
        self.values = {name: np.full(shape, np.nan) for name in _GIVEN}
        self.given = {name: np.zeros(shape, dtype=np.bool_) for name in _GIVEN}
        self._grad_scale = np.ones(shape)
        self._stepped = np.full(shape, -1, dtype=np.int8)
        self._has_row = np.zeros(shape, dtype=np.bool_)
        self._sum_squares, self._max_abs = np.zeros(shape), np.zeros(shape)
        self._zeros, self._nonfinite = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)

    def add(self, part: _Part) -> None:
        placed = (part.place >= 0) & (part.run_group >= 0)
        at = part.place[placed], part.run_group[placed]
        single, scale = part.rows.single, part.scale()[placed]
        self._has_row[at] = True
        self._grad_scale[at] = scale
        for name, target in self.values.items():
            with np.errstate(over="ignore", under="ignore"):
                target[at] = single[name][placed] if name == "norm_type" else single[name][placed] / scale
            self.given[name][at] = part.rows.present[name][placed]
        self._stepped[at] = np.where(part.rows.present["stepped"], single["stepped"], -1)[placed]
        self._add_gradient(part)

    def _add_gradient(self, part: _Part) -> None:
        counts = part.entry_counts & ~np.isnan(part.values("sum_squares"))
        row = part.entry_row[counts]
        at, scale = (part.place[row], part.run_group[row]), part.scale()[row]
        with np.errstate(over="ignore", under="ignore"):
            np.add.at(self._sum_squares, at, part.values("sum_squares")[counts] / scale / scale)
            np.maximum.at(self._max_abs, at, part.values("max_abs")[counts] / scale)
        np.add.at(self._zeros, at, part.values("zeros")[counts])
        for name in ("nan", "inf"):
            np.add.at(self._nonfinite, at, part.values(name)[counts])

    def results(self) -> dict[str, Any]:
        """The fields of ``MergedSteps``."""
        return {
            **self.values,
            "given": self.given,
            "grad_scale": self._grad_scale,
            "stepped": self._stepped,
            "has_row": self._has_row,
            "group_sum_squares": self._sum_squares,
            "group_max_abs": self._max_abs,
            "group_zeros": self._zeros,
            "group_nonfinite": self._nonfinite,
        }


def _repeated(keys: IntArray, among: BoolArray) -> IntArray:
    """Where, ``among`` these entries, a key stands that an earlier one has."""
    places = np.flatnonzero(among)
    if not len(places) or np.bincount(keys[places]).max() == 1:
        return places[:0]
    first = np.unique(keys[places], return_index=True)[1]
    return np.delete(places, first)


def _whole_norm(parts: Sequence[_Part], group: int, steps: int) -> FloatArray:
    """The norm of which every counting rank was returned its part: the p-norm of the parts, per step."""
    total, largest, power = np.zeros(steps), np.zeros(steps), np.full(steps, 2.0)
    returned = np.zeros(steps, dtype=np.bool_)
    for part in parts:
        here = (part.place >= 0) & (part.run_group == group) & part.rows.present["returned_norm"]
        at, norm = part.place[here], part.rows.single["returned_norm"][here] / part.scale()[here]
        p = np.nan_to_num(part.rows.single["norm_type"][here], nan=2.0, posinf=np.inf)
        power[at], returned[at] = p, True
        np.maximum.at(largest, at, norm)
        with np.errstate(over="ignore", under="ignore", divide="ignore"):
            np.add.at(total, at, np.where(np.isinf(p), 0.0, norm**p))
    with np.errstate(over="ignore", under="ignore", divide="ignore"):
        whole = np.where(np.isinf(power), largest, total ** (1.0 / power))
    return np.where(returned, whole, np.nan)
