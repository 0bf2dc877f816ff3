"""``gradscope record``: its options, what it refuses, and what it says and leaves when the command has ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import gradscope
from gradscope.recording.outcome import launched_traces
from gradscope.recording.settings import RecordSettings
from gradscope.recording.trace_names import default_trace, next_free
from gradscope.trace.metadata_json import metadata_to_json
from gradscope.trace.schema import TraceMetadata

ROOT = Path(__file__).parent.parent
CLEAN = {
    **{name: value for name, value in os.environ.items() if name != "GRADSCOPE_RECORD"},
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
}
TRAIN = """
import sys, torch
from torch.nn.utils import clip_grad_norm_

def train(steps, poison=None):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(torch.ones(3, 4)).square().sum()
        if step == poison:
            loss = loss * float("nan")
        loss.backward()
        clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()

if __name__ == "__main__":
    train(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None)
    print("trained")
"""


def record(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    options = {"capture_output": True, "text": True, "timeout": 120, "env": CLEAN, **options}
    return subprocess.run([sys.executable, "-m", "gradscope", "record", *arguments], check=False, **options)


def metadata(trace: str | Path) -> dict[str, object]:
    return json.loads(Path(trace, "trace.json").read_bytes())


def make_trace(path: Path) -> bytes:
    path.mkdir()
    (path / "trace.json").write_text('{"schema": "gradscope.trace/1"}')
    return (path / "trace.json").read_bytes()


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text(TRAIN)
    return tmp_path


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "hint"),
    [
        ([], "record: no command was given", "gradscope record -- python train.py"),
        (["--"], "record: no command was given", "gradscope record -- python train.py"),
        (["--", "no-such-program", "x"], "no-such-program: no such command", None),
        (["--", "./no-such-program"], "./no-such-program: no such command", None),
        (["--", "train.py"], "train.py: is not executable", "gradscope record -- python train.py"),
        (["--", "./train.py", "5"], "./train.py: is not executable", "gradscope record -- python ./train.py"),
        (["--", "."], ".: is a directory, not a command", None),
        (["-o", "nowhere/x", "--", "true"], "-o nowhere/x: there is no directory", None),
        (["-o", "/proc/x", "--", "true"], "-o /proc/x: nothing can be written in /proc", None),
        (["-o", "", "--", "true"], "-o : names no file", None),
        (["--every", "0", "--", "true"], "--every: must be a whole number of at least 1", None),
        (["--max-steps", "x", "--", "true"], "--max-steps: must be a whole number of at least 1", None),
        (["--evry", "5", "--", "true"], "--evry: no such option", "did you mean --every?"),
        (["--stop-on", "nan", "--", "true"], "--stop-on: 'nan' is not one of 'nonfinite'", None),
    ],
)
def test_what_cannot_be_done_is_one_line_and_a_hint(arguments: list[str], error: str, hint: str | None) -> None:
    done = record(*arguments)
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and done.stdout == ""
    assert lines[0].startswith(f"error: {error}")
    assert lines[1:] == ([f"hint: {hint}"] if hint else [])


def test_an_existing_trace_is_replaced_by_force_alone(work: Path) -> None:
    before = make_trace(work / "run.gradscope")
    done = record("-o", "run", "--", "true")
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == "error: -o run: exists"
    assert (work / "run.gradscope" / "trace.json").read_bytes() == before


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_what_is_no_trace_is_never_replaced(force: list[str], work: Path) -> None:
    (work / "run.gradscope").mkdir()
    (work / "run.gradscope" / "thesis.tex").write_text("mine")
    done = record(*force, "-o", "run.gradscope", "--", "true")
    assert done.returncode == 2
    assert done.stderr.startswith("error: -o run.gradscope: exists and is no recorded trace")


def test_a_failed_launch_loses_nothing_to_force(work: Path) -> None:
    before = make_trace(work / "run.gradscope")
    assert record("--force", "-o", "run", "--", sys.executable, "-c", "raise SystemExit(3)").returncode == 3
    assert (work / "run.gradscope" / "trace.json").read_bytes() == before


@pytest.mark.parametrize("arguments", [["--help"], ["--", "true"]])
def test_the_launcher_loads_no_engine(arguments: list[str]) -> None:
    code = (
        f"import sys\nsys.argv = ['gradscope', 'record', *{arguments!r}]\n"
        "from gradscope.__main__ import main\nassert main() == 0\n"
        "assert not {'numpy', 'torch', 'pyarrow', 'wrapt'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=CLEAN, check=False)
    assert done.returncode == 0, done.stderr


# --- the command's own words ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("separator", [["--"], []])
def test_options_of_the_command_are_never_eaten(separator: list[str]) -> None:
    words = ["--every", "5", "-q", "--help", "--", "--debug", "--max-norm", "1", "2", "-o", "x"]
    done = record("--every", "2", *separator, "echo", *words)
    assert (done.returncode, done.stdout) == (0, " ".join(words) + "\n")


def test_a_script_with_a_hash_bang_is_a_command(work: Path) -> None:
    (work / "train.py").write_text(f"#!{sys.executable}\nimport sys; print(sys.argv[1:])\n")
    (work / "train.py").chmod(0o755)
    assert record("--", "./train.py", "--lr", "3").stdout == "['--lr', '3']\n"


def test_a_file_that_no_kernel_can_run_is_an_error(work: Path) -> None:
    (work / "data").write_bytes(b"\0\1\2")
    (work / "data").chmod(0o755)
    done = record("--", "./data")
    assert done.returncode == 2
    assert done.stderr == "error: ./data: cannot be run: Exec format error\n"


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("python train.py --lr 3", "train.gradscope"),
        ("torchrun --nproc-per-node 2 scripts/fine_tune.py", "fine_tune.gradscope"),
        ("python -m package", "run.gradscope"),
        ("./train.sh", "run.gradscope"),
    ],
)
def test_the_trace_is_named_after_the_script(command: str, name: str, work: Path) -> None:
    assert default_trace(command.split()) == work / name


def test_a_taken_name_is_followed_by_the_next_free_one(work: Path) -> None:
    (work / "train.gradscope").mkdir()
    (work / "train-2.gradscope").write_text("a file")
    assert next_free(work / "train.gradscope") == work / "train-3.gradscope"
    assert default_trace(["python", "train.py"]) == work / "train-3.gradscope"


# --- recordings -------------------------------------------------------------------------------------------------------


def test_a_training_leaves_a_trace_and_says_where(work: Path) -> None:
    done = record("--", sys.executable, "train.py", "12")
    assert (done.returncode, done.stdout) == (0, "trained\n")
    summary, following = done.stderr.splitlines()
    assert summary.startswith("Recorded 12 updates, 1 clip group, 2 tensors: train.gradscope (")
    assert following == "Next: gradscope inspect train.gradscope"
    assert metadata("train.gradscope")["command"] == [sys.executable, "train.py", "12"]
    assert sorted(path.name for path in work.iterdir() if path.name != "__pycache__") == ["train.gradscope", "train.py"]
    inspection = gradscope.inspect(work / "train.gradscope")
    assert inspection.source.steps == 12


def test_a_module_and_a_console_script_started_by_a_shell_script_are_recorded(work: Path) -> None:
    program = work / "train-tool"
    program.write_text(f"#!{sys.executable}\nimport sys\nsys.path.insert(0, '{work}')\nimport train\ntrain.train(3)\n")
    program.chmod(0o755)
    (work / "both.sh").write_text(f"#!/bin/sh\n{sys.executable} -m train 1\n./train-tool\n")
    (work / "both.sh").chmod(0o755)
    done = record("--", "./both.sh")
    first, second, following = done.stderr.splitlines()
    assert first.startswith("Recorded 1 update, 1 clip group, 2 tensors: run.gradscope (")
    assert second.startswith("Recorded 3 updates, 1 clip group, 2 tensors: run-2.gradscope (")
    assert following == "Next: gradscope inspect run.gradscope"


PROCESSES = """
import multiprocessing, sys
from train import train

if __name__ == "__main__":
    train(2)
    context = multiprocessing.get_context(sys.argv[1])
    workers = [context.Process(target=train, args=(int(steps),)) for steps in sys.argv[2:]]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    print([worker.exitcode for worker in workers])
"""


@pytest.mark.parametrize(("method", "steps"), [("fork", ["5", "7"]), ("spawn", ["5"])])
def test_processes_that_train_side_by_side_make_a_trace_each(method: str, steps: list[str], work: Path) -> None:
    (work / "processes.py").write_text(PROCESSES)
    done = record("-o", "run", "--", sys.executable, "processes.py", method, *steps)
    assert done.stdout == f"{[0] * len(steps)}\n"
    counts = [gradscope.inspect(path).source.steps for path in work.glob("run*.gradscope")]
    assert sorted(counts) == [2, *map(int, steps)]


def test_a_command_that_never_steps_leaves_nothing(work: Path) -> None:
    done = record("--", sys.executable, "-c", "import torch; raise SystemExit(3)")
    assert done.returncode == 3
    [line] = done.stderr.splitlines()
    assert line.startswith("gradscope: no optimizer step was seen: no torch.optim optimizer stepped")
    assert [path.name for path in work.iterdir()] == ["train.py"]


def test_training_that_ends_before_the_first_step_to_record_says_so(work: Path) -> None:
    done = record("--start", "10", "--", sys.executable, "train.py", "4")
    [line] = done.stderr.splitlines()
    assert line == "gradscope: nothing was recorded: training ended before the first step to record"
    assert not list(work.glob("*.gradscope"))


def test_some_steps_and_parameters_can_be_chosen_and_a_trace_replaced(work: Path) -> None:
    make_trace(work / "run.gradscope")
    chosen = ["--start", "2", "--every", "3", "--max-steps", "4", "--detail", "norms", "--include", "*bias"]
    done = record("-q", "--force", "-o", "run", *chosen, "--", sys.executable, "train.py", "30")
    assert (done.stdout, done.stderr) == ("trained\n", "")
    held = metadata("run.gradscope")
    assert [held[name] for name in ("steps", "start", "every", "detail")] == [4, 2, 3, "norms"]
    inspection = gradscope.inspect(work / "run.gradscope")
    assert inspection.gradients is not None
    assert [tensor.name for tensor in inspection.gradients.tensors] == ["bias"]


def test_a_run_can_be_ended_at_its_first_fault(work: Path) -> None:
    done = record("--stop-on", "nonfinite", "--", sys.executable, "train.py", "20", "6")
    assert done.returncode == 1 and done.stdout == ""
    assert "step 6: the gradient of" in done.stderr
    assert metadata("train.gradscope")["steps"] == 7


def test_what_is_wrong_with_the_clipping_is_told_even_when_quiet(work: Path) -> None:
    (work / "zero.py").write_text(TRAIN.replace("0.5)", "0.0)"))
    done = record("-q", "--", sys.executable, "zero.py", "3")
    [line] = done.stderr.splitlines()
    assert line.startswith("warning: ") and "max_norm" in line


def test_a_killed_training_is_told_with_the_steps_that_it_holds(work: Path) -> None:
    (work / "killed.py").write_text(
        "import os, time\nfrom train import train\ntrain(5)\ntime.sleep(1)\nos.kill(os.getpid(), 9)\n"
    )
    done = record("--", sys.executable, "killed.py")
    assert done.returncode == -9
    line = done.stderr.splitlines()[0]
    assert line.startswith("Recorded 4 updates") or line.startswith("Recorded 5 updates")
    assert line.endswith("it is cut off: the command was killed by SIGKILL")


def run_with(work: Path, line: str, steps: int = 5, wait: float = 0.8) -> subprocess.CompletedProcess[str]:
    """Record a script that trains, waits until it is on disk, and then does what ``line`` says."""
    (work / "ends.py").write_text(
        f"import os, shutil, sys, time\nfrom train import train\ntrain({steps})\ntime.sleep({wait})\n{line}\n"
    )
    return record("-o", "run", "--", sys.executable, "ends.py")


@pytest.mark.parametrize(
    ("line", "code"), [("os._exit(4)", 4), ("os.execv(sys.executable, [sys.executable, '-c', ''])", 0)]
)
def test_a_process_that_skips_its_end_is_not_called_killed(line: str, code: int, work: Path) -> None:
    done = run_with(work, line)
    assert done.returncode == code
    summary, following = done.stderr.splitlines()
    assert summary.startswith("Recorded 5 updates") and "killed" not in summary
    assert summary.endswith("it is cut off: a process ended without closing its trace")
    assert following == "Next: gradscope inspect run.gradscope"


def test_a_trace_without_a_step_is_removed_and_not_recommended(work: Path) -> None:
    done = run_with(work, "os._exit(4)", steps=1, wait=0)
    [line] = done.stderr.splitlines()
    assert line.startswith("gradscope: nothing was recorded: a process ended without closing its trace, before the")
    assert not list(work.glob("*.gradscope"))


def test_a_trace_that_the_script_deletes_has_disappeared(work: Path) -> None:
    done = run_with(work, "shutil.rmtree('run.gradscope')")
    assert done.returncode == 0
    assert done.stderr.splitlines()[-1].startswith("gradscope: the trace run.gradscope has disappeared")
    assert "no optimizer step was seen" not in done.stderr


def test_after_a_failed_write_the_steps_on_disk_are_counted(work: Path) -> None:
    limited = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))\nimport time\n"
    (work / "full.py").write_text(
        limited + "from train import train\nfor _ in range(10):\n    train(20)\n    time.sleep(0.3)\n"
    )
    done = record("-o", "run", "--", sys.executable, "full.py")
    held = gradscope.inspect(work / "run.gradscope").source.steps
    assert 0 < held < 200
    told, summary, warning, following = done.stderr.splitlines()
    assert told.startswith(f"gradscope: recording stopped after {held} of ") and told.endswith("steps: File too large")
    assert summary.startswith(f"Recorded {held} updates, ")
    assert warning == f"warning: {told.removeprefix('gradscope: ')}"
    assert following == "Next: gradscope inspect run.gradscope"


def test_nothing_is_left_of_a_trace_that_no_step_could_be_written_to(work: Path) -> None:
    limited = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (5_000, 5_000))\n"
    (work / "full.py").write_text(limited + "from train import train\ntrain(200)\n")
    done = record("-o", "run", "--", sys.executable, "full.py")
    assert done.stderr.splitlines()[-1] == (
        "gradscope: nothing was recorded: recording stopped after 0 of 200 steps: File too large"
    )
    assert not list(work.glob("*.gradscope"))


def test_descriptors_that_a_program_closes_end_the_recording_only(work: Path) -> None:
    done = run_with(work, "os.closerange(3, 200)\ntrain(5)\nprint('trained')")
    assert (done.returncode, done.stdout) == (0, "trained\n")
    assert "Traceback" not in done.stderr
    assert "recording stopped after 5 of 10 steps: the program has closed its file descriptor" in done.stderr
    assert gradscope.inspect(work / "run.gradscope").source.steps == 5


def test_the_trace_at_the_path_asked_for_comes_first_then_the_others_by_number(work: Path) -> None:
    settings = RecordSettings(str(work / "run.gradscope"), "this launch", str(work), ("python", "train.py"))
    for started, (name, launch) in enumerate(
        [
            ("run-10", "this launch"),
            ("run-9", "this launch"),
            ("run", "this launch"),
            ("run-2", "another"),
            ("run-old", "this launch"),
        ]
    ):
        (work / f"{name}.gradscope").mkdir()
        held = TraceMetadata(started=float(started), steps=5, extra={"launch": launch})
        (work / f"{name}.gradscope" / "trace.json").write_bytes(metadata_to_json(held))
    assert [trace.path.stem for trace in launched_traces(settings)] == ["run", "run-9", "run-10"]


def test_a_script_that_records_itself_is_recorded_too(work: Path) -> None:
    (work / "own.py").write_text(
        "import gradscope\nwith gradscope.Recorder('own'):\n    from train import train\n    train(3)\ntrain(2)\n"
    )
    done = record("-o", "run", "--", sys.executable, "own.py")
    assert done.stderr.startswith("Recorded 5 updates, ")
    assert [metadata(f"{name}.gradscope")["steps"] for name in ("own", "run")] == [3, 5]


def test_a_worker_whose_steps_were_not_written_is_told(work: Path) -> None:
    (work / "pool.py").write_text(
        "import os\nfrom train import train\ntrain(3)\nif not os.fork():\n    train(1)\n    os._exit(0)\nos.wait()\n"
    )
    done = record("-o", "run", "--", sys.executable, "pool.py")
    assert "warning: 1 more process ended before the first step was written" in done.stderr.splitlines()
    assert [path.name for path in work.glob("*.gradscope")] == ["run.gradscope"]
