"""``gradscope check`` as it is typed: what is judged, by which limits, where the result goes, and how it ends."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

import gradscope
from gradscope.__main__ import main
from gradscope.health.catalogue import RULES

ROOT = Path(__file__).parent.parent
SAMPLES = ROOT / "sample_ckpts"
TRACE, CHECKPOINT = SAMPLES / "ppo_cartpole.gradscope", SAMPLES / "ppo_cartpole.zip"
HEALTHY = (
    TRACE,
    SAMPLES / "rsl_rl_run.gradscope",
    SAMPLES / "ppo_cartpole_gradients",
    CHECKPOINT,
    SAMPLES / "a2c_cartpole.zip",
    SAMPLES / "rsl_rl_run",
)
NAMES = [rule.name for rule in RULES]
# Drift is told where there is a baseline.
TOLD = [name for name in NAMES if name != "drift"]

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run ``gradscope check`` in an empty directory of this process: exit code, stdout, stderr."""
    for name in ("COLUMNS", "GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY", "GITHUB_WORKSPACE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    # What lies above the directory of tests is none of theirs.
    (tmp_path / "pyproject.toml").write_text("")

    def _run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["gradscope", "check", *map(str, arguments)])
        code = main()
        out, err = capsys.readouterr()
        return code, out, err

    return _run


def save(folder: Path, steps: int = 6, broken: int | None = None) -> list[Path]:
    """Dumps of a healthy run; one holds a NaN if ``broken`` says so."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    paths = []
    for step in range(steps):
        tensors = {f"net.{i}.weight": random.standard_normal((4, 4)) for i in range(3)}
        if step == broken:
            tensors["net.1.weight"][2, 2] = np.nan
        paths.append(folder / f"step_{step}.npz")
        np.savez(paths[-1], **tensors)
    return paths


@pytest.fixture
def healthy(tmp_path: Path) -> Path:
    save(tmp_path / "healthy")
    return tmp_path / "healthy"


@pytest.fixture
def sick(tmp_path: Path) -> Path:
    save(tmp_path / "sick", broken=3)
    return tmp_path / "sick"


def parsed(out: str) -> dict[str, Any]:
    return json.loads(out)


def statuses(result: dict[str, Any]) -> dict[str, str]:
    return {outcome["rule"]: outcome["status"] for outcome in result["rules"]}


# --- the verdict is the exit code ------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", HEALTHY, ids=lambda path: path.name)
def test_healthy_samples_pass_with_all_defaults(run: Run, source: Path) -> None:
    code, out, err = run(source)
    assert (code, err) == (0, "")
    passed = int(out.splitlines()[-1].split(" passed")[0])
    assert passed >= 4


def test_a_nan_is_unhealthy(run: Run, healthy: Path, sick: Path) -> None:
    assert run(healthy)[0] == 0
    code, out, err = run(sick)
    assert (code, err) == (1, "")
    assert "nonfinite failed" in out
    assert out.splitlines()[-1].startswith("1 failed, ")


def test_every_rule_is_told_once_for_every_source(run: Run, healthy: Path) -> None:
    result = parsed(run(TRACE, CHECKPOINT, healthy, "--format", "json")[1])
    assert [outcome["rule"] for outcome in result["rules"]] == TOLD * 3
    assert [source["path"] for source in result["sources"]] == [str(TRACE), str(CHECKPOINT), str(healthy)]


def test_one_sick_source_is_enough(run: Run, healthy: Path, sick: Path) -> None:
    assert run(healthy, sick, healthy)[0] == 1


def test_a_skipped_rule_fails_only_when_strict(run: Run, healthy: Path) -> None:
    assert run(healthy)[0] == 0
    code, out, _ = run(healthy, "--strict", "--format", "json")
    assert code == 1
    assert "strict" in parsed(out)["failed_because"]
    assert run(healthy, "--strict", "--select", "nonfinite,spike")[0] == 1  # six steps are too few for spike
    assert run(healthy, "--strict", "--select", "nonfinite")[0] == 0


def test_a_warning_fails_only_where_it_is_asked_for(run: Run, sick: Path) -> None:
    warn = ("--rule", "nonfinite.severity=warn")
    code, out, _ = run(sick, *warn, "--format", "json")
    assert (code, parsed(out)["status"]) == (0, "warn")
    assert run(sick, *warn, "--fail-on", "warn")[0] == 1
    assert run(sick, *warn, "--fail-on", "error")[0] == 0


def test_an_interrupt_is_130(run: Run, healthy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gradscope.health.evidence.Evidence.gather", interrupted)
    assert run(healthy) == (130, "", "")


# --- what is judged --------------------------------------------------------------------------------------------------


def test_single_dumps_are_steps_of_one_run_and_the_rest_is_by_itself(run: Run, tmp_path: Path) -> None:
    paths = save(tmp_path / "grads", steps=5)
    save(tmp_path / "others", steps=4)
    np.savez(tmp_path / "one.npz", w=np.ones(3))
    result = parsed(run(TRACE, *reversed(paths), tmp_path / "others", CHECKPOINT, "--format", "json")[1])
    assert [(source["kind"], source["steps"]) for source in result["sources"]] == [
        ("trace", 595), ("gradients", 5), ("gradients", 4), ("checkpoint", 0),
    ]  # fmt: skip
    alone = parsed(run(tmp_path / "one.npz", TRACE, "--format", "json")[1])
    assert [source["steps"] for source in alone["sources"]] == [1, 595]


def test_a_glob_is_what_it_matches(run: Run, tmp_path: Path) -> None:
    save(tmp_path / "grads", steps=5)
    result = parsed(run(str(SAMPLES / "*_cartpole.zip"), tmp_path / "grads" / "step_[1-3].npz", "--format", "json")[1])
    assert [Path(source["path"]).name for source in result["sources"]] == [
        "a2c_cartpole.zip",
        "ppo_cartpole.zip",
        "grads",
    ]
    assert result["sources"][-1]["steps"] == 3


def test_steps_pick_what_is_judged(run: Run, sick: Path) -> None:
    assert run(sick, "--steps", "0:3")[0] == 0
    assert run(sick, "--steps", "3:")[0] == 1


def test_the_default_source_is_named(run: Run, healthy: Path, tmp_path: Path) -> None:
    (tmp_path / "work" / "pyproject.toml").write_text('[tool.gradscope]\nsource = "../healthy"\n')
    code, out, _ = run()
    assert code == 0
    assert "source in pyproject.toml" in out.splitlines()[0]
    assert "source in pyproject.toml" not in "".join(run("-q")[1:])


def test_a_captured_batch(run: Run) -> None:
    rollout = SAMPLES / "ppo_cartpole_rollout.safetensors"
    code, out, _ = run(CHECKPOINT, "--batch", rollout, "--trust", "--format", "json", "--minibatch-size", "256")
    assert code == 0
    result = parsed(out)
    assert result["sources"][0]["steps"] > 1
    assert statuses(result)["nonfinite"] == "pass"


def test_what_a_model_prints_is_not_the_result(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    (tmp_path / "work" / "chatty.py").write_text(
        "import torch\n\n\ndef model():\n    return torch.nn.Linear(3, 1)\n\n\n"
        "def loss(model, batch):\n    print('hello')\n    return (model(batch['x']) ** 2).mean()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "work"))
    torch.save(torch.nn.Linear(3, 1).state_dict(), "weights.pt")
    np.savez("batch.npz", x=np.random.default_rng(0).standard_normal((64, 3)).astype(np.float32))
    batch = ("--batch", "batch.npz", "--model", "chatty:model", "--loss", "chatty:loss", "--minibatch-size", "8")
    rule = ("--rule", "direction-change.policy=value:0.01")
    code, out, err = run("weights.pt", *batch, *rule, "--format", "json")
    assert statuses(parsed(out))["direction-change"] in ("pass", "fail")
    assert code in (0, 1)
    assert set(err.splitlines()) == {"hello"}


# --- rules and limits ------------------------------------------------------------------------------------------------


def test_rules_take_several_values(run: Run, healthy: Path) -> None:
    code, out, _ = run("--rule", "exploding.max=0.001", "nonfinite.max=0.5", healthy, "--format", "json")
    assert code == 1
    assert statuses(parsed(out))["exploding"] == "fail"
    limits = {
        rule["rule"]: {limit["name"]: limit["value"] for limit in rule["limits"]} for rule in parsed(out)["catalogue"]
    }
    assert (limits["exploding"]["max"], limits["nonfinite"]["max"]) == (0.001, 0.5)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--select", "nonfinite"], ["nonfinite"]),
        (["--select", "dead", "nonfinite"], ["nonfinite", "dead"]),
        (["--select", "dead,nonfinite"], ["nonfinite", "dead"]),
        (["--select=dead", "--select", "nonfinite,spike", "--ignore", "spike"], ["nonfinite", "dead"]),
        (["--ignore", *NAMES[2:]], NAMES[:2]),
    ],
)
def test_select_and_ignore(run: Run, healthy: Path, arguments: list[str], told: list[str]) -> None:
    result = parsed(run(*arguments, healthy, "--format", "json")[1])
    assert [outcome["rule"] for outcome in result["rules"]] == told


def test_a_file_called_like_a_rule_is_a_path(run: Run, tmp_path: Path) -> None:
    np.savez(tmp_path / "work" / "x.npz", w=np.ones(3))
    os.rename(tmp_path / "work" / "x.npz", tmp_path / "work" / "spike")
    code, out, _ = run("--select", "nonfinite", "spike", "--format", "json")
    assert code == 0
    assert parsed(out)["sources"][0]["path"] == "spike"


def test_the_project_decides_and_the_command_line_wins(run: Run, sick: Path, tmp_path: Path) -> None:
    project = tmp_path / "work" / "pyproject.toml"
    project.write_text("[tool.gradscope.check]\nselect = ['nonfinite', 'dead']\nnonfinite.max = 0.5\nstrict = true\n")
    code, out, _ = run(sick, "--format", "json")
    assert (code, statuses(parsed(out))) == (0, {"nonfinite": "pass", "dead": "pass"})
    assert run(sick, "--rule", "nonfinite.max=0.1")[0] == 1
    assert run(sick, "--select", "nonfinite", "saturation")[0] == 1
    assert run(sick, "--select", "nonfinite", "saturation", "--no-strict")[0] == 0
    project.write_text("[tool.gradscope.check]\nnonfinite.severity = 'warn'\nfail-on = 'warn'\n")
    assert run(sick)[0] == 1
    assert run(sick, "--fail-on", "error")[0] == 0


def test_the_rules_can_be_read(run: Run, tmp_path: Path) -> None:
    code, out, err = run("--list-rules")
    assert (code, err) == (0, "")
    listed = parsed(run("--list-rules", "--format", "json")[1])
    page = run("--list-rules", "--format", "markdown")[1]
    assert listed["schema"] == "gradscope.rules/1"
    assert [rule["rule"] for rule in listed["rules"]] == NAMES
    for rule, told in zip(RULES, listed["rules"], strict=True):
        assert (told["formula"], told["source"], told["severity"]) == (rule.formula, rule.source, rule.severity)
        assert {limit["name"]: limit["value"] for limit in told["limits"]} == rule.defaults()
        assert f"{rule.name} ({rule.severity}): " in out
        assert f"### {rule.name} ({rule.severity})" in page
        assert all(f"    {limit.name} = " in out for limit in rule.limits)
    assert max(map(len, out.splitlines())) <= 80
    assert run("--list-rules", "--select", "spike", "-o", tmp_path / "rules.txt")[0] == 0
    assert (tmp_path / "rules.txt").read_text().startswith("spike (error): ")


# --- where the result goes -------------------------------------------------------------------------------------------


def test_every_format_and_a_file_that_is_written_all_the_same(run: Run, sick: Path, tmp_path: Path) -> None:
    def written(form: str) -> str:
        code, out, err = run(sick, "--format", form)
        assert (code, err) == (1, "")
        file = tmp_path / f"check.{form}"
        assert run(sick, "--format", form, "-o", file, "-q") == (1, "", "")
        assert form == "table" or file.read_bytes().decode() == out
        return file.read_text()

    assert written("table").startswith(str(sick))
    assert parsed(written("json"))["schema"] == "gradscope.check/1"
    assert [row["rule"] for row in csv.DictReader(io.StringIO(written("csv")))] == TOLD
    assert ElementTree.fromstring(written("junit")).tag == "testsuites"
    assert parsed(written("sarif"))["version"] == "2.1.0"
    assert written("github").startswith("::error ")
    assert "nonfinite" in written("markdown")


def test_inside_github_actions(run: Run, sick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = tmp_path / "summary.md"
    summary.write_text("# Before\n")
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    code, out, err = run(sick)
    assert (code, err) == (1, "")
    assert out.startswith("::error ")
    assert summary.read_text().startswith("# Before\n")
    assert "nonfinite" in summary.read_text()
    before = summary.read_text()
    assert run(sick, "--format", "table")[1].startswith(str(sick))
    assert run("--list-rules")[1].startswith(NAMES[0])
    run(sick, "-o", tmp_path / "check.txt")
    assert (tmp_path / "check.txt").read_text().startswith(str(sick))
    assert summary.read_text() == before


@pytest.mark.parametrize("where", ["missing/summary.md", "folder", "\0"])
def test_a_summary_that_cannot_be_written_hides_nothing(
    run: Run, sick: Path, healthy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    (tmp_path / "folder").mkdir()
    # No environment can hold a zero byte.
    monkeypatch.setattr(os, "environ", {**os.environ, "GITHUB_STEP_SUMMARY": str(tmp_path / where)})
    for source, verdict in ((sick, 1), (healthy, 0)):
        code, out, err = run(source, "--format", "github")
        assert code == verdict
        assert out.splitlines()[-1].endswith("skipped")
        (line,) = err.splitlines()
        assert line.startswith("warning: the job summary ")


def test_without_github_no_summary(run: Run, sick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "")
    assert run(sick)[1].startswith(str(sick))
    assert run(sick, "--format", "github")[2] == ""


# --- baselines -------------------------------------------------------------------------------------------------------


def test_a_baseline_of_several_seeds(run: Run, tmp_path: Path) -> None:
    base = tmp_path / "base.json"
    code, _, err = run(TRACE, "--save-baseline", base)
    assert (code, err) == (0, f"Wrote {base}\n")
    code, out, _ = run(TRACE, "--baseline", base, "--select", "drift", "--format", "json", "--strict")
    assert (code, statuses(parsed(out))) == (0, {"drift": "pass"})
    code, _, err = run(TRACE, TRACE, "--save-baseline", tmp_path / "two.json", "-q")
    assert code == 2 and "again: a baseline is of different seeds" in err
    assert not (tmp_path / "two.json").exists()


def test_without_a_baseline_drift_is_told_only_to_those_who_ask(run: Run) -> None:
    assert "drift" not in statuses(parsed(run(TRACE, "--format", "json")[1]))
    asked = run(TRACE, "--format", "json", "--select", "drift", "nonfinite")[1]
    assert statuses(parsed(asked)) == {"nonfinite": "pass", "drift": "skipped"}


def test_the_baseline_of_what_failed_is_said_to_be_one(run: Run, sick: Path, tmp_path: Path) -> None:
    code, _, err = run(sick, "--save-baseline", tmp_path / "base.json")
    assert code == 1
    assert err == f"warning: {tmp_path / 'base.json'} is the baseline of what failed this check\n"


def test_the_project_s_baseline_is_made_before_it_is_there(run: Run, tmp_path: Path) -> None:
    (tmp_path / "work" / "pyproject.toml").write_text("[tool.gradscope.check]\nbaseline = 'base.json'\n")
    code, _, err = run(TRACE)
    assert code == 2
    assert "base.json" in err.splitlines()[0]
    assert run(TRACE, "--ignore", "drift")[0] == 0
    for _ in range(2):  # it may be renewed, too
        assert run(TRACE, "--save-baseline", "base.json")[0] == 0
    assert statuses(parsed(run(TRACE, "--format", "json")[1]))["drift"] == "pass"


def test_a_checkpoint_is_no_baseline(run: Run, tmp_path: Path) -> None:
    code, out, err = run(TRACE, CHECKPOINT, "--save-baseline", tmp_path / "base.json")
    assert (code, out) == (2, "")
    assert err.splitlines()[0].endswith(f"{CHECKPOINT} holds no gradients to make a baseline of")
    assert not (tmp_path / "base.json").exists()


def test_a_baseline_never_takes_the_place_of_what_is_read(run: Run, healthy: Path, tmp_path: Path) -> None:
    step = healthy / "step_0.npz"
    before = step.read_bytes()
    for target, why in (
        (step, "is the input"),
        (healthy / "step_1.npz", "holds tensors"),
        (healthy, "is a directory"),
        (tmp_path / "no" / "base.json", "there is no directory"),
        (tmp_path / "pyproject.toml", "settings of a run"),
    ):
        code, out, err = run(step, "--save-baseline", target)
        assert (code, out) == (2, "")
        assert err.startswith(f"error: --save-baseline {target}: ") and why in err
    assert step.read_bytes() == before
    assert run(TRACE, "--save-baseline", tmp_path / "b.json")[0] == 0
    code, _, err = run(TRACE, "--baseline", tmp_path / "b.json", "--save-baseline", tmp_path / "b.json")
    assert code == 2 and "is the input" in err
    code, _, err = run(TRACE, "-o", tmp_path / "c.json", "--save-baseline", tmp_path / "c.json")
    assert code == 2 and "is what -o writes" in err


# --- unusable options ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--rule"], "error: --rule: needs a value"),
        (["--rule", "clip-rate"], "error: --rule clip-rate: is not of the form NAME.LIMIT=VALUE"),
        (["--rule", "clip-rte.max=1"], "error: --rule clip-rte.max=1: no rule is called clip-rte"),
        (["--rule", "clip-rate.maxx=1"], "error: --rule clip-rate.maxx=1: clip-rate has no limit 'maxx'"),
        (["--rule", "clip-rate.max=7"], "error: --rule clip-rate.max=7: must be a number from 0 to 1, not 7"),
        (["--rule", "clip-rate.max=x"], "error: --rule clip-rate.max=x: must be a number from 0 to 1, not x"),
        (["--rule", "dead.severity=bad"], "error: --rule dead.severity=bad: must be error or warn, not 'bad'"),
        (["--rule", "direction-change.policy=nom:1"],
         "error: --rule direction-change.policy=nom:1: no policy is called 'nom'"),
        (["--select", "spik"], "error: --select spik: no such rule"),
        (["--select", "dead,spik"], "error: --select spik: no such rule"),
        (["--ignore", "clip_rate"], "error: --ignore clip_rate: no such rule"),
        (["--select", ","], "error: --select ,: names no rule"),
        (["--select", "dead", "--ignore", "dead"], "error: rules: select and ignore leave none"),
        (["--fail-on", "never"], "error: --fail-on: "),
        (["--baseline", ""], "error: --baseline: needs the name of a file"),
        (["--save-baseline", ""], "error: --save-baseline: needs the name of a file"),
        (["--save-baseline", os.devnull], f"error: --save-baseline {os.devnull}: is not a regular file"),
        (["-o", ""], "error: -o: needs the name of a file"),
        ([""], "error: PATH: is empty"),
        (["--format", "xml"], "error: --format: "),
        (["--baseline", "missing.json"], "error: missing.json: "),
        (["--steps", "x"], "error: --steps x: "),
        (["--model", "a:b"], "error: --model: goes with --batch FILE"),
        (["--tag", "x"], "error: --tag x: "),
        (["-o", "no/where.json"], "error: -o no/where.json: there is no directory "),
        (["--stric"], "error: --stric: no such option"),
        (["--list-rules", "--format", "junit"], "error: --format junit: is none for rules"),
    ],
)  # fmt: skip
def test_a_slip_is_one_line_and_exit_code_2(run: Run, healthy: Path, arguments: list[str], line: str) -> None:
    code, out, err = run(healthy, *arguments)
    assert (code, out) == (2, "")
    first, *hint = err.splitlines()
    assert first.startswith(line)
    assert len(hint) <= 1 and all(text.startswith("hint: ") for text in hint)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[tool.gradscope.check\n", "error: {}:1:22: is no TOML: "),
        ("[tool.gradscope.check]\nspke.z = 3\n", "error: {}: spke in [tool.gradscope.check]: is no rule"),
        ("[tool.gradscope.check]\nspike.z = -3\n", "error: {}: spike.z in [tool.gradscope.check]: must be a number"),
        ("[tool.gradscope.check]\nbaseline = ''\n", "error: {}: baseline in [tool.gradscope.check]: must be the name"),
        ("[tool.gradscope.check]\nselect = ['spke']\n", "error: {}: spke in [tool.gradscope.check]: no such rule"),
    ],
)  # fmt: skip
def test_a_slip_in_the_project_is_one_line(run: Run, healthy: Path, tmp_path: Path, text: str, line: str) -> None:
    (tmp_path / "work" / "pyproject.toml").write_text(text)
    code, out, err = run(healthy)
    assert (code, out) == (2, "")
    assert err.startswith(line.format("pyproject.toml"))
    assert len(err.splitlines()) <= 2


def test_a_pipe_is_no_baseline(run: Run, healthy: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert run(healthy, "--baseline", pipe)[::2] == (2, f"error: {pipe}: is not a regular file\n")
    code, _, err = run(healthy, "--save-baseline", pipe)
    assert (code, err) == (2, f"error: --save-baseline {pipe}: is not a regular file\n") and pipe.is_fifo()


@pytest.mark.parametrize("name", ["missing.gradscope", "empty", "text.npz"])
def test_a_source_that_is_none(run: Run, healthy: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "work" / "empty").mkdir()
    (tmp_path / "work" / "text.npz").write_text("hello")
    for arguments in ([name], [healthy, name], [name, TRACE, CHECKPOINT]):
        code, out, err = run(*arguments)
        assert (code, out) == (2, "")
        assert err.startswith("error: ") and name in err.splitlines()[0]


# --- as a process, and from Python -----------------------------------------------------------------------------------


def imported(code: str) -> set[str]:
    heavy = "numpy", "torch", "pyarrow", "rich.console", "stable_baselines3"
    program = f"{code}\nimport sys\nprint(*[m for m in {heavy!r} if m in sys.modules], sep='\\n', file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    return set(done.stderr.split())


def checking(*arguments: str | Path) -> str:
    argv = ["gradscope", "check", *map(str, arguments)]
    return f"import sys\nsys.argv = {argv!r}\nfrom gradscope.__main__ import main\nassert main() == 0"


def test_what_it_imports() -> None:
    assert not imported(checking("--help")) & {"numpy", "torch", "pyarrow"}
    for source in (CHECKPOINT, SAMPLES / "ppo_cartpole_gradients"):
        assert not imported(checking(source)) & {"torch", "pyarrow"}
    assert "torch" not in imported(checking(TRACE))


def test_python_says_what_the_command_says(run: Run, healthy: Path, sick: Path) -> None:
    result = gradscope.check(sick, rules={"exploding.max": 0.5}, ignore=["dead"])
    assert isinstance(result, gradscope.Check)
    assert not result
    _, out, _ = run(sick, "--rule", "exploding.max=0.5", "--ignore", "dead", "--format", "json")
    printed = parsed(out)
    assert statuses(printed) == {outcome.rule: outcome.status for outcome in result.rules}
    assert [outcome["message"] for outcome in printed["rules"]] == [outcome.message for outcome in result.rules]
    assert gradscope.check(sick, steps="0:3")
    assert gradscope.check(healthy, select="nonfinite", strict=True)
    assert not gradscope.check(sick, rules={"nonfinite.severity": "warn"}, fail_on="warn")


def test_python_takes_what_inspect_takes_and_lists(healthy: Path) -> None:
    gradients = {"a.weight": np.ones((2, 2)), "b.weight": np.ones(3)}
    assert [source.steps for source in gradscope.check(gradients).sources] == [1]
    assert [source.steps for source in gradscope.check([gradients, gradients]).sources] == [2]
    steps = sorted(healthy.glob("*.npz"))
    assert [source.steps for source in gradscope.check([*steps, TRACE, CHECKPOINT]).sources] == [6, 595, 0]
    with pytest.raises(gradscope.GradscopeError):
        gradscope.check([])


def test_python_reads_no_project_but_the_one_it_is_given(run: Run, sick: Path, tmp_path: Path) -> None:
    project = tmp_path / "work" / "pyproject.toml"
    project.write_text(
        "[tool.gradscope.check]\nnonfinite.max = 0.5\nstrict = true\nselect = ['nonfinite', 'saturation']\n"
    )
    assert not gradscope.check(sick, select=["nonfinite"])
    assert gradscope.check(sick, config=project, ignore=["saturation"])
    assert not gradscope.check(sick, config=project)
    assert gradscope.check(sick, config=project, strict=False)
    assert not gradscope.check(sick, config=project, rules={"nonfinite.max": 0.1}, strict=False)
    with pytest.raises(gradscope.GradscopeError, match="no rule is called nonfinit"):
        gradscope.check(sick, rules={"nonfinit.max": 1})
    with pytest.raises(gradscope.GradscopeError, match=r"missing\.toml"):
        gradscope.check(sick, config=tmp_path / "missing.toml")
