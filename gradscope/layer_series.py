"""What a run shows of each layer over its steps, as series: norms, updates, and the shape of the spectrum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from gradscope.spectra_sample import Spectra
from gradscope.spectrum import MagnitudeSpectrum
from gradscope.step_table import StepTable
from gradscope.tensors import TensorInfo

FloatArray = NDArray[np.float64]

Quantity: TypeAlias = Literal["norm", "update", "update-ratio", "shape", "nonzero"]

# What each is called in a sentence.  All are natural logarithms, so that differences are factors.
QUANTITIES: Mapping[Quantity, str] = {
    "norm": "gradient norm",
    "update": "update norm",
    "update-ratio": "ratio of update to weights",
    "shape": "ratio of median to RMS gradient",
    "nonzero": "share of non-zero gradient elements",
}


@dataclass(frozen=True, slots=True, eq=False)
class LayerSeries:
    """One layer over the steps of a run: ``series`` maps a quantity to float64 [steps], NaN where it is not known.

    A norm of zero has no logarithm and is not known either; ``silent`` is the share of such steps among those without
    NaN or Inf at which the layer had a gradient, NaN where there is none.
    """

    layer: str
    numel: int
    silent: float
    series: Mapping[Quantity, FloatArray]


def series_by_layer(
    table: StepTable,
    tensors: Sequence[TensorInfo],
    layers: Mapping[str, Sequence[int]],
    shapes: Mapping[str, FloatArray] = MappingProxyType({}),
) -> dict[str, LayerSeries]:
    """What ``table`` holds of each of ``layers`` (name to the places of its tensors), in their order.

    ``shapes`` are those of a ``ShapeSeries``, by layer.
    """
    return {
        name: _series_of(name, table, [tensors[i].numel for i in members], members, shapes.get(name))
        for name, members in layers.items()
    }


def _series_of(
    name: str, table: StepTable, numel: Sequence[int], members: Sequence[int], shape: FloatArray | None
) -> LayerSeries:
    places, elements = list(members), sum(numel)
    norms = table.norms(places)
    finite = np.isfinite(norms) & table.there(places)
    told = finite & (norms > 0.0)
    found: dict[Quantity, FloatArray] = {
        "norm": _log_where(told, norms),
        "nonzero": _log_where(told, _share_not_zero(table, places, numel)),
    }
    rows, ratios = table.update_ratios(places)
    if len(rows):
        assert table.update_norm is not None and table.measured is not None
        sizes = np.sqrt(np.square(table.update_norm[:, places]).sum(axis=1))
        found["update-ratio"] = _at(rows, ratios, len(norms))
        found["update"] = _at(table.measured, sizes, len(norms))
    if shape is not None and not np.isnan(shape).all():
        found["shape"] = shape
    silent = float((norms[finite] == 0.0).mean()) if finite.any() else float("nan")
    return LayerSeries(name, elements, silent, found)


@dataclass(slots=True, eq=False)
class ShapeSeries:
    """Takes down the shape of each layer's spectrum where a ``SpectraSample`` shows one.

    ``layers`` maps a layer to the places of its tensors.  The shape is log(median|g| / rms) over the elements that are
    not zero: log 0.6745 for normal elements, less for longer tails.  ``shapes`` are float64 [steps] by layer, NaN at
    the steps that were not shown.
    """

    layers: Mapping[str, Sequence[int]]
    steps: int
    shapes: dict[str, FloatArray] = field(default_factory=dict)

    def take(self, row: int, spectra: Spectra) -> None:
        """Take down the shapes of a step."""
        for layer, members in self.layers.items():
            told = [spectrum for i in members if (spectrum := spectra[i]) is not None]
            if len(told) == len(members):
                self.shapes.setdefault(layer, np.full(self.steps, np.nan))[row] = _shape(told)


def _shape(spectra: Sequence[MagnitudeSpectrum]) -> float:
    """log(median|g| / rms) over the finite elements of ``spectra`` that are not zero; NaN where there is none."""
    merged = MagnitudeSpectrum.merge(spectra)
    others = merged.finite - merged.zeros
    if others == 0 or not 0.0 < merged.sum_squares < np.inf:
        return float("nan")
    median = merged.quantile((merged.zeros + 0.5 * others) / merged.finite)
    return float(np.log(median) - 0.5 * np.log(merged.sum_squares / others)) if median > 0.0 else float("nan")


def _share_not_zero(table: StepTable, places: list[int], numel: Sequence[int]) -> FloatArray:
    """Elements other than zero / elements, of the tensors that had a gradient."""
    elements = (table.present[:, places] * np.asarray(numel, dtype=np.int64)).sum(axis=1)
    return np.asarray(1.0 - table.zeros[:, places].sum(axis=1) / np.maximum(1, elements))


def _at(rows: NDArray[np.int64], values: FloatArray, steps: int) -> FloatArray:
    """Logarithms of ``values`` at their ``rows``, as a series of all steps."""
    series = np.full(steps, np.nan)
    series[rows] = _log_where(values > 0.0, values)
    return series


def _log_where(here: NDArray[np.bool_], values: FloatArray) -> FloatArray:
    logs = np.full(len(values), np.nan)
    np.log(values, out=logs, where=here)
    return logs
