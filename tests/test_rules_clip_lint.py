"""``coverage``, ``scaled-clip``, ``bad-threshold``, ``double-clip``, ``unused``: training loops that have the bug."""

from __future__ import annotations

import json
import math
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from judged import SAMPLES, judged, skipped
from real_training import sb3_checkpoint
from recorded import record
from torch import nn

import gradscope
from gradscope.backward.in_memory import gradients_in_memory

clip = torch.nn.utils.clip_grad_norm_
ALL = ("coverage", "scaled-clip", "bad-threshold", "double-clip", "unused")


@pytest.fixture(autouse=True)
def errors_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADSCOPE_DEBUG", "1")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def run(
    directory: Path,
    model: nn.Module,
    before_step: Callable[[], Any] = lambda: None,
    after_step: Callable[[], Any] = lambda: None,
    forward: Callable[[Any], Any] | None = None,
    steps: int = 4,
) -> Path:
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)

    def train() -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            (forward or model)(torch.randn(16, 4)).pow(2).sum().backward()
            before_step()
            optimizer.step()
            after_step()

    directory.mkdir(exist_ok=True)
    return record(directory, train).path


def test_a_correct_loop_passes_all(tmp_path: Path) -> None:
    model = network()
    path = run(tmp_path, model, lambda: clip(model.parameters(), 0.5))
    for rule in ALL:
        verdict = judged(rule, path)
        assert verdict.status == "pass"
        assert not verdict.violations


def test_a_run_that_clips_nothing_is_skipped_where_clipping_is_asked_about(tmp_path: Path) -> None:
    path = run(tmp_path, network())
    for rule in ("coverage", "scaled-clip", "bad-threshold", "double-clip"):
        assert skipped(judged(rule, path)) == "the run clips nothing"
    assert judged("unused", path).status == "pass"


@pytest.mark.parametrize("rule", ["coverage", "scaled-clip", "double-clip"])
def test_what_only_a_recording_tells_is_skipped_elsewhere(rule: Any) -> None:
    for sample in ("ppo_cartpole.zip", "ppo_cartpole_gradients"):
        assert skipped(judged(rule, SAMPLES / sample)) == "only a recorded run tells"


def test_a_clip_of_half_the_parameters_is_no_coverage(tmp_path: Path) -> None:
    model = network()
    verdict = judged("coverage", run(tmp_path, model, lambda: clip(model[0].parameters(), 0.5)))
    (found,) = verdict.violations
    assert "leaves out 2 of the 4 tensors that SGD updates: 2.weight, 2.bias" in found.message
    assert (found.where, found.steps) == ("SGD", (0, 0))


def test_a_clip_of_nothing_and_a_clip_after_the_step_are_no_coverage(tmp_path: Path) -> None:
    model = network()
    empty = judged("coverage", run(tmp_path / "empty", model, lambda: clip([], 0.5)))
    assert "was given no parameters" in empty.violations[0].message
    late = judged("coverage", run(tmp_path / "late", model, after_step=lambda: clip(model.parameters(), 0.5)))
    assert "runs after optimizer.step()" in late.violations[0].message


def scaled_run(directory: Path, unscale_first: bool) -> Path:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def train() -> None:
        for _ in range(3):
            optimizer.zero_grad()
            scaler.scale(model(torch.randn(16, 4)).pow(2).sum()).backward()
            if unscale_first:
                scaler.unscale_(optimizer)
            clip(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()

    directory.mkdir(exist_ok=True)
    return record(directory, train).path


def test_a_clip_before_unscale(tmp_path: Path) -> None:
    (found,) = judged("scaled-clip", scaled_run(tmp_path / "bad", unscale_first=False)).violations
    assert "still multiplied by the loss scale 1024" in found.message
    assert judged("scaled-clip", scaled_run(tmp_path / "good", unscale_first=True)).status == "pass"


@pytest.mark.parametrize(
    ("max_norm", "effect"), [(0.0, "stops training"), (-1.0, "turns every gradient around"), (math.nan, "NaN")]
)
def test_a_max_norm_that_cannot_be_meant(tmp_path: Path, max_norm: float, effect: str) -> None:
    model = network()
    (found,) = judged("bad-threshold", run(tmp_path, model, lambda: clip(model.parameters(), max_norm))).violations
    assert effect in found.message
    if not math.isnan(max_norm):
        assert (found.value, found.limit, found.where, found.steps) == (max_norm, 0.0, "all", (0, 3))


def test_a_max_norm_that_becomes_zero_is_told_with_its_steps(tmp_path: Path) -> None:
    model = network()
    limits = iter([math.inf, 1.0, 0.0, 0.0])
    (found,) = judged("bad-threshold", run(tmp_path, model, lambda: clip(model.parameters(), next(limits)))).violations
    assert (found.value, found.steps) == (0.0, (2, 3))
    assert "from step 2 on" in found.message


def test_an_infinite_max_norm_asks_for_the_norm(tmp_path: Path) -> None:
    model = network()
    path = run(tmp_path, model, lambda: clip(model.parameters(), math.inf))
    verdict = judged("bad-threshold", path)
    assert verdict.status == "pass"
    assert "only the norm is wanted" in verdict.message
    assert skipped(judged("coverage", path)) == "the run clips nothing"


def test_a_clip_value_of_zero(tmp_path: Path) -> None:
    model = network()
    path = run(tmp_path, model, lambda: torch.nn.utils.clip_grad_value_(model.parameters(), 0.0))
    (found,) = judged("bad-threshold", path).violations
    assert "clip_value" in found.message


def test_the_max_norm_of_a_checkpoint() -> None:
    verdict = judged("bad-threshold", SAMPLES / "ppo_cartpole.zip")
    assert verdict.status == "pass"
    assert verdict.value == 0.5
    assert skipped(judged("bad-threshold", SAMPLES / "ppo_cartpole_gradients")) == "the source names no max_norm"


@pytest.mark.parametrize(("max_norm", "effect"), [(0.0, "stops training"), (0, "stops training"), (-1.0, "turns")])
def test_a_checkpoint_whose_library_clips_at_zero(tmp_path: Path, max_norm: float, effect: str) -> None:
    """SB3 and rsl_rl's PPO hand max_grad_norm to clip_grad_norm_ whatever it is."""
    with zipfile.ZipFile(SAMPLES / "ppo_cartpole.zip") as healthy, zipfile.ZipFile(tmp_path / "bad.zip", "w") as bad:
        for name in healthy.namelist():
            content = healthy.read(name)
            if name == "data":
                content = json.dumps(json.loads(content) | {"max_grad_norm": max_norm}).encode()
            bad.writestr(name, content)
    (found,) = judged("bad-threshold", tmp_path / "bad.zip").violations
    assert effect in found.message
    shutil.copytree(SAMPLES / "rsl_rl_run", tmp_path / "run")
    settings = tmp_path / "run" / "params" / "agent.yaml"
    settings.write_text(re.sub(r"max_grad_norm: .*", f"max_grad_norm: {max_norm}", settings.read_text()))
    (found,) = judged("bad-threshold", tmp_path / "run").violations
    assert effect in found.message
    rollout = tmp_path / "run" / "rollout.safetensors"
    with_batch = gradscope.check(tmp_path / "run", batch=rollout, select=["bad-threshold"])
    assert [effect in outcome.message for outcome in with_batch.rules if outcome.status == "fail"] == [True]


def test_clipping_twice(tmp_path: Path) -> None:
    model = network()
    path = run(tmp_path, model, lambda: (clip(model.parameters(), 1.0), clip(list(model.parameters()), 0.5)))
    outcome = judged("double-clip", path)
    assert (len(outcome.violations), outcome.status) == (1, "warn")
    assert "clipped already" in outcome.message


def test_a_parameter_that_is_never_used(tmp_path: Path) -> None:
    model = nn.ModuleDict({"used": nn.Linear(4, 2), "idle": nn.Linear(4, 2)})
    path = run(tmp_path, model, forward=model["used"])
    (found,) = judged("unused", path).violations
    assert (found.value, found.limit) == (2.0, 0.0)
    assert "idle.weight, idle.bias" in found.message
    assert judged("unused", path, max=2.0).status == "pass"


def test_a_checkpoint_whose_optimizer_holds_no_state_of_a_parameter(tmp_path: Path) -> None:
    model = nn.ModuleDict({"used": nn.Linear(4, 2), "idle": nn.Linear(4, 2)})
    optimizer = torch.optim.Adam(model.parameters())
    model["used"](torch.randn(3, 4)).sum().backward()
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    (found,) = judged("unused", tmp_path / "checkpoint.pt").violations
    assert (found.value, found.where) == (2.0, "optimizer")
    assert "idle.weight, idle.bias" in found.message
    fresh = torch.optim.Adam(model.parameters())
    torch.save({"model": model.state_dict(), "optimizer": fresh.state_dict()}, tmp_path / "fresh.pt")
    assert judged("unused", tmp_path / "fresh.pt").status == "skipped"
    assert judged("unused", SAMPLES / "ppo_cartpole_gradients").status == "skipped"


def test_an_actor_that_is_trained_without_the_optimizer_is_not_unused() -> None:
    outcome = judged("unused", sb3_checkpoint("TRPO"))
    assert outcome.status == "skipped"
    assert "TRPO trains its actor without the optimizer" in outcome.message


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_without_state_the_gradients_of_the_batch_tell_what_is_unused(optimizer: Any) -> None:
    model = nn.ModuleDict({"used": nn.Linear(4, 2), "idle": nn.Linear(4, 2)})
    elsewhere = nn.Parameter(torch.zeros(3))
    batch = {"x": torch.randn(6, 4)}

    def found(*parameters: nn.Parameter) -> Any:
        held = optimizer(parameters, lr=0.1)
        loss = lambda model, batch: model["used"](batch["x"]).square().mean()  # noqa: E731
        with gradients_in_memory(model, batch, loss, optimizer=held) as source:
            return judged("unused", source)

    (reading,) = found(*model.parameters(), elsewhere).violations
    assert reading.value == 2.0 and "2 of the 5 parameters" in reading.message
    assert "idle.weight, idle.bias" in reading.message
    assert found(*model["used"].parameters(), elsewhere).status == "pass"
    assert found(elsewhere).status == "skipped"
