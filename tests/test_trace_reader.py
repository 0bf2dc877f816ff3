"""Reading a trace back: what was written, up to the last whole batch, and one clear line for whatever is damaged."""

from __future__ import annotations

import json
import os
import shutil
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trace_rows import START, described, joined, row, write

from gradscope.errors import GradscopeError
from gradscope.trace.columns import arrow_schema
from gradscope.trace.measurement import Bins, Measurement, Row
from gradscope.trace.metadata_json import metadata_from_json, metadata_to_json
from gradscope.trace.reader import RankTrace
from gradscope.trace.rows import Rows
from gradscope.trace.schema import LintFinding, TraceMetadata
from gradscope.trace.stream import RowStream

SHAPES = {"a.weight": (3,), "b.weight": (2,), "c.weight": (1,)}
GROUPS = {"first": ["a.weight", "b.weight"], "second": ["c.weight"]}
RANDOM = np.random.default_rng(3)


def a_trace(directory: Path, steps: int = 6, **fields: Any) -> Path:
    rows = []
    for step in range(steps):
        spectra = "all" if step % 2 == 0 else "group"
        rows.append(row(step, [RANDOM.normal(size=3), RANDOM.normal(size=2)], max_norm=0.5, spectra=spectra))
        rows.append(row(step, [RANDOM.normal(size=1)], group=1, returned_norm=1.5, stepped=step != 2))
    return write(directory, described(SHAPES, GROUPS, **fields), rows, flush_every=2)


def opened(directory: Path, rank: int = 0) -> RankTrace:
    return RankTrace.open(directory, rank)


def all_rows(trace: RankTrace) -> Rows:
    return trace.rows(0, len(trace.step))


# --- what was written ------------------------------------------------------------------------------------------------

numbers = st.floats(allow_nan=True, allow_infinity=True)
maybe = st.none() | numbers


@st.composite
def bins(draw: st.DrawFn) -> Bins:
    codes = draw(st.lists(st.integers(8, 16000), max_size=5))
    fractions = st.lists(st.floats(0, 1, width=32), min_size=len(codes), max_size=len(codes))
    counts = draw(st.lists(st.integers(1, 2**32 - 1), min_size=len(codes), max_size=len(codes)))
    return Bins(
        np.array(codes, np.uint16),
        np.array(counts, np.uint32),
        np.array(draw(fractions), np.float32),
        np.array(draw(fractions), np.float32),
    )


@st.composite
def rows_of(draw: st.DrawFn) -> list[Row]:
    """Rows of the groups above, with anything in them that may be."""
    made = []
    for step in sorted(draw(st.lists(st.integers(0, 2**40), max_size=6))):
        group = draw(st.integers(0, 1))
        n = draw(st.integers(0, len(GROUPS["first" if group == 0 else "second"])))
        sums = st.just(np.nan) | st.floats(0, allow_infinity=True)
        counts = st.lists(st.integers(0, 2**62), min_size=n, max_size=n).map(lambda c: np.array(c, np.int64))
        reals = st.lists(numbers, min_size=n, max_size=n).map(lambda c: np.array(c, np.float64))
        tensor_bins = [draw(bins()) for _ in range(n)] if draw(st.booleans()) else None
        measurement = Measurement(
            np.array(draw(st.lists(sums, min_size=n, max_size=n)), np.float64),
            np.array(draw(st.lists(st.floats(0, 1e300), min_size=n, max_size=n)), np.float64),
            draw(counts),
            draw(counts),
            draw(counts),
            draw(st.none() | bins()),
            joined(tensor_bins) if tensor_bins else None,
            np.array([len(b.code) for b in tensor_bins], np.int32) if tensor_bins else None,
        )
        made.append(
            Row(
                step,
                group,
                draw(st.floats(0, 1e10)),
                measurement,
                draw(maybe),
                draw(maybe),
                draw(maybe),
                draw(maybe),
                draw(st.floats(1e-300, 1e300)),
                draw(st.none() | st.booleans()),
                draw(st.none() | reals),
                draw(st.none() | reals),
            )
        )
    return made


def assert_same(read: Rows, i: int, written: Row) -> None:
    m = written.measurement
    for name in ("step", "group", "time", "grad_scale"):
        assert read.single[name][i] == getattr(written, name)
    for name in ("max_norm", "clip_value", "norm_type", "returned_norm", "stepped"):
        value = getattr(written, name)
        assert read.present[name][i] == (value is not None)
        assert value is None or np.array_equal(read.single[name][i], value, equal_nan=name != "stepped")
    for name in ("sum_squares", "max_abs", "zeros", "nan", "inf"):
        np.testing.assert_array_equal(read.lists[name].of(i), getattr(m, name))
    for prefix, held in (("group", m.group_bins), ("tensor", m.tensor_bins)):
        for part in Bins.__slots__:
            expected = np.zeros(0) if held is None else getattr(held, part)
            np.testing.assert_array_equal(read.lists[f"{prefix}_{part}"].of(i), expected)
    for name in ("weight_norm", "update_norm"):
        value = getattr(written, name)
        np.testing.assert_array_equal(read.lists[name].of(i), np.zeros(0) if value is None else value)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=rows_of(), flush_every=st.integers(1, 4))
def test_any_rows_are_read_as_they_were_written(tmp_path: Path, rows: list[Row], flush_every: int) -> None:
    directory = tmp_path / "run.gradscope"
    shutil.rmtree(directory, ignore_errors=True)
    write(directory, described(SHAPES, GROUPS), rows, flush_every=flush_every)
    trace = opened(directory)
    assert trace.step.tolist() == [r.step for r in rows]
    if rows:
        read = all_rows(trace)
        for i, written in enumerate(rows):
            assert_same(read, i, written)


def test_any_part_of_the_rows_can_be_read_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradscope.trace.stream.BLOCK_BYTES", 6000)
    trace = opened(a_trace(tmp_path / "run.gradscope"))
    assert len(trace.stream.blocks) > 2
    whole = all_rows(trace)
    for start in range(12):
        for stop in range(start + 1, 13):
            part = trace.rows(start, stop)
            assert part.single["step"].tolist() == whole.single["step"][start:stop].tolist()
            for i in range(stop - start):
                assert part.lists["group_code"].of(i).tolist() == whole.lists["group_code"].of(start + i).tolist()
                assert part.lists["sum_squares"].of(i).tolist() == whole.lists["sum_squares"].of(start + i).tolist()


def test_other_tools_read_the_stream(tmp_path: Path) -> None:
    directory = a_trace(tmp_path / "run.gradscope")
    with pa.ipc.open_stream((directory / "rank-00000.arrows").read_bytes()) as reader:
        table = reader.read_all()
    assert table.schema.equals(arrow_schema(), check_metadata=True)
    assert table["step"].to_pylist() == sorted([*range(6)] * 2)
    assert table["max_norm"].to_pylist()[:2] == [0.5, None]
    assert table["stepped"].to_pylist()[:6] == [None, True, None, True, None, False]


def test_metadata_survives() -> None:
    metadata = described(SHAPES, GROUPS, framework="SB3 PPO", command=["python", "train.py"], extra={"a": [1, None]})
    metadata.tensors[0].placements, metadata.tensors[0].mesh_shape = ("S(0)",), (2,)
    metadata.tensors[0].mesh_coordinate = (1,)
    metadata.findings.append(LintFinding("twice", "It clips twice.", 3, 1, "first", ("a.weight",)))
    assert metadata_from_json(metadata_to_json(metadata), "x") == metadata
    assert metadata_from_json(metadata_to_json(TraceMetadata()), "x") == TraceMetadata()


# --- cut off ---------------------------------------------------------------------------------------------------------


def test_a_stream_cut_at_any_byte_opens_up_to_its_last_whole_batch(tmp_path: Path) -> None:
    directory = a_trace(tmp_path / "run.gradscope", steps=2)
    path = directory / "rank-00000.arrows"
    content = path.read_bytes()
    ends = batch_ends(content)
    assert len(ends) == 3
    for cut in reversed(range(len(content))):
        os.truncate(path, cut)
        whole = [end for end in ends if end <= cut]
        stream = RowStream.open(path)
        assert (stream.dropped, stream.ended) == (cut - (whole[-1] if whole else 0), False)
        assert stream.nbytes == (whole[-1] - ends[0] if whole else 0)
        if cut % 50 == 0 or cut in whole or cut + 1 in ends:
            assert opened(directory).step.tolist() == [0, 0, 1, 1][: 2 * max(0, len(whole) - 1)]


def batch_ends(content: bytes) -> list[int]:
    """Where the schema and each batch end, by pyarrow's own account."""
    buffer = pa.BufferReader(content)
    ends = []
    for message in pa.ipc.MessageReader.open_stream(buffer):
        assert message.type in ("schema", "record batch")
        ends.append(buffer.tell())
    return ends


def test_zeros_at_the_end_are_an_unfinished_write(tmp_path: Path) -> None:
    directory = a_trace(tmp_path / "run.gradscope")
    with open(directory / "rank-00000.arrows", "r+b") as stream:
        stream.seek(-8, os.SEEK_END)
        stream.write(bytes(4096))
    trace = opened(directory)
    assert (len(trace.step), trace.stream.dropped, trace.stream.ended) == (12, 4096, False)


# --- damaged ---------------------------------------------------------------------------------------------------------


def test_a_stream_with_any_byte_changed_opens_or_is_refused(tmp_path: Path) -> None:
    directory = a_trace(tmp_path / "run.gradscope", steps=2)
    path = directory / "rank-00000.arrows"
    content = path.read_bytes()
    random = np.random.default_rng(1)
    refused = 0
    for at in random.choice(len(content), 400, replace=False):
        damaged = bytearray(content)
        damaged[at] ^= int(random.integers(1, 256))
        path.write_bytes(damaged)
        try:
            opened(directory)
        except GradscopeError as error:
            refused += 1
            assert error.what.endswith("rank-00000.arrows")
            assert "\n" not in str(error)
    assert refused > 50


def batch(change: Callable[[dict[str, pa.Array]], None]) -> bytes:
    """A stream of one batch whose columns were changed."""
    directory = Path(os.environ["PYTEST_TRACE"])
    with pa.ipc.open_stream((directory / "rank-00000.arrows").read_bytes()) as reader:
        table = reader.read_all().combine_chunks()
    columns = {name: table[name].combine_chunks() for name in table.schema.names}
    change(columns)
    made = pa.RecordBatch.from_arrays(list(columns.values()), names=list(columns))
    made = pa.RecordBatch.from_arrays(
        [c.cast(t.type) if c.type != t.type else c for c, t in zip(made.columns, arrow_schema(), strict=True)],
        schema=arrow_schema(),
    )
    return bytes(arrow_schema().serialize()) + bytes(made.serialize())


def changed(name: str, value: Any) -> Callable[[dict[str, pa.Array]], None]:
    """``value`` in place of the first value of a column, or of the first value of its first list."""

    def change(columns: dict[str, pa.Array]) -> None:
        values = columns[name].to_pylist()
        first = next((i for i, v in enumerate(values) if not isinstance(v, list) or v), 0)
        values[first] = [value, *values[first][1:]] if isinstance(values[first], list) else value
        columns[name] = pa.array(values, arrow_schema().field(name).type, from_pandas=False)

    return change


def longer(name: str) -> Callable[[dict[str, pa.Array]], None]:
    def change(columns: dict[str, pa.Array]) -> None:
        values = columns[name].to_pylist()
        values[0] = [*values[0], 1]
        columns[name] = pa.array(values, arrow_schema().field(name).type)

    return change


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (changed("step", 9), "steps go backwards"),
        (changed("step", -1), "steps go backwards"),
        (changed("group", 2), "a group that trace.json does not name"),
        (changed("group", -1), "a group that trace.json does not name"),
        (changed("time", np.inf), "a time is impossible"),
        (changed("sum_squares", -1.0), "sum_squares is negative"),
        (changed("max_abs", np.nan), "max_abs is not finite"),
        (changed("zeros", -1), "zeros is negative"),
        (changed("group_code", 40000), "bin codes lie in"),
        (changed("group_count", 0), "group_count is zero"),
        (changed("group_mean", 1.5), "group_mean lies outside"),
        (changed("tensor_spread", -0.5), "tensor_spread lies outside"),
        (changed("tensor_bin_counts", 77), "tensor_bin_counts do not fit"),
        (changed("tensor_bin_counts", -1), "tensor_bin_counts do not fit"),
        (longer("sum_squares"), "differ in length"),
        (longer("group_mean"), "differ in length"),
        (longer("weight_norm"), "weight_norm does not fit"),
    ],
)
def test_rows_that_contradict_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[dict[str, pa.Array]], None], why: str
) -> None:
    directory = a_trace(tmp_path / "run.gradscope")
    monkeypatch.setenv("PYTEST_TRACE", str(directory))
    (directory / "rank-00000.arrows").write_bytes(batch(change))
    with pytest.raises(GradscopeError, match=why):
        opened(directory)


def test_a_message_that_claims_more_than_there_is_costs_nothing(tmp_path: Path) -> None:
    directory = a_trace(tmp_path / "run.gradscope")
    path = directory / "rank-00000.arrows"
    for claim, refused in ((0x7FFFFFF0, True), (-5, True), (8 << 20, False)):
        path.write_bytes(struct.pack("<Ii", 0xFFFFFFFF, claim) + bytes(64))
        tracemalloc.start()
        if refused:
            with pytest.raises(GradscopeError, match="no Arrow message"):
                opened(directory)
        else:
            assert opened(directory).stream.dropped == 72
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
        tracemalloc.stop()


def test_compressed_batches_are_refused_before_they_expand(tmp_path: Path) -> None:
    directory = a_trace(tmp_path / "run.gradscope")
    with pa.ipc.open_stream((directory / "rank-00000.arrows").read_bytes()) as reader:
        table = reader.read_all()
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_stream(directory / "rank-00000.arrows", table.schema, options=options) as out:
        out.write_table(table)
    with pytest.raises(GradscopeError, match="none of a trace's"):
        opened(directory)


def test_another_table_is_no_trace(tmp_path: Path) -> None:
    directory = a_trace(tmp_path / "run.gradscope")
    table = pa.table({"step": [1, 2], "loss": [0.5, 0.25]})
    with pa.ipc.new_stream(directory / "rank-00000.arrows", table.schema) as out:
        out.write_table(table)
    with pytest.raises(GradscopeError, match="it has no column group"):
        opened(directory)


def edited(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    tree = json.loads((directory / "trace.json").read_text())
    change(tree)
    (directory / "trace.json").write_text(json.dumps(tree))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda t: t.update(schema="gradscope.trace/2"), "does not know"),
        (lambda t: t.update(schema="something/1"), "does not describe a gradscope trace"),
        (lambda t: t.update(schema=7), "does not describe a gradscope trace"),
        (lambda t: t.update(rank=-1), "rank -1 of 1"),
        (lambda t: t.update(rank=True), "rank is no int"),
        (lambda t: t.update(tensors="all"), "tensors is no list"),
        (lambda t: t.update(tensors=[3]), "wrong kind"),
        (lambda t: t.update(detail="much"), "detail 'much'"),
        (lambda t: t["tensors"][0].pop("name"), "name is missing"),
        (lambda t: t["tensors"][0].update(shape=[-1]), "is impossible"),
        (lambda t: t["tensors"][0].update(shape=[2**40, 2**40]), "is impossible"),
        (lambda t: t["tensors"][0].update(placements=["S(0)"]), "do not fit its mesh"),
        (lambda t: t["tensors"][0].update(name="b.weight"), "two tensors 'b.weight'"),
        (lambda t: t["groups"][0].update(tensors=[0, 99]), "names a tensor that there is not"),
        (lambda t: t["groups"][0].update(tensors=[0, -1]), "names a tensor that there is not"),
        (lambda t: t["groups"][0].update(tensors=[0, 0]), "the group .* names a tensor twice"),
        (lambda t: t["groups"][0].update(name="second"), "two groups 'second'"),
        (lambda t: t["groups"][0].update(tensors=[0]), "more tensors than its group"),
    ],
)
def test_damaged_metadata(tmp_path: Path, change: Callable[[dict[str, Any]], None], why: str) -> None:
    directory = a_trace(tmp_path / "run.gradscope")
    edited(directory, change)
    with pytest.raises(GradscopeError, match=why):
        opened(directory)


@pytest.mark.parametrize(
    "text", ["", "{", "[" * 100_000, "[]", "null", "\x00", '{"schema": "gradscope.trace/1", "rank": 1e400}']
)
def test_metadata_that_is_none(tmp_path: Path, text: str) -> None:
    directory = a_trace(tmp_path / "run.gradscope")
    (directory / "trace.json").write_text(text)
    with pytest.raises(GradscopeError, match=r"trace\.json"):
        opened(directory)


def test_what_a_later_version_adds_is_passed_over(tmp_path: Path) -> None:
    directory = a_trace(tmp_path / "run.gradscope")
    edited(directory, lambda tree: (tree.update(colour="red"), tree["groups"][0].update(size=3)))
    assert opened(directory).metadata == described(SHAPES, GROUPS)


def test_missing_files(tmp_path: Path) -> None:
    directory = a_trace(tmp_path / "run.gradscope")
    (directory / "trace.json").unlink()
    with pytest.raises(GradscopeError, match=r"trace\.json: no such file"):
        opened(directory)
    (directory / "rank-00000.arrows").unlink()
    os.mkfifo(directory / "rank-00000.arrows")
    with pytest.raises(GradscopeError, match="not a regular file"):
        opened(directory)


def test_rows_know_when_they_were_recorded(tmp_path: Path) -> None:
    rows = all_rows(opened(a_trace(tmp_path / "run.gradscope")))
    assert rows.single["time"].tolist() == [START + step for step in range(6) for _ in range(2)]
