"""Energy, mean and variance of the factors merge into the same angle as the whole vectors give."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from in_memory_source import angle_deg

from gradscope.clipping.layout import Partition
from gradscope.clipping.moments import Moments


def column(*values: float) -> np.ndarray:
    return np.array([values], dtype=np.float64)


def test_two_tensors_worked_out_by_hand() -> None:
    # g = (3, 4), factors 1 and 1/2: c = (3, 2), g·c = 17, ‖c‖² = 13, tan θ = √(25·13 − 17²)/17 = 6/17.
    merged = Moments(column(9, 16), column(1, 0.5), column(0, 0)).merge(Partition.by(["all", "all"]))
    assert merged.energy[0, 0] == 25
    assert merged.mean[0, 0] == pytest.approx(17 / 25, rel=1e-15)
    assert merged.norm_ratio()[0, 0] == pytest.approx(np.sqrt(13 / 25), rel=1e-15)
    assert merged.direction_change_deg()[0, 0] == pytest.approx(np.degrees(np.arctan2(6, 17)), rel=1e-14)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.integers(1, 5), st.integers(1, 3))
def test_merging_equals_the_whole_vectors(seed: int, numel: int, layers: int, groups: int) -> None:
    rng = np.random.default_rng(seed)
    gradient = rng.normal(size=numel) * 10.0 ** rng.uniform(-4, 4, numel)
    factor = rng.uniform(0.001, 1.0, numel)
    elements = Moments(gradient[None] ** 2, factor[None], np.zeros((1, numel)))
    layer_of = rng.integers(0, layers, numel)
    by_layer = Partition.by(layer_of.tolist())
    group_of = rng.integers(0, groups, len(by_layer)).tolist()
    by_group = Partition.by(group_of)
    joint = elements.merge(by_layer).merge(by_group).merge(Partition.by(["all"] * len(by_group)))
    clipped = gradient * factor
    assert joint.norm_ratio()[0, 0] == pytest.approx(np.linalg.norm(clipped) / np.linalg.norm(gradient), rel=1e-9)
    assert joint.direction_change_deg()[0, 0] == pytest.approx(angle_deg(gradient, clipped), rel=1e-6, abs=1e-10)


def test_one_common_factor_turns_nothing_at_all() -> None:
    energies = np.array([[0.1, 0.7, 1e-9, 3.3e7]])
    merged = Moments(energies, np.full((1, 4), 0.1 / 3), np.zeros((1, 4))).merge(Partition.by([0, 1, 0, 1]))
    assert (merged.mean == 0.1 / 3).all()
    assert (merged.direction_change_deg() == 0.0).all()


def test_a_tiny_angle_is_not_lost_in_cancellation() -> None:
    # tan θ = δ/2 to first order for two equal energies with factors 1 and 1 − δ.
    delta = 1e-12
    merged = Moments(column(1, 1), column(1, 1 - delta), column(0, 0)).merge(Partition.by(["all", "all"]))
    assert merged.direction_change_deg()[0, 0] == pytest.approx(np.degrees(delta / 2), rel=1e-3)


@pytest.mark.parametrize("size", [1e-150, 1e150])
def test_energies_near_the_ends_of_float64_neither_overflow_nor_vanish(size: float) -> None:
    merged = Moments(column(size**2, size**2), column(1, 0.5), column(0, 0)).merge(Partition.by(["all", "all"]))
    assert merged.direction_change_deg()[0, 0] == pytest.approx(np.degrees(np.arctan2(1, 3)), rel=1e-14)


def test_without_energy_the_factor_stays_and_a_dropped_set_has_no_direction() -> None:
    still = Moments(column(0, 0), column(0.25, 0.25), column(0, 0)).merge(Partition.by(["all", "all"]))
    assert (still.mean[0, 0], still.direction_change_deg()[0, 0]) == (0.25, 0.0)
    dropped = Moments(column(1, 4), column(0, 0), column(0, 0)).merge(Partition.by(["all", "all"]))
    assert dropped.norm_ratio()[0, 0] == 0.0
    assert np.isnan(dropped.direction_change_deg()[0, 0])


def test_a_set_without_energy_does_not_blur_the_others() -> None:
    moments = Moments(np.array([[0.0, 0.69]]), np.array([[1.0, 1.7546594212e-06]]), np.zeros((1, 2)))
    merged = moments.merge(Partition.by(["all", "all"]))
    assert merged.mean[0, 0] == 1.7546594212e-06
    assert merged.direction_change_deg()[0, 0] == 0.0
