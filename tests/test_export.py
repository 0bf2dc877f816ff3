"""``gradscope export``: a recorded run as Parquet, CSV or JSONL."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from trace_rows import START, described, row, write

from gradscope.commands.app import run
from gradscope.errors import GradscopeError

SHAPES = {"actor.weight": (2, 3), "actor,bias": (3,), "critic.weight": (4,)}
GROUPS = {"actor": ["actor.weight", "actor,bias"], "critic": ["critic.weight"]}
BY_GROUP = ["step", "group", "time", "max_norm", "norm_type", "returned_norm", "l2_norm", "max_abs", "zeros"]
BY_GROUP += ["nonfinite", "stepped", "clip_value", "grad_scale"]
BY_TENSOR = ["step", "group", "tensor", "l2_norm", "max_abs", "zeros", "nonfinite", "weight_norm", "update_norm"]
ACTOR = [np.array([[3.0, 0.0, 0.0], [0.0, 4.0, 0.0]]), np.array([0.0, 12.0, 0.0])]
FAULTY = [np.array([[3.0, np.nan, 0.0], [np.inf, 4.0, 0.0]]), None]


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    rows = [
        row(0, ACTOR, max_norm=0.5, norm_type=2.0, returned_norm=13.0, stepped=True),
        row(0, [np.full(4, 2.0)], group=1),
        row(1, FAULTY, max_norm=0.5, norm_type=math.inf, returned_norm=math.nan, stepped=False),
        row(2, [np.full(4, -2.0)], group=1, returned_norm=math.inf, clip_value=1.0, weight_norm=np.array([7.0])),
    ]
    return write(tmp_path / "run.gradscope", described(SHAPES, GROUPS, framework="SB3 PPO"), rows)


def exported(trace: Path, name: str, *options: str) -> Path:
    path = trace.parent / name
    assert run(["export", str(trace), "-o", str(path), "-q", *options]) == 0
    return path


# What it must hold, in either format, worked out by hand.
GROUP_ROWS: list[list[Any]] = [
    [0, "actor", START, 0.5, 2.0, 13.0, 13.0, 12.0, 6, 0, True, None, 1.0],
    [0, "critic", START, None, None, None, 4.0, 2.0, 0, 0, None, None, 1.0],
    [1, "actor", START + 1, 0.5, math.inf, math.nan, 5.0, 4.0, 2, 2, False, None, 1.0],
    [2, "critic", START + 2, None, None, math.inf, 4.0, 2.0, 0, 0, None, 1.0, 1.0],
]
TENSOR_ROWS: list[list[Any]] = [
    [0, "actor", "actor.weight", 5.0, 4.0, 4, 0, None, None],
    [0, "actor", "actor,bias", 12.0, 12.0, 2, 0, None, None],
    [0, "critic", "critic.weight", 4.0, 2.0, 0, 0, None, None],
    [1, "actor", "actor.weight", 5.0, 4.0, 2, 2, None, None],
    [1, "actor", "actor,bias", None, None, None, None, None, None],
    [2, "critic", "critic.weight", 4.0, 2.0, 0, 0, 7.0, None],
]
TABLES = [("group", BY_GROUP, GROUP_ROWS), ("tensor", BY_TENSOR, TENSOR_ROWS)]


def same(found: Any, expected: Any) -> bool:
    if isinstance(expected, float) and math.isnan(expected):
        return isinstance(found, float) and math.isnan(found)
    return type(found) is type(expected) and bool(found == expected)


@pytest.mark.parametrize(("by", "names", "rows"), TABLES)
def test_parquet_keeps_types_and_nulls(trace: Path, by: str, names: list[str], rows: list[list[Any]]) -> None:
    table = pq.read_table(exported(trace, "run.parquet", "--by", by))
    assert table.schema.names == names
    found = [list(line.values()) for line in table.to_pylist()]
    assert len(found) == len(rows)
    assert all(
        same(a, b) for line, expected in zip(found, rows, strict=True) for a, b in zip(line, expected, strict=True)
    )
    assert json.loads(table.schema.metadata[b"gradscope"])["framework"] == "SB3 PPO"


@pytest.mark.parametrize(("by", "names", "rows"), TABLES)
def test_jsonl_holds_no_nan(trace: Path, by: str, names: list[str], rows: list[list[Any]]) -> None:
    def refuse(word: str) -> None:
        raise AssertionError(word)

    lines = exported(trace, "run.jsonl", "--by", by).read_text().splitlines()
    found = [json.loads(line, parse_constant=refuse) for line in lines]
    words = {math.inf: "inf", -math.inf: "-inf"}
    for line, expected in zip(found, rows, strict=True):
        values = ["nan" if isinstance(v, float) and math.isnan(v) else words.get(v, v) for v in expected]
        assert line == dict(zip(names, values, strict=True))


@pytest.mark.parametrize(("by", "names", "rows"), TABLES)
def test_csv_leaves_nulls_empty(trace: Path, by: str, names: list[str], rows: list[list[Any]]) -> None:
    with exported(trace, "run.csv", "--by", by).open(newline="") as stream:
        header, *found = csv.reader(stream)
    assert header == names
    for line, expected in zip(found, rows, strict=True):
        cells = ["" if v is None else str(v).lower() if isinstance(v, bool) else str(v) for v in expected]
        assert line == cells


@pytest.mark.parametrize("suffix", ["parquet", "csv", "jsonl"])
def test_some_of_the_steps(trace: Path, suffix: str) -> None:
    whole = exported(trace, f"whole.{suffix}")
    part = exported(trace, f"part.{suffix}", "--steps", "1:2")
    if suffix == "parquet":
        assert pq.read_table(part)["step"].to_pylist() == [1]
    else:
        lines = [line for line in part.read_text().splitlines() if "actor" in line]
        assert len(lines) == 1
        assert lines[0] in whole.read_text().splitlines()


def test_a_loss_scale_is_divided_out_and_named(tmp_path: Path) -> None:
    rows = [row(0, [np.array([[3.0, 0, 0], [0, 4.0, 0]]) * 8, None], grad_scale=8.0, max_norm=4.0, returned_norm=40.0)]
    trace = write(tmp_path / "run.gradscope", described(SHAPES, GROUPS), rows)
    (found,) = pq.read_table(exported(trace, "run.parquet")).to_pylist()
    assert (found["l2_norm"], found["max_abs"], found["max_norm"], found["returned_norm"]) == (5.0, 4.0, 0.5, 5.0)
    assert found["grad_scale"] == 8.0


def test_it_streams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradscope.trace.merging.MERGED_ENTRIES", 30)
    rows = [row(step, [np.full((2, 3), float(step)), np.ones(3)]) for step in range(200)]
    trace = write(tmp_path / "run.gradscope", described(SHAPES, GROUPS), rows, flush_every=13)
    file = pq.ParquetFile(exported(trace, "run.parquet"))
    assert file.num_row_groups > 5
    assert file.read()["step"].to_pylist() == list(range(200))
    assert len(exported(trace, "run.csv").read_text().splitlines()) == 201


def test_an_earlier_export_is_replaced_and_nothing_else(trace: Path) -> None:
    for name in ("run.parquet", "run.csv"):
        first = exported(trace, name).read_bytes()
        assert exported(trace, name).read_bytes() == first
    foreign = trace.parent / "mine.parquet"
    pq.write_table(pq.read_table(trace.parent / "run.parquet").replace_schema_metadata(None), foreign)
    with pytest.raises(GradscopeError, match="would be overwritten"):
        exported(trace, "mine.parquet")
    assert sorted(p.name for p in trace.parent.iterdir()) == ["mine.parquet", "run.csv", "run.gradscope", "run.parquet"]


def test_what_was_written_is_said(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = trace.parent / "run.jsonl"
    assert run(["export", str(trace), "-o", str(path)]) == 0
    streams = capsys.readouterr()
    assert streams.out == ""
    assert streams.err == f"Wrote {path}: 4 rows\n"


def test_without_a_trace_the_newest_is_taken(
    trace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(trace.parent)
    assert run(["export", "-o", "run.csv"]) == 0
    assert capsys.readouterr().err.startswith("Using run.gradscope (newest, ")


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["-o", "run.xlsx"], r"-o run\.xlsx: must end in one of \.parquet, \.csv, \.jsonl"),
        (["-o", "run"], "must end in one of"),
        ([], "-o: is missing"),
        (["-o", "nowhere/run.csv"], "there is no directory"),
        (["-o", "run.csv", "--steps", "7:"], "selects none of the 3 steps"),
    ],
)
def test_unusable_options(trace: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], why: str) -> None:
    monkeypatch.chdir(trace.parent)
    with pytest.raises(GradscopeError, match=why):
        run(["export", str(trace), *arguments])
    assert [p.name for p in trace.parent.iterdir()] == ["run.gradscope"]


def test_only_a_recorded_run_can_be_exported(tmp_path: Path) -> None:
    np.savez(tmp_path / "grads.npz", w=np.ones(3))
    with pytest.raises(GradscopeError, match="is no recorded run"):
        run(["export", str(tmp_path / "grads.npz"), "-o", str(tmp_path / "run.csv")])


def test_a_device_is_refused(trace: Path) -> None:
    (trace.parent / "run.csv").symlink_to("/dev/full")
    with pytest.raises(GradscopeError, match="not a regular file"):
        run(["export", str(trace), "-o", str(trace.parent / "run.csv"), "-q"])


@pytest.mark.parametrize("suffix", ["parquet", "csv", "jsonl"])
def test_a_full_disk_leaves_nothing_half_made(trace: Path, suffix: str) -> None:
    # The limit on the size of a file fails a write half-way, as a full disk does.
    script = "import resource, sys; from gradscope.commands.app import run\n"
    script += "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)); from gradscope.__main__ import main\n"
    script += "sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", script, "export", str(trace), "-o", str(trace.parent / f"run.{suffix}")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "File too large" in done.stderr and len(done.stderr.splitlines()) == 1
    assert [p.name for p in trace.parent.iterdir()] == ["run.gradscope"]
