"""The program as a process: what it imports, pipes that close, streams that are full, encodings."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
CLEAN = {
    **{name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR", "PYTHONIOENCODING")},
    "PYTHONPATH": str(ROOT),
}


def gradscope(*arguments: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gradscope", *map(str, arguments)]
    environment = {**CLEAN, **options.pop("env", {})}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False, **options)


def imported(code: str) -> set[str]:
    """The heavy libraries that ``code`` imports in a fresh interpreter."""
    heavy = "numpy", "torch", "pyarrow", "rich.console", "typer", "yaml"
    program = f"{code}\nimport sys\nprint(*[m for m in {heavy!r} if m in sys.modules], sep='\\n', file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=CLEAN, check=True)
    return set(done.stderr.split())


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dump") / "g.npz"
    np.savez(path, **{f"layers.{i}.weight": np.full(3, float(i + 1)) for i in range(2000)})
    return path


def test_import_gradscope_loads_nothing() -> None:
    assert imported("import gradscope") == set()


@pytest.mark.parametrize("arguments", [["--help"], ["simulate", "--help"], ["inspect", "--help"], ["--version"]])
def test_help_loads_no_engine(arguments: list[str]) -> None:
    code = (
        f"import sys\nsys.argv = ['gradscope', *{arguments!r}]\nfrom gradscope.__main__ import main\nassert main() == 0"
    )
    assert not imported(code) & {"numpy", "torch", "pyarrow", "yaml"}


@pytest.mark.parametrize("command", ["inspect", "simulate"])
def test_commands_do_not_import_torch(command: str, dump: Path) -> None:
    arguments = [command, str(dump)]
    code = (
        f"import sys\nsys.argv = ['gradscope', *{arguments!r}]\nfrom gradscope.__main__ import main\nassert main() == 0"
    )
    assert not imported(code) & {"torch", "pyarrow"}


def test_help_lists_the_commands_and_every_policy() -> None:
    from gradscope.clipping import POLICIES

    assert {"inspect", "simulate"} <= set(gradscope("--help").stdout.split())
    text = gradscope("simulate", "--help", env={"COLUMNS": "200"}).stdout
    for rule in POLICIES:
        assert rule.usage in text


def test_no_command_prints_the_help() -> None:
    done = gradscope()
    assert done.returncode == 0
    assert "simulate" in done.stdout and done.stderr == ""


def test_a_reader_that_has_seen_enough_is_no_failure(dump: Path) -> None:
    command = f"'{sys.executable}' -m gradscope inspect '{dump}' --by tensor --format csv | head -n 1"
    done = subprocess.run(
        ["bash", "-c", command + "; echo ${PIPESTATUS[0]}"], capture_output=True, text=True, env=CLEAN, check=True
    )
    header, status = done.stdout.splitlines()
    assert header.startswith("name,numel,share")
    assert (status, done.stderr) == ("0", "")


def test_a_full_disk_is_one_line(dump: Path) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "gradscope", "inspect", str(dump)]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=CLEAN, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["error: standard output: No space left on device"]


def test_a_closed_stdout_is_one_line(dump: Path) -> None:
    command = f"'{sys.executable}' -m gradscope inspect '{dump}' >&-"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=CLEAN, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == "error: standard output: is closed"


def test_an_encoding_without_blocks_gets_ascii(dump: Path) -> None:
    done = gradscope("inspect", dump, env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0
    assert done.stdout.isascii()
    assert "#" in done.stdout and "█" not in done.stdout


@pytest.mark.parametrize("env", [{}, {"NO_COLOR": "1"}, {"TERM": "dumb"}, {"FORCE_COLOR": "1"}])
def test_a_pipe_gets_no_colours(dump: Path, env: dict[str, str]) -> None:
    assert "\x1b" not in gradscope("inspect", dump, env=env).stdout


def test_usage_errors_end_with_2(dump: Path) -> None:
    done = gradscope("simulate", dump, "--max-norm", "0")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --max-norm 0: max_norm must be above 0\n"


def test_the_python_api_returns_what_the_command_prints(dump: Path) -> None:
    import json

    import gradscope as api

    simulation = api.simulate(dump, ["norm:0.5", "value:1"])
    printed = json.loads(
        gradscope("simulate", dump, "--max-norm", "0.5", "--clip-value", "1", "--format", "json").stdout
    )
    assert isinstance(simulation, api.Simulation)
    assert simulation.norm.max == printed["norm"]["max"]
    assert [result.policy for result in simulation.results] == [result["policy"] for result in printed["results"]]
    assert isinstance(api.inspect(dump), api.Inspection)
    with pytest.raises(api.GradscopeError, match="no policy is called"):
        api.simulate(dump, ["nrm:1"])
    with pytest.raises(AttributeError, match="no attribute 'simulat'"):
        api.simulat  # noqa: B018
