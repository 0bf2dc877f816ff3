"""Holm's procedure by hand, and what it promises."""

from __future__ import annotations

import math

import numpy as np

from gradscope.holm import holm


def test_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005], 0.05) == [True, False, False, True]
    assert holm([math.nan, 0.04], 0.05) == [False, True]
    assert holm([], 0.05) == []


def test_at_least_what_bonferroni_rejects_falls_and_all_together_are_seldom_wrong() -> None:
    probabilities = np.random.default_rng(0).random((2000, 20))
    wrong = 0
    for row in probabilities:
        fell = holm(row.tolist(), 0.05)
        assert all(fell[i] for i in np.flatnonzero(row <= 0.05 / 20))
        wrong += any(fell)
    assert 0.03 < wrong / 2000 < 0.06
