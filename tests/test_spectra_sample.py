"""Spectra at a few of many steps: which steps, and what is told of tensors without one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from gradscope.gradients import GradientStep
from gradscope.spectra_sample import MOST_SAMPLED, MergedSpectra, SpectraSample
from gradscope.spectrum import MagnitudeSpectrum

SPECTRA = [MagnitudeSpectrum.of(np.random.default_rng(seed).standard_normal(50)) for seed in range(40)]


def shown(steps: Sequence[GradientStep], tensors: int) -> tuple[list[int], list[Sequence[MagnitudeSpectrum | None]]]:
    taken: list[Sequence[MagnitudeSpectrum | None]] = []
    sample = SpectraSample(tensors, len(steps), [lambda row, spectra: taken.append(spectra)])
    for position, step in enumerate(steps):
        sample.see(position, step)
    return sample.rows, taken


@pytest.mark.parametrize("steps", [1, 63, 64, 65, 1000])
def test_no_more_than_64_steps_are_shown_and_these_lie_evenly(steps: int) -> None:
    rows, taken = shown([GradientStep.from_spectra(0, "", SPECTRA[:1])] * steps, 1)
    assert len(rows) == len(taken) == min(steps, MOST_SAMPLED)
    assert rows[0] == 0
    assert set(np.diff(rows)) <= {steps // len(rows), steps // len(rows) + 1}


def test_steps_without_spectra_are_passed_over_for_the_next_that_has_them() -> None:
    with_spectra = GradientStep.from_spectra(0, "", SPECTRA[:1])
    without = replace(with_spectra, spectra=())
    assert shown([without, without, with_spectra, without, with_spectra], 1)[0] == [2, 4]


def test_no_gradient_is_an_empty_spectrum_and_an_unknown_one_is_none() -> None:
    step = GradientStep.from_spectra(0, "", SPECTRA[:3])
    step = replace(step, spectra=(SPECTRA[0], SPECTRA[1], None), present=np.array([True, False, True]))
    (spectra,) = shown([step], 3)[1]
    assert spectra[0] is SPECTRA[0]
    assert spectra[1] is not None and spectra[1].numel == 0
    assert spectra[2] is None


def test_what_is_merged_on_the_way_is_what_all_of_them_give() -> None:
    merged = MergedSpectra(2)
    for row, spectrum in enumerate(SPECTRA):
        merged.take(row, [spectrum, None])
    found, nothing = merged.merged()
    whole = MagnitudeSpectrum.merge(SPECTRA)
    assert nothing is None
    assert found is not None and found.numel == whole.numel == 40 * 50
    assert found.sum_squares == pytest.approx(whole.sum_squares, rel=1e-14)
    assert np.array_equal(found.count, whole.count)
    assert found.sum_abs == pytest.approx(whole.sum_abs, rel=1e-12)
