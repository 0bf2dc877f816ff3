"""The sample files: loadable by the libraries that wrote them, and showing the figures their README states."""

from __future__ import annotations

import importlib.util
import io
import json
import zipfile
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray
from rsl_rl.runners import OnPolicyRunner
from safetensors import safe_open
from safetensors.numpy import load_file
from stable_baselines3 import A2C, PPO

import gradscope
from gradscope.sources import open_source

SAMPLES = Path(__file__).parent.parent / "sample_ckpts"
DUMPS = sorted((SAMPLES / "ppo_cartpole_gradients").iterdir())


def dumped_norms(pick: str = "") -> NDArray[np.float64]:
    """The float64 norm, per dump, of the tensors whose name contains ``pick``."""
    norms = []
    for path in DUMPS:
        picked = [gradient.ravel() for name, gradient in load_file(path).items() if pick in name]
        norms.append(np.linalg.norm(np.concatenate(picked).astype(np.float64)))
    return np.array(norms)


def squared_recent_norm(states: Iterable[dict[str, Any]]) -> float:
    return sum(float((s["exp_avg_sq"].double() / (1 - 0.999 ** float(s["step"]))).sum()) for s in states)


def sample_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_samples", SAMPLES / "make_samples.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_samples_leave_room_for_later_ones() -> None:
    assert sum(path.stat().st_size for path in SAMPLES.rglob("*") if "__pycache__" not in path.parts) <= 5 * 2**20


@pytest.mark.parametrize(
    ("file", "algorithm", "optimizer"), [("ppo", PPO, torch.optim.Adam), ("a2c", A2C, torch.optim.RMSprop)]
)
def test_sb3_loads_its_checkpoint(file: str, algorithm: type[PPO | A2C], optimizer: type) -> None:
    path = SAMPLES / f"{file}_cartpole.zip"
    with zipfile.ZipFile(path) as archive:
        assert json.loads(archive.read("data"))["max_grad_norm"] == 0.5
        weights = torch.load(io.BytesIO(archive.read("policy.pth")), weights_only=True)
    model = algorithm.load(path, device="cpu")
    assert type(model.policy.optimizer) is optimizer
    assert model.max_grad_norm == 0.5
    for name, parameter in model.policy.named_parameters():
        assert torch.equal(parameter, weights[name])


def test_recent_updates_of_the_ppo_sample_sat_at_the_limit() -> None:
    optimizer = PPO.load(SAMPLES / "ppo_cartpole.zip", device="cpu").policy.optimizer
    assert squared_recent_norm(optimizer.state.values()) == pytest.approx(0.25, rel=1e-4)
    saturation = gradscope.inspect(SAMPLES / "ppo_cartpole.zip").optimizers[0].saturation
    assert saturation == pytest.approx(1, abs=1e-4)


def test_rsl_rl_resumes_its_run() -> None:
    run = SAMPLES / "rsl_rl_run"
    agent = yaml.safe_load((run / "params" / "agent.yaml").read_text())
    assert agent["algorithm"]["max_grad_norm"] == 1.0
    runner = OnPolicyRunner(sample_script().CartPole(), agent, log_dir=None, device="cpu")
    for iteration in (0, 50, 100, 149):
        runner.load(str(run / f"model_{iteration}.pt"))
        assert runner.current_learning_iteration == iteration
    states = list(runner.alg.optimizer.state.values())
    actor = len(list(runner.alg.actor.parameters()))
    groups = gradscope.inspect(run / "model_149.pt").optimizers[0].groups
    assert [group.name for group in groups] == ["actor", "critic"]
    for group, expected in zip(groups, (states[:actor], states[actor:]), strict=True):
        assert group.max_norm == 1.0
        assert group.saturation == pytest.approx(squared_recent_norm(expected), rel=1e-6)


def test_dumps_are_named_by_update_and_describe_themselves() -> None:
    policy = PPO(
        "MlpPolicy", "CartPole-v1", device="cpu", policy_kwargs={"net_arch": sample_script().DUMP_NET}
    ).policy.state_dict()
    assert [path.stem for path in DUMPS] == [f"step_{update:05d}" for update in range(0, 16_000, 125)]
    for update, path in zip(range(0, 16_000, 125), DUMPS, strict=True):
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata()
        assert {name: g.shape for name, g in load_file(path).items()} == {name: w.shape for name, w in policy.items()}
        assert metadata["update"] == str(update)
        assert metadata["max_grad_norm"] == "0.5"
        assert metadata["library"] == "stable_baselines3 2.9.2"


def test_dumped_norms_shrink_as_the_readme_says() -> None:
    norms = dumped_norms()
    clipped = norms > 0.5
    assert (clipped[:48].all(), clipped.sum(), clipped[64:].sum(), clipped[80:].sum()) == (True, 81, 17, 9)
    medians = np.median(norms.reshape(8, 16), axis=1)
    assert medians == pytest.approx([24.70, 39.01, 27.34, 14.15, 0.489, 0.257, 0.240, 0.287], rel=2e-3)
    critic = dumped_norms("value")
    assert (critic**2).sum() / (norms**2).sum() == pytest.approx(0.9998, abs=5e-5)
    assert (np.sqrt(norms**2 - critic**2) > 0.5).sum() == 13


def test_simulation_of_the_dumps_agrees_with_their_float64_norms() -> None:
    norms = dumped_norms()
    simulation = gradscope.simulate(SAMPLES / "ppo_cartpole_gradients", ["norm:0.5"])
    assert simulation.steps == 128
    assert simulation.results[0].clip_rate == pytest.approx(81 / 128)
    assert simulation.norm.min == pytest.approx(norms.min(), rel=1e-6)
    assert simulation.norm.p50 == pytest.approx(np.median(norms), rel=1e-6)
    assert simulation.norm.max == pytest.approx(norms.max(), rel=1e-6)


@pytest.mark.parametrize(
    ("trace", "checkpoint", "framework", "limits"),
    [
        ("ppo_cartpole.gradscope", "ppo_cartpole.zip", "SB3 PPO", {"all": 0.5}),
        ("rsl_rl_run.gradscope", "rsl_rl_run", "rsl_rl PPO", {"actor": 1.0, "critic": 1.0}),
    ],
)
def test_the_recorded_runs_are_those_of_the_checkpoints(
    trace: str, checkpoint: str, framework: str, limits: dict[str, float]
) -> None:
    recorded, saved = open_source(SAMPLES / trace), gradscope.inspect(SAMPLES / checkpoint)
    assert recorded.info.format == f"recorded {framework} run"
    assert {group.name: group.max_norm for group in recorded.groups} == limits
    assert {tensor.name for tensor in recorded.tensors} == {tensor.name for tensor in saved.optimizers[0].tensors}
    assert list(recorded.step_numbers[:3]) == [0, 7, 14]
    assert recorded.step_numbers[-1] == (saved.optimizers[0].steps - 1) // 7 * 7
