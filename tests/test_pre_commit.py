"""The hooks for pre-commit: its own manifest check, and the entries run as it runs them."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

ROOT = Path(__file__).parents[1]
MANIFEST = ROOT / ".pre-commit-hooks.yaml"
HOOKS: dict[str, dict[str, Any]] = {hook["id"]: hook for hook in yaml.safe_load(MANIFEST.read_text(encoding="utf-8"))}


def _run(hook: str, files: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    entry = shlex.split(HOOKS[hook]["entry"])
    assert entry[0] == "gradscope"
    command = [sys.executable, "-m", *entry, *files]
    return subprocess.run(command, cwd=folder, check=False, capture_output=True, text=True, timeout=120)


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    import torch

    for name, value in (("well.pt", 0.5), ("ill.pt", float("nan"))):
        torch.save({"model": {"weight": torch.full((4, 4), value)}}, tmp_path / name)
    return tmp_path


def test_pre_commit_accepts_the_manifest() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pre_commit", "validate-manifest", str(MANIFEST)],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    broken = subprocess.run(
        [sys.executable, "-m", "pre_commit", "validate-manifest", str(ROOT / "action.yml")],
        check=False,
        capture_output=True,
    )
    assert broken.returncode != 0


def test_checkpoints_are_what_the_first_hook_is_given() -> None:
    files = HOOKS["gradscope-check"]["files"]
    for name in ("ppo.zip", "runs/model_100.pt", "last.ckpt", "weights.pth"):
        assert re.search(files, name)
    for name in ("train.py", "zip.md", "apt"):
        assert not re.search(files, name)


def test_a_commit_of_healthy_checkpoints_passes_and_another_does_not(checkpoints: Path) -> None:
    done = _run("gradscope-check", ["well.pt"], checkpoints)
    assert done.returncode == 0, done.stdout + done.stderr
    done = _run("gradscope-check", ["well.pt", "ill.pt"], checkpoints)
    assert done.returncode == 1
    assert "nonfinite failed" in done.stdout


def test_the_second_hook_reads_the_source_of_the_project(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text('[tool.gradscope]\nsource = "gradients"\n')
    (tmp_path / "gradients").mkdir()
    for step in range(4):
        bad = np.inf if step == 2 else 1.0
        np.savez(tmp_path / "gradients" / f"{step}.npz", weight=np.array([0.5, bad], dtype=np.float32))
    done = _run("gradscope-check-source", [], tmp_path)
    assert done.returncode == 1
    assert "nonfinite failed" in done.stdout
