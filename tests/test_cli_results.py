"""The commands on real files: what is printed, where it goes, in which form."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradscope.__main__ import main

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in this process: exit code, stdout, stderr."""
    monkeypatch.delenv("COLUMNS", raising=False)

    def _run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["gradscope", *map(str, arguments)])
        code = main()
        out, err = capsys.readouterr()
        return code, out, err

    return _run


@pytest.fixture
def example(tmp_path: Path) -> Path:
    """g = (10, 0.1), the example of the specification."""
    np.savez(tmp_path / "g.npz", **{"layer.weight": np.array([10.0, 0.1])})
    return tmp_path / "g.npz"


@pytest.fixture
def steps(tmp_path: Path) -> Path:
    """Thirty steps of an actor-critic whose norms are 1, 2, … 30."""
    folder = tmp_path / "grads"
    folder.mkdir()
    for i in range(1, 31):
        tensors = {"policy_net.weight": np.array([[0.6 * i, 0.0]]), "value_net.weight": np.array([0.0, 0.8 * i])}
        np.savez(folder / f"step_{i}.npz", **tensors)
    return folder


def loaded(text: str) -> Any:
    return json.loads(text)


def test_the_example_by_value_and_by_norm(run: Run, example: Path) -> None:
    code, out, err = run("simulate", example, "--max-norm", "0.5", "--clip-value", "0.5", "--format", "json")
    assert (code, err) == (0, "")
    by_norm, by_value = loaded(out)["results"]
    assert by_norm["direction_change_deg"]["max"] == 0
    assert by_norm["scale"]["p50"] == pytest.approx(0.0499975, abs=5e-8)
    assert by_value["direction_change_deg"]["max"] == pytest.approx(10.7370, abs=5e-5)


def test_a_single_gradient_is_told_with_its_digits(run: Run, example: Path) -> None:
    _, out, _ = run("simulate", example, "--max-norm", "0.5", "20", "--clip-value", "0.5", "--sweep")
    assert re.search(r"max_norm 0\.5 +yes +0\.049998× +0\.049998× +0°", out)
    assert re.search(r"max_norm 20 +no +1\.0000× +1\.0000× +0°", out)
    assert re.search(r"clip_value 0\.5 +yes +0\.050988× +0\.050095× +10\.737°", out)
    assert "recently" not in out
    assert "Any max_norm below 10.00 clips this gradient." in out


def test_several_values_and_a_path_after_one_option(run: Run, steps: Path) -> None:
    code, out, _ = run("simulate", "--max-norm", "10", "20", steps, "--format", "json")
    assert code == 0
    results = loaded(out)["results"]
    assert [(r["policy"], r["clipped_steps"]) for r in results] == [("norm:10", 20), ("norm:20", 10)]


def test_max_grad_norm_is_max_norm(run: Run, steps: Path) -> None:
    assert run("simulate", steps, "--max-grad-norm", "10") == run("simulate", steps, "--max-norm", "10")


def test_groups_and_steps(run: Run, steps: Path) -> None:
    options = ("--groups", "actor=policy*", "critic=value*", "--steps", "-10:", "--format", "json")
    _, out, _ = run("simulate", steps, "--max-norm", "18", *options)
    data = loaded(out)
    assert data["steps"] == 10
    assert [group["name"] for group in data["results"][0]["groups"]] == ["actor", "critic"]
    # The critic's norms are 0.8 × 21 … 0.8 × 30: above 18 from the 23rd step on; the actor's stay at 18 and below.
    assert data["results"][0]["clipped_steps"] == 8


def test_shell_expanded_paths_are_a_sequence_of_steps(run: Run, steps: Path) -> None:
    paths = sorted(steps.iterdir())
    _, out, _ = run("inspect", *paths, "--format", "json")
    data = loaded(out)
    assert data["source"]["steps"] == 30
    assert data["gradients"]["global"]["l2_norm"]["max"] == pytest.approx(30, rel=1e-6)


def test_the_table_says_it_in_words_first(run: Run, steps: Path) -> None:
    code, out, err = run("simulate", steps, "--max-norm", "10")
    assert (code, err) == (0, "")
    assert "\n\n▸ max_norm 10 clips" in out
    assert out.rstrip().endswith("Replay: another threshold would have trained another policy.")
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) <= 80


def test_columns_widen_a_piped_table(run: Run, steps: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    _, out, _ = run("inspect", steps)
    assert "p99" in out
    monkeypatch.setenv("COLUMNS", "80")
    assert "p99" not in run("inspect", steps)[1]


def test_sweep_and_suggestions(run: Run, steps: Path) -> None:
    _, out, _ = run("simulate", steps, "--sweep")
    assert re.search(r"^ +max_norm +clipped", out, re.M)
    assert "To clip 10 % of" in out


def test_one_step_and_its_neighbours(run: Run, steps: Path) -> None:
    _, out, _ = run("inspect", steps, "--at", "25", "--format", "json")
    rows = loaded(out)["gradients"]["at"]
    assert [row["step"] for row in rows] == list(range(5, 26))
    assert rows[-1]["l2_norm"] == pytest.approx(26, rel=1e-6)
    assert "step_26.npz" in run("inspect", steps, "--at", "25")[1]


def test_csv_and_markdown(run: Run, steps: Path) -> None:
    rows = list(csv.DictReader(run("inspect", steps, "--by", "tensor", "--format", "csv")[1].splitlines()))
    assert [row["name"] for row in rows] == ["value_net.weight", "policy_net.weight"]
    assert float(rows[0]["share"]) == pytest.approx(0.64)
    assert "| layer |" in run("inspect", steps, "--format", "markdown")[1]


def test_nan_gradients_are_reported_and_no_error(run: Run, steps: Path) -> None:
    broken = {"policy_net.weight": np.array([[math.nan, 0.0]]), "value_net.weight": np.array([0.0, 1.0])}
    np.savez(steps / "step_31.npz", **broken)
    code, out, _ = run("simulate", steps, "--max-norm", "10")
    assert code == 0
    assert "1 of 31 steps holds NaN or Inf" in out
    assert "policy_net.weight" in out


def test_output_file_leaves_stdout_empty(run: Run, steps: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    code, out, err = run("simulate", steps, "--max-norm", "1", "--format", "json", "-o", target)
    assert (code, out, err) == (0, "", f"Wrote {target}\n")
    assert loaded(target.read_text())["steps"] == 30
    code, out, err = run("simulate", steps, "--max-norm", "1", "-q", "-o", target)
    assert (code, out, err) == (0, "", "")
    assert "Replay" in target.read_text(encoding="utf-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grads", "out.json"]


def test_output_replaces_what_a_link_points_to_with_ordinary_permissions(run: Run, steps: Path, tmp_path: Path) -> None:
    real, link = tmp_path / "real.txt", tmp_path / "link.txt"
    real.write_text("old")
    link.symlink_to(real)
    before = os.umask(0o022)
    try:
        assert run("inspect", steps, "-o", link)[0] == 0
    finally:
        os.umask(before)
    assert link.is_symlink()
    assert "whole gradient" in real.read_text(encoding="utf-8")
    assert stat.S_IMODE(real.stat().st_mode) == 0o644


def test_output_to_a_device(run: Run, steps: Path) -> None:
    assert run("inspect", steps, "-o", "/dev/null")[0] == 0
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_default_source_is_named(run: Run, steps: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (steps.parent / "pyproject.toml").write_text('[tool.gradscope]\nsource = "grads"\n')
    monkeypatch.chdir(steps.parent)
    code, out, err = run("simulate", "--max-norm", "1")
    assert (code, err) == (0, "")
    assert out.startswith("Using grads")
    code, out, err = run("simulate", "--max-norm", "1", "--format", "json")
    assert err.startswith("Using grads") and loaded(out)["steps"] == 30
    code, out, err = run("simulate", "--max-norm", "1", "-q", "--format", "json")
    assert (code, err) == (0, "")
    assert not run("simulate", "--max-norm", "1", "-q")[1].startswith("Using")
