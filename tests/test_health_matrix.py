"""One seed of the real trainings: the rule that names a disease fails, and nothing fails in a healthy run."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.health_matrix import judge, rules_that
from benchmarks.trainings import TRAININGS, train

SEED = 0
HEALTHY = ["ppo", "transformer", "mlp", "residual", "momentum", "convolutional", "lstm", "fp16-scaled"]
NAMED_BY = {
    "ppo-lr": "update-ratio",
    "transformer-lr": "update-ratio",
    "no-normalisation": "depth-decay",
    "sigmoid": "depth-decay",
    "dead-relu": "dead",
    "dead-relu-most": "dead",
    "dead-relu-rate": "dead",
    "fp16-unscaled": "underflow",
    "fp16-weights": "underflow",
    "scaled-clip": "scaled-clip",
    "half-clipped": "coverage",
    "nan": "nonfinite",
    "max-norm-zero": "bad-threshold",
}


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_training_passes(name: str, tmp_path: Path) -> None:
    trace = tmp_path / f"{name}.gradscope"
    train(name, SEED, trace)

    check = judge(trace)

    assert not TRAININGS[name].disease
    assert rules_that(check, "fail") == set()
    assert check.status in ("pass", "warn")
    assert {"nonfinite", "exploding", "dead", "update-ratio"} <= rules_that(check, "pass")


@pytest.mark.parametrize(("name", "rule"), NAMED_BY.items())
def test_disease_is_found_by_the_rule_that_names_it(name: str, rule: str, tmp_path: Path) -> None:
    trace = tmp_path / f"{name}.gradscope"
    train(name, SEED, trace)

    check = judge(trace)

    assert rule in TRAININGS[name].disease
    assert rule in rules_that(check, "fail")
    assert check.status == "fail"
    outcome = next(outcome for outcome in check.rules if outcome.rule == rule)
    assert outcome.violations and outcome.message
