"""Unusable options and input: one line that says what and why, a hint where it helps, exit code 2."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gradscope.__main__ import main

Failed = Callable[..., list[str]]


@pytest.fixture
def failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Failed:
    """Run the command line beside a gradient dump ``g.npz``; it must fail as the contract says: its error lines."""
    np.savez(tmp_path / "g.npz", **{"policy.weight": np.array([3.0, 4.0])})
    monkeypatch.chdir(tmp_path)

    def _failed(*arguments: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["gradscope", *arguments])
        assert main() == 2
        out, err = capsys.readouterr()
        assert out == ""
        lines = err.splitlines()
        assert lines[0].startswith("error: ")
        assert len(lines) == 1 or (len(lines) == 2 and lines[1].startswith("hint: "))
        return lines

    return _failed


@pytest.mark.parametrize(
    ("line", "error", "hint"),
    [
        ("simulat", "simulat: no such command", "did you mean simulate?"),
        ("g.npz", "g.npz: no command", "gradscope inspect g.npz tells what is in it"),
        ("--nonsense", "--nonsense: no such option", ""),
        ("simulate g.npz --max-nrom 1", "--max-nrom: no such option", "did you mean --max-norm?"),
        ("simulate g.npz --max-norm", "--max-norm: needs a value", ""),
        ("simulate g.npz --max-norm abc", "--max-norm abc: not a number", ""),
        ("simulate g.npz --max-norm 0.5,1", "--max-norm 0.5,1: not a number", "separate several values by spaces"),
        ("simulate g.npz --max-norm 0", "--max-norm 0: max_norm must be above 0", ""),
        ("simulate g.npz --max-norm 1 -1", "--max-norm -1: max_norm must be above 0", ""),
        ("simulate g.npz --max-norm nan", "--max-norm nan: max_norm must be a finite number", ""),
        ("simulate g.npz --clip-value inf", "--clip-value inf: clip_value must be a finite number", ""),
        ("simulate g.npz --policy valeu:1", "--policy valeu:1: no policy is called 'valeu'", "did you mean value?"),
        ("simulate g.npz --policy norm", "--policy norm: ", "write norm:MAX_NORM"),
        ("simulate g.npz --convention tf", "--convention: 'tf' is not one of 'exact', 'torch'", ""),
        ("inspect g.npz --format jsn", "--format: 'jsn' is not one of", "did you mean json?"),
        ("inspect g.npz --max-norm x", "--max-norm x: not a number", ""),
        ("inspect g.npz --max-norm -1", "--max-norm -1: ", ""),
        ("inspect g.npz --by layr", "--by: 'layr' is not one of", "did you mean layer?"),
        ("inspect g.npz --top 0", "--top: must be a whole number of at least 1", ""),
        ("inspect g.npz --top x", "--top: must be a whole number of at least 1", ""),
        ("inspect g.npz --at x", "--at: must be a whole number", ""),
        ("inspect g.npz --at 7", "--at 7: ", ""),
        ("inspect g.npz --steps 3", "--steps 3: not of the form A:B", "-1000:"),
        ("inspect g.npz --groups actor", "--groups actor: not of the form NAME=GLOB", "for example"),
        ("inspect g.npz --groups a=pol* a=*", "--groups a=*: the group a is given twice", ""),
        ("inspect g.npz --groups a=nothing*", "--groups a=nothing*: matches no tensor", "policy.weight"),
        ("inspect missing.pt", "missing.pt: no such file or directory", ""),
        ("inspect g.npz -o missing/out.txt", "-o missing/out.txt: there is no directory", ""),
        ("inspect g.npz -o .", "-o .: is a directory", ""),
        ("inspect g.npz -o g.npz", "-o g.npz: is the input; it would be overwritten", ""),
        ("simulate g.npz --policy agc:0.01", "--policy agc:0.01: ", "--weights"),
        ("inspect", ": ", ""),
    ],
)
def test_one_line_says_what_and_why(failed: Failed, line: str, error: str, hint: str) -> None:
    lines = failed(*line.split())
    assert error in lines[0]
    assert hint in "".join(lines[1:])


def test_a_bare_checkpoint_names_what_to_do(failed: Failed) -> None:
    import torch

    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, "ckpt.pt")
    lines = failed("simulate", "ckpt.pt", "--max-norm", "1")
    assert "--batch" in lines[1] and "record" in lines[1]


def test_the_input_survives_a_refused_output(failed: Failed) -> None:
    failed("inspect", "g.npz", "-o", "g.npz")
    assert np.load("g.npz")["policy.weight"].tolist() == [3.0, 4.0]


def test_a_fifo_that_nobody_reads_is_an_error_and_no_wait(failed: Failed) -> None:
    os.mkfifo("pipe")
    assert failed("inspect", "g.npz", "-o", "pipe")[0].startswith("error: -o pipe: ")


def test_control_characters_of_a_path_are_escaped(failed: Failed) -> None:
    assert failed("inspect", "a\x1b[31m\nb")[0].startswith(r"error: a\x1b[31m\nb: ")


def test_debug_shows_the_traceback_and_the_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gradscope", "inspect", str(tmp_path / "missing"), "--debug"])
    assert main() == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("error: ")


def test_an_unexpected_exception_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import gradscope.inspection

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("division\nby zero")

    np.savez(tmp_path / "g.npz", w=np.ones(2))
    monkeypatch.setattr(gradscope.inspection, "inspect", broken)
    monkeypatch.setattr(sys, "argv", ["gradscope", "inspect", str(tmp_path / "g.npz")])
    assert main() == 2
    line = r"error: internal: ZeroDivisionError: division\nby zero; rerun with --debug"
    assert capsys.readouterr().err.splitlines() == [line]


def test_an_interruption_ends_with_130(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import gradscope.inspection

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    np.savez(tmp_path / "g.npz", w=np.ones(2))
    monkeypatch.setattr(gradscope.inspection, "inspect", interrupted)
    monkeypatch.setattr(sys, "argv", ["gradscope", "inspect", str(tmp_path / "g.npz")])
    assert main() == 130
    assert "Traceback" not in capsys.readouterr().err
