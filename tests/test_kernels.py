"""Raw buffers of every dtype: counts, exact sums, zeros and non-finite elements."""

from __future__ import annotations

import math
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from spectrum_oracle import check_against

from gradscope._kernels import Scanner
from gradscope.spectrum import FLOAT_DTYPES, MagnitudeSpectrum

SHORT_DTYPES = ["float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]


def spectrum_of(buffer: object, dtype: str) -> MagnitudeSpectrum:
    scanner = Scanner(dtype)
    scanner.feed(buffer)
    return MagnitudeSpectrum.from_scan(scanner)


@pytest.mark.parametrize("dtype", SHORT_DTYPES)
def test_every_bit_pattern_of_the_short_dtypes_means_what_torch_says(dtype: str) -> None:
    unsigned = np.dtype(f"u{FLOAT_DTYPES[dtype].itemsize}")
    patterns = np.arange(1 << (8 * unsigned.itemsize)).astype(unsigned)
    repeated = np.repeat(patterns, 1 + np.arange(patterns.size) % 3)
    values = torch.from_numpy(repeated).view(getattr(torch, dtype)).to(torch.float64).numpy()
    check_against(spectrum_of(repeated, dtype), values, dtype, 2**-51)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("n", [0, 1, 7, 31, 32, 33, 1023, 2047, 2048, 2049, 5000])
def test_lengths_around_the_block_size(dtype: str, n: int) -> None:
    values = np.random.default_rng(n).standard_normal(n).astype(dtype)
    values[::11] = 0
    check_against(spectrum_of(values, dtype), values, dtype, 2**-46)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_bin_edges_signs_zeros_and_nonfinite(dtype: str) -> None:
    info = np.finfo(dtype)
    edges = [1 + m / 128 for m in range(128)]
    below = np.nextafter(np.array(edges, dtype), np.array(0, dtype))
    special = [0.0, -0.0, math.nan, -math.nan, math.inf, -math.inf, info.tiny]
    largest = [float(info.max)] if dtype == "float32" else [1e150]
    values = np.concatenate([edges, below, -np.array(edges), special, largest, [-1e-30]]).astype(dtype)
    check_against(spectrum_of(values, dtype), values, dtype, 2**-46)


def test_float32_subnormals_are_binned_as_finely_as_the_rest() -> None:
    rng = np.random.default_rng(0)
    bits = np.concatenate([np.arange(1, 3000), rng.integers(1, 1 << 23, 3000), [0, (1 << 23) - 1, 1 << 23]])
    values = bits.astype(np.uint32).view(np.float32)
    values[::2] *= -1
    spectrum = spectrum_of(values, "float32")
    check_against(spectrum, values, "float32", 2**-46)
    assert np.all(spectrum.upper - spectrum.lower <= spectrum.lower / 128)


def test_a_processor_told_to_flush_subnormals_changes_nothing() -> None:
    values = np.array([1e-40, 3e-45, 0.0], np.float32)
    expected = spectrum_of(values, "float32")
    torch.set_flush_denormal(True)
    try:
        flushed = spectrum_of(values, "float32")
    finally:
        torch.set_flush_denormal(False)
    assert flushed.sum_squares == expected.sum_squares > 0
    assert flushed.max_abs == expected.max_abs > 0
    assert np.array_equal(flushed.sum_abs, expected.sum_abs)


def test_float64_subnormals_are_counted_apart_from_zeros() -> None:
    values = np.array([0.0, -0.0, 5e-324, -1e-320, 2e-310, 1.0])
    spectrum = spectrum_of(values, "float64")
    assert (spectrum.zeros, spectrum.numel) == (2, 6)
    assert spectrum.sum_abs_total == 1.0
    assert spectrum.lower[0] == 5e-324
    assert int(spectrum.count.sum()) == 4


def test_a_float64_square_that_overflows_gives_inf() -> None:
    spectrum = spectrum_of(np.array([1e200, 1.0, math.nan]), "float64")
    assert spectrum.sum_squares == math.inf
    assert spectrum.max_abs == 1e200
    assert spectrum.nan == 1


def test_large_float32_squares_do_not_overflow() -> None:
    values = np.full(1000, 3e38, np.float32)
    assert spectrum_of(values, "float32").norm == pytest.approx(float(values[0]) * math.sqrt(1000), rel=1e-14)


@pytest.mark.parametrize("value", [0.1, 1e-23, 1e18])
def test_sums_of_a_constant_are_right_to_float64(value: float) -> None:
    n = (1 << 23) + (1 << 22) + 5
    spectrum = spectrum_of(np.full(n, value, np.float32), "float32")
    exact = float(np.float32(value))
    assert spectrum.sum_squares == pytest.approx(exact * exact * n, rel=1e-14)
    assert spectrum.sum_abs.tolist() == [exact * n]
    assert spectrum.count.tolist() == [n]


def test_float64_low_bits_carry_past_64() -> None:
    value = math.nextafter(1 + 1 / 128, 0)
    n = (1 << 21) + 3
    spectrum = spectrum_of(np.full(n, value), "float64")
    assert spectrum.count.tolist() == [n]
    assert spectrum.sum_abs[0] == pytest.approx(value * n, rel=4e-16)


def test_nonfinite_elements_leave_no_trace_in_the_next_tensor() -> None:
    for dtype in ("float32", "float64"):
        scanner = Scanner(dtype)
        for _ in range(3):
            hostile = np.array([math.nan, math.inf, -math.inf, 1e-40, -0.0, 5.0] * 1000, dtype)
            scanner.feed(hostile)
            check_against(MagnitudeSpectrum.from_scan(scanner), hostile, dtype, 2**-46)
        plain = np.array([1.0, 0.25], dtype)
        scanner.feed(plain)
        check_against(MagnitudeSpectrum.from_scan(scanner), plain, dtype, 2**-46)
        assert MagnitudeSpectrum.from_scan(scanner).numel == 0


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_a_misaligned_buffer(dtype: str) -> None:
    values = np.random.default_rng(1).standard_normal(5000).astype(dtype)
    for shift in (1, 2, 3):
        check_against(spectrum_of((b"x" * shift + values.tobytes())[shift:], dtype), values, dtype, 2**-46)
        shifted = memoryview(b"x" * shift + values.tobytes())[shift:]
        check_against(spectrum_of(shifted, dtype), values, dtype, 2**-46)


def test_feeding_in_pieces_equals_feeding_whole() -> None:
    values = np.random.default_rng(2).standard_normal(10_001).astype(np.float32)
    scanner = Scanner("float32")
    for start in range(0, values.size, 777):
        scanner.feed(values[start : start + 777])
    check_against(MagnitudeSpectrum.from_scan(scanner), values, "float32", 2**-46)


def test_feed_file_reads_exactly_the_range(tmp_path: Path) -> None:
    values = np.random.default_rng(3).standard_normal(600_000).astype(np.float32)
    path = tmp_path / "values"
    path.write_bytes(b"abc" + values.tobytes() + b"tail")
    fd = os.open(path, os.O_RDONLY)
    try:
        scanner = Scanner("float32")
        scanner.feed_file(fd, 3, values.nbytes)
        from_file = MagnitudeSpectrum.from_scan(scanner)
        whole = spectrum_of(values, "float32")
        assert np.array_equal(from_file.count, whole.count)
        assert np.array_equal(from_file.sum_abs, whole.sum_abs)
        assert from_file.sum_squares == pytest.approx(whole.sum_squares, rel=1e-14)
        with pytest.raises(EOFError, match="1 bytes early"):
            scanner.feed_file(fd, 8, values.nbytes)
    finally:
        os.close(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        Scanner("float32").feed_file(fd, 0, 4)


def test_what_is_no_whole_number_of_elements_is_refused() -> None:
    scanner = Scanner("float32")
    with pytest.raises(ValueError, match="whole number"):
        scanner.feed(b"12345")
    with pytest.raises(ValueError, match="whole number"):
        scanner.feed_file(0, 0, 5)
    with pytest.raises(ValueError, match="unknown dtype"):
        Scanner("int8")
    with pytest.raises((ValueError, BufferError)):
        scanner.feed(np.zeros((4, 4), np.float32)[:, ::2])


def test_one_scanner_per_thread() -> None:
    values = np.random.default_rng(4).standard_normal(200_000).astype(np.float32)
    whole = spectrum_of(values, "float32")
    results: list[MagnitudeSpectrum] = []

    def work() -> None:
        results.extend(spectrum_of(values, "float32") for _ in range(5))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 20
    assert all(np.array_equal(r.count, whole.count) and r.sum_squares == whole.sum_squares for r in results)
