"""``gradscope compare`` on real files: exit codes, formats, options."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import gradscope
from gradscope.__main__ import main

SAMPLES = Path(__file__).parents[1] / "sample_ckpts"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.delenv("COLUMNS", raising=False)

    def _run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["gradscope", *map(str, arguments)])
        code = main()
        out, err = capsys.readouterr()
        return code, out, err

    return _run


@pytest.fixture
def dumps(tmp_path: Path) -> tuple[Path, Path]:
    """Thirty steps of a network with two layers, and the same times 1024."""
    folders = tmp_path / "a", tmp_path / "b"
    random = np.random.default_rng(0)
    for folder in folders:
        folder.mkdir()
    for i in range(30):
        step = {f"{layer}.weight": random.standard_normal((8, 4)).astype(np.float32) for layer in ("in", "out")}
        np.savez(folders[0] / f"step_{i}.npz", **step)
        np.savez(folders[1] / f"step_{i}.npz", **{name: 1024 * array for name, array in step.items()})
    return folders


def test_a_loss_scale_is_named_and_the_exit_code_is_0(run: Run, dumps: tuple[Path, Path]) -> None:
    code, out, err = run("compare", *dumps)
    assert (code, err) == (0, "")
    assert "Every norm in B is 1,024 times that in A, at every step." in out
    assert "a loss scale of 1,024 that B still carries" in out
    assert out.rstrip().split("\n\n")[-1].startswith("Next: ")


def test_json_is_what_python_returns(run: Run, dumps: tuple[Path, Path]) -> None:
    code, out, _ = run("compare", *dumps, "--max-norm", "5", "--format", "json")
    assert code == 0
    told = json.loads(out)
    assert told["schema"] == "gradscope.compare/1"
    comparison = gradscope.compare(*dumps, ["norm:5"])
    assert isinstance(comparison, gradscope.Comparison)
    assert told["verdict"] == comparison.verdict == "differs"
    assert told["sources"]["a"]["path"] == str(dumps[0])
    assert [unit["name"] for unit in told["layers"]] == [unit.name for unit in comparison.layers]
    assert told["constant_ratio"]["ratio"] == pytest.approx(1024)
    assert told["policies"][0]["rate"]["b"]["clip_rate"] == 1.0


def test_csv_has_a_row_for_each_unit(run: Run, dumps: tuple[Path, Path]) -> None:
    _, out, _ = run("compare", *dumps, "--by", "tensor", "--format", "csv")
    rows = list(csv.DictReader(out.splitlines()))
    assert {row["name"] for row in rows} == {"all", "in.weight", "out.weight"}
    assert all(float(row["ratio"]) == pytest.approx(1024) for row in rows)


def test_markdown_goes_to_a_file(run: Run, dumps: tuple[Path, Path], tmp_path: Path) -> None:
    code, out, err = run("compare", *dumps, "--format", "markdown", "-o", tmp_path / "page.md")
    assert (code, out) == (0, "")
    assert "Wrote" in err
    assert "| layer | norm A | B | B/A |" in (tmp_path / "page.md").read_text()


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("ppo_cartpole.zip", "ppo_cartpole.gradscope"),
        ("ppo_cartpole.gradscope", "ppo_cartpole.gradscope"),
        ("rsl_rl_run/model_50.pt", "rsl_rl_run/model_149.pt"),
        ("rsl_rl_run.gradscope", "rsl_rl_run/model_149.pt"),
        ("ppo_cartpole_gradients", "ppo_cartpole_gradients"),
    ],
)
@pytest.mark.parametrize("width", ["80", "120"])
def test_any_two_of_a_run_fit_the_terminal(
    run: Run, monkeypatch: pytest.MonkeyPatch, a: str, b: str, width: str
) -> None:
    monkeypatch.setenv("COLUMNS", width)
    code, out, err = run("compare", SAMPLES / a, SAMPLES / b)
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= int(width)
    assert out.startswith(f"A: {SAMPLES / a}"[:40])
    assert "Next: " in out


def test_bad_input_is_one_line_and_exit_2(run: Run, dumps: tuple[Path, Path], tmp_path: Path) -> None:
    for arguments in (
        ["compare", dumps[0]],
        ["compare", dumps[0], tmp_path / "nowhere"],
        ["compare", *dumps, "--steps", "40:"],
        ["compare", *dumps, "--max-norm", "-1"],
        ["compare", *dumps, "--groups", "x=nothing*"],
        ["compare", *dumps, "--format", "junit"],
        ["compare", dumps[0], SAMPLES / "ppo_cartpole.zip"],
        ["compare", *dumps, dumps[0]],
    ):
        code, out, err = run(*arguments)
        assert (code, out) == (2, ""), arguments
        assert err.startswith("error: ") and len(err.splitlines()) <= 2, err


def test_help_names_both_sources(run: Run) -> None:
    code, out, _ = run("compare", "--help")
    assert code == 0
    assert "A" in out and "--max-norm" in out


def test_a_tag_goes_to_the_log(run: Run, dumps: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("step,first,second\n" + "\n".join(f"{i},{1 + i % 3},5.0" for i in range(30)))
    code, out, _ = run("compare", dumps[0], tmp_path / "log.csv", "--tag", "second", "--format", "json")
    assert code == 0
    assert json.loads(out)["overall"]["typical"]["b"] == pytest.approx(5.0)
    code, _, err = run("compare", *dumps, "--tag", "second")
    assert code == 2
    assert "neither source is one" in err


def test_what_cannot_be_chosen_from_is_refused(run: Run) -> None:
    checkpoint = SAMPLES / "ppo_cartpole.zip"
    code, _, err = run("compare", checkpoint, checkpoint, "--steps", "-10:")
    assert code == 2
    assert "holds no gradient steps" in err
    code, out, _ = run("compare", checkpoint, checkpoint, "--max-norm", "0.5")
    assert code == 0
    assert "max_norm 0.5 is not compared" in " ".join(out.split())
