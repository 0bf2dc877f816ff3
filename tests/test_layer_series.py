"""The series of a layer, against the same worked out on the arrays."""

from __future__ import annotations

import numpy as np
import pytest

from gradscope.health.evidence import Evidence
from gradscope.layer_series import ShapeSeries, series_by_layer
from gradscope.spectra_sample import SpectraSample
from gradscope.step_table import StepTable
from tests.in_memory_source import InMemorySource, RecordedSource

GENERATOR = np.random.default_rng(1)
STEPS = [
    {"a.weight": GENERATOR.standard_normal((30, 20)), "a.bias": GENERATOR.standard_normal(20) * (i % 3 != 0)}
    for i in range(30)
]
LAYERS = {"a": [0, 1]}


def joined(step: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([array.ravel() for array in step.values()])


def test_norms_and_shares_are_those_of_the_layer() -> None:
    source = InMemorySource(STEPS)
    table = StepTable.read(source, range(30))
    found = series_by_layer(table, source.tensors, LAYERS)["a"]
    assert found.numel == 620
    assert found.series["norm"] == pytest.approx([np.log(np.linalg.norm(joined(step))) for step in STEPS])
    assert np.exp(found.series["nonzero"]) == pytest.approx([(joined(step) != 0).mean() for step in STEPS])
    assert found.silent == 0.0
    assert "update" not in found.series


def test_a_norm_of_zero_or_nan_is_not_known_and_the_silent_steps_are_counted() -> None:
    steps = [{"a.weight": np.ones(4) * (i >= 5)} for i in range(20)]
    steps[19] = {"a.weight": np.array([1.0, np.nan, 1.0, 1.0])}
    source = InMemorySource(steps)
    found = series_by_layer(StepTable.read(source, range(20)), source.tensors, {"a": [0]})["a"]
    assert np.flatnonzero(np.isnan(found.series["norm"])).tolist() == [0, 1, 2, 3, 4, 19]
    assert found.silent == pytest.approx(5 / 19)


def test_updates_are_those_of_the_steps_at_which_they_were_measured() -> None:
    source = RecordedSource(STEPS, updates={"a.weight": (3.0, 0.3), "a.bias": (4.0, 0.4)})
    found = series_by_layer(StepTable.read(source, range(30)), source.tensors, LAYERS)["a"]
    for quantity, value in (("update", 0.5), ("update-ratio", 0.1)):
        series = found.series[quantity]
        assert np.flatnonzero(~np.isnan(series)).tolist() == [0, 10, 20]
        assert np.exp(series[::10]) == pytest.approx(value)


def test_the_shape_is_the_median_of_what_is_not_zero_over_its_rms() -> None:
    source = InMemorySource(STEPS)
    shapes = ShapeSeries(LAYERS, 30)
    StepTable.read(source, range(30), None, [SpectraSample(2, 30, [shapes.take]).see])
    for row, step in enumerate(STEPS):
        elements = np.abs(joined(step)[joined(step) != 0])
        expected = np.log(np.median(elements) / np.sqrt(np.mean(elements**2)))
        assert shapes.shapes["a"][row] == pytest.approx(expected, abs=0.02)


def test_shapes_of_a_long_run_are_sampled_evenly() -> None:
    source = InMemorySource([{"a.w": np.array([1.0, 2.0, 3.0])}] * 1000)
    taken = np.flatnonzero(~np.isnan(Evidence.gather(source).shapes["a"]))
    assert len(taken) == 64
    assert set(np.diff(taken)) <= {15, 16}
