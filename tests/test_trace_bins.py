"""The bins of a trace: codes and edges, and spectra decoded from them, whose every answer holds the truth."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from spectrum_oracle import exact_angle_deg, exact_clip

from gradscope.recording.meter import GroupMeter
from gradscope.spectrum import MagnitudeSpectrum
from gradscope.trace.bins import BELOW, LEVEL_STARTS, decode, edges
from gradscope.trace.measurement import Bins, Measurement
from gradscope.value_clip import ValueClip

FIELDS = ("excess", "excess_sq", "clipped_energy")


def measured(elements: np.ndarray, spectra: int = 1) -> Measurement:
    return GroupMeter([elements.size], [elements.dtype.name]).measure([elements.ctypes.data], spectra)


def through_a_trace(elements: np.ndarray, grad_scale: float = 1.0) -> MagnitudeSpectrum:
    kept = np.ascontiguousarray(elements)
    row = measured(kept)
    assert row.group_bins is not None
    totals = (float(row.sum_squares[0]), float(row.max_abs[0]), int(row.zeros[0]), int(row.nan[0]), int(row.inf[0]))
    return decode(row.group_bins, *totals, grad_scale)


def check_bounds(clip: ValueClip, elements: np.ndarray, most: float = 1.0) -> None:
    exact = exact_clip(elements, clip.v)
    for name in FIELDS:
        assert Fraction(getattr(clip, f"{name}_lo")) <= exact[name] <= Fraction(getattr(clip, f"{name}_hi")), name
    assert clip.clipped.lo <= exact["clipped"] <= clip.clipped.hi
    assert clip.clipped.lo <= clip.clipped.likely <= clip.clipped.hi
    assert abs(Fraction(clip.energy) - exact["energy"]) <= Fraction(clip.rounding) * exact["energy"]
    angle, half_width = clip.direction_change_deg()
    assert abs(angle - exact_angle_deg(elements, clip.v)) <= half_width + 1e-13
    assert half_width <= most


def test_every_magnitude_lies_in_one_bin_of_each_level() -> None:
    magnitudes = np.abs(np.random.default_rng(1).integers(1, 0x7FF0000000000000, 4000).view(np.float64))
    magnitudes = np.concatenate([magnitudes, [5e-324, 2.0**-1022, 1.0, np.finfo(np.float64).max]])
    for level, start in enumerate(LEVEL_STARTS):
        codes = start + (magnitudes.view(np.uint64) >> np.uint64(49 + level)).astype(np.int64)
        lower, upper = edges(codes)
        assert np.all((lower <= magnitudes) & (magnitudes <= upper))
        if level < 3:
            normal = magnitudes >= 2.0**-1022
            assert upper[normal] / lower[normal] == pytest.approx(1 + (upper - lower)[normal] / lower[normal])
            assert np.all(upper[normal] / lower[normal] <= 1 + 2.0 ** (level - 3))


def test_levels_nest_and_meet_without_a_gap() -> None:
    fine_lower, fine_upper = edges(np.arange(8, 16376))
    assert np.array_equal(np.nextafter(fine_upper[:-1], np.inf), fine_lower[1:])
    for level in (1, 2, 3):
        lower, upper = edges(np.arange(8 >> level, 16376 >> level) + LEVEL_STARTS[level])
        assert np.array_equal(lower, fine_lower[:: 1 << level])
        assert np.array_equal(upper, fine_upper[(1 << level) - 1 :: 1 << level])
    lower, upper = edges(np.array([BELOW + 1023]))
    assert (lower[0], np.nextafter(upper[0], 2.0)) == (5e-324, 1.0)


@pytest.mark.parametrize("code", [-1, 16376, 30719, BELOW, BELOW + 2047, 32768])
def test_codes_that_mean_nothing_are_refused(code: int) -> None:
    with pytest.raises(ValueError, match="bin code"):
        edges(np.array([code]))


def test_impossible_moments_are_refused() -> None:
    for count, mean, spread in ((0, 0.5, 0.1), (1, 1.5, 0.0), (1, math.nan, 0.0), (2, 0.5, -0.1)):
        bins = Bins(
            np.array([8000], np.uint16),
            np.array([count], np.uint32),
            np.array([mean], np.float32),
            np.array([spread], np.float32),
        )
        with pytest.raises(ValueError, match="moments"):
            decode(bins, 1.0, 1.0)
    with pytest.raises(ValueError, match="grad_scale"):
        decode(measured(np.ones(3)).group_bins or bins, 3.0, 1.0, grad_scale=0.0)


@st.composite
def clusters(draw: st.DrawFn) -> tuple[np.ndarray, float]:
    """Elements of few magnitudes in few octaves, in very different numbers, and a threshold among them."""
    parts: list[np.ndarray] = []
    for _ in range(draw(st.integers(1, 4))):
        octave = 2.0 ** draw(st.sampled_from([0, 0, -1, -2, -3, -5, -8, -20, -45, -60]))
        for _ in range(draw(st.integers(1, 2))):
            value = octave * (1 + draw(st.sampled_from([0.0, 0.125, 0.5]) | st.floats(0, 0.9999)))
            parts.append(np.full(draw(st.sampled_from([1, 2, 3, 30, 31, 64, 200])), value))
    elements = np.concatenate([*parts, np.zeros(draw(st.integers(0, 2)))]).astype(np.float32)
    nonzero = sorted(set(elements[elements > 0].tolist()))
    near = draw(st.sampled_from(nonzero))
    return elements, near * draw(st.sampled_from([1.0, 1.0 + 2.0**-20, 1.0 - 2.0**-20]) | st.floats(0.4, 2.1))


@settings(max_examples=300, deadline=None)
@given(clusters())
@example((np.array([1.0433] * 6 + [1.0, 1.1153], np.float32), 1.0449))
@example((np.repeat(np.array([1, 0.9935, 0.646], np.float32), [189, 4, 2]), 0.8238))
@example((np.array([1, 0.5, 0.25, 2.0**-60], np.float32), 2.0**-60))
@example((np.array([1, 2.0**-45, 2.0**-60, 2.0**-61], np.float32), 1.5 * 2.0**-60))
def test_the_truth_lies_within_a_degree_at_any_threshold(case: tuple[np.ndarray, float]) -> None:
    elements, v = case
    check_bounds(through_a_trace(elements).value_clip(v), elements)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([np.float32, np.float64]))
def test_random_gradients_at_thresholds_on_edges_in_bins_and_outside(seed: int, dtype: type) -> None:
    rng = np.random.default_rng(seed)
    elements = (rng.standard_t(rng.uniform(0.5, 6), 200) * 10.0 ** rng.uniform(-9, 5)).astype(dtype)
    spectrum = through_a_trace(elements)
    inside = float(np.quantile(np.abs(elements), rng.uniform()))
    edge = float(rng.choice(spectrum.lower))
    for v in (inside, edge, spectrum.max_abs, spectrum.max_abs * 1.01, inside * 1e-12, float(spectrum.upper[0])):
        check_bounds(spectrum.value_clip(v), elements)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_clips_of_the_tensors_of_a_group_add_up_to_bounds_of_the_whole(seed: int) -> None:
    rng = np.random.default_rng(seed)
    parts = [(rng.standard_t(3, rng.integers(1, 80)) * 10.0 ** rng.uniform(-4, 1)).astype(np.float32) for _ in range(4)]
    whole = np.concatenate(parts)
    v = float(np.quantile(np.abs(whole), rng.uniform()))
    check_bounds(ValueClip.total(through_a_trace(part).value_clip(v) for part in parts), whole)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.randoms(use_true_random=False))
def test_spectra_of_any_coarseness_merge_in_any_order_and_stay_right(seed: int, random: object) -> None:
    rng = np.random.default_rng(seed)
    parts = [
        (rng.standard_t(2, rng.integers(1, 60)) * 2.0 ** rng.integers(-50, 10)).astype(np.float32) for _ in range(4)
    ]
    whole = np.concatenate(parts)
    spectra = [through_a_trace(part) for part in parts[:-1]] + [MagnitudeSpectrum.of(parts[-1].astype(np.float64))]
    decoded = spectra[:-1]
    merged = MagnitudeSpectrum.merge(spectra)
    shuffled = list(decoded)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    one, other = MagnitudeSpectrum.merge(decoded), MagnitudeSpectrum.merge(shuffled)
    for name in ("lower", "upper", "count", "sum_abs", "bin_sum_squares"):
        assert np.array_equal(getattr(one, name), getattr(other, name)), name
    assert np.all(merged.lower[1:] > merged.upper[:-1])
    assert merged.numel == whole.size
    for spectrum, elements in ((merged, whole), (one, np.concatenate(parts[:-1]))):
        for v in np.quantile(np.abs(elements), rng.uniform(size=3)).tolist():
            check_bounds(spectrum.value_clip(v), elements)


def test_an_octave_that_one_rank_hardly_fills_stays_sharp_where_another_does() -> None:
    rng = np.random.default_rng(6)
    ranks = [(rng.standard_normal(4000) * 2.0**-k).astype(np.float32) for k in (0, 8, 8)]
    merged = MagnitudeSpectrum.merge([through_a_trace(rank) for rank in ranks])
    alike = MagnitudeSpectrum.merge([through_a_trace(ranks[1]), through_a_trace(ranks[1])])
    assert len(merged.parts) == 3
    assert alike.parts == ()
    for v in (0.5 * 2.0**-8, 0.9 * 2.0**-8, 2.0**-8):
        assert merged.value_clip(v).direction_change_deg()[1] < 0.1
    again = merged.repeated(2) + MagnitudeSpectrum.of(np.ones(3))
    assert len(again.parts) == 4
    assert again.value_clip(0.01).energy == pytest.approx(again.sum_squares, rel=1e-12)


def test_bins_that_repeat_a_code_are_one() -> None:
    spectrum = through_a_trace(np.array([1.0, 1.1, 3.0], np.float32))
    bins = measured(np.array([1.0, 1.1, 3.0], np.float32)).group_bins
    assert bins is not None
    twice = Bins(*(np.concatenate([getattr(bins, name)] * 2) for name in ("code", "count", "mean", "spread")))
    doubled = decode(twice, 2 * spectrum.sum_squares, spectrum.max_abs)
    assert doubled.count.tolist() == (2 * spectrum.count).tolist()
    assert doubled.sum_abs == pytest.approx(2 * spectrum.sum_abs)
    assert doubled.value_clip(0.9).excess_lo == pytest.approx(spectrum.repeated(2).value_clip(0.9).excess_lo)


@pytest.mark.parametrize("scale", [65536.0, 1000.0, 1 / 3, 1e-3])
def test_the_loss_scale_is_divided_out(scale: float) -> None:
    elements = np.random.default_rng(3).standard_normal(300).astype(np.float32)
    spectrum = through_a_trace(elements, scale)
    true = elements.astype(np.float64) / scale
    assert np.all(spectrum.lower[1:] > spectrum.upper[:-1])
    assert spectrum.norm == pytest.approx(float(np.linalg.norm(true)), rel=1e-12)
    for v in (0.3 / scale, 1.0 / scale, float(spectrum.lower[7])):
        clip = spectrum.value_clip(v)
        angle, half_width = clip.direction_change_deg()
        assert abs(angle - exact_angle_deg(true, v)) <= half_width + 1e-9
        assert half_width <= 1.0


def test_a_step_of_a_small_policy_takes_few_bins_and_keeps_the_octaves() -> None:
    elements = np.random.default_rng(4).standard_normal(10_000).astype(np.float32)
    bins = measured(elements).group_bins
    assert bins is not None
    assert bins.code.size <= 70
    spectrum = through_a_trace(elements)
    for octave in (2.0**-3, 2.0**-8, 2.0**-12):
        lo, hi = spectrum.share_below(octave)
        assert lo == hi == np.mean(np.abs(elements) < octave)


def test_octaves_are_told_apart_down_to_a_trillionth_of_the_largest() -> None:
    steps = (2.0 ** -np.arange(60.0)).astype(np.float32)
    elements = np.concatenate([steps, np.ones(2000, np.float32)])
    spectrum = through_a_trace(elements)
    assert spectrum.lower[1:].tolist() == sorted(steps[:41].tolist())
    assert (int(spectrum.count[0]), float(spectrum.upper[0])) == (19, math.nextafter(2.0**-40, 0))
    assert spectrum.sum_abs[0] == pytest.approx(float(steps[41:].sum(dtype=np.float64)), rel=1e-6)


def test_many_small_elements_are_told_apart_however_small() -> None:
    elements = (2.0 ** -np.arange(60.0)).astype(np.float32)
    assert through_a_trace(elements).lower.tolist() == sorted(elements.tolist())
    widest = 2.0 ** np.arange(-1074.0, 1024.0)
    assert through_a_trace(widest).numel == widest.size


def test_what_is_known_of_a_scan_stays_as_exact_as_it_was() -> None:
    elements = np.random.default_rng(5).standard_normal(2000).astype(np.float32)
    scanned = MagnitudeSpectrum.of(elements)
    assert scanned.rounding == 0.0
    assert scanned.value_clip(float(scanned.lower[100])).direction_change_deg()[1] < 1e-3
    assert through_a_trace(elements).rounding > 0.0
