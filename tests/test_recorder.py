"""``Recorder`` as people call it: what it refuses, where it records, and what it says when it has recorded nothing."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recorded import read_rows
from torch.nn.utils import clip_grad_norm_

import gradscope
from gradscope import GradscopeError, Recorder


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(steps: int = 3) -> None:
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(3, 4)).square().sum().backward()
        clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every=0: must be at least 1"),
        ({"every": 2.5}, "every=2.5: must be a whole number"),
        ({"every": "3"}, "every='3': must be a whole number"),
        ({"start": -1}, "start=-1: must be at least 0"),
        ({"start": None}, "start=None: must be a whole number"),
        ({"max_steps": 0}, "max_steps=0: must be at least 1"),
        ({"max_steps": 1e3}, "max_steps=1000.0: must be a whole number"),
        ({"include": "weight"}, "include='weight': must be a list of globs"),
        ({"include": 3}, "include=3: must be a list of globs"),
        ({"include": ["weight", None]}, "include=['weight', None]: must be a list of globs"),
        ({"detail": "all"}, "detail='all': must be 'default' or 'full' or 'norms'"),
        ({"stop_on": ["nonfinite"]}, "stop_on=['nonfinite']: must be None or 'nonfinite'"),
    ],
)
def test_an_option_that_cannot_be_used_is_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(GradscopeError) as refused:
        Recorder("run", **options)
    assert str(refused.value) == message


def test_whole_numbers_of_any_type_will_do(work: Path) -> None:
    with Recorder("run", every=np.int64(2), max_steps=torch.tensor(2), quiet=True) as recorder:
        train(9)
    assert recorder.steps == 2
    assert [row["step"] for row in read_rows(work / "run.gradscope")] == [0, 2]
    assert '"every":2,' in (work / "run.gradscope" / "trace.json").read_text()


# --- where it records -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "Recorder(''): names no file"),
        ("/", "Recorder('/'): names no file"),
        ("..", "Recorder('..'): names no file"),
        ("a\0b", "Recorder('a\\x00b'): names no file"),
        (3, "Recorder(3): is no path"),
        ("nowhere/run", "Recorder('nowhere/run'): there is no directory "),
        ("file/run", "Recorder('file/run'): there is no directory "),
        ("/proc/run", "Recorder('/proc/run'): nothing can be written in /proc ("),
        ("x" * 300, f"Recorder('{'x' * 300}'): cannot be made: File name too long"),
    ],
)
def test_a_path_that_cannot_be_made_is_refused_at_once(path: Any, message: str, work: Path) -> None:
    (work / "file").write_text("")
    with pytest.raises(GradscopeError, match=f"^{re.escape(message)}"):
        Recorder(path)


@pytest.mark.parametrize("path", ["run", "run/", "run.gradscope", b"run", Path("run")])
def test_a_path_is_the_one_of_the_moment(path: Any, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(path, quiet=True)
    assert not list(work.iterdir())
    (work / "elsewhere").mkdir()
    monkeypatch.chdir(work / "elsewhere")
    with recorder:
        train()
    assert recorder.path == work / "run.gradscope"
    assert len(read_rows(work / "run.gradscope")) == 3
    assert not list((work / "elsewhere").iterdir())


def test_a_name_that_is_taken_meanwhile_is_passed_over(work: Path) -> None:
    recorder = Recorder("run", quiet=True)
    (work / "run.gradscope").write_text("mine")
    with recorder:
        train()
    assert recorder.path == work / "run-2.gradscope"
    assert (work / "run.gradscope").read_text() == "mine"
    assert len(read_rows(recorder.path)) == 3


# --- once -------------------------------------------------------------------------------------------------------------


def test_a_recorder_records_once(work: Path) -> None:
    recorder = Recorder("run", quiet=True)
    with recorder:
        train()
        with pytest.raises(GradscopeError, match="records once"):
            recorder.start()
    with pytest.raises(GradscopeError, match="records once") as refused, recorder:
        train()
    assert refused.value.hint == "make another Recorder"
    assert len(read_rows(work / "run.gradscope")) == 3


# --- nothing recorded -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "steps", "why"),
    [
        ({}, 0, "no optimizer step was seen: no torch.optim optimizer stepped where it can be seen"),
        ({"start": 3}, 3, "training ended before the first step to record"),
        ({"include": ["nope*", "?"]}, 3, "no tensor that was trained has a name like nope* or ?"),
        ({"include": ["nope*"], "start": 3}, 3, "training ended before the first step to record"),
    ],
)
def test_a_recording_of_nothing_says_why(
    options: dict[str, Any], steps: int, why: str, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Recorder("run", **options):
        train(steps)
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"gradscope: nothing was recorded: {why}")
    with Recorder("run", quiet=True, **options):
        train(steps)
    assert capsys.readouterr().err == ""
    assert not list(work.iterdir())


def test_a_recording_says_nothing_where_all_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    with Recorder("run", start=2):
        train(3)
    assert capsys.readouterr().err == ""


def test_a_forked_child_that_trains_not_says_nothing(work: Path) -> None:
    (work / "forks.py").write_text(
        "import gradscope, os, sys, torch\n"
        "with gradscope.Recorder('run'):\n"
        "    if not os.fork():\n        sys.exit(5)\n"
        "    print(os.waitstatus_to_exitcode(os.wait()[1]))\n"
    )
    root = str(Path(gradscope.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "forks.py"], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": root}
    )
    assert done.stdout == "5\n"
    assert done.stderr.count("nothing was recorded") == 1


def test_a_trace_that_no_step_could_be_written_to_is_removed(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    recorder = Recorder("run", quiet=True)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, limits[1]))
        with recorder:
            train(100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert capsys.readouterr().err == "gradscope: recording stopped after 0 of 100 steps: File too large\n"
    assert not list(work.iterdir())


def test_a_trace_made_anew_by_another_run_is_not_touched(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Recorder("run", quiet=True):
        train(2)
        shutil.rmtree("run.gradscope")
        with Recorder("run", quiet=True) as other:
            train(3)
    assert capsys.readouterr().err == f"gradscope: recording stopped: {other.path} has disappeared\n"
    assert len(read_rows(work / "run.gradscope")) == 3


def test_what_lies_in_a_trace_beside_its_own_files_is_kept(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, limits[1]))
        with Recorder("run", quiet=True):
            train(1)
            (work / "run.gradscope" / "notes.txt").write_text("mine")
            train(100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in capsys.readouterr().err
    assert (work / "run.gradscope" / "notes.txt").read_text() == "mine"


def test_a_trace_names_the_version_that_recorded_it(work: Path) -> None:
    with Recorder("run", quiet=True):
        train()
    named = json.loads((work / "run.gradscope" / "trace.json").read_text())["versions"]["gradscope"]
    assert named == gradscope.__version__
    assert re.match(r"\d+\.\d+", named)


def test_a_descriptor_that_another_file_has_taken_is_left_alone(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Recorder("run", quiet=True) as recorder:
        train(2)
        assert recorder._writer is not None and recorder._writer._stream is not None
        number = recorder._writer._stream
        os.close(number)
        with (work / "mine.txt").open("w") as mine:
            assert mine.fileno() == number
            train(2)
            recorder.stop()
            mine.write("mine")
    assert (work / "mine.txt").read_text() == "mine"
    assert "the program has closed its file descriptor" in capsys.readouterr().err


RANKED = """
import torch, torch.distributed as dist
# Before DistributedDataParallel, and in a function: why, says training_scripts/ddp.py.
import torch.distributed.nn
from torch.nn.parallel import DistributedDataParallel
from gradscope import Recorder

def train():
    torch.manual_seed(0)
    model = DistributedDataParallel(torch.nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(3, 4)).square().sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()

dist.init_process_group("gloo")
with Recorder("ranks.gradscope", quiet=True):
    train()
dist.destroy_process_group()
"""


def test_the_ranks_of_a_run_share_a_trace(work: Path) -> None:
    (work / "ranked.py").write_text(RANKED)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "ranked.py"]
    subprocess.run(torchrun, check=True, capture_output=True, timeout=120)
    assert sorted(path.name for path in work.glob("*.gradscope")) == ["ranks.gradscope"]
    first, second = (read_rows(work / "ranks.gradscope", rank) for rank in (0, 1))
    assert [row["sum_squares"] for row in first] == [row["sum_squares"] for row in second]
    assert gradscope.inspect(work / "ranks.gradscope").source.steps == 5
