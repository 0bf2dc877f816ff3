"""A source tree whose kernels were never built says so."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import gradscope


def test_a_source_tree_that_was_not_built_says_so(tmp_path: Path) -> None:
    package = Path(gradscope.__file__).parent
    shutil.copytree(package, tmp_path / "gradscope", ignore=shutil.ignore_patterns("*.so", "*.pyd", "__pycache__"))
    command = [sys.executable, "-m", "gradscope", "inspect", "x.safetensors"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: gradscope: this source tree was not built: its compiled core is missing",
        "hint: pip install -e . builds it in place",
    ]
