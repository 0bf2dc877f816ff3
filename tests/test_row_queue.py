"""Rows on their way to the writer: many at once or one by one, they are the same rows in the same order."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from gradscope._meter import ArrowRows
from gradscope.recording import rows
from gradscope.recording.clip_calls import ClipCall
from gradscope.recording.meter import Meter
from gradscope.recording.rows import RowQueue
from gradscope.trace.columns import arrow_schema
from gradscope.trace.measurement import Row
from gradscope.trace.pending_rows import PackedRows, PendingRows


class Written:
    """What a queue writes, and in which of the two ways."""

    def __init__(self, *, in_bulk: bool = True) -> None:
        self.pending = PendingRows()
        self.alone: list[int] = []
        self.queue = RowQueue(self._write, self.pending.extend if in_bulk else None)

    def _write(self, row: Row, call: ClipCall) -> None:
        self.alone.append(row.step)
        self.pending.append(row)

    def table(self) -> pa.RecordBatch:
        schema = arrow_schema()
        batch = pa.ipc.read_record_batch(self.pending.serialized(schema), schema)
        batch.validate(full=True)
        return batch

    def steps(self) -> list[int]:
        return self.table()["step"].to_pylist()


class OnDevice:
    """A number that arrives when told to."""

    def __init__(self) -> None:
        self.arrived = False

    def ready(self) -> bool:
        return self.arrived

    def result(self) -> float:
        return 3.0


def call_of(meter: Meter, gradients: list[Any], spectra: int = 1, returned: Any = 0.5) -> ClipCall:
    measured = meter.take(gradients, spectra)
    call = ClipCall("clip_grad_norm_", "train.py:1", [(None, measured)], 12.5, 1.0, None, 2.0)  # type: ignore[list-item]
    call.returned = returned
    return call


def warm_meter(gradients: list[Any]) -> Meter:
    """One that copies."""
    meter = Meter(gradients)
    meter.take([torch.zeros_like(g) if g is not None else None for g in gradients], 1)
    return meter


def some_gradients(seed: int) -> list[Any]:
    torch.manual_seed(seed)
    double = torch.randn(17, dtype=torch.float64)
    double[3] = torch.inf
    single = torch.randn(40, 5) * 1e-3
    single[2, 2], single[3, 1] = torch.nan, 0.0
    return [double, single, None, torch.randn(7).bfloat16(), torch.zeros(0), torch.randn(3).half()]


@pytest.mark.parametrize("spectra", [0, 1, 2])
def test_many_at_once_are_the_rows_that_they_are_one_by_one(spectra: int) -> None:
    tables = []
    for in_bulk in (True, False):
        written = Written(in_bulk=in_bulk)
        meter = warm_meter(some_gradients(0))
        for step in range(5):
            call = call_of(meter, some_gradients(step), spectra, None if step == 1 else 0.25 * step)
            call.max_norm, call.clip_value = (None, 0.1) if step == 2 else (1.0, None)
            norms = [np.arange(6.0) + step] if step % 2 else []
            call.weight_norms = norms
            written.queue.put(step, step % 3, call, (True, False, None)[step % 3], [2 * n for n in norms])
        written.queue.finish()
        assert written.alone == ([] if in_bulk else list(range(5)))
        tables.append(written.table())
    assert tables[0].to_pydict().keys() == set(arrow_schema().names)
    # NaN marks a tensor without a gradient, and equals nothing in a table's comparison.
    assert repr(tables[0].to_pylist()) == repr(tables[1].to_pylist())
    assert tables[0]["stepped"].to_pylist() == [True, False, None, True, False]


def test_measuring_meanwhile_changes_nothing() -> None:
    written, at_once = Written(), Written()
    for taker in (written, at_once):
        meter = warm_meter(some_gradients(0))
        for step in range(7):
            taker.queue.put(step, 0, call_of(meter, some_gradients(step), 2), True, [])
            if taker is written and step % 3 == 0:
                taker.queue.measure_for(0.01)
            if taker is written and step == 4:
                taker.queue.drain()
        taker.queue.drain()
    assert repr(written.table().to_pylist()) == repr(at_once.table().to_pylist())
    assert written.steps() == list(range(7))


def test_copies_are_given_back() -> None:
    gradients = [torch.ones(1000)]
    meter, written = warm_meter(gradients), Written()
    for step in range(50):
        written.queue.put(step, 0, call_of(meter, gradients), True, [])
        written.queue.measure_for(0.01)
    assert meter._copies == 1


def test_rows_that_have_to_be_looked_at_keep_their_place() -> None:
    gradients = [torch.ones(10)]
    meter, written = warm_meter(gradients), Written()
    coarse = call_of(meter, gradients)
    coarse.total_norm = torch.tensor(1.0, dtype=torch.bfloat16)
    calls = [call_of(meter, gradients) for _ in range(3)]
    for step, call in enumerate(
        [calls[0], call_of(meter, gradients, returned=float("inf")), calls[1], coarse, calls[2]]
    ):
        written.queue.put(step, 0, call, True, [])
    written.queue.finish()
    assert written.steps() == list(range(5))
    assert {1, 3} <= set(written.alone) and 0 not in written.alone


def test_what_a_device_works_on_holds_back_what_is_behind_it() -> None:
    gradients = [torch.ones(10)]
    meter, written, late = warm_meter(gradients), Written(), OnDevice()
    for step in range(6):
        written.queue.put(step, 0, call_of(meter, gradients, returned=late if step == 2 else 0.5), True, [])
        written.queue.drain()
    assert written.steps() == [0, 1]
    late.arrived = True
    written.queue.drain()
    written.queue.put(6, 0, call_of(meter, gradients), True, [])
    written.queue.drain()
    assert written.steps() == list(range(7))
    assert written.table()["returned_norm"].to_pylist() == [0.5, 0.5, 3.0, 0.5, 0.5, 0.5, 0.5]


def test_no_more_than_so_many_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MOST_COPIED", 8)
    gradients = [torch.ones(10)]
    meter, written = warm_meter(gradients), Written()
    for step in range(30):
        written.queue.put(step, 0, call_of(meter, gradients), True, [])
    assert meter._copies <= 9
    written.queue.finish()
    assert written.steps() == list(range(30))


@pytest.mark.parametrize("most", [1, 2, 7])
def test_the_ring_keeps_the_order_while_others_measure_and_write(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(rows, "MOST_COPIED", most)
    monkeypatch.setattr(rows, "TICK_SECONDS", 1e-4)
    written, rounds = Written(), 400
    sizes = (3, 1000, 40)
    meters = [warm_meter([torch.ones(size)]) for size in sizes]
    # Two numbers that are never rounded: whose gradient it is, and of which step.
    gradients = [torch.zeros(size) for size in sizes]
    ended = threading.Event()

    def write() -> None:
        while written.queue.measure_for(0.003):
            written.queue.drain()
        ended.set()

    writer = threading.Thread(target=write)
    writer.start()
    for step in range(rounds):
        for group, gradient in enumerate(gradients):
            gradient[0], gradient[-1] = step, group
            call = call_of(meters[group], [gradient], step % 3, returned=float("inf") if step % 50 == 7 else 0.5)
            written.queue.put(step, group, call, True, [])
            # It was copied: what is written now must not be in the row.
            gradient.fill_(1e9)
            gradient.zero_()
    written.queue.finish()
    assert ended.wait(10)
    writer.join()
    table = written.table()
    assert table["step"].to_pylist() == [step for step in range(rounds) for _ in sizes]
    assert table["group"].to_pylist() == [0, 1, 2] * rounds
    assert table["sum_squares"].to_pylist() == [
        [float(step * step + group * group)] for step in range(rounds) for group in range(3)
    ]
    assert all(meter._copies <= most + 2 + rows.MOST_WAITING for meter in meters)


def test_after_the_end_nobody_measures_in_the_background() -> None:
    gradients = [torch.ones(10)]
    meter, written = warm_meter(gradients), Written()
    assert written.queue.measure_for(0.01)
    written.queue.put(0, 0, call_of(meter, gradients), True, [])
    written.queue.finish()
    written.queue.finish()
    assert not written.queue.measure_for(60.0)
    # A row that comes late is not lost.
    written.queue.put(1, 0, call_of(meter, gradients), True, [])
    assert not written.queue.measure_for(60.0)
    written.queue.drain()
    assert written.steps() == [0, 1]


def test_the_end_wakes_who_measures() -> None:
    written, results = Written(), []
    measuring = threading.Thread(target=lambda: results.append(written.queue.measure_for(600.0)))
    measuring.start()
    written.queue.finish()
    measuring.join(10)
    assert results == [False]


def test_columns_must_hold_what_their_rows_say() -> None:
    gradients = [torch.ones(10)]
    written = Written()
    written.queue.put(0, 0, call_of(warm_meter(gradients), gradients), True, [])
    written.queue.drain()
    first = written.pending._first
    assert isinstance(first, PackedRows)
    broken = PackedRows(first.heads, (b"12345678" * 2, *first.columns[1:]))
    pending = PendingRows()
    pending.extend(broken)
    with pytest.raises(ValueError, match="sum_squares holds 2 values of 1"):
        pending.serialized(arrow_schema())


def test_no_rows_are_a_batch_too() -> None:
    schema = arrow_schema()
    batch = pa.ipc.read_record_batch(PendingRows().serialized(schema), schema)
    batch.validate(full=True)
    assert batch.num_rows == 0
    assert ArrowRows(b"", 88, 60, []).address
