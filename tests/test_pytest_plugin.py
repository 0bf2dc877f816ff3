"""The pytest fixture: what a test says, and what pytest shows of it."""

from __future__ import annotations

import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest

# Loaded here, because pytester unloads after each run what a run loaded, and torch cannot be loaded twice.
import gradscope.backward.in_memory
import gradscope.health.checking
import gradscope.sources
import gradscope.views.check_screen  # noqa: F401

pytest_plugins = "pytester"

PRELUDE = """
import torch
from torch import nn

def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))

def rows(bad=False):
    x, y = torch.randn(64, 4), torch.randint(0, 2, (64,))
    if bad:
        x[3] = float("nan")
    return x, y

def my_loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])

"""
WELL = "def test_health(gradscope):\n    assert gradscope.check(network(), rows(), my_loss)\n"
ILL = "def test_health(gradscope):\n    assert gradscope.check(network(), rows(bad=True), my_loss)\n"


def _run(pytester: pytest.Pytester, code: str, *options: str) -> pytest.RunResult:
    pytester.makepyfile(test_it=PRELUDE + code)
    # Hypothesis' plugin would be loaded anew for every run.
    return pytester.runpytest_inprocess("-p", "no:cacheprovider", "-p", "no:hypothesispytest", *options)


def test_a_pytest_that_starts_loads_nothing_for_it() -> None:
    code = (
        "import sys, gradscope.integrations.pytest_plugin\n"
        "print({'torch', 'numpy', 'rich', 'typer', 'pyarrow'} & set(sys.modules), "
        "sorted(name for name in sys.modules if name.startswith('gradscope')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (
        done.stdout.strip() == "set() ['gradscope', 'gradscope.integrations', 'gradscope.integrations.pytest_plugin']"
    )


def test_a_healthy_model_passes_without_a_word(pytester: pytest.Pytester) -> None:
    result = _run(pytester, WELL)
    result.assert_outcomes(passed=1)
    result.stdout.no_fnmatch_line("*gradscope check*")
    result.stdout.no_fnmatch_line("*Warning*")


def test_a_failure_shows_the_screen_and_a_short_assertion(pytester: pytest.Pytester) -> None:
    result = _run(pytester, ILL)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            ">       assert gradscope.check(network(), rows(bad=True), my_loss)",
            "E       assert <unhealthy: nonfinite (1 failed, *skipped)>",
            "test_it.py:*: AssertionError",
            "*--- gradscope check ---*",
            "Sequential: in memory, 64 captured rows · 1 step",
            "▸ nonfinite failed: *",
            "1 failed, *skipped",
            "FAILED *::test_health - assert <unhealthy: nonfinite*",
        ]
    )
    result.stdout.no_fnmatch_line("*where*check(*")
    result.stdout.no_fnmatch_line("*tensor(*")


@pytest.mark.parametrize(
    "assertion",
    [
        "check = {}\n    assert check, 'off'",
        "assert {}.status == 'pass'",
        "assert not not {}",
        "if not {}: raise OSError",
    ],
)
def test_however_it_is_asserted(pytester: pytest.Pytester, assertion: str) -> None:
    call = "gradscope.check(network(), rows(bad=True), nn.CrossEntropyLoss())"
    result = _run(pytester, f"def test_health(gradscope):\n    {assertion.format(call)}\n")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*--- gradscope check ---*", "▸ nonfinite failed: *"])
    result.stdout.no_fnmatch_line("*tensor(*")


@pytest.mark.parametrize("options", [("--show-capture=no",), ("--tb=short",), ("-x", "-q"), ("--tb=native",)])
def test_the_screen_is_there_whatever_else_is_shown(pytester: pytest.Pytester, options: tuple[str, ...]) -> None:
    result = _run(pytester, ILL, *options)
    result.stdout.fnmatch_lines(["▸ nonfinite failed: *", "1 failed, *"])
    assert result.stdout.str().count("▸ nonfinite failed") == 1


def test_only_the_checks_that_failed_are_shown_with_a_failure(pytester: pytest.Pytester) -> None:
    loop = "for bad in (False, True): assert gradscope.check(network(), rows(bad), my_loss)"
    code = f"def test_health(gradscope):\n    {loop}\n"
    result = _run(pytester, code)
    assert result.stdout.str().count("- gradscope check -") == 1


def test_passes_show_it_where_passes_are_shown(pytester: pytest.Pytester) -> None:
    result = _run(pytester, WELL, "-rA")
    result.stdout.fnmatch_lines(["*--- gradscope check ---*", "  nonfinite *", "* passed, * skipped"])


def test_xdist_and_junit_carry_the_screen(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_it=PRELUDE + ILL)
    result = pytester.runpytest_subprocess("-n", "1", "--junitxml=junit.xml")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["E       assert <unhealthy: nonfinite*", "▸ nonfinite failed: *"])
    assert "▸ nonfinite failed" in (pytester.path / "junit.xml").read_text(encoding="utf-8")


# What is said of each of these calls, as fnmatch has it.
WRONG = {
    "network(), rows(), lambda model, batch: 1 / 0": "loss <lambda>: raised ZeroDivisionError: * (test_it.py:*)",
    "network(), rows(), lambda model, batch: 3.0": "loss <lambda>: returned a float, not a tensor",
    "network(), rows(), lambda output, target: (output - target).mean()": "loss <lambda>: raised TypeError: *",
    "nn.ReLU(), rows(), my_loss": "model ReLU: its model has no trainable parameters",
    "nn.LazyLinear(2), rows(), my_loss": "model LazyLinear: is lazy (weight has no shape yet)",
    "'network', rows(), my_loss": "model: is no torch.nn.Module, but str",
    "network(), rows(), 'my_loss'": "loss: is no function or module, but str",
    "network(), rows()": "loss: is missing: check(model, batch, loss)",
    "network(), (torch.zeros(0, 4), torch.zeros(0)), my_loss": "batch: has no rows *",
    "network(), (torch.zeros(3, 4), torch.zeros(2)), my_loss": "batch: its tensors have no common first dimension*",
    "network(), {'x': torch.zeros(3, 4), 'beta': 0.1}, my_loss": "batch*'beta'*: is no tensor, but float",
    "network(), {}, my_loss": "batch: holds no tensors",
    "network(), [], my_loss": "batch: list gives no batch",
    "network(), 7, my_loss": "batch: is no tensor, mapping or sequence of tensors, but int",
    "network(), torch.utils.data.TensorDataset(*rows()), my_loss": "batch: TensorDataset holds single samples",
    "network(), rows()[0], nn.MSELoss()": "batch: is no pair (inputs, targets), with which * MSELoss goes",
    "network(), rows(), my_loss, minibatch_size=65": "minibatch_size 65: is more than the 64 rows of batch",
    "network(), rows(), my_loss, rules={'clip-rat.max': 1}": "clip-rat.max: no rule is called clip-rat",
    "network(), rows(), my_loss, optimizer=3": "optimizer: is no torch.optim.Optimizer, but int",
    "'/nowhere.pt'": "/nowhere.pt: no such file or directory",
}  # fmt: skip


def test_what_is_wrong_is_one_line(pytester: pytest.Pytester) -> None:
    calls = [f"def test_{i}(gradscope):\n    assert gradscope.check({call})\n" for i, call in enumerate(WRONG)]
    result = _run(pytester, "\n".join(calls))
    reports = result.reprec.getreports("pytest_runtest_logreport")
    texts = [report.longreprtext for report in reports if report.when == "call"]
    assert len(texts) == len(WRONG)
    for text, told in zip(texts, WRONG.values(), strict=True):
        errors = [line for line in text.splitlines() if line.startswith("E ")]
        assert fnmatch(errors[0], f"E *gradscope.errors.GradscopeError: {told}"), text
        assert all(line.strip().startswith("hint: ") for line in (error[1:] for error in errors[1:])), text
        # Nothing of gradscope's own code, and no exception behind the exception.
        assert "pytest_plugin.py" not in text and "above exception" not in text


def test_a_hint_stands_on_a_second_line(pytester: pytest.Pytester) -> None:
    code = "def test_health(gradscope):\n    gradscope.check(network(), rows(), my_loss, rules={'nonfinit.max': 0})\n"
    result = _run(pytester, code)
    result.stdout.fnmatch_lines(["E *nonfinit.max: no rule is called nonfinit", "E *hint: did you mean nonfinite?"])


def test_the_project_says_what_is_asked(pytester: pytest.Pytester) -> None:
    pytester.makepyprojecttoml('[tool.pytest.ini_options]\n[tool.gradscope.check]\nselect = ["spike"]\nstrict = true\n')
    result = _run(pytester, WELL)
    result.stdout.fnmatch_lines(["E       assert <unhealthy: 1 skipped, which is a failure with --strict>"])
    overruled = (
        "def test_health(gradscope):\n"
        "    check = gradscope.check(network(), rows(True), my_loss, select=['nonfinite'], strict=False,\n"
        "                            rules={'nonfinite.severity': 'warn'})\n"
        "    assert check.status == 'warn' and [outcome.rule for outcome in check.rules] == ['nonfinite']\n"
        "    assert not gradscope.check(network(), rows(True), my_loss, select='nonfinite')\n"
    )
    _run(pytester, overruled).assert_outcomes(passed=1)
    pytester.makepyprojecttoml("[tool.pytest.ini_options]\n[tool.gradscope.check]\nselekt = []\n")
    result = _run(pytester, WELL)
    result.stdout.fnmatch_lines(["E *pyproject.toml: selekt in *: is no rule and no setting", "E *hint: *select*"])


def test_files_and_modules_with_gradients_are_checked_as_they_are(pytester: pytest.Pytester) -> None:
    for step in range(5):
        gradient = np.array([0.5, np.inf if step == 3 else 0.25], dtype=np.float32)
        path = Path(pytester.path, "gradients", f"{step}.npz")
        path.parent.mkdir(exist_ok=True)
        np.savez(path, weight=gradient)
    code = (
        "def test_health(gradscope):\n"
        "    model = network()\n"
        "    my_loss(model, rows()).backward()\n"
        "    assert gradscope.check(model)\n"
        "    assert gradscope.check('gradients')\n"
    )
    result = _run(pytester, code)
    result.stdout.fnmatch_lines([">       assert gradscope.check('gradients')", "▸ nonfinite failed: *"])
