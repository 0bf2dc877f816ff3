"""Stored tensors: files, memory and streams, scanned in pieces and read whole."""

from __future__ import annotations

import gzip
import io
import math
import os
import resource
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from spectrum_oracle import check_against

from gradscope.errors import GradscopeError
from gradscope.sources.stored import FileTensor, MemoryTensor, StoredTensor, StreamTensor, read, scan
from gradscope.spectrum import FLOAT_DTYPES, MagnitudeSpectrum
from gradscope.tensors import TensorInfo


def info(shape: tuple[int, ...], dtype: str = "float32", name: str = "w") -> TensorInfo:
    return TensorInfo(name, shape, dtype)


def same(one: MagnitudeSpectrum, other: MagnitudeSpectrum) -> bool:
    return (
        np.array_equal(one.lower, other.lower)
        and np.array_equal(one.count, other.count)
        and one.sum_abs == pytest.approx(other.sum_abs, rel=1e-15)
        and one.sum_squares == pytest.approx(other.sum_squares, rel=1e-14)
        and (one.zeros, one.nan, one.inf, one.max_abs) == (other.zeros, other.nan, other.inf, other.max_abs)
    )


def large(n: int) -> np.ndarray:
    values = np.random.default_rng(0).standard_normal(n).astype(np.float32)
    values[::1000] = 0
    values[5::100_000] = math.nan
    return values


def test_large_tensors_are_cut_and_small_ones_gathered(tmp_path: Path) -> None:
    values = large(3_000_017)
    path = tmp_path / "dump"
    path.write_bytes(b"header.." + values.tobytes())
    (tmp_path / "other").write_bytes(values[:100].tobytes())
    tensors: list[StoredTensor] = [
        FileTensor(info((3_000_000,)), str(path), 8),
        FileTensor(info((17,)), str(path), 8 + 12_000_000),
        FileTensor(info((10, 10)), str(tmp_path / "other"), 0),
        FileTensor(info((0,)), str(path), 8),
        FileTensor(info(()), str(path), 12),
        MemoryTensor(info(values.shape), values),
        MemoryTensor(info((1000, 3000)), values[:3_000_000].reshape(3000, 1000).T),
        StreamTensor(info(values.shape), lambda: io.BytesIO(values.tobytes())),
    ]
    seen: list[tuple[int, int]] = []
    spectra = scan(tensors, lambda done, total: seen.append((done, total)))
    parts = [values[:3_000_000], values[3_000_000:], values[:100], values[:0], values[1:2], values, values[:3_000_000]]
    for spectrum, part in zip(spectra, [*parts, values], strict=True):
        assert same(spectrum, MagnitudeSpectrum.of(part))
    total = sum(part.nbytes for part in parts) + values.nbytes
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_a_small_file_is_scanned_at_once(tmp_path: Path) -> None:
    values = large(1000)
    path = tmp_path / "dump"
    path.write_bytes(values.tobytes())
    tensors = [FileTensor(info((500,)), str(path), 0), FileTensor(info((500,)), str(path), 2000)]
    seen: list[tuple[int, int]] = []
    for progress in (None, lambda done, total: seen.append((done, total))):
        first, second = scan(tensors, progress)
        check_against(first, values[:500], "float32", 2**-46)
        check_against(second, values[500:], "float32", 2**-46)
    assert seen == [(2000, 4000), (4000, 4000)]
    assert scan([]) == []


@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        ((30, 40), (1, 30)),
        ((30, 40, 1), (40, 1, 7)),
        ((4, 30, 10), (10, 40, 1)),
        ((20, 10), (60, 1)),
        ((20, 10), (60, 3)),
        ((5, 40), (0, 1)),
        ((5, 20, 3), (0, 60, 0)),
        ((), ()),
        ((1,), (0,)),
        ((3, 0), (5, 1)),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_strided_views_as_torch_saves_them(
    tmp_path: Path, shape: tuple[int, ...], strides: tuple[int, ...], dtype: str
) -> None:
    storage = torch.randn(1400, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    stand_in = {"bfloat16": torch.uint16}.get(dtype)
    path = tmp_path / "storage"
    path.write_bytes((storage.view(stand_in) if stand_in else storage).numpy().tobytes())
    view = storage.as_strided(shape, strides, 100)
    tensor = FileTensor(info(shape, dtype), str(path), 100 * storage.element_size(), strides)
    check_against(scan([tensor])[0], view.double().flatten().tolist(), dtype, 2**-46)
    whole = read(tensor)
    assert whole.shape == shape
    assert np.array_equal(whole, view.to(torch.float64 if dtype == "float64" else torch.float32).numpy())


def test_a_gapped_view_larger_than_a_chunk(tmp_path: Path) -> None:
    values = large(2_000_000).reshape(1000, 2000)
    path = tmp_path / "dump"
    path.write_bytes(values.tobytes())
    for rows, columns in ((1000, 100), (3, 2000), (1000, 1)):
        tensor = FileTensor(info((columns, rows)), str(path), 0, (1, 2000))
        assert same(scan([tensor])[0], MagnitudeSpectrum.of(values[:rows, :columns]))
    thin = FileTensor(info((2, 500)), str(path), 0, (1_000_000, 2000))
    assert same(scan([thin])[0], MagnitudeSpectrum.of(values[:, 0].copy()))


def test_a_huge_expanded_view_costs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "dump"
    path.write_bytes(np.array([2.0, 0.0], np.float32).tobytes())
    tensor = FileTensor(info((1 << 40, 2)), str(path), 0, (0, 1))
    spectrum = scan([tensor])[0]
    assert (spectrum.numel, spectrum.zeros, spectrum.norm) == (1 << 41, 1 << 40, math.sqrt(4 * 2.0**40))
    assert read(tensor).shape == (1 << 40, 2)


def test_a_billion_elements_in_bounded_memory(tmp_path: Path) -> None:
    n = (1 << 30) + 3
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(n)
        file.seek(n - 1)
        file.write(b"\x38")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    spectrum = scan([FileTensor(info((n,), "float8_e4m3fn"), str(path), 0)])[0]
    assert (spectrum.numel, spectrum.zeros, spectrum.norm) == (n, n - 1, 1.0)
    unit = 1 if sys.platform == "darwin" else 1024
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit < 64 << 20


@pytest.mark.parametrize("n", [1000, 3_000_000])
def test_a_file_that_ends_early(tmp_path: Path, n: int) -> None:
    path = tmp_path / "dump"
    path.write_bytes(np.ones(n, np.float32).tobytes()[:-1])
    for strides in (None, (1,)):
        tensor = FileTensor(info((n,), name="layer.weight"), str(path), 0, strides)
        for action in (lambda tensor=tensor: scan([tensor]), lambda tensor=tensor: read(tensor)):
            with pytest.raises(GradscopeError, match=r"dump: the data end before tensor layer\.weight does"):
                action()
    gapped = FileTensor(info((n // 2,)), str(path), 4, (2,))
    with pytest.raises(GradscopeError, match="the data end before"):
        scan([gapped])
    short = StreamTensor(info((n,), name="layer.weight"), lambda: io.BytesIO(b"1234"))
    with pytest.raises(GradscopeError, match=r"the data end before tensor layer\.weight does"):
        scan([short])
    # What the failed scans had read is forgotten.
    assert scan([MemoryTensor(info((1,)), np.ones(1, np.float32))])[0].numel == 1


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "missing", tmp_path):
        tensor = FileTensor(info((4,)), str(path), 0)
        for action in (lambda tensor=tensor: scan([tensor]), lambda tensor=tensor: read(tensor)):
            with pytest.raises(GradscopeError, match=str(path)):
                action()


def test_impossible_and_overlapping_strides(tmp_path: Path) -> None:
    path = tmp_path / "dump"
    path.write_bytes(bytes(4000))
    for shape, strides, why in (
        ((1 << 20, 900), (1, 1), "overlaps itself"),
        ((4, 4), (1,), "impossible strides"),
        ((4,), (-1,), "impossible strides"),
        ((1 << 60, 4), (0, 1), "out of reach"),
    ):
        tensor = FileTensor(info(shape), str(path), 0, strides)
        for action in (lambda tensor=tensor: scan([tensor]), lambda tensor=tensor: read(tensor)):
            with pytest.raises(GradscopeError, match=why):
                action()


def test_a_size_that_no_file_has_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "dump"
    path.write_bytes(bytes(4000))
    for shape, strides in (((1 << 50,), None), ((1 << 25, 1 << 25), (1 << 25, 1)), ((1 << 40,), (3,))):
        for tensor in (
            FileTensor(info(shape), str(path), 0, strides),
            StreamTensor(info(shape), lambda: path.open("rb")),
        ):
            for action in (lambda tensor=tensor: scan([tensor]), lambda tensor=tensor: read(tensor)):
                with pytest.raises(GradscopeError, match="the data end before"):
                    action()


def test_a_compressed_stream_is_read_in_order() -> None:
    values = large(700_000)
    packed = gzip.compress(b"skip" + values.tobytes(), 1)

    def open_stream() -> gzip.GzipFile:
        stream = gzip.GzipFile(fileobj=io.BytesIO(packed))
        stream.read(4)
        return stream

    tensor = StreamTensor(info((700, 1000)), open_stream)  # type: ignore[arg-type]
    assert same(scan([tensor])[0], MagnitudeSpectrum.of(values))
    assert np.array_equal(read(tensor), values.reshape(700, 1000), equal_nan=True)


@pytest.mark.parametrize("dtype", list(FLOAT_DTYPES))
def test_read_decodes_every_value_as_torch_does(tmp_path: Path, dtype: str) -> None:
    stored = FLOAT_DTYPES[dtype]
    raw = np.random.default_rng(0).integers(0, 256, 65536 * stored.itemsize).astype(np.uint8)
    if stored.itemsize <= 2:
        raw = np.arange(256**stored.itemsize).astype(f"u{stored.itemsize}").view(np.uint8)
    n = raw.size // stored.itemsize
    expected = torch.from_numpy(raw.copy()).view(getattr(torch, dtype)).to(torch.float64).numpy()
    path = tmp_path / "dump"
    path.write_bytes(raw.tobytes())
    in_memory = MemoryTensor(info((n // 2, 2), dtype), raw.view(stored).reshape(n // 2, 2))
    in_file = FileTensor(info((n // 2, 2), dtype), str(path), 0)
    streamed = StreamTensor(info((n // 2, 2), dtype), lambda: path.open("rb"))
    for tensor in (in_memory, in_file, streamed):
        got = read(tensor)
        assert got.dtype == (np.float64 if dtype == "float64" else np.float32)
        assert np.array_equal(got.ravel(), expected, equal_nan=True)


def test_no_file_stays_open(tmp_path: Path) -> None:
    tensors = []
    for i in range(50):
        (tmp_path / str(i)).write_bytes(bytes(4))
        tensors.append(FileTensor(info((1,)), str(tmp_path / str(i)), 0))
    probe = os.open(tmp_path, os.O_RDONLY)
    os.close(probe)
    scan(tensors)
    with pytest.raises(GradscopeError):
        scan([FileTensor(info((2,)), tensors[0].path, 0)])
    after = os.open(tmp_path, os.O_RDONLY)
    os.close(after)
    assert after == probe
