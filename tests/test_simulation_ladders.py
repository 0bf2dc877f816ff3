"""Round edges and thresholds over any range of norms."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradscope.ladders import norm_histogram, round_ladder


@settings(max_examples=150, deadline=None)
@given(st.lists(st.floats(1e-160, 1e154) | st.floats(0.5, 0.6) | st.just(0.0), min_size=1, max_size=40))
def test_a_histogram_covers_every_norm_in_at_most_24_bins(norms: list[float]) -> None:
    histogram = norm_histogram(np.array(norms))
    edges = np.array(histogram.edges)
    assert (np.diff(edges) > 0).all()
    assert 1 <= len(histogram.counts) <= 24
    assert sum(histogram.counts) == len(norms)
    assert (histogram.smallest, histogram.largest) == (min(norms), max(norms))
    positive = [norm for norm in norms if norm > 0]
    if positive:
        assert edges[0] <= min(positive)
        assert max(positive) <= edges[-1]


def test_edges_are_round_numbers_on_a_logarithmic_scale() -> None:
    histogram = norm_histogram(np.geomspace(0.1, 10, 100))
    assert histogram.edges[0] == 0.1
    assert histogram.edges[-1] == 10.0
    assert 12 <= len(histogram.counts) <= 24
    assert all(float(f"{edge:.2g}") == edge for edge in histogram.edges)
    ratios = np.array(histogram.edges[1:]) / np.array(histogram.edges[:-1])
    assert ratios.max() / ratios.min() < 1.2


def test_zero_norms_count_in_the_first_bin() -> None:
    histogram = norm_histogram(np.array([0.0, 0.0, 1.0, 100.0]))
    assert histogram.counts[0] == 3
    assert norm_histogram(np.zeros(4)).counts == (4,)
    assert norm_histogram(np.array([])).counts == (0,)


def test_a_ladder_reaches_from_the_first_percentile_to_the_largest_norm() -> None:
    norms = np.exp(np.random.default_rng(0).normal(size=1000))
    ladder = round_ladder(norms, [0.5, 77.0])
    assert {0.5, 77.0} <= set(ladder)
    assert ladder == sorted(ladder)
    assert ladder[0] == pytest.approx(np.percentile(norms, 1), rel=0.06)
    assert any(math.isclose(rung, norms.max(), rel_tol=0.06) for rung in ladder)
    assert round_ladder(np.zeros(3), [0.5]) == [0.5]
