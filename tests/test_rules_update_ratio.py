"""``update-ratio`` against the weights before and after each step."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from judged import SAMPLES, judged
from recorded import record
from torch import nn

from tests.in_memory_source import InMemorySource, NormSource, RecordedSource


@pytest.fixture(autouse=True)
def errors_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADSCOPE_DEBUG", "1")


class Followed:
    """A recorded training, and the norms of the updates of its matrices by torch in float64."""

    def __init__(self, directory: Path, model: nn.Module, lr: float, steps: int = 120) -> None:
        torch.manual_seed(1)
        optimizer = torch.optim.Adam(model.parameters(), lr=lr)
        matrices = {name: p for name, p in model.named_parameters() if p.ndim == 2}
        self.updates: dict[str, list[float]] = {name: [] for name in matrices}
        self.weights: dict[str, list[float]] = {name: [] for name in matrices}
        self.initial = {name: math.sqrt(p.shape[0] / 3) for name, p in matrices.items()}

        def train() -> None:
            for _ in range(steps):
                x = torch.randn(32, 8)
                optimizer.zero_grad()
                (model(x) - x[:, :2]).pow(2).mean().backward()
                before = {name: p.detach().double().clone() for name, p in matrices.items()}
                optimizer.step()
                for name, p in matrices.items():
                    self.updates[name].append(float((p.detach().double() - before[name]).norm()))
                    self.weights[name].append(float(before[name].norm()))

        self.path = record(directory, train).path

    def of_weights(self, name: str) -> np.ndarray:
        return np.array(self.updates[name]) / np.maximum(self.weights[name], self.initial[name])

    def of_initial(self, name: str) -> np.ndarray:
        return np.array(self.updates[name]) / self.initial[name]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 2))


def test_the_largest_median_of_a_part_is_torchs(tmp_path: Path) -> None:
    followed = Followed(tmp_path, network(), 1e-2)
    # 12 measured steps in four parts, of which the first is left out.
    parts = [(30, 40, 50), (60, 70, 80), (90, 100, 110)]

    def expected(ratios: Callable[[str], np.ndarray]) -> dict[str, float]:
        return {
            name.split(".")[0]: max(float(np.median(ratios(name)[list(part)])) for part in parts)
            for name in followed.updates
        }

    verdict = judged("update-ratio", followed.path, max=0.0)
    assert {found.where: found.value for found in verdict.violations} == pytest.approx(
        expected(followed.of_weights), rel=1e-4
    )
    assert {found.steps for found in verdict.violations} <= {(part[0], part[-1]) for part in parts}
    beyond = judged("update-ratio", followed.path, **{"max-of-initial": 0.0})
    assert {found.where: found.value for found in beyond.violations} == pytest.approx(
        expected(followed.of_initial), rel=1e-4
    )
    assert expected(followed.of_weights) != pytest.approx(expected(followed.of_initial), rel=1e-2)
    nearest = judged("update-ratio", followed.path)
    assert nearest.status == "pass"
    assert nearest.value == pytest.approx(max(expected(followed.of_weights).values()), rel=1e-4)


def test_a_hundredfold_learning_rate_fails(tmp_path: Path) -> None:
    verdict = judged("update-ratio", Followed(tmp_path, network(), 0.1).path)
    assert verdict.violations
    assert "lower the learning rate" in verdict.violations[0].message


def test_inputs_far_wider_than_the_outputs_are_no_sign_of_a_high_rate() -> None:
    def largest(shape: tuple[int, ...]) -> float:
        source = RecordedSource([{"a.weight": np.ones(shape)}] * 60, updates={"a.weight": (1.0, 1.0)})
        found = judged("update-ratio", source, **{"max-of-initial": 0.0, "max": 1e9}).violations[0].value
        assert found is not None
        return found

    assert largest((6, 2)) == largest((6, 64)) == largest((6, 4, 4, 4)) == pytest.approx(math.sqrt(3 / 6))
    assert largest((6, 2400)) == pytest.approx(math.sqrt(3 / 6 / (2400 / 64)))
    assert largest((32, 128)) == pytest.approx(math.sqrt(3 / 32))
    assert largest((32, 1280)) == pytest.approx(math.sqrt(3 / 320))


def test_weights_that_start_at_zero_are_no_alarm(tmp_path: Path) -> None:
    model = network()
    nn.init.zeros_(model[2].weight)
    assert judged("update-ratio", Followed(tmp_path, model, 1e-3).path).status == "pass"


def test_a_layer_that_hardly_learns_fails_only_where_min_is_set(tmp_path: Path) -> None:
    path = Followed(tmp_path, network(), 1e-7).path
    assert judged("update-ratio", path).status == "pass"
    assert "hardly learns" in judged("update-ratio", path, min=1e-4).violations[0].message


def test_a_learning_rate_of_zero_fails(tmp_path: Path) -> None:
    (violation,) = judged("update-ratio", Followed(tmp_path, network(), 0.0).path).violations
    assert violation.steps == (60, 110)
    assert "changed nothing at all: a learning rate of zero" in violation.message


def test_steps_that_were_not_to_change_anything_are_no_fault_of_the_learning_rate() -> None:
    arrays = {"a.weight": np.ones((3, 4)), "scale": np.ones(3)}
    nothing = {"a.weight": (1.0, 0.0), "scale": (1.0, 0.0)}
    assert judged("update-ratio", RecordedSource([arrays] * 60, updates=nothing)).violations
    one_kept = {**nothing, "scale": (1.0, 1e-9)}
    zeros = {name: np.zeros_like(array) for name, array in arrays.items()}
    for source in (
        RecordedSource([arrays] * 60, updates=one_kept),
        RecordedSource([arrays] * 60, updates=nothing, limits=0.0),
        RecordedSource([arrays] * 60, updates=nothing, stepped=0),
        RecordedSource([zeros] * 60, updates=nothing),
    ):
        assert judged("update-ratio", source).status == "pass"


def recorded(updates: dict[str, tuple[float, float]], steps: int, every: int = 10) -> RecordedSource:
    arrays = {"a.weight": np.ones((3, 4)), "a.bias": np.ones(3), "log_std": np.ones(2)}
    return RecordedSource([arrays] * steps, tensor_every=every, updates=updates)


def test_only_layers_with_a_matrix_count() -> None:
    sizes = {"a.weight": (1.0, 0.01), "a.bias": (0.0, 9.0), "log_std": (1e-9, 5.0)}
    nearest = judged("update-ratio", recorded(sizes, 60))
    assert nearest.status == "pass"
    assert (nearest.where, nearest.value) == ("a", pytest.approx(0.01))
    assert judged("update-ratio", recorded({"log_std": (1.0, 5.0)}, 60)).status == "skipped"


def test_one_outlying_step_does_not_fail() -> None:
    class Spiked(RecordedSource):
        def _recorded(self, index: int, names: list[str], sampled: bool) -> Any:
            call = super()._recorded(index, names, sampled)
            if call.update_norm is not None and index == 80:
                call.update_norm[:] *= 1e4
            return call

    arrays = {"a.weight": np.ones((3, 4))}
    source = Spiked([arrays] * 100, updates={"a.weight": (1.0, 0.01)})
    assert judged("update-ratio", source).status == "pass"


def test_too_few_measured_steps_cannot_tell() -> None:
    assert judged("update-ratio", recorded({"a.weight": (1.0, 5.0)}, 1)).status == "skipped"
    assert judged("update-ratio", recorded({"a.weight": (1.0, 5.0)}, 20)).status == "skipped"
    (found,) = judged("update-ratio", recorded({"a.weight": (1.0, 5.0)}, 21)).violations
    assert found.steps == (10, 20)


def test_of_two_measured_steps_both_must_be_too_large() -> None:
    class Uneven(RecordedSource):
        def _recorded(self, index: int, names: list[str], sampled: bool) -> Any:
            call = super()._recorded(index, names, sampled)
            if call.update_norm is not None and index == 10:
                call.update_norm[:] *= 100.0
            return call

    outcome = judged("update-ratio", Uneven([{"a.weight": np.ones((3, 4))}] * 25, updates={"a.weight": (1.0, 0.01)}))
    assert (outcome.status, outcome.value) == ("pass", pytest.approx(0.01))


def test_a_short_run_is_judged_by_what_it_did_briefly() -> None:
    (found,) = judged("update-ratio", recorded({"a.weight": (100.0, 0.2)}, 50)).violations
    assert (found.value, found.limit, found.steps) == (pytest.approx(0.2), 0.15, (10, 30))
    nearest = judged("update-ratio", recorded({"a.weight": (100.0, 0.1)}, 50))
    assert nearest.status == "pass"
    assert (nearest.value, nearest.limit) == (pytest.approx(0.1), 0.15)


def test_what_is_large_for_a_while_only_may_be_larger() -> None:
    class Early(RecordedSource):
        def _recorded(self, index: int, names: list[str], sampled: bool) -> Any:
            call = super()._recorded(index, names, sampled)
            if call.update_norm is not None and 10 <= index <= 40:
                call.update_norm[:] *= self.factor
            return call

        factor = 1.0

    def briefly(factor: float) -> Any:
        source = Early([{"a.weight": np.ones((3, 4))}] * 400, updates={"a.weight": (1.0, 0.01)})
        source.factor = factor
        return judged("update-ratio", source)

    assert briefly(14.0).status == "pass"
    (found,) = briefly(16.0).violations
    assert (found.value, found.limit, found.steps) == (pytest.approx(0.16), 0.15, (10, 30))


def test_sources_without_updates_cannot_tell() -> None:
    for source in (InMemorySource([{"a.weight": np.ones((3, 4))}]), NormSource(np.ones((5, 2)))):
        assert judged("update-ratio", source).status == "skipped"
    assert judged("update-ratio", SAMPLES / "a2c_cartpole.zip").status == "skipped"


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW])
def test_a_checkpoint_tells_adams_last_update(tmp_path: Path, optimizer: Any) -> None:
    model = network()
    adam = optimizer(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(7):
        x = torch.randn(32, 8)
        adam.zero_grad()
        (model(x) - x[:, :2]).pow(2).mean().backward()
        before = {name: p.detach().double().clone() for name, p in model.named_parameters()}
        adam.step()
    torch.save({"model": model.state_dict(), "optimizer": adam.state_dict()}, tmp_path / "checkpoint.pt")
    expected = {}
    for layer in ("0", "2"):
        weight = model.get_parameter(f"{layer}.weight").detach().double()
        update = float((weight - before[f"{layer}.weight"]).norm())
        expected[layer] = update / max(float(weight.norm()), math.sqrt(weight.shape[0] / 3))
    verdict = judged("update-ratio", tmp_path / "checkpoint.pt", max=0.0)
    assert {found.where: found.value for found in verdict.violations} == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("sample", ["ppo_cartpole.zip", "ppo_cartpole.gradscope", "rsl_rl_run", "rsl_rl_run.gradscope"])
def test_healthy_samples_pass(sample: str) -> None:
    nearest = judged("update-ratio", SAMPLES / sample)
    assert nearest.status == "pass"
    assert 1e-4 < (nearest.value or 0.0) < 0.05
