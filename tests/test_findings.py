"""Sentences about policies and optimizers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from in_memory_source import InMemorySource

import gradscope
from gradscope.errors import GradscopeError
from gradscope.simulation import simulate

PPO = Path(__file__).parent.parent / "sample_ckpts" / "ppo_cartpole.zip"


def run_of(norms: list[float], dtype: str = "float32") -> InMemorySource:
    return InMemorySource([{"a.w": np.array([norm, 0.0], dtype)} for norm in norms])


def test_skip_drops_steps_and_keeps_no_direction() -> None:
    findings = simulate(run_of([1.0] * 15 + [9.0]), ["skip:5", "norm:5"]).findings
    assert "skip:5 drops 6.2 % [1–28] of the 16 steps whole." in findings
    assert "Direction is kept (0°) by max_norm 5; only the length changes." in findings
    assert simulate(run_of([9.0]), ["skip:5"]).findings == ("skip:5 drops this gradient whole: its norm is 9.000.",)


@pytest.mark.parametrize("policies", [[], ["norm:1", "skip:5"]])
def test_simulate_says_where_torch_would_zero_the_update(policies: list[str]) -> None:
    simulation = simulate(run_of([1.0, 2e19, 3.0]), policies)
    assert simulation.float32_overflow is not None
    assert (simulation.float32_overflow.steps, simulation.float32_overflow.tensors) == (1, ("a.w",))
    assert simulation.findings[0] == (
        "The squares of a.w overflow float32 in 1 of 3 steps although every element is finite: PyTorch's norm would "
        "be infinite and clip_grad_norm_ would zero the whole update."
    )
    gradient = torch.tensor([2e19, 0.0])
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = gradient
    assert torch.nn.utils.clip_grad_norm_([parameter], 1.0).isinf()
    assert parameter.grad.tolist() == [0.0, 0.0]


def test_float64_does_not_overflow_where_float32_does() -> None:
    assert simulate(run_of([2e19], "float64"), ()).float32_overflow is None
    assert simulate(run_of([1.8e19]), ()).float32_overflow is None


def test_tensors_may_overflow_together() -> None:
    step = {"a.w": np.full(2, 1e19, np.float32), "b.w": np.full(2, 1e19, np.float32)}
    overflow = simulate(InMemorySource([step]), ()).float32_overflow
    assert overflow is not None
    assert (overflow.tensors, overflow.groups) == ((), ("all",))
    apart = simulate(InMemorySource([step], groups={"a": ["a.w"], "b": ["b.w"]}), ())
    assert apart.float32_overflow is None


# --- another threshold or other groups than the file's ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("max_norm", "sentence"),
    [
        (0.1, "This file was trained with max_norm 0.5, so max_norm 0.1 was not in force"),
        (2.0, "This file was trained with max_norm 0.5, so what max_norm 2 would have clipped reached the optimizer"),
    ],
)
def test_the_files_own_max_norm_is_told_beside_another(max_norm: float, sentence: str) -> None:
    report = gradscope.inspect(PPO, max_norm=max_norm)
    assert report.findings[0].startswith(sentence)
    assert "unclipped" not in "".join(report.findings)
    assert "All of the last" in gradscope.inspect(PPO, max_norm=0.5).findings[0]


def test_the_groups_of_a_checkpoint_can_be_redefined() -> None:
    (before,) = gradscope.inspect(PPO).optimizers
    groups = {"actor": "*policy_net*", "critic": "*value_net*"}
    report = gradscope.inspect(PPO, groups=groups)
    (after,) = report.optimizers
    assert [group.name for group in after.groups] == ["actor", "critic", "rest"]
    assert [(group.max_norm, group.saturation) for group in after.groups] == [(None, None)] * 3
    for group, pattern in zip(after.groups, ("policy_net", "value_net"), strict=False):
        norms = [t.recent_norm for t in before.tensors if pattern in t.name and t.recent_norm is not None]
        assert group.recent_norm == pytest.approx(np.linalg.norm(norms), rel=1e-9)
    assert any("The run clipped policy (max_norm 0.5)" in note for note in report.notes)
    given = gradscope.inspect(PPO, groups=groups, max_norm=0.5)
    actor = given.optimizers[0].groups[0]
    assert actor.saturation == pytest.approx((actor.recent_norm or 0.0) ** 2 / 0.25)
    assert any("a run that clipped each of these groups at 0.5" in note for note in given.notes)


def test_a_glob_that_matches_no_parameter_of_a_checkpoint() -> None:
    with pytest.raises(GradscopeError, match="matches no tensor"):
        gradscope.inspect(PPO, groups={"actor": "nothing*"})


def test_groups_need_something_to_divide() -> None:
    with pytest.raises(GradscopeError, match="neither gradients nor an optimizer"):
        gradscope.inspect({"w": np.ones(2)}, as_="weights", groups={"a": "*"})
