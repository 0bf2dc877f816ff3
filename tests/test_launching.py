"""A recorded command is run as if nobody watched: its code, signals, streams, environment and imports."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CLEAN = {
    **{name: value for name, value in os.environ.items() if name != "GRADSCOPE_RECORD"},
    "PYTHONPATH": str(ROOT),
}
RECORD = [sys.executable, "-m", "gradscope", "record", "--"]
# Says when it is ready, and what it was sent; ends by itself if nothing comes.
TRAP = "trap 'echo got; exit 5' {}; echo ready; i=0; while [ $i -lt 200 ]; do sleep 0.05; i=$((i+1)); done"


def run(*command: str, **options: object) -> subprocess.CompletedProcess[bytes]:
    options = {"capture_output": True, "timeout": 60, "env": CLEAN, **options}
    return subprocess.run([*RECORD, *command], check=False, **options)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("code", [0, 1, 2, 77, 255])
def test_the_exit_code_is_kept(code: int) -> None:
    assert run("sh", "-c", f"exit {code}").returncode == code


@pytest.mark.parametrize("name", ["TERM", "KILL", "INT", "SEGV"])
def test_a_command_ended_by_a_signal_ends_gradscope_by_the_same(name: str) -> None:
    assert run("sh", "-c", f"kill -{name} $$").returncode == -getattr(signal, f"SIG{name}")


def test_input_and_output_pass_through_untouched() -> None:
    data = bytes(range(256)) * 1000
    done = run("sh", "-c", "tee /dev/stderr", input=data)
    assert done.stdout == data
    assert done.stderr.startswith(data)


def test_open_files_are_passed_on_as_a_shell_passes_them(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("from descriptor 3\n")
    recorded = " ".join(f"'{word}'" for word in RECORD)
    done = subprocess.run(
        ["sh", "-c", f"exec 3<data; {recorded} sh -c 'cat <&3'"], capture_output=True, env=CLEAN, check=True
    )
    assert done.stdout == b"from descriptor 3\n"


def test_standard_output_is_the_commands_alone() -> None:
    assert run("echo", "hello").stdout == b"hello\n"


@pytest.mark.parametrize("name", ["TERM", "HUP", "QUIT", "USR1", "USR2", "INT"])
def test_a_signal_sent_to_gradscope_alone_reaches_the_command(name: str) -> None:
    process = subprocess.Popen([*RECORD, "sh", "-c", TRAP.format(name)], stdout=subprocess.PIPE, env=CLEAN)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(getattr(signal, f"SIG{name}"))
    assert process.communicate(timeout=30)[0] == b"got\n"
    assert process.returncode == 5


COUNT_INTERRUPTS = """
import signal, sys, time
got = []
signal.signal(signal.SIGINT, lambda number, frame: got.append(number))
print("ready", flush=True)
end = time.monotonic() + 20
while not got and time.monotonic() < end:
    time.sleep(0.02)
time.sleep(0.3)
print("interrupts:", len(got), flush=True)
sys.exit(9)
"""


def test_ctrl_c_at_the_terminal_reaches_the_command_once_and_gradscope_waits_for_it() -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(sys.executable, [*RECORD, sys.executable, "-c", COUNT_INTERRUPTS], CLEAN)
    shown = b""
    while b"ready" not in shown:
        shown += os.read(terminal, 1000)
    os.write(terminal, b"\x03")
    while b"interrupts:" not in shown:
        shown += os.read(terminal, 1000)
    while True:
        try:
            if not (piece := os.read(terminal, 1000)):
                break
            shown += piece
        except OSError:
            break
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert b"interrupts: 1" in shown
    assert b"no optimizer step was seen" in shown


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_ctrl_z_stops_the_whole_job_and_fg_wakes_it() -> None:
    # The shell starts nothing: stopped within its vfork it would wait in another state.
    command = [*RECORD, "sh", "-c", "echo $$; read line; exit 6"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    # process_group=0 says the same from Python 3.11 on.
    process = subprocess.Popen(command, **pipes, env=CLEAN, preexec_fn=os.setpgrp)  # noqa: PLW1509
    assert process.stdin is not None and process.stdout is not None
    child = int(process.stdout.readline())
    os.killpg(process.pid, signal.SIGTSTP)
    assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])
    end = time.monotonic() + 10
    while state(child) != "T" and time.monotonic() < end:
        time.sleep(0.01)
    assert state(child) == "T"
    os.killpg(process.pid, signal.SIGCONT)
    process.stdin.close()
    assert process.wait(timeout=30) == 6


# Two signals that glibc keeps for itself, and ignores in whatever posix_spawn starts.
GLIBC_INTERNAL = 1 << 31 | 1 << 32


def signal_sets(status: bytes) -> list[int]:
    return [int(line.split()[1], 16) & ~GLIBC_INTERNAL for line in status.splitlines()]


@pytest.mark.parametrize("before", ["", "trap '' HUP USR1; "])
def test_ignored_and_blocked_signals_are_those_of_an_unrecorded_command(before: str) -> None:
    look = "exec grep -E '^Sig(Ign|Blk)' /proc/self/status"
    plain = subprocess.run(["sh", "-c", before + look], capture_output=True, check=True).stdout
    recorded = " ".join(f"'{word}'" for word in RECORD)
    launch = f'{before}exec {recorded} sh -c "{look}"'
    done = subprocess.run(["sh", "-c", launch], capture_output=True, env=CLEAN, check=True)
    assert signal_sets(done.stdout) == signal_sets(plain)
    assert bool(signal_sets(plain)[1]) == bool(before)


def test_the_environment_is_that_of_an_unrecorded_command() -> None:
    environment = {name: value for name, value in CLEAN.items() if name != "OPENBLAS_NUM_THREADS"}
    shown = run(sys.executable, "-c", "import os; print(dict(os.environ))", env=environment).stdout
    seen = eval(shown)
    assert {name: seen[name] for name in environment if name != "PYTHONPATH"} == {
        name: value for name, value in environment.items() if name != "PYTHONPATH"
    }
    assert seen.keys() - environment.keys() <= {"GRADSCOPE_RECORD", "LC_CTYPE"}
    assert seen["PYTHONPATH"].endswith(f"{os.pathsep}{ROOT}")


def test_a_command_may_be_as_long_as_the_system_allows() -> None:
    files = [f"shard-{number:06d}.jsonl" for number in range(10_000)]
    assert run("sh", "-c", "echo $#", "sh", *files).stdout == b"10000\n"


LOOK = "import sys; print(sys.path, sys.argv, sorted(m for m in sys.modules if 'gradscope' in m or m == 'wrapt'))"


def test_a_python_without_torch_sees_the_same_path_and_loads_nothing() -> None:
    plain = subprocess.run([sys.executable, "-c", LOOK, "--every", "3"], capture_output=True, env=CLEAN, check=True)
    assert run(sys.executable, "-c", LOOK, "--every", "3").stdout == plain.stdout
    assert plain.stdout.strip().endswith(b"[]")


def test_a_hidden_sitecustomize_runs_once_and_stays_importable(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import builtins; builtins.RUNS = getattr(builtins, 'RUNS', 0) + 1\n")
    environment = {**CLEAN, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = run(sys.executable, "-c", "import sitecustomize; print(RUNS, sitecustomize.__file__)", env=environment)
    assert done.stdout.decode().split() == ["1", str(tmp_path / "sitecustomize.py")]


@pytest.mark.parametrize("code", ["raise RuntimeError('mine')", "import does_not_exist"])
def test_an_error_in_a_hidden_sitecustomize_is_told_as_ever(code: str, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(code + "\n")
    environment = {**CLEAN, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    plain = subprocess.run([sys.executable, "-c", "print(1)"], capture_output=True, env=environment, check=True)
    done = run(sys.executable, "-c", "print(1)", env=environment)
    assert done.stdout == b"1\n"
    assert b"Error in sitecustomize" in plain.stderr
    assert done.stderr.startswith(plain.stderr)


def test_descendants_of_a_shell_script_are_reached(tmp_path: Path) -> None:
    script = tmp_path / "train.sh"
    script.write_text(f"#!/bin/sh\n'{sys.executable}' -c 'import sys; print(type(sys.meta_path[0]).__name__)'\n")
    script.chmod(0o755)
    assert run("./train.sh").stdout == b"_FirstImportOfTorch\n"


@pytest.mark.parametrize("flag", ["-I", "-E", "-S"])
def test_a_python_that_cannot_be_followed_is_named_as_the_reason(flag: str) -> None:
    done = run(sys.executable, flag, "-c", "print(1)")
    assert (done.returncode, done.stdout) == (0, b"1\n")
    [line] = done.stderr.decode().splitlines()
    assert "no optimizer step was seen" in line and "-I, -E or -S" in line


def test_a_python_without_gradscope_trains_on_and_says_so_once(tmp_path: Path) -> None:
    venv.create(tmp_path / "other", with_pip=False, symlinks=True)
    (tmp_path / "torch.py").write_text("")
    train = "import torch; print(torch.__file__)"
    python = f"PYTHONPATH=${{PYTHONPATH%%:*}} other/bin/python -c '{train}'"
    done = run("sh", "-c", f"{python}; {python}; exit 4")
    assert done.returncode == 4
    assert done.stdout.decode().splitlines() == [str(tmp_path / "torch.py")] * 2
    early, late = done.stderr.decode().splitlines()
    assert "other/bin/python cannot import gradscope" in early
    assert "other/bin/python has no gradscope" in late


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    work = tmp_path / "work"
    work.mkdir()
    run(sys.executable, "-c", "print(1)", cwd=work, env={**CLEAN, "TMPDIR": str(temporary)})
    assert list(temporary.iterdir()) == [] and list(work.iterdir()) == []


def test_a_launcher_that_was_killed_leaves_the_command_running(tmp_path: Path) -> None:
    mark = tmp_path / "done"
    environment = {**CLEAN, "TMPDIR": str(tmp_path)}
    command = [*RECORD, "sh", "-c", f"echo ready; sleep 0.5; echo > {mark}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.kill()
    process.wait()
    end = time.monotonic() + 10
    while not mark.exists() and time.monotonic() < end:
        time.sleep(0.02)
    process.stdout.close()
    assert mark.exists()
