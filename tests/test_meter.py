"""Gradients as torch holds them -> totals and bins, against an independent float64 computation."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gradscope._meter import GradientTally, KnownTensors, TensorTypes, use_openmp
from gradscope.recording.meter import DTYPES, TENSOR_TYPES, GroupMeter, Meter, UpdateMeter
from gradscope.recording.torch_threads import join_torch_threads
from gradscope.recording.updates import UpdateNorms
from gradscope.trace.bins import edges
from gradscope.trace.measurement import Bins, Measurement

SHAPES = [(64, 4), (64,), (64, 64), (64,), (64, 4), (64,), (64, 64), (64,), (2, 64), (2,), (1, 64), (1,), (5,)]


def measure(tensors: list[Tensor | None], spectra: int = 2) -> Measurement:
    row = Meter(tensors).measure(tensors, spectra)
    assert isinstance(row, Measurement)
    return row


def bins_of(row: Measurement, i: int) -> Bins:
    assert row.tensor_bins is not None and row.tensor_bin_counts is not None
    start = int(row.tensor_bin_counts[:i].sum())
    stop = start + int(row.tensor_bin_counts[i])
    return Bins(*(getattr(row.tensor_bins, name)[start:stop] for name in ("code", "count", "mean", "spread")))


def check_bins(bins: Bins | None, elements: np.ndarray) -> None:
    assert bins is not None
    left = np.abs(elements[np.isfinite(elements) & (elements != 0)])
    assert int(bins.count.sum()) == left.size
    lower, upper = edges(bins.code)
    for k in range(bins.code.size):
        inside = left[(left >= lower[k]) & (left <= upper[k])]
        position = (inside - lower[k]) / (upper[k] - lower[k])
        assert inside.size == bins.count[k]
        assert abs(position.mean() - bins.mean[k]) <= 2**-24 * position.mean() + 1e-15
        assert abs(position.var() - bins.spread[k]) <= 2**-24 * position.var() + 1e-14 * position.mean()


def check(row: Measurement, elements: list[np.ndarray]) -> None:
    for i, values in enumerate(elements):
        finite = np.abs(values[np.isfinite(values)])
        squares = math.fsum((finite * finite).tolist())
        assert row.sum_squares[i] == pytest.approx(squares, rel=1e-12, abs=0)
        assert row.max_abs[i] == finite.max(initial=0.0)
        assert row.zeros[i] == np.count_nonzero(finite == 0)
        assert row.nan[i] == np.count_nonzero(np.isnan(values))
        assert row.inf[i] == np.count_nonzero(np.isinf(values))
        if row.tensor_bins is not None:
            check_bins(bins_of(row, i), values)
    if row.group_bins is not None:
        check_bins(row.group_bins, np.concatenate(elements))


def as_float64(tensors: list[Tensor]) -> list[np.ndarray]:
    return [tensor.detach().double().numpy().ravel() for tensor in tensors]


@pytest.mark.parametrize("dtype", list(DTYPES), ids=list(DTYPES.values()))
def test_every_dtype_with_whatever_it_can_hold(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(1)
    wide = torch.from_numpy(rng.standard_normal(3001) * np.exp(rng.normal(0, 9, 3001)))
    tensors = [
        torch.from_numpy(rng.standard_normal(5000)).to(dtype),
        wide.float().to(dtype),
        torch.zeros(7).to(dtype),
        torch.tensor([math.nan, math.inf, -math.inf, 1.0, 0.0, -2.0]).to(dtype),
        torch.from_numpy(rng.standard_normal(300) * 1e-41).float().to(dtype),
        torch.zeros(0).to(dtype),
        torch.tensor(-3.0).to(dtype),
    ]
    if dtype.itemsize <= 2:
        every = torch.arange(256**dtype.itemsize, dtype=torch.int32)
        tensors.append(every.to(torch.int16 if dtype.itemsize == 2 else torch.uint8).view(dtype))
    for spectra in (0, 1, 2):
        row = measure(tensors, spectra)
        assert (row.group_bins is not None) == (spectra >= 1)
        assert (row.tensor_bins is not None) == (spectra == 2)
        check(row, as_float64(tensors))


def test_a_square_that_overflows_float64_is_infinite() -> None:
    row = measure([torch.tensor([1e200, 2.0], dtype=torch.float64), torch.tensor([3e38])])
    assert row.sum_squares.tolist() == [math.inf, float(np.float32(3e38)) ** 2]
    assert row.max_abs.tolist() == [1e200, float(np.float32(3e38))]


@pytest.fixture
def threads_of_our_own() -> Iterator[None]:
    """Instead of torch's."""
    join_torch_threads()
    use_openmp(0)
    yield
    join_torch_threads.cache_clear()
    join_torch_threads()


@pytest.mark.parametrize("threads", [1, 2])
def test_large_groups_whether_divided_or_not(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    check_large_groups()


def test_large_groups_in_threads_of_our_own(threads_of_our_own: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    check_large_groups()


def check_large_groups() -> None:
    generator = torch.Generator().manual_seed(2)
    tensors: list[Tensor | None] = [
        torch.randn(300_001, generator=generator),
        None,
        torch.randn(1_300_000, generator=generator) * 1e-3,
        torch.randn(10, generator=generator),
        torch.randn(3000, generator=generator).bfloat16(),
    ]
    meter = Meter(tensors)
    # Twice, since the tables are used again.
    for spectra in (2, 1, 2, 0, 2):
        row = meter.measure(tensors, spectra)
    assert isinstance(row, Measurement) and row.tensor_bin_counts is not None
    assert math.isnan(row.sum_squares[1]) and row.tensor_bin_counts[1] == 0
    for i, tensor in enumerate(tensors):
        if tensor is not None:
            values = tensor.double().numpy()
            assert row.sum_squares[i] == pytest.approx(float(values @ values), rel=1e-12)
            check_bins(bins_of(row, i), values)
    check_bins(row.group_bins, np.concatenate([t.double().numpy() for t in tensors if t is not None]))


def test_more_elements_than_a_table_holds_before_it_is_emptied() -> None:
    largest_mantissa = np.full(3_000_000, np.nextafter(np.float32(2), np.float32(0)))
    row = GroupMeter([largest_mantissa.size], ["float32"]).measure([largest_mantissa.ctypes.data], 1)
    assert row.group_bins is not None
    assert row.group_bins.count.tolist() == [3_000_000]
    assert row.group_bins.mean[0] == pytest.approx(1 - 2.0**-20, rel=2e-7)
    assert row.group_bins.spread[0] <= 1e-15


def test_what_was_measured_stays_when_the_next_step_is() -> None:
    meter = Meter([0])
    first = meter.measure([torch.tensor([1.0, 2.0])], 2)
    kept = (first.sum_squares.copy(), first.group_bins.count.copy())  # type: ignore[union-attr]
    meter.measure([torch.full((2,), 9.0)], 2)
    assert np.array_equal(first.sum_squares, kept[0])
    assert np.array_equal(first.group_bins.count, kept[1])  # type: ignore[union-attr]


def test_gradients_that_come_and_go_and_change_their_dtype() -> None:
    meter = Meter(["weight", "bias"])
    weight, bias = torch.randn(4, 5), torch.randn(4)
    for tensors in ([None, None], [weight, None], [weight, bias], [weight.half(), bias], [None, bias], [weight, bias]):
        row = meter.measure(tensors, 2)
        assert isinstance(row, Measurement)
        for i, tensor in enumerate(tensors):
            if tensor is None:
                assert math.isnan(row.sum_squares[i])
            else:
                assert row.sum_squares[i] == pytest.approx(float(tensor.double().square().sum()), rel=1e-12)


def test_layouts_and_views() -> None:
    image = torch.randn(2, 3, 5, 7).to(memory_format=torch.channels_last)
    assert not image.is_contiguous()
    every_other = torch.randn(40)[::2]
    transposed = torch.randn(6, 4).t()
    expanded = torch.randn(1, 5).expand(3, 5)
    flipped = torch.randn(3, 4).as_strided((2, 2), (1, 1))
    offset = torch.randn(9)[1:]
    for tensor in (image, every_other, transposed, expanded, flipped, offset):
        check(measure([tensor]), as_float64([tensor]))


def test_sparse_gradients_count_what_is_missing_as_zeros() -> None:
    embedding = nn.Embedding(50, 3, sparse=True)
    embedding(torch.tensor([4, 7, 4])).square().sum().backward()
    gradient = embedding.weight.grad
    assert gradient is not None and gradient.is_sparse and not gradient.is_coalesced()
    dense = gradient.to_dense()
    for tensor in (gradient, gradient.coalesce(), dense.to_sparse_csr()):
        row = measure([tensor, torch.ones(2)])
        check(row, as_float64([dense, torch.ones(2)]))
        assert row.zeros[0] == 48 * 3


class Marked(Tensor):
    """A subclass that changes nothing."""


def kinds_of_tensors() -> Iterator[tuple[str, Any]]:
    plain = torch.randn(4, 3)
    yield "None", None
    yield "parameter", nn.Parameter(plain)
    yield "with a graph", nn.Parameter(plain) * 2
    yield from ((str(dtype), plain.to(dtype)) for dtype in (*DTYPES, torch.int32, torch.bool, torch.complex64))
    yield "conjugate", plain.to(torch.complex64).conj()
    yield "negative", torch._neg_view(plain)
    yield "nothing but zeros", torch._efficientzerotensor((4, 3))
    yield "sparse", plain.to_sparse()
    yield "mkldnn", plain.to_mkldnn()
    yield "meta", plain.to("meta")
    yield "transposed", torch.randn(3, 4).t()
    yield "channels last", torch.randn(1, 4, 3, 1).to(memory_format=torch.channels_last)
    yield "strides of axes of 1", plain.as_strided((1, 12), (999, 1))
    yield "expanded", torch.randn(1, 3).expand(4, 3)
    yield "shifted", torch.randn(13)[1:]
    yield "no elements", torch.zeros(0)
    yield "no elements, strides", torch.zeros(0, 5).t()
    yield "0-dim", torch.tensor(2.0)
    yield "without memory", freed(torch.randn(12))
    yield "functional", torch._to_functional_tensor(plain)
    yield "subclass", plain.as_subclass(Marked)
    yield "lazy", torch._lazy_clone(plain)
    yield "unknown float", plain.to(torch.float8_e4m3fnuz)
    with torch.inference_mode():
        yield "inference", torch.randn(4, 3)


def freed(tensor: Tensor) -> Tensor:
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.parametrize("numel", [12, 1, 0, 13])
def test_both_ways_of_asking_where_a_tensor_lies_say_the_same(numel: int) -> None:
    dtypes = {name: dtype for dtype, name in DTYPES.items()}
    asking = TensorTypes((Tensor, nn.Parameter), torch.strided, dtypes)
    found = 0
    for kind, tensor in kinds_of_tensors():
        for dtype in dtypes:
            told, asked = (
                KnownTensors(types, [numel], [dtype]).addresses([tensor]) for types in (TENSOR_TYPES, asking)
            )
            assert told == asked, (kind, dtype)
            if told is not None and tensor is not None:
                assert told == [tensor.data_ptr() or 1]
                found += 1
    # An empty or 0-dim tensor is one of the sizes; no tensor has 13 elements.
    assert (found > 0) == (numel < 13)


def test_an_unknown_table_of_functions_is_not_called() -> None:
    known = KnownTensors(
        TensorTypes((Tensor, nn.Parameter), torch.strided, {"float32": torch.float32}, object()), [2], ["float32"]
    )
    tensor = torch.ones(2)
    assert known.addresses([tensor]) == [tensor.data_ptr()]


def test_every_kind_of_tensor_is_measured_or_named() -> None:
    for kind, tensor in kinds_of_tensors():
        meter = Meter([tensor])
        for _ in range(2):
            row = meter.measure([tensor], 2)
            assert isinstance(row, Measurement)
            assert math.isnan(row.sum_squares[0]) == (tensor is None or 0 in meter.unmeasured), kind
    zeros = torch._efficientzerotensor((4, 3))
    check(measure([zeros]), [np.zeros(12)])


def test_a_gradient_that_cannot_be_measured_is_told_and_counts_as_none() -> None:
    tensors: list[Tensor | None] = [torch.ones(3), torch.ones(2, dtype=torch.complex64), torch.ones(2, device="meta")]
    meter = Meter(tensors)
    row = meter.measure(tensors, 2)
    assert isinstance(row, Measurement)
    assert row.sum_squares[0] == 3.0
    assert np.isnan(row.sum_squares[1:]).all()
    assert "complex64" in meter.unmeasured[1]
    assert "meta" in meter.unmeasured[2]


def test_subclasses_are_read_as_what_they_are() -> None:
    tensor = torch.randn(8).as_subclass(Marked)
    check(measure([tensor, nn.Parameter(torch.ones(2))]), [tensor.numpy().astype(np.float64), np.ones(2)])


def test_a_dtensor_is_read_as_the_part_of_this_rank() -> None:
    from torch.distributed import HashStore, destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        local = torch.randn(6, 4)
        gradient = DTensor.from_local(local, init_device_mesh("cpu", (1,)), [Shard(0)])
        check(measure([gradient, torch.ones(3)]), as_float64([local, torch.ones(3)]))
    finally:
        destroy_process_group()


def test_measuring_changes_nothing() -> None:
    layer = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    layer(torch.randn(1, 3, 6, 6)).sum().backward(create_graph=True)
    gradients = [p.grad for p in layer.parameters()]
    assert all(g is not None and g.requires_grad for g in gradients)
    before = [(g.clone(), g._version, g.stride(), g.grad_fn) for g in gradients if g is not None]
    state = torch.get_rng_state()
    row = Meter(gradients).measure(gradients, 2)
    assert isinstance(row, Measurement)
    assert torch.equal(torch.get_rng_state(), state)
    for gradient, (values, version, stride, grad_fn) in zip(gradients, before, strict=True):
        assert gradient is not None
        assert torch.equal(gradient, values)
        assert (gradient._version, gradient.stride(), gradient.grad_fn) == (version, stride, grad_fn)


def test_it_is_right_where_the_processor_flushes_subnormals() -> None:
    tensors = [torch.tensor([1e-40, -3e-42, 1.0]), torch.tensor([6e-8, 2.0]).half()]
    expected = as_float64(tensors)
    torch.set_flush_denormal(True)
    try:
        row = measure(tensors)
    finally:
        torch.set_flush_denormal(False)
    check(row, expected)


def test_wrong_numbers_of_pointers_and_unknown_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match="pointers"):
        GradientTally([3], ["float32"]).measure([], 1)
    with pytest.raises(ValueError, match="int8"):
        GradientTally([3], ["int8"])
    with pytest.raises(ValueError, match="sizes"):
        GradientTally([3, 4], ["float32"])


@pytest.mark.parametrize("dtype", list(DTYPES), ids=list(DTYPES.values()))
def test_weight_and_update_norms(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(4)
    weights = [torch.randn(n, generator=generator).to(dtype) for n in (5000, 1, 77, 0)]
    meter = UpdateMeter([w.numel() for w in weights], [DTYPES[dtype]] * 4)
    old = [w.double().numpy().copy() for w in weights]
    pointers = [w.data_ptr() for w in weights]
    assert meter.before(pointers) == pytest.approx([float(np.linalg.norm(w)) for w in old], rel=1e-12)
    for weight in weights:
        weight.copy_((weight.float() * 1.25 + 0.5).to(dtype))
    changes = [float(np.linalg.norm(w.double().numpy() - o)) for w, o in zip(weights, old, strict=True)]
    assert meter.after(pointers) == pytest.approx(changes, rel=1e-12)


@pytest.mark.parametrize("threads", [1, 2])
def test_update_norms_of_large_groups(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    torch.manual_seed(0)
    weights = [torch.randn(n) for n in (700_001, 3, 900_000, 17)]
    meter = UpdateMeter([w.numel() for w in weights], ["float32"] * 4)
    pointers = [w.data_ptr() for w in weights]
    norms = meter.before(pointers)
    changes = [torch.randn_like(w) * 1e-3 for w in weights]
    before = [w.clone() for w in weights]
    for weight, change in zip(weights, changes, strict=True):
        weight.add_(change)
    updates = meter.after(pointers)
    for i, (old, new) in enumerate(zip(before, weights, strict=True)):
        assert norms[i] == pytest.approx(float(old.double().norm()), rel=1e-12)
        assert updates[i] == pytest.approx(float((new.double() - old.double()).norm()), rel=1e-12)


def test_weights_beyond_the_limit_take_turns() -> None:
    weights = [torch.zeros(n) for n in (64, 64, 64, 1000)]
    meter = UpdateMeter([w.numel() for w in weights], ["float32"] * 4, limit=512)
    pointers = [w.data_ptr() for w in weights]
    seen = []
    for _ in range(3):
        assert meter.before(pointers).tolist() == [float(w.norm()) for w in weights]
        for weight in weights:
            weight.add_(1.0)
        seen.append(meter.after(pointers).tolist())
        for weight in weights:
            weight.zero_()
    taken = [[not math.isnan(norm) for norm in norms] for norms in seen]
    assert all(sum(row) == 2 for row in taken)
    assert [any(row[i] for row in taken) for i in range(4)] == [True, True, True, False]
    assert {norm for norms in seen for norm in norms if not math.isnan(norm)} == {8.0}


def test_weights_that_a_step_exchanges_have_no_update_norm() -> None:
    weights = [nn.Parameter(torch.ones(1000)), nn.Parameter(torch.ones(4))]
    norms = UpdateNorms([weakref.ref(weight) for weight in weights])
    assert norms.before() == pytest.approx([1000**0.5, 2.0])
    weights[0].data = torch.ones(9, dtype=torch.float64)
    assert np.isnan(norms.after()).all()
    assert norms.before().tolist() == [3.0, 2.0]
    weights[1].data += 1
    assert norms.after().tolist() == [0.0, 2.0]


def test_a_large_group_is_measured_where_no_thread_can_be_started(
    threads_of_our_own: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    tensors = [torch.randn(700_000), torch.randn(700_000)]
    row = measure(tensors)
    for i, values in enumerate(as_float64(tensors)):
        assert row.sum_squares[i] == pytest.approx(float(values @ values), rel=1e-12)
        assert int(bins_of(row, i).count.sum()) == np.count_nonzero(values)


LARGE = """
import os, signal, sys, threading, torch
from pathlib import Path

def measure():
    from gradscope.recording.meter import Meter
    meter = Meter([gradient])
    for _ in range(3):
        row = meter.measure([gradient], 1)
    assert abs(row.sum_squares[0] / expected - 1) < 1e-9

gradient = torch.randn(1_500_000)
expected = float(gradient.double().square().sum())
torch.set_num_threads(3)
gradient.add(1)
"""

IN_A_CHILD = """
child = os.fork()
if not child:
    # OpenMP of GNU waits for ever for threads that the child has not.
    signal.alarm(30)
    measure()
    os._exit(5)
print(os.waitstatus_to_exitcode(os.wait()[1]))
"""


def output_of(script: str) -> list[str]:
    root = Path(__file__).parent.parent
    run = [sys.executable, "-c", LARGE + script]
    done = subprocess.run(run, check=False, capture_output=True, text=True, timeout=100, cwd=root)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("before", ["measure()", ""])
def test_a_forked_child_measures_large_groups(before: str) -> None:
    assert output_of(before + IN_A_CHILD) == ["5"]


def test_torch_keeps_its_threads() -> None:
    script = """
threads = lambda: set(os.listdir("/proc/self/task"))
before = threads()
measure()
print(before <= threads())
"""
    assert output_of(script) == ["True"]


def test_large_groups_in_any_thread_and_with_one_alone() -> None:
    script = """
def in_a_thread():
    measure()
    # print() writes the end of the line by itself, and another thread may come between.
    sys.stdout.write("measured\\n")

threads = [threading.Thread(target=in_a_thread) for _ in range(3)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
torch.set_num_threads(1)
measure()
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
torch.set_num_threads(2)
measure()
"""
    assert output_of(script) == ["measured"] * 3
