"""What an accelerator computes, on the CPU: the same totals and spectra as the compiled kernel's."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor

from gradscope.recording.device_meter import CHUNK, MOST_TOGETHER, SMALL, DeviceMeter, Layout
from gradscope.recording.meter import DTYPES, Meter
from gradscope.spectrum import MagnitudeSpectrum
from gradscope.trace.bins import decode
from gradscope.trace.measurement import Bins, Measurement


def both(tensors: list[Tensor | None], spectra: int) -> tuple[Measurement, Measurement]:
    there = DeviceMeter().measure(tensors, spectra, np.zeros(len(tensors), np.int64))
    assert there.ready()
    here = Meter(tensors).measure(tensors, spectra)
    assert isinstance(here, Measurement)
    return there.result(), here


def spectrum(bins: Bins) -> MagnitudeSpectrum:
    return decode(bins, 1.0, 1.0)


def same_bins(one: Bins, other: Bins) -> None:
    a, b = spectrum(one), spectrum(other)
    assert np.array_equal(a.lower, b.lower)
    assert np.array_equal(a.upper, b.upper)
    assert np.array_equal(a.count, b.count)
    assert a.sum_abs == pytest.approx(b.sum_abs, rel=2e-7)
    assert a.bin_sum_squares == pytest.approx(b.bin_sum_squares, rel=4e-7)


def same(there: Measurement, here: Measurement) -> None:
    assert there.sum_squares == pytest.approx(here.sum_squares, rel=1e-12, nan_ok=True)
    for name in ("max_abs", "zeros", "nan", "inf"):
        assert np.array_equal(getattr(there, name), getattr(here, name)), name
    assert (there.group_bins is None) == (here.group_bins is None)
    if there.group_bins is not None and here.group_bins is not None:
        same_bins(there.group_bins, here.group_bins)
    assert (there.tensor_bins is None) == (here.tensor_bins is None)
    if there.tensor_bins is not None and here.tensor_bins is not None:
        assert there.tensor_bin_counts is not None and here.tensor_bin_counts is not None
        assert np.array_equal(there.tensor_bin_counts, here.tensor_bin_counts)
        assert np.array_equal(there.tensor_bins.code, here.tensor_bins.code)
        assert np.array_equal(there.tensor_bins.count, here.tensor_bins.count)
        assert there.tensor_bins.mean == pytest.approx(here.tensor_bins.mean, abs=1e-6)
        assert there.tensor_bins.spread == pytest.approx(here.tensor_bins.spread, abs=1e-6)


@pytest.mark.parametrize("spectra", [0, 1, 2])
@pytest.mark.parametrize("dtype", list(DTYPES), ids=list(DTYPES.values()))
def test_every_dtype(dtype: torch.dtype, spectra: int) -> None:
    generator = torch.Generator().manual_seed(1)
    tensors = [
        torch.randn(64, 64, generator=generator).to(dtype),
        None,
        torch.randn(300, generator=generator).mul(1e-3).to(dtype),
        torch.zeros(5).to(dtype),
        torch.zeros(0).to(dtype),
        torch.tensor([math.nan, math.inf, -math.inf, 2.0, 0.0]).to(dtype),
        torch.randn(SMALL + 1, generator=generator).to(dtype),
    ]
    same(*both(tensors, spectra))


@pytest.mark.parametrize("spectra", [1, 2])
def test_small_tensors_together_and_large_ones_in_chunks(spectra: int) -> None:
    generator = torch.Generator().manual_seed(2)
    sizes = [3, CHUNK + 17, 40, SMALL, 7, SMALL + 1]
    tensors: list[Tensor | None] = [torch.randn(n, generator=generator) * 10.0**-k for k, n in enumerate(sizes)]
    same(*both(tensors, spectra))


def test_a_layout_holds_every_element_once_and_bounds_what_is_reduced_at_a_time() -> None:
    sizes = [5] * (MOST_TOGETHER + 3) + [0, 3 * CHUNK + 1, SMALL, 1, SMALL + 1, SMALL]
    layout = Layout(sizes, torch.device("cpu"))
    held = [0] * len(sizes)
    for chunk in layout.chunks:
        assert chunk.size <= CHUNK
        assert chunk.stop - chunk.first <= MOST_TOGETHER
        lengths = [chunk.size] if chunk.lengths is None else chunk.lengths.tolist()
        for place, length in zip(range(chunk.first, chunk.stop), lengths, strict=True):
            held[layout.order[place]] += length
    assert held == sizes


def test_a_norm_that_overflows_float32_and_one_that_underflows() -> None:
    tensors: list[Tensor | None] = [torch.full((100,), 3e19), torch.full((100,), 1e-30), torch.full((9,), 1e-40)]
    there, here = both(tensors, 2)
    same(there, here)
    assert there.sum_squares[0] == pytest.approx(100 * float(np.float32(3e19)) ** 2)


def test_what_lies_far_below_the_largest_is_in_one_bin_together() -> None:
    values = torch.cat([torch.ones(1000), torch.tensor([2.0**-100, 1.5 * 2.0**-90, 2.0**-70])]).double()
    there, here = both([values], 1)
    assert there.group_bins is not None and here.group_bins is not None
    low, high = (decode(row.group_bins, 1000.0, 1.0) for row in (there, here))
    assert low.count.tolist() == high.count.tolist() == [3, 1000]
    assert low.sum_abs == pytest.approx(high.sum_abs, rel=1e-6)
    v = 2.0**-80
    clip, other = low.value_clip(v), high.value_clip(v)
    assert clip.clipped.lo <= 1001 <= clip.clipped.hi
    assert other.clipped.lo <= 1001 <= other.clipped.hi


def test_zeros_that_a_sparse_gradient_does_not_store_are_counted() -> None:
    row = DeviceMeter().measure([torch.ones(3), None], 0, np.array([7, 0])).result()
    assert row.zeros.tolist() == [7, 0]
    assert math.isnan(row.sum_squares[1])


def test_no_gradient_at_all() -> None:
    row = DeviceMeter().measure([None, None], 2, np.zeros(2, np.int64)).result()
    assert np.isnan(row.sum_squares).all()
    assert row.group_bins is not None and row.group_bins.code.size == 0
    assert row.tensor_bin_counts is not None and row.tensor_bin_counts.tolist() == [0, 0]


def test_a_step_gives_the_same_result_when_asked_twice_and_leaves_the_gradient_alone() -> None:
    gradient = torch.randn(10, 4).t()
    version = gradient._version
    pending = DeviceMeter().measure([gradient], 2, np.zeros(1, np.int64))
    gradient_then = gradient.clone()
    assert pending.result() is pending.result()
    assert gradient._version == version
    assert torch.equal(gradient, gradient_then)


def test_it_works_where_deterministic_algorithms_are_asked_for() -> None:
    tensors: list[Tensor | None] = [torch.randn(1000), torch.randn(SMALL + 5)]
    torch.use_deterministic_algorithms(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            same(*both(tensors, 2))
    finally:
        torch.use_deterministic_algorithms(False)
