"""What clip-by-value does at any threshold, as a rigorous interval."""

from __future__ import annotations

import math
from fractions import Fraction
from functools import reduce
from operator import add

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spectrum_oracle import bfloat16_bits, exact_angle_deg, exact_clip

from gradscope.clipped_count import exactly
from gradscope.spectrum import MagnitudeSpectrum
from gradscope.value_clip import ValueClip

FIELDS = ("excess", "excess_sq", "clipped_energy")


def check_bounds(clip: ValueClip, elements: np.ndarray, most: float) -> None:
    exact = exact_clip(elements, clip.v)
    for name in FIELDS:
        assert Fraction(getattr(clip, f"{name}_lo")) <= exact[name] <= Fraction(getattr(clip, f"{name}_hi")), name
    assert clip.clipped.lo <= exact["clipped"] <= clip.clipped.hi
    assert clip.clipped.lo <= clip.clipped.likely <= clip.clipped.hi
    assert abs(Fraction(clip.energy) - exact["energy"]) <= Fraction(clip.rounding) * exact["energy"]
    angle, half_width = clip.direction_change_deg()
    # atan2 and degrees() round the true angle too.
    assert abs(angle - exact_angle_deg(elements, clip.v)) <= half_width + 1e-13
    assert half_width <= most


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_the_example_of_the_specification(dtype: str) -> None:
    clip = MagnitudeSpectrum.of(np.array([10, 0.1], dtype)).value_clip(0.5)
    angle, half_width = clip.direction_change_deg()
    assert angle == pytest.approx(10.7370, abs=5e-5 if dtype != "float16" else 5e-3)
    assert half_width < 1e-8
    assert clip.clipped == exactly(1)
    assert clip.norm_ratio() == pytest.approx(math.sqrt(0.26 / 100.01), rel=1e-4)
    assert clip.scale() == pytest.approx(5.01 / 100.01, rel=1e-4)


@st.composite
def magnitudes_in_bins(draw: st.DrawFn) -> tuple[np.ndarray, float]:
    """Elements that sit where bins are hardest to split, and a threshold among them."""
    octave = 2.0 ** draw(st.integers(-20, 10))
    first = octave * (1 + draw(st.integers(0, 127)) / 128)
    width = octave / 128
    parts: list[np.ndarray] = []
    for _ in range(draw(st.integers(1, 4))):
        offset = draw(st.sampled_from([0.0, 0.0, -width, width, 2 * width, 7 * octave, -first * 0.97]))
        lower = first + offset
        inside = draw(st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.9999, draw(st.floats(0, 0.9999))]), min_size=1))
        repeats = draw(st.integers(1, 3))
        parts.append(np.repeat(lower + np.array(inside) * width, repeats))
    elements = np.concatenate([*parts, np.zeros(draw(st.integers(0, 2)))]).astype(np.float32)
    v = draw(st.one_of(st.sampled_from(sorted(set(elements[elements > 0].tolist()))), st.floats(0.01, 0.99)))
    return elements, v if v in elements else first + v * width


@settings(max_examples=250, deadline=None)
@given(magnitudes_in_bins())
def test_bounds_hold_and_stay_narrow_wherever_the_elements_sit(case: tuple[np.ndarray, float]) -> None:
    elements, v = case
    for dtype in (np.float32, np.float64):
        check_bounds(MagnitudeSpectrum.of(elements.astype(dtype)).value_clip(v), elements, 0.1)


@settings(max_examples=60, deadline=None)
@given(magnitudes_in_bins(), magnitudes_in_bins())
def test_clips_of_parts_add_up_to_bounds_of_the_whole(
    one: tuple[np.ndarray, float], other: tuple[np.ndarray, float]
) -> None:
    v = one[1]
    parts = [one[0], one[0][::2], other[0]]
    clips = [MagnitudeSpectrum.of(part).value_clip(v) for part in parts]
    for whole in (reduce(add, clips), ValueClip.total(clips)):
        check_bounds(whole, np.concatenate(parts), 0.1)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(-1e4, 1e4, width=16), min_size=1, max_size=40),
    st.floats(1e-6, 1e5),
    st.sampled_from(["float16", "bfloat16"]),
)
def test_the_short_dtypes_are_exact(values: list[float], v: float, dtype: str) -> None:
    if dtype == "float16":
        elements = np.array(values, np.float16)
        spectrum = MagnitudeSpectrum.of(elements)
    else:
        bits = bfloat16_bits(np.array(values))
        spectrum = MagnitudeSpectrum.of(bits, "bfloat16")
        elements = (bits.astype(np.uint32) << 16).view(np.float32)
    clip = spectrum.value_clip(v)
    check_bounds(clip, elements, 1e-5)
    assert clip.clipped.error == 0


@settings(max_examples=60, deadline=None)
@given(st.floats(-12, 6), st.floats(-10, 3), st.integers(0, 2**32 - 1))
def test_random_gradients_at_any_scale_and_threshold(scale: float, below: float, seed: int) -> None:
    elements = (np.random.default_rng(seed).standard_t(2, 60) * 10**scale).astype(np.float32)
    v = 10 ** (scale + below)
    check_bounds(MagnitudeSpectrum.of(elements).value_clip(v), elements, 0.1)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.floats(0.01, 100), min_size=1, max_size=30),
    st.lists(st.floats(0.02, 90), max_size=4),
    st.floats(0.02, 90),
    st.booleans(),
)
def test_bounds_hold_for_bins_of_any_width(values: list[float], cuts: list[float], v: float, told: bool) -> None:
    elements = np.sort(np.array(values))
    which = np.searchsorted(np.sort(cuts), elements)
    bins = [elements[which == k] for k in range(len(cuts) + 1) if (which == k).any()]
    spectrum = MagnitudeSpectrum(
        np.array([part[0] for part in bins]),
        np.array([part[-1] for part in bins]),
        np.array([part.size for part in bins]),
        np.array([math.fsum(part) for part in bins]),
        math.fsum(elements * elements),
        float(elements[-1]),
        bin_sum_squares=np.array([math.fsum(part * part) for part in bins]) if told else None,
    )
    check_bounds(spectrum.value_clip(v), elements, 45)


def hardest_half_width(seed: int, rounds: int) -> float:
    """The widest interval that a hill climb over counts, means, scatters and v finds."""
    rng = np.random.default_rng(seed)

    def width(rows: np.ndarray, at: float) -> float:
        octave, step = np.divmod(np.round(rows[:, 1]), 128)
        _, first = np.unique(rows[:, 1].round(), return_index=True)
        octave, step, rows = octave[first], step[first], rows[first]
        lower = 2.0**octave * (1 + step / 128)
        upper = lower + 2.0**octave / 128 - 2.0 ** (octave - 23)
        count = np.exp2(rows[:, 0]).astype(np.int64)
        mean = lower + (upper - lower) * rows[:, 2]
        scatter = (mean - lower) * (upper - mean) * count * rows[:, 3]
        energy = math.fsum(count * mean**2 + scatter)
        spectrum = MagnitudeSpectrum(lower, upper, count, count * mean, energy, float(upper[-1]))
        return spectrum.value_clip(1 + at / 128).direction_change_deg()[1]

    low, high = np.array([0, -600, 0, 0]), np.array([20, 600, 1, 1])
    widest = 0.0
    for _ in range(rounds):
        rows = rng.uniform(low, high, (rng.integers(1, 4), 4))
        rows[:, 1] = rng.choice([-128, -1, 1, 2], rows.shape[0])
        rows[0, 1] = 0
        at = rng.uniform(0.05, 0.95)
        best = width(rows, at)
        for _ in range(150):
            trial = np.clip(rows + rng.normal(size=rows.shape) * (high - low) * 10.0 ** -rng.uniform(0.5, 3), low, high)
            trial[0, 1] = 0
            trial_at = min(max(at + rng.normal() * 0.05, 0.001), 0.999)
            found = width(trial, trial_at)
            if found > best:
                rows, at, best = trial, trial_at, found
        widest = max(widest, best)
    return widest


def test_no_adversary_makes_the_interval_wider_than_a_tenth_of_a_degree() -> None:
    assert 0.05 < hardest_half_width(0, 40) <= 0.1


def test_nothing_above_v_changes_nothing() -> None:
    values = np.array([0.5, -0.25, 0.0], np.float32)
    for v in (0.5, 1.0, math.inf):
        clip = MagnitudeSpectrum.of(values).value_clip(v)
        assert clip.direction_change_deg() == (0.0, 0.0)
        assert (clip.norm_ratio(), clip.scale(), clip.clipped) == (1.0, 1.0, exactly(0))


@pytest.mark.parametrize("values", [[], [0.0, -0.0], [math.nan], [math.inf, 0.0]])
def test_nothing_to_clip(values: list[float]) -> None:
    clip = MagnitudeSpectrum.of(np.array(values, np.float32)).value_clip(1e-3)
    assert clip.direction_change_deg() == (0.0, 0.0)
    assert (clip.norm_ratio(), clip.scale(), clip.energy) == (1.0, 1.0, 0.0)


def test_equal_magnitudes_all_clipped_keep_their_direction() -> None:
    for dtype in ("float16", "float32", "float64"):
        clip = MagnitudeSpectrum.of(np.array([3.0, -3.0] * 500, dtype)).value_clip(1e-4)
        angle, half_width = clip.direction_change_deg()
        assert angle <= half_width <= 1e-4
        assert clip.scale() == pytest.approx(1e-4 / 3, rel=1e-12)


def test_v_at_a_bin_edge_is_sharp_for_every_quantity_but_the_scatter() -> None:
    values = np.random.default_rng(0).standard_normal(3000).astype(np.float32)
    clip = MagnitudeSpectrum.of(values).value_clip(1.0)
    assert clip.clipped.likely == int((np.abs(values.astype(float)) > 1).sum())
    assert clip.excess_hi - clip.excess_lo < 1e-11
    assert clip.direction_change_deg()[1] < 1e-3


def test_agrees_with_torch_on_a_large_tensor() -> None:
    gradient = torch.from_numpy(np.random.default_rng(5).standard_t(3, 200_000).astype(np.float32) * 1e-3)
    spectrum = MagnitudeSpectrum.of(gradient.numpy())
    for v in (1e-4, 1e-3, 5e-3):
        before, after = gradient.double(), gradient.clamp(-v, v).double()
        cosine = float(before @ after / before.norm() / after.norm())
        angle, half_width = spectrum.value_clip(v).direction_change_deg()
        assert abs(angle - math.degrees(math.acos(cosine))) <= half_width + 1e-4
        assert half_width < 1e-2


def test_known_sums_of_squares_of_the_bins_narrow_the_interval() -> None:
    elements = np.array([0.25, 0.25, 0.5, 0.5, 1.25, 1.25, 1.75, 1.75])
    bins = np.array([0.25, 1.0]), np.array([0.5, 2.0]), np.array([4, 4]), np.array([1.5, 6.0])
    energy = float(elements @ elements)
    blind = MagnitudeSpectrum(*bins, energy, 1.75).value_clip(1.1)
    told = MagnitudeSpectrum(*bins, energy, 1.75, bin_sum_squares=np.array([0.625, 9.25])).value_clip(1.1)
    check_bounds(blind, elements, 20)
    check_bounds(told, elements, blind.direction_change_deg()[1] * 0.9)


def test_squares_that_leave_float64_are_owned_up_to() -> None:
    for values in ([1e200, 1e-3], [1e-200, 3e-200]):
        assert MagnitudeSpectrum.of(np.array(values)).value_clip(2e-200).direction_change_deg() == (45.0, 45.0)


@pytest.mark.parametrize("v", [0.0, -1.0, math.nan])
def test_a_threshold_that_is_not_positive(v: float) -> None:
    with pytest.raises(ValueError, match="positive"):
        MagnitudeSpectrum.of(np.ones(3)).value_clip(v)


def test_clips_at_different_values_do_not_add_up() -> None:
    one, other = (MagnitudeSpectrum.of(np.ones(3)).value_clip(v) for v in (0.5, 0.25))
    with pytest.raises(ValueError, match="do not add up"):
        one + other
    with pytest.raises(ValueError, match="do not add up"):
        ValueClip.total([one, other])
