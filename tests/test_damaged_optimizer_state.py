"""Optimizer state that cannot be what an optimizer wrote is not believed."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from spectrum_oracle import bfloat16_bits

import gradscope
from gradscope.results import Inspection, OptimizerReport
from gradscope.sources.signs import holds_negative
from gradscope.sources.stored import FileTensor, MemoryTensor
from gradscope.tensors import TensorInfo

SAMPLES = Path(__file__).parent.parent / "sample_ckpts"


def checkpoint(optimizer: str = "Adam") -> dict[str, Any]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 1))
    optimize = getattr(torch.optim, optimizer)(model.parameters(), lr=0.1)
    for _ in range(3):
        optimize.zero_grad()
        model(torch.randn(5, 4)).square().sum().backward()
        optimize.step()
    return {"model": model.state_dict(), "optimizer": optimize.state_dict()}


def report_of(content: dict[str, Any], tmp_path: Path) -> tuple[OptimizerReport, Inspection]:
    torch.save(content, tmp_path / "checkpoint.pt")
    inspection = gradscope.inspect(tmp_path / "checkpoint.pt", max_norm=1.0)
    return inspection.optimizers[0], inspection


@pytest.mark.parametrize(("optimizer", "key"), [("Adam", "exp_avg_sq"), ("RMSprop", "square_avg"), ("Adagrad", "sum")])
def test_means_of_squares_are_never_negative(tmp_path: Path, optimizer: str, key: str) -> None:
    content = checkpoint(optimizer)
    healthy, _ = report_of(content, tmp_path)
    assert healthy.recent_norm is not None and healthy.unavailable is None
    content["optimizer"]["state"][2][key][0, 1] *= -1
    report, inspection = report_of(content, tmp_path)
    assert report.recent_norm is None and report.saturation is None
    assert report.unavailable == (
        f"it is damaged: {key} holds negative numbers, which means of squares never are (1.weight, 1 of 4 parameters)"
    )
    assert any("not available: it is damaged" in finding for finding in inspection.findings)


def test_a_state_of_another_shape_than_its_parameter(tmp_path: Path) -> None:
    content = checkpoint()
    content["optimizer"]["state"][0]["exp_avg_sq"] = torch.ones(2, 2)
    report, _ = report_of(content, tmp_path)
    assert report.recent_norm is None
    assert "exp_avg_sq of 0.weight has the shape (2, 2), the parameter has (3, 4)" in str(report.unavailable)


def test_the_shape_of_a_parameter_that_the_state_names_itself(tmp_path: Path) -> None:
    content = checkpoint()
    names = list(content["model"])
    content["optimizer"]["param_groups"][0]["param_names"] = names
    for moment in ("exp_avg", "exp_avg_sq"):
        content["optimizer"]["state"][1][moment] = torch.ones(5)
    assert "exp_avg_sq of 0.bias has the shape (5,)" in str(report_of(content, tmp_path)[0].unavailable)
    for i, name in enumerate(names):
        for moment in ("exp_avg", "exp_avg_sq"):
            content["optimizer"]["state"][i][moment] = torch.ones(content["model"][name].numel())
    assert report_of(content, tmp_path)[0].recent_norm is not None  # flat, as sharded training stores it


@pytest.mark.parametrize(
    ("key", "junk"), [("param_groups", 5), ("param_groups", None), ("param_groups", [{"lr": 1.0}]), ("state", [1, 2])]
)
def test_parts_of_a_wrong_type_are_told_and_the_weights_still_read(tmp_path: Path, key: str, junk: Any) -> None:
    content = checkpoint()
    content["optimizer"][key] = junk
    report, inspection = report_of(content, tmp_path)
    assert report.unavailable == "its state is damaged: state and param_groups are not what PyTorch writes"
    assert inspection.weights is not None and len(inspection.weights.tensors) == 4


# --- max_grad_norm ---------------------------------------------------------------------------------------------------


def sb3_with(max_grad_norm: Any, path: Path) -> Path:
    with zipfile.ZipFile(SAMPLES / "ppo_cartpole.zip") as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            if name == "data":
                content = json.dumps({**json.loads(content), "max_grad_norm": max_grad_norm}).encode()
            target.writestr(name, content)
    return path


@pytest.mark.parametrize(
    ("stored", "said"), [(float("nan"), "nan"), (-0.5, "-0.5"), ("half", "'half'"), ([1], "no number")]
)
def test_a_max_grad_norm_that_is_none_is_named(tmp_path: Path, stored: Any, said: str) -> None:
    inspection = gradscope.inspect(sb3_with(stored, tmp_path / "ppo.zip"))
    assert inspection.notes == (f"max_norm is unknown: max_grad_norm in data is {said}.",)
    assert inspection.optimizers[0].max_norm is None


def test_an_infinite_max_grad_norm_clips_nothing(tmp_path: Path) -> None:
    inspection = gradscope.inspect(sb3_with(float("inf"), tmp_path / "ppo.zip"))
    assert inspection.notes == ("This PPO did not clip its gradients.",)


def test_a_max_grad_norm_of_0_is_what_stops_training(tmp_path: Path) -> None:
    inspection = gradscope.inspect(sb3_with(0, tmp_path / "ppo.zip"))
    assert inspection.notes == ()
    assert "max_grad_norm in data is 0: it zeroes every gradient and stops training." in inspection.findings


@pytest.mark.parametrize("stored", ["half", -1.0])
def test_the_same_in_agent_yaml(tmp_path: Path, stored: Any) -> None:
    (model,) = list((SAMPLES / "rsl_rl_run").glob("model_*.pt"))[:1]
    (tmp_path / "params").mkdir()
    (tmp_path / "params" / "agent.yaml").write_text(yaml.safe_dump({"algorithm": {"max_grad_norm": stored}}))
    (tmp_path / model.name).write_bytes(model.read_bytes())
    inspection = gradscope.inspect(tmp_path / model.name)
    assert f"max_norm is unknown: max_grad_norm in params/agent.yaml is {stored!r}." in inspection.notes


# --- signs -----------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.floats(-10, 10, width=16), max_size=30),
    st.sampled_from(["float64", "float32", "float16", "bfloat16"]),
)
def test_a_negative_number_is_seen(values: list[float], dtype: str) -> None:
    array = bfloat16_bits(np.array(values)) if dtype == "bfloat16" else np.array(values, dtype)
    tensor = MemoryTensor(TensorInfo("w", array.shape, dtype), array)
    assert holds_negative(tensor) == any(value < 0 for value in values)


def test_a_negative_number_is_seen_anywhere_in_a_file(tmp_path: Path) -> None:
    values = np.zeros(700_001, np.float32)
    values[-1] = -0.0
    for place in (None, 0, 262_143, 262_144, 700_000):
        changed = values.copy()
        if place is not None:
            changed[place] = -1e-30
        (tmp_path / "raw").write_bytes(b"abc" + changed.tobytes())
        tensor = FileTensor(TensorInfo("w", (700_001,), "float32"), str(tmp_path / "raw"), 3)
        assert holds_negative(tensor) == (place is not None)
    rows = FileTensor(TensorInfo("w", (2, 2), "float32"), str(tmp_path / "raw"), 3, (2, 1))
    assert not holds_negative(rows)
