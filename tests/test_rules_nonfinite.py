"""``nonfinite`` names the step and the tensors, and forgives what a loss scaler forgives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from in_memory_source import Arrays, InMemorySource, NormSource, RecordedSource
from judged import SAMPLES, judged

from gradscope.intervals import wilson_interval

NAMES = ("0.weight", "0.bias", "2.weight", "2.bias")


def run(steps: int, broken: dict[int, dict[str, float]] | None = None, seed: int = 0) -> list[Arrays]:
    """Steps of four tensors; ``broken`` maps a step to what stands in the first element of its tensors."""
    rng = np.random.default_rng(seed)
    made = [{name: rng.standard_normal(4).astype(np.float32) for name in NAMES} for _ in range(steps)]
    for step, tensors in (broken or {}).items():
        for name, value in tensors.items():
            made[step][name][0] = value
    return made


def test_a_finite_run_passes() -> None:
    outcome = judged("nonfinite", InMemorySource(run(20)))
    assert (outcome.status, outcome.value, outcome.limit) == ("pass", 0.0, 0.0)
    assert outcome.message == "No NaN or Inf in any of 20 steps."


def test_the_step_the_tensors_and_what_was_finite_before_them_are_named() -> None:
    source = RecordedSource(run(50, {30: {"2.weight": np.nan, "2.bias": np.inf}, 40: {"0.bias": np.nan}}), apart=2)
    outcome = judged("nonfinite", source)
    assert outcome.status == "fail"
    assert outcome.value == pytest.approx(2 / 50)
    assert outcome.where == "2.weight"
    assert outcome.steps == (60, 80)
    assert "Step 60 holds NaN or Inf in 2.weight, 2.bias; last finite before: 0.bias" in outcome.message
    assert "1 more of 50 steps (4.0 % in all)" in outcome.message


def test_a_step_where_everything_is_nan_says_so() -> None:
    outcome = judged("nonfinite", InMemorySource(run(3, {2: dict.fromkeys(NAMES, np.nan)})))
    assert outcome.message == "Step 2 holds NaN or Inf in all 4 tensors."


def test_a_share_may_be_allowed() -> None:
    source = InMemorySource(run(50, {30: {"0.bias": np.nan}}))
    assert judged("nonfinite", source, max=0.02).status == "pass"
    assert judged("nonfinite", source, max=0.019).status == "fail"


def scaled(steps: int, skipped: list[int]) -> RecordedSource:
    stepped = np.ones((steps, 1), dtype=np.int8)
    stepped[skipped] = 0
    return RecordedSource(run(steps, {step: {"2.bias": np.inf} for step in skipped}), stepped=stepped)


def test_the_search_for_a_first_loss_scale_is_no_disease() -> None:
    outcome = judged("nonfinite", scaled(60, list(range(12))))
    assert outcome.status == "pass"
    assert outcome.value == 0.0
    assert "12 at the start" in outcome.message


def test_few_skipped_steps_later_on_are_none_either() -> None:
    outcome = judged("nonfinite", scaled(200, [0, 1, 80, 150]))
    assert outcome.status == "pass"
    assert outcome.value == pytest.approx(2 / 198)


def test_an_overflow_that_comes_back_is() -> None:
    skipped = list(range(20, 120, 3))
    outcome = judged("nonfinite", scaled(120, skipped))
    assert wilson_interval(len(skipped) / 120, 120)[0] > 0.05
    assert outcome.status == "fail"
    assert outcome.value == pytest.approx(len(skipped) / 120)
    assert judged("nonfinite", scaled(120, skipped), max_skipped=0.5).status == "pass"


def test_a_run_whose_every_step_is_skipped_fails() -> None:
    assert judged("nonfinite", scaled(20, list(range(20)))).status == "fail"


def test_of_two_optimizers_the_one_that_stepped_counts() -> None:
    groups = {"a": NAMES[:2], "b": NAMES[2:]}
    stepped = np.ones((30, 2), dtype=np.int8)
    stepped[10] = (0, 1)
    held = RecordedSource(run(30, {10: {"0.bias": np.nan}}), groups, stepped=stepped)
    taken = RecordedSource(run(30, {10: {"2.bias": np.nan}}), groups, stepped=stepped)
    assert judged("nonfinite", held).status == "pass"
    assert judged("nonfinite", taken).status == "fail"


def test_a_log_of_norms_tells_too() -> None:
    norms = np.ones((30, 1))
    norms[7] = np.nan
    assert judged("nonfinite", NormSource(norms)).steps == (7, 7)


def test_weights_that_are_nan_fail(tmp_path: Path) -> None:
    import torch

    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    path = tmp_path / "healthy.pt"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    assert judged("nonfinite", path).status == "pass"
    with torch.no_grad():
        model[1].weight[0, 0] = torch.nan
    optimizer.state[model[0].bias]["exp_avg_sq"][1] = torch.inf
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    outcome = judged("nonfinite", path)
    assert outcome.status == "fail"
    assert outcome.where == "1.weight"
    assert outcome.value == pytest.approx(1 / 11)
    assert "1 of 11 elements of the weights" in outcome.message
    assert "0.bias (exp_avg_sq)" in outcome.violations[1].message


@pytest.mark.parametrize("name", ["ppo_cartpole.gradscope", "ppo_cartpole.zip", "rsl_rl_run", "ppo_cartpole_gradients"])
def test_the_samples_pass(name: str) -> None:
    assert judged("nonfinite", SAMPLES / name).status == "pass"
