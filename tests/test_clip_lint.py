"""Every finding of the clip lint, shown by a training loop that has the bug."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from recorded import Recorded, record
from torch import nn

clip = torch.nn.utils.clip_grad_norm_


@pytest.fixture(autouse=True)
def errors_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADSCOPE_DEBUG", "1")


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8, dtype=dtype), nn.ReLU(), nn.Linear(8, 2, dtype=dtype))


def loop(
    directory: Any,
    model: nn.Module,
    before_step: Callable[[], Any] = lambda: None,
    after_step: Callable[[], Any] = lambda: None,
    optimizer: Any = None,
    steps: int = 5,
    scale: float = 1.0,
) -> Recorded:
    """Train; ``before_step`` and ``after_step`` stand around ``optimizer.step()``."""
    used = optimizer or torch.optim.SGD(model.parameters(), 1e-3)

    def train() -> None:
        dtype = next(model.parameters()).dtype
        for _ in range(steps):
            used.zero_grad()
            (model(torch.randn(16, 4, dtype=dtype)).pow(2).sum() * scale).backward()
            before_step()
            used.step()
            after_step()

    return record(directory, train)


def finding(recorded: Recorded, rule: str) -> dict[str, Any]:
    assert recorded.rules == {rule}
    return next(found for found in recorded.metadata["findings"] if found["rule"] == rule)


def test_a_correct_loop_has_none(tmp_path: Any) -> None:
    model = network()
    assert not loop(tmp_path, model, lambda: clip(model.parameters(), 0.5)).metadata["findings"]


@pytest.mark.parametrize(
    ("max_norm", "effect"),
    [
        (0.0, "max_norm is 0 .*stops training"),
        (-1.0, "max_norm is -1 .*turns every gradient around"),
        (math.inf, "max_norm is inf .*nothing is ever clipped"),
        (math.nan, "max_norm is nan .*makes every gradient NaN"),
    ],
)
def test_a_threshold_that_cannot_be_meant(tmp_path: Any, max_norm: float, effect: str) -> None:
    model = network()
    recorded = loop(tmp_path, model, lambda: clip(model.parameters(), max_norm), steps=1)
    assert "bad-threshold" in recorded.rules
    with pytest.raises(AssertionError, match=effect):
        raise AssertionError(recorded.message("bad-threshold"))


def test_a_clip_value_that_cannot_be_meant(tmp_path: Any) -> None:
    model = network()
    recorded = loop(tmp_path, model, lambda: torch.nn.utils.clip_grad_value_(model.parameters(), 0.0))
    found = finding(recorded, "bad-threshold")
    assert "clip_value is 0" in found["message"]
    assert found["count"] == 5


def test_clip_of_a_used_up_generator(tmp_path: Any) -> None:
    model = network()
    parameters = model.parameters()
    assert list(parameters)
    found = finding(loop(tmp_path, model, lambda: clip(parameters, 0.5)), "empty-clip")
    assert "was given no parameters" in found["message"]


def test_clip_before_backward(tmp_path: Any) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)

    def train() -> None:
        for _ in range(5):
            optimizer.zero_grad()
            clip(model.parameters(), 0.5)
            model(torch.randn(16, 4)).pow(2).sum().backward()
            optimizer.step()

    found = finding(record(tmp_path, train), "empty-clip")
    assert "4 parameters, none of which has a gradient" in found["message"]


def test_clip_after_the_step(tmp_path: Any) -> None:
    model = network()
    recorded = loop(tmp_path, model, after_step=lambda: clip(model.parameters(), 0.5))
    assert "runs after optimizer.step()" in finding(recorded, "clip-after-step")["message"]
    assert [row["max_norm"] for row in recorded.rows] == [None] * 5


def test_clipping_twice(tmp_path: Any) -> None:
    model = network()
    recorded = loop(tmp_path, model, lambda: (clip(model.parameters(), 1.0), clip(list(model.parameters()), 0.5)))
    assert finding(recorded, "clipped-twice")["count"] == 5
    assert [row["max_norm"] for row in recorded.rows] == [0.5] * 5


def test_clip_that_leaves_parameters_out(tmp_path: Any) -> None:
    model = network()
    found = finding(loop(tmp_path, model, lambda: clip(model[0].parameters(), 0.5)), "coverage")
    assert "leaves out 2 of the 4 tensors that SGD updates: 2.weight, 2.bias" in found["message"]
    assert found["tensors"] == ["2.weight", "2.bias"]


def test_clip_of_a_norm_that_is_not_finite(tmp_path: Any) -> None:
    model = network()

    def before_step() -> None:
        model[0].bias.grad[0] = math.nan
        clip(model.parameters(), 0.5)

    recorded = loop(tmp_path, model, before_step, steps=1)
    assert "not finite" in finding(recorded, "nonfinite-norm")["message"]


def test_a_finite_gradient_whose_norm_overflows(tmp_path: Any) -> None:
    model = network()

    def before_step() -> None:
        model[0].bias.grad.fill_(1e20)
        clip(model.parameters(), 0.5)

    found = finding(loop(tmp_path, model, before_step, steps=1), "norm-overflow")
    assert "norm 2.83e+20" in found["message"]


def test_a_rounded_norm_that_decides(tmp_path: Any) -> None:
    model = network(torch.bfloat16)

    def before_step() -> None:
        for parameter in model.parameters():
            parameter.grad.zero_()
        # 1 + 2**-9 is no bfloat16: the norm is rounded to 1.
        model[0].weight.grad.view(-1)[0] = 1.0
        model[2].weight.grad.view(-1)[0] = 0.0625
        clip(model.parameters(), 1.0)

    recorded = loop(tmp_path, model, before_step, steps=1)
    assert float(recorded.rows[0]["returned_norm"]) == 1.0
    assert (
        "taken in bfloat16, whose rounding decided: 1 instead of 1.00195"
        in finding(recorded, "rounded-norm")["message"]
    )


def test_clip_in_front_of_an_optimizer_that_normalises(tmp_path: Any) -> None:
    model = nn.Linear(4, 8, bias=False)
    recorded = loop(
        tmp_path, model, lambda: clip(model.parameters(), 0.5), optimizer=torch.optim.Muon(model.parameters(), 1e-3)
    )
    assert "Muon, which normalises the gradient itself" in finding(recorded, "normalised-anyway")["message"]


def test_parameters_that_never_have_a_gradient(tmp_path: Any) -> None:
    model = network()
    model.spare = nn.Linear(3, 3)  # type: ignore[assignment]
    model.forward = lambda x: model[2](model[1](model[0](x)))  # type: ignore[method-assign]
    recorded = loop(tmp_path, model, lambda: clip(model.parameters(), 0.5))
    found = finding(recorded, "unused")
    assert found["message"] == "2 tensors of SGD never had a gradient: spare.weight, spare.bias."


@pytest.mark.parametrize("gone", [False, True])
def test_parameters_that_are_trained_without_a_gradient_are_used(tmp_path: Any, gone: bool) -> None:
    def train() -> None:
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model[2](torch.randn(4, model[2].in_features)).sum().backward()
            optimizer.step()
            # As a line search does.
            model[0].weight.data.copy_(model[0].weight.data * 1.01)
            model[0].bias.data.copy_(model[0].bias.data * 1.01)
        if not gone:
            kept.append(optimizer)

    kept: list[Any] = []
    assert not record(tmp_path, train).metadata["findings"]


def test_parameters_of_a_model_that_is_gone_are_still_told(tmp_path: Any) -> None:
    def train() -> None:
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model[2](torch.randn(4, model[2].in_features)).sum().backward()
            optimizer.step()

    recorded = record(tmp_path, train)
    assert "2 tensors of SGD never had a gradient" in finding(recorded, "unused")["message"]


def test_frozen_parameters_are_no_finding(tmp_path: Any) -> None:
    model = network()
    model[0].requires_grad_(False)
    assert not loop(tmp_path, model, lambda: clip(model.parameters(), 0.5)).metadata["findings"]


def test_a_framework_that_clips_before_is_said(tmp_path: Any) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    engine: dict[str, Any] = {"__name__": "deepspeed.runtime.engine", "optimizer": optimizer}
    exec("def step():\n    optimizer.step()", engine)

    def train() -> None:
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(16, 4)).pow(2).sum().backward()
            engine["step"]()

    recorded = record(tmp_path, train)
    assert recorded.metadata["groups"][0]["after_clipping"] == "DeepSpeed"
    assert recorded.metadata["notes"] == [
        "DeepSpeed clips inside its own optimizer: what is recorded is after its clipping."
    ]


def test_an_infinite_threshold_that_only_logs_the_norm_is_no_finding(tmp_path: Any) -> None:
    model = network()
    recorded = loop(tmp_path, model, lambda: (clip(model.parameters(), math.inf), clip(model.parameters(), 0.5)))
    assert not recorded.metadata["findings"]
    assert [row["max_norm"] for row in recorded.rows] == [0.5] * 5
