"""Logs that cannot be read end in one clear line; what is whole before a cut is read."""

from __future__ import annotations

import json
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from gradscope.errors import GradscopeError
from gradscope.gradients import GradientSource
from gradscope.sources import open_source

DEEP = b"[" * 100_000
HUGE = b"9" * 5000


def read(path: Path, tag: str | None = None) -> GradientSource:
    source = open_source(path, tag=tag)
    assert len(list(source.read_steps(range(source.info.steps)))) == source.info.steps > 0
    return source


def failure(path: Path, tag: str | None = None) -> GradscopeError:
    with pytest.raises(GradscopeError) as caught:
        read(path, tag)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700
    return caught.value


BAD: dict[str, tuple[bytes, str]] = {
    "empty.csv": (b"", "is empty"),
    "blank.csv": (b"\n\n", "no format"),
    "header.csv": (b"step,grad_norm\n", "holds no values of grad_norm"),
    "no norms.csv": (b"step,grad_norm\n1,\n2,\n", "holds no values of grad_norm"),
    "no column.csv": (b"step,loss,note\n1,0.5,a\n", "nothing that is called a gradient norm: its series are loss"),
    "no numbers.csv": (b"a,b\nx,y\n", "holds no series of numbers"),
    "ragged.csv": (b"step,grad_norm\n1,2\n1,2,3\n1,2\n", "line 3 has 3 columns, and its header 2"),
    "text.csv": (b"step,grad_norm\n1,2\n2,oops\n", "row 2: grad_norm is 'oops', not a number"),
    "comma.csv": (b"step;grad_norm\n1;0,5\n", "row 1: grad_norm is '0,5', not a number"),
    "latin1.csv": ("step,grad_norm,größe\n1,2,3\n".encode("latin1"), "is not UTF-8"),
    "latin1 below.csv": (b"step,grad_norm\n" + b"1,2\n" * 60 + b"3,\xff\n", "is not UTF-8"),
    "negative.csv": (b"step,grad_norm\n1,2\n2,-0.5\n", "grad_norm is -0.5 at step 2, and a norm is never negative"),
    "headless.csv": (b"1,2\n3,4\n", "has no header line"),
    "twice.csv": (b"step,grad_norm,grad_norm\n1,2,3\n", "has two columns called grad_norm"),
    "long line.csv": (b"step,grad_norm\n1,2\n2," + b"0" * (10 << 20) + b"\n", "a line is longer than 4 MiB"),
    "long header.csv": (b"a" * (2 << 20), "its first line is longer than 1 MiB"),
    "deep.json": (DEEP, "nested too deep"),
    "deep.jsonl": (b'{"grad_norm": 1}\n{"grad_norm": ' + DEEP + b"\n", "line 2 is no JSON (nested too deep)"),
    "huge number.jsonl": (b'{"grad_norm": 1}\n{"grad_norm": ' + HUGE + b"}\n", "line 2 is no JSON"),
    "text.jsonl": (b'{"grad_norm": 1}\n{"grad_norm": "big"}\n', "line 2: grad_norm is 'big', not a number"),
    "list.jsonl": (b'{"grad_norm": 1}\n[1, 2]\n', "line 2 is no record"),
    "damage.jsonl": (b'{"grad_norm": 1}\n{"grad_norm": \n{"grad_norm": 1}\n', "line 2 is no JSON"),
    "long line.jsonl": (b'{"grad_norm": 1}\n{"a": "' + b"x" * (17 << 20), "line 2 is longer than 16 MiB"),
    "scalars.json": (b"[1, 2]", "record 0 is no record"),
    "scalar.json": (b"5", "holds no records"),
    "cut.json": (b'[{"grad_norm": 1}, {"grad', "is damaged JSON"),
    "columns.json": (b'{\n"step": [1, 2],\n"grad_norm": [1]}', "lists of different lengths"),
    "settings.json": (b'{\n"model_type": "gpt2",\n"n_layer": 2}', "nothing that is called a gradient norm"),
    "trainer_state.json": (b'{\n"log_history": []}', "holds no series of numbers"),
    "odd history.json": (b'{\n"log_history": [3]}', "log_history[0] is no record"),
    "head.parquet": (b"PAR1" + bytes(50), "is a truncated Parquet file"),
    "hollow.parquet": (b"PAR1" + bytes(50) + b"PAR1", "is a damaged Parquet file"),
    "run.wandb": (b":W&B\x44\x00\x00" + bytes(50), "is a W&B run in the form that only W&B reads"),
    "no events": (b"\x18" + bytes(11) + b"\x09" + bytes(8) + b"\x1a\x0dbrain.Event:2", "holds no series of numbers"),
}


@pytest.mark.parametrize("name", BAD)
def test_one_line_for_each(tmp_path: Path, name: str) -> None:
    content, message = BAD[name]
    (tmp_path / name).write_bytes(content)
    assert message in str(failure(tmp_path / name))


def test_a_run_of_wandb_is_told_how_to_export_itself(tmp_path: Path) -> None:
    (tmp_path / "run-x.wandb").write_bytes(b":W&B\x44\x00\x00" + bytes(50))
    for source in (tmp_path, tmp_path / "run-x.wandb"):
        assert "scan_history" in str(failure(source).hint)


def test_a_log_among_steps(tmp_path: Path) -> None:
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text("step,grad_norm\n1,2\n")
    with pytest.raises(GradscopeError, match=r"is a log \(CSV\), and tensors are wanted here") as caught:
        open_source([tmp_path / "a.csv", tmp_path / "b.csv"])
    assert "name one log" in str(caught.value.hint)


# --- cut off ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("log.csv", b"step,loss,grad_norm\n1,0.5,2.0\n2,0.5,3.0\n3,0.5\n"),
        ("log.jsonl", b'{"step": 1, "grad_norm": 2.0}\n{"step": 2, "grad_norm": 3.0}\n{"step": 3, "gra'),
    ],
)
def test_a_last_row_that_is_cut_off(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    source = read(tmp_path / name)
    assert [step.index for step in source.read_steps(range(2))] == [1, 2]
    assert any("cut off" in note for note in source.notes)


def test_parquet_cut_or_flipped_anywhere(tmp_path: Path) -> None:
    table = pyarrow.table({"step": np.arange(100), "grad_norm": np.arange(100.0)})
    parquet.write_table(table, tmp_path / "whole.parquet")
    whole = (tmp_path / "whole.parquet").read_bytes()
    choose = random.Random(0)
    path = tmp_path / "log.parquet"
    for _ in range(150):
        path.write_bytes(whole[: choose.randrange(8, len(whole))])
        assert "Parquet" in str(failure(path)) or "no format" in str(failure(path))
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[choose.randrange(4, len(whole) - 4)] ^= 1 << choose.randrange(8)
        path.write_bytes(damaged)
        try:
            read(path)
        except GradscopeError as error:
            assert "\n" not in str(error)


# --- odd, and readable -----------------------------------------------------------------------------------------------

READABLE: dict[str, tuple[bytes, list[float]]] = {
    "byte order mark.csv": (b"\xef\xbb\xbfstep,grad_norm\n1,2\n2,3\n", [2, 3]),
    "carriage returns.csv": (b"step,grad_norm\r\n1,2\r\n2,3\r\n", [2, 3]),
    "spaces.csv": (b"step, grad_norm\n1, 2\n2, 3 \n", [2, 3]),
    "quotes.csv": (b'"step","grad_norm","note, long"\n"1","2","a, b"\n', [2]),
    "words.csv": (b"step,grad_norm\n1,NaN\n2,inf\n3,Infinity\n4,1e400\n", [np.nan, np.inf, np.inf, np.inf]),
    "words.jsonl": (b'{"grad_norm": NaN}\n{"grad_norm": "inf"}\n{"grad_norm": "nan"}\n', [np.nan, np.inf, np.nan]),
    "nulls.jsonl": (b'{"step": 1, "grad_norm": null}\n\n{"step": 2, "grad_norm": 3}\n', [3]),
    "integers.jsonl": (b'{"grad_norm": 1' + b"0" * 400 + b"}\n", [np.inf]),
    "one record.json": (b'{"step": 1, "grad_norm": 2}', [2]),
    "odd steps.csv": (b"step,grad_norm\na,2\n1.5,3\n", [2, 3]),
    "huge steps.csv": (b"step,grad_norm\n1e300,2\n-7,3\n", [2, 3]),
    "byte order mark.jsonl": (b'\xef\xbb\xbf{"grad_norm": 1}\n', [1]),
}


@pytest.mark.parametrize("name", READABLE)
def test_what_is_odd_and_readable(tmp_path: Path, name: str) -> None:
    content, norms = READABLE[name]
    (tmp_path / name).write_bytes(content)
    source = read(tmp_path / name)
    steps = list(source.read_steps(range(source.info.steps)))
    said = [np.nan if step.nan[0] else np.inf if step.inf[0] else step.sum_squares[0] ** 0.5 for step in steps]
    assert said == pytest.approx(norms, nan_ok=True)


@given(
    st.binary(max_size=300), st.sampled_from(["", ".csv", ".json", ".jsonl", ".parquet", ".tfevents"]), st.booleans()
)
def test_any_bytes_end_in_a_result_or_in_a_line(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, suffix: str, known: bool
) -> None:
    heads = {
        ".csv": b"step,grad_norm\n",
        ".jsonl": b'{"grad_norm": 1}\n',
        ".parquet": b"PAR1",
        ".json": b'{"grad_norm":',
    }
    path = tmp_path_factory.getbasetemp() / f"any{suffix}"
    path.write_bytes(heads.get(suffix, b"") * known + content)
    try:
        read(path)
    except GradscopeError as error:
        assert "\n" not in str(error)


def test_memory_does_not_grow_with_what_is_not_wanted(tmp_path: Path) -> None:
    row = json.dumps({"step": 1, "grad_norm": 2.0, **{f"metric {i}": i / 7 for i in range(200)}}) + "\n"
    with (tmp_path / "log").open("w") as file:
        for _ in range(1000):
            file.write(row)
    tracemalloc.start()
    try:
        read(tmp_path / "log")
        assert tracemalloc.get_traced_memory()[1] < 3 << 20
    finally:
        tracemalloc.stop()
