"""Stable-Baselines3 checkpoints of real trainings, against torch.load and against SB3's own loaded models."""

from __future__ import annotations

import functools
import importlib
import io
import json
import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from real_training import SB3_RUNS, sb3_a2c_like_tensorflow, sb3_checkpoint, sb3_logged_ppo

from gradscope.errors import GradscopeError
from gradscope.forensics import analyse
from gradscope.gradients import GradientSource
from gradscope.results import OptimizerReport
from gradscope.sources import open_source

FORMATS = {name: f"SB3 {name}" for name in SB3_RUNS} | {"QRDQN": "SB3 QR-DQN"}
WITH_OPTIMIZER = [name for name in SB3_RUNS if name != "ARS"]


def reports(path: Path, max_norm: float | None = None) -> dict[str, OptimizerReport]:
    return {state.name: analyse(state, max_norm) for state in open_source(str(path)).optimizers()}


def members(path: Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as archive:
        return {
            name.removesuffix(".pth"): torch.load(io.BytesIO(archive.read(name)), weights_only=True)
            for name in archive.namelist()
            if name.endswith(".pth")
        }


def settings_of(path: Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as archive:
        return dict(json.loads(archive.read("data")))


@functools.cache
def loaded(algorithm: str) -> Any:
    package = importlib.import_module(SB3_RUNS[algorithm][0])
    return getattr(package, algorithm).load(sb3_checkpoint(algorithm), device="cpu")


def recomputed(state: dict[str, Any], start: float = 0.0) -> tuple[list[float], list[float | None]]:
    """r² and m² of every parameter that has stepped, from torch's own reading of the state, in float64."""
    recent, mean = [], []
    hyper = state["param_groups"][0]
    for entry in state["state"].values():
        step = float(entry["step"])
        if "exp_avg_sq" in entry:
            beta1, beta2 = hyper["betas"]
            recent.append(float(entry["exp_avg_sq"].double().sum()) / (1 - beta2**step))
            mean.append(float(entry["exp_avg"].double().square().sum()) / (1 - beta1**step) ** 2)
        else:
            tail = hyper["alpha"] ** step
            square = entry["square_avg"].double()
            recent.append(float(square.sum() - start * tail * square.numel()) / (1 - tail))
            mean.append(None)
    return recent, mean


@pytest.mark.parametrize("algorithm", SB3_RUNS)
def test_the_algorithm_and_its_weights_are_told(algorithm: str) -> None:
    source = open_source(str(sb3_checkpoint(algorithm)))
    assert (source.info.format, source.info.kind, source.info.steps) == (FORMATS[algorithm], "checkpoint", 0)
    weights = source.weights()
    assert weights is not None
    held = loaded(algorithm).policy.state_dict()
    assert {tensor.name for tensor in weights.tensors} <= set(held)
    assert {name for name, _ in loaded(algorithm).policy.named_parameters()} == {t.name for t in weights.tensors}
    for info, spectrum in zip(weights.tensors, weights.spectra, strict=True):
        assert np.array_equal(weights.read(info.name), held[info.name].numpy())
        assert spectrum.norm == pytest.approx(float(held[info.name].double().norm()), rel=1e-12)


@pytest.mark.parametrize("algorithm", WITH_OPTIMIZER)
def test_forensics_agree_with_a_float64_recomputation(algorithm: str) -> None:
    path = sb3_checkpoint(algorithm)
    states = {name: state for name, state in members(path).items() if name.endswith("optimizer")}
    found = reports(path)
    assert set(found) == set(states)
    for name, report in found.items():
        recent, mean = recomputed(states[name])
        stepped = [tensor for tensor in report.tensors if tensor.recent_norm is not None]
        assert [tensor.recent_norm for tensor in stepped] == pytest.approx([math.sqrt(r) for r in recent], rel=1e-9)
        assert report.recent_norm == pytest.approx(math.sqrt(sum(recent)), rel=1e-9)
        if None not in mean:
            assert report.mean_norm == pytest.approx(math.sqrt(sum(m for m in mean if m is not None)), rel=1e-9)
        assert report.steps == max(float(entry["step"]) for entry in states[name]["state"].values())
        assert report.lr == states[name]["param_groups"][0]["lr"]
        assert report.unavailable is None


@pytest.mark.parametrize("algorithm", WITH_OPTIMIZER)
def test_parameters_bear_the_names_that_sb3_gives_them(algorithm: str) -> None:
    model = loaded(algorithm)
    names = {id(parameter): name for name, parameter in model.policy.named_parameters()}
    if getattr(model, "log_ent_coef", None) is not None:
        names[id(model.log_ent_coef)] = "log_ent_coef"
    for state in open_source(str(sb3_checkpoint(algorithm))).optimizers():
        optimizer = functools.reduce(getattr, state.name.split("."), model)
        if state.name == "ent_coef_optimizer":
            assert [parameter.name for parameter in state.parameters] == ["log_ent_coef"]
            continue
        expected = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
        assert [parameter.name for parameter in state.parameters] == expected


@pytest.mark.parametrize(("algorithm", "max_norm"), [("PPO", 0.5), ("A2C", 0.5), ("DQN", 10.0), ("RecurrentPPO", 0.5)])
def test_max_norm_comes_from_the_checkpoint(algorithm: str, max_norm: float) -> None:
    path = sb3_checkpoint(algorithm)
    assert settings_of(path)["max_grad_norm"] == max_norm
    (report,) = reports(path).values()
    assert report.max_norm == max_norm
    assert report.recent_norm is not None
    assert report.saturation == pytest.approx((report.recent_norm / max_norm) ** 2)
    (overridden,) = reports(path, max_norm=3.0).values()
    assert overridden.saturation == pytest.approx((report.recent_norm / 3.0) ** 2)


@pytest.mark.parametrize("algorithm", ["SAC", "TD3", "DDPG", "TQC", "QRDQN", "TRPO", "CrossQ"])
def test_algorithms_that_do_not_clip_have_no_saturation(algorithm: str) -> None:
    path = sb3_checkpoint(algorithm)
    assert all(report.saturation is None and report.max_norm is None for report in reports(path).values())
    assert any("did not clip" in note for note in open_source(str(path)).notes)


def test_a2c_is_told_its_rmsprop_by_its_class() -> None:
    (plain,) = reports(sb3_checkpoint("A2C")).values()
    assert plain.type == "RMSprop"
    path = sb3_a2c_like_tensorflow()
    (report,) = reports(path).values()
    assert report.type == "RMSpropTFLike"
    recent, _ = recomputed(members(path)["policy.optimizer"], start=1.0)
    assert report.recent_norm == pytest.approx(math.sqrt(sum(recent)), rel=1e-6)
    assert report.saturation is not None
    assert report.saturation <= 1.001


def test_actor_and_critic_have_an_optimizer_each() -> None:
    found = reports(sb3_checkpoint("SAC"))
    assert list(found) == ["actor.optimizer", "critic.optimizer", "ent_coef_optimizer"]
    assert [group.name for report in found.values() for group in report.groups] == ["actor", "critic", "ent_coef"]


def test_trpo_steps_its_critic_only() -> None:
    (report,) = reports(sb3_checkpoint("TRPO")).values()
    stepped = {tensor.name for tensor in report.tensors if tensor.recent_norm is not None}
    assert stepped == {tensor.name for tensor in report.tensors if "value_net" in tensor.name}


def test_ars_has_no_optimizer() -> None:
    source = open_source(str(sb3_checkpoint("ARS")))
    assert source.optimizers() == ()
    assert any("no optimizer" in note for note in source.notes)


def test_a_checkpoint_has_no_steps_to_replay() -> None:
    source = open_source(str(sb3_checkpoint("PPO")))
    assert (source.tensors, source.groups) == ((), ())
    with pytest.raises(GradscopeError, match="holds no gradients") as raised:
        next(source.read_steps(range(1)))
    assert raised.value.hint is not None
    assert "--batch" in raised.value.hint
    assert "record" in raised.value.hint


# --- the saturation of a run whose norms were logged -----------------------------------------------------------------


def test_saturation_agrees_with_the_logged_norms() -> None:
    path, norms = sb3_logged_ppo()
    (report,) = reports(path).values()
    assert report.max_norm is not None
    assert report.saturation is not None
    assert report.clipped_share_at_most is not None
    assert report.at_limit_share_at_least is not None
    assert report.steps == len(norms)
    before = np.array(norms)
    after = before * np.minimum(1.0, report.max_norm / (before + 1e-6))
    weights = 0.999 ** np.arange(len(norms) - 1, -1, -1)
    weights /= weights.sum()
    clipped_share = float(weights @ (before > report.max_norm))
    assert 0.05 < clipped_share < 0.999, "the run should be clipped in some of its steps only"
    assert report.saturation == pytest.approx(float(weights @ after**2) / report.max_norm**2, rel=1e-5)
    assert clipped_share <= report.clipped_share_at_most
    for c, least in report.at_limit_share_at_least.items():
        assert float(weights @ (after >= float(c) * report.max_norm * (1 - 1e-6))) >= least
    assert report.at_limit_share_at_least["0.9"] > 0.1


# --- files written otherwise -----------------------------------------------------------------------------------------


def rewritten(path: Path, target: Path, compression: int = zipfile.ZIP_STORED, **changed: bytes | None) -> Path:
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(target, "w", compression) as copy:
        for name in archive.namelist():
            content = changed.get(name, archive.read(name))
            if content is not None:
                copy.writestr(name, content)
    return target


def same(one: GradientSource, other: GradientSource) -> bool:
    return [analyse(state) for state in one.optimizers()] == [analyse(state) for state in other.optimizers()]


def test_a_compressed_zip_reads_the_same(tmp_path: Path) -> None:
    path = sb3_checkpoint("PPO")
    compressed = rewritten(path, tmp_path / "ppo.zip", zipfile.ZIP_DEFLATED)
    assert compressed.stat().st_size < path.stat().st_size
    assert same(open_source(str(path)), open_source(str(compressed)))


def test_members_from_before_torch_1_6_read_the_same(tmp_path: Path) -> None:
    """SB3 0.x with PyTorch 1.4 wrote each member in the legacy format and keyed the state by ids."""
    path = sb3_checkpoint("PPO")
    changed: dict[str, bytes | None] = {}
    for name, content in members(path).items():
        if name == "policy.optimizer":
            ids = {i: 140_000_000_000_000 + 64 * i for i in content["param_groups"][0]["params"]}
            content["state"] = {ids[i]: entry for i, entry in content["state"].items()}
            for entry in content["state"].values():
                entry["step"] = int(entry["step"])
            content["param_groups"][0]["params"] = list(ids.values())
        buffer = io.BytesIO()
        torch.save(content, buffer, _use_new_zipfile_serialization=False)
        changed[f"{name}.pth"] = buffer.getvalue()
    legacy = rewritten(path, tmp_path / "old.zip", **changed)
    assert same(open_source(str(path)), open_source(str(legacy)))


@pytest.mark.parametrize("max_grad_norm", ["0.5", None, [0.5], 1e400, {"a": 1}, 10**400])
def test_an_odd_max_grad_norm_is_none(tmp_path: Path, max_grad_norm: Any) -> None:
    path = sb3_checkpoint("PPO")
    data = settings_of(path) | {"max_grad_norm": max_grad_norm}
    odd = rewritten(path, tmp_path / "odd.zip", data=json.dumps(data).encode())
    (report,) = reports(odd).values()
    assert (report.max_norm, report.saturation) == (None, None)
    assert report.recent_norm is not None


def test_tied_feature_extractors_count_once(tmp_path: Path) -> None:
    """SB3 stores a shared extractor three times: for the policy, for its actor and for its critic."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.torch_layers import BaseFeaturesExtractor

    class Extractor(BaseFeaturesExtractor):
        def __init__(self, space: Any) -> None:
            super().__init__(space, 8)
            self.linear = torch.nn.Linear(space.shape[0], 8)

        def forward(self, observed: torch.Tensor) -> torch.Tensor:
            return self.linear(observed)

    settings = {"features_extractor_class": Extractor, "net_arch": [8]}
    model = PPO("MlpPolicy", "CartPole-v1", n_steps=32, batch_size=32, n_epochs=1, policy_kwargs=settings)
    model.learn(32)
    path = tmp_path / "shared.zip"
    model.save(path)
    source = open_source(str(path))
    names = [name for name, _ in model.policy.named_parameters()]
    (state,) = source.optimizers()
    assert [parameter.name for parameter in state.parameters] == names
    weights = source.weights()
    assert weights is not None
    assert sum(tensor.numel for tensor in weights.tensors) == sum(p.numel() for p in model.policy.parameters())
    assert "pi_features_extractor.linear.weight: the same tensor as features_extractor.linear.weight" in source.skipped
