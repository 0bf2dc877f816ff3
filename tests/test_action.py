"""The GitHub Action, its steps run as they are written, in the environment that a runner gives them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

ROOT = Path(__file__).parents[1]
ACTION = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
INSTALL, CHECK = ACTION["runs"]["steps"]


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str
    summary: str
    outputs: dict[str, str]


class Runner:
    """What a runner does with a composite action's step: expressions into ``env``, the script to bash."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.action = folder / "_actions" / "v1"
        self.temp = folder / "_temp"
        self.python = ""
        for part in (self.action, self.temp, folder / "bin"):
            part.mkdir(parents=True)
        base = folder / "bin" / "python3"
        base.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        base.chmod(0o755)

    def run(self, step: Mapping[str, Any], workspace: Path, **inputs: str) -> Ran:
        given = {name: entry["default"] for name, entry in ACTION["inputs"].items()}
        given |= {name.replace("_", "-"): value for name, value in inputs.items()}
        known = {f"inputs.{name}": value for name, value in given.items()}
        known["steps.install.outputs.python"] = self.python

        def resolved(text: str) -> str:
            return re.sub(r"\$\{\{ *([\w.-]+) *\}\}", lambda match: known[match[1]], text)

        script = self.folder / "step.sh"
        script.write_text(step["run"], encoding="utf-8")
        files = {name: self.folder / name for name in ("GITHUB_STEP_SUMMARY", "GITHUB_OUTPUT")}
        for file in files.values():
            file.write_text("")
        environment = {
            "PATH": f"{self.folder / 'bin'}:/usr/bin:/bin",
            "HOME": str(self.folder),
            "GITHUB_ACTIONS": "true",
            "GITHUB_ACTION_PATH": str(self.action),
            "GITHUB_WORKSPACE": str(workspace),
            "RUNNER_TEMP": str(self.temp),
            # Nothing is downloaded: what gradscope and its build need is what the tests run with.
            "PYTHONPATH": sysconfig.get_path("purelib"),
            "PIP_NO_INDEX": "1",
            "PIP_NO_BUILD_ISOLATION": "0",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            **{name: str(file) for name, file in files.items()},
            **{name: resolved(value) for name, value in step.get("env", {}).items()},
        }
        done = subprocess.run(
            # As a runner calls it where a step says `shell: bash`.
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(script)],
            cwd=workspace / resolved(step.get("working-directory", ".")),
            env=environment,
            check=False,
            capture_output=True,
            text=True,
            timeout=300,
        )
        return Ran(
            done.returncode,
            done.stdout,
            done.stderr,
            files["GITHUB_STEP_SUMMARY"].read_text(encoding="utf-8"),
            _outputs(files["GITHUB_OUTPUT"].read_text(encoding="utf-8")),
        )


def _outputs(text: str) -> dict[str, str]:
    """Both forms in which a step says what it gives: NAME=VALUE, and NAME<<END lines END."""
    found, lines = {}, iter(text.splitlines())
    for line in lines:
        if "<<" in line:
            name, _, end = line.partition("<<")
            found[name] = "\n".join(iter(lambda: next(lines), end))
        else:
            name, _, found[name] = line.partition("=")
    return found


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """A runner that has done the first step: it builds and installs the action's own checkout."""
    runner = Runner(tmp_path_factory.mktemp("runner"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "constraints.txt", "action.yml"):
        shutil.copy2(ROOT / name, runner.action)
    shutil.copytree(
        ROOT / "gradscope", runner.action / "gradscope", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    installed = runner.run(INSTALL, runner.folder)
    assert installed.code == 0, installed.err
    runner.python = installed.outputs["python"]
    return runner


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A repository with the gradients of 20 healthy steps in ``runs/well`` and a NaN in ``runs/ill``."""
    rng = np.random.default_rng(0)
    for name in ("well", "ill"):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        for step in range(20):
            gradient = {f"layers.{i}.weight": rng.standard_normal((8, 8)).astype(np.float32) for i in range(3)}
            if name == "ill" and step == 7:
                gradient["layers.1.weight"][2, 3] = np.nan
            np.savez(folder / f"step_{step:03}.npz", **gradient)
    return tmp_path


def test_validates_against_the_schema_of_github_actions() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "check_jsonschema",
            "--builtin-schema",
            "vendor.github-actions",
            str(ROOT / "action.yml"),
        ],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ok" in done.stdout


def test_no_expression_stands_in_a_script() -> None:
    for step in (INSTALL, CHECK):
        assert "${{" not in step["run"]
        assert step["shell"] == "bash"


def test_every_input_is_used_and_every_expression_names_one() -> None:
    said = " ".join(str(value) for step in (INSTALL, CHECK) for key, value in step.items() if key != "run")
    assert set(re.findall(r"\$\{\{ inputs\.([\w-]+) \}\}", said)) == set(ACTION["inputs"])


def test_installs_the_checkout_into_an_environment_of_its_own(runner: Runner) -> None:
    # Away from the tree that the tests run in, which an import from the working directory would find.
    command = [runner.python, "-c", "import gradscope; print(gradscope.__file__)"]
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": ""}
    where = subprocess.run(
        command, cwd=runner.folder, env=environment, check=True, capture_output=True, text=True
    ).stdout
    assert Path(where.strip()).is_relative_to(runner.temp / "gradscope-v1")


def test_healthy_gradients_pass_with_a_summary(runner: Runner, workspace: Path) -> None:
    ran = runner.run(CHECK, workspace, path="runs/well")
    assert (ran.code, ran.err) == (0, "")
    assert "::error" not in ran.out
    assert "healthy" in ran.summary and "unhealthy" not in ran.summary
    assert ran.outputs == {}


def test_unhealthy_gradients_fail_with_annotations_a_summary_and_sarif(runner: Runner, workspace: Path) -> None:
    ran = runner.run(CHECK, workspace, path="runs/well\nruns/ill\n", sarif_file="out put.sarif")
    assert ran.code == 1, ran.err
    errors = [line for line in ran.out.splitlines() if line.startswith("::error ")]
    assert len(errors) == 1
    assert "nonfinite" in errors[0] and "runs/ill" in errors[0] and "7" in errors[0]
    assert ran.summary.count("unhealthy") == 1
    assert ran.outputs == {"sarif-file": "out put.sarif"}
    sarif = json.loads((workspace / "out put.sarif").read_text(encoding="utf-8"))
    assert sarif["version"] == "2.1.0"
    assert [result["ruleId"] for result in sarif["runs"][0]["results"] if result["level"] == "error"] == ["nonfinite"]


def test_arguments_are_quoted_as_in_a_shell_and_never_run(runner: Runner, workspace: Path) -> None:
    shutil.copytree(workspace / "runs" / "ill", workspace / "$(touch pwned) `touch pwned`; touch pwned")
    ran = runner.run(
        CHECK,
        workspace,
        path="$(touch pwned) `touch pwned`; touch pwned",
        args="""--rule 'nonfinite.severity=warn' --ignore "spike" --steps ':10'""",
        fail_on="error",
    )
    assert ran.code == 0, ran.err
    assert "::warning " in ran.out
    ran = runner.run(CHECK, workspace, path="runs/well", args="--steps $(touch${IFS}pwned)")
    assert ran.code == 2
    assert not (workspace / "pwned").exists()


def test_other_inputs_reach_the_command(runner: Runner, workspace: Path) -> None:
    ran = runner.run(CHECK, workspace, path="ill", working_directory="runs", format="json", args="--strict")
    assert ran.code == 1
    assert json.loads(ran.out)["status"] == "fail"
    assert ran.summary == ""
    ran = runner.run(CHECK, workspace, path="runs/well", baseline="nowhere.json")
    assert ran.code == 2
    assert "nowhere.json" in ran.err
    ran = runner.run(CHECK, workspace, path="runs/well", fail_on="warm")
    assert ran.code == 2
    assert "--fail-on" in ran.err


@pytest.mark.parametrize(
    ("inputs", "told"),
    [({"path": "nothing"}, "error: nothing"), ({"path": "--help"}, "--help"), ({"args": "'"}, "error: args")],
)
def test_unusable_inputs_end_in_one_line(runner: Runner, workspace: Path, inputs: dict[str, str], told: str) -> None:
    ran = runner.run(CHECK, workspace, **inputs, sarif_file="out.sarif")
    assert ran.code == 2
    assert told in ran.err.splitlines()[0]
    assert "Traceback" not in ran.err
    assert not (workspace / "out.sarif").exists()


def test_a_python_of_the_jobs_own_gets_gradscope_beside_what_it_has(runner: Runner, workspace: Path) -> None:
    # A module of the working directory is none of pip's.
    (workspace / "pip.py").write_text("raise SystemExit(3)")
    ran = runner.run(INSTALL, workspace, python=runner.python)
    assert ran.code == (0 if sys.version_info >= (3, 11) else 3), ran.err
    if sys.version_info >= (3, 11):
        assert ran.outputs == {"python": runner.python}


def test_a_sarif_file_that_cannot_be_written_is_no_verdict(runner: Runner, workspace: Path) -> None:
    ran = runner.run(CHECK, workspace, path="runs/well", sarif_file="nowhere/out.sarif")
    assert ran.code == 2
    assert "-o nowhere/out.sarif: there is no directory" in ran.err
