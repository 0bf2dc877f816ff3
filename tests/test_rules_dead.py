"""``dead``: gradients that are zero step after step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from in_memory_source import Arrays, InMemorySource, NormSource
from judged import SAMPLES, judged

from gradscope.gradients import GradientStep, Progress


def run(steps: int, zero: dict[str, range] | None = None, seed: int = 0) -> list[Arrays]:
    """Steps of three tensors, zero at the steps that ``zero`` names."""
    rng = np.random.default_rng(seed)
    made = [{name: rng.standard_normal((8, 8)) for name in ("0.weight", "0.bias", "2.weight")} for _ in range(steps)]
    for name, rows in (zero or {}).items():
        for row in rows:
            made[row][name][:] = 0.0
    return made


def test_tensors_that_are_always_zero_are_dead() -> None:
    outcome = judged("dead", InMemorySource(run(20, {"0.weight": range(20), "0.bias": range(20)})))
    assert outcome.status == "fail"
    assert (outcome.value, outcome.where, outcome.steps) == (1.0, "0.weight", (0, 19))
    assert outcome.message.startswith("0.weight, 0.bias have a gradient of exactly zero at every step from 0 to 19")
    assert len(outcome.violations) == 1


def test_a_network_that_dies_halfway_is_dead_from_there_on() -> None:
    outcome = judged("dead", InMemorySource(run(100, {name: range(60, 100) for name in ("0.weight", "2.weight")})))
    assert (outcome.status, outcome.steps) == ("fail", (60, 99))
    everything = {name: range(60, 100) for name in ("0.weight", "0.bias", "2.weight")}
    assert judged("dead", InMemorySource(run(100, everything))).message.startswith("All 3 tensors have")


def test_zeros_for_a_while_are_no_death() -> None:
    assert judged("dead", InMemorySource(run(100, {"0.weight": range(90)}))).status == "pass"
    assert judged("dead", InMemorySource(run(100, {"0.weight": range(80, 100)}))).status == "pass"
    assert judged("dead", InMemorySource(run(20, {"0.weight": range(5, 20)}))).status == "pass"


def test_one_step_proves_nothing() -> None:
    source = InMemorySource(run(2, {"0.weight": range(2)}))
    assert judged("dead", source).status == "skipped"


def with_dead_units(steps: int, share: float, name: str = "0.weight", moving: bool = False) -> list[Arrays]:
    rng = np.random.default_rng(0)
    made = run(steps)
    for step in made:
        gradient = rng.standard_normal((20, 20))
        rows = rng.permutation(20) if moving else np.arange(20)
        gradient[rows[: round(20 * share)]] = 0.0
        if moving:
            gradient[rows[-1], : rng.integers(0, 20)] = 0.0
        step[name] = gradient
        step["1.weight"] = np.where(np.arange(20) < 12, 0.0, 1.0)
        step.pop("2.weight", None)
    return made


def test_a_share_of_dead_elements_is_the_fewest_zeros() -> None:
    steps = with_dead_units(30, 0.9)
    steps[7]["0.weight"][19, :5] = 0.0
    outcome = judged("dead", InMemorySource(steps), max_share=0.8)
    assert outcome.status == "fail"
    assert outcome.value == pytest.approx(0.9)
    assert outcome.message.startswith("90.0 % of the elements of 0.weight")
    assert judged("dead", InMemorySource(steps)).status == "pass"


def test_zeros_that_wander_are_not_dead() -> None:
    assert judged("dead", InMemorySource(with_dead_units(30, 0.9, moving=True)), max_share=0.8).status == "pass"


def test_embeddings_have_rows_that_no_batch_touches() -> None:
    steps = with_dead_units(30, 0.9, "model.embed_tokens.weight")
    assert judged("dead", InMemorySource(steps), max_share=0.8).status == "pass"


def bags_of_words(biases_alive: int) -> list[Arrays]:
    """A first layer whose inputs are words, of which each batch holds a few: never the same, but about as many."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(30):
        weight, bias = np.zeros((20, 2000)), np.zeros(20)
        weight[:, rng.integers(0, 2000, 20)] = 1.0
        bias[:biases_alive] = 1.0
        made.append({"0.weight": weight, "0.bias": bias})
    return made


def test_inputs_that_are_mostly_zero_leave_a_layer_alive() -> None:
    assert judged("dead", InMemorySource(bags_of_words(20))).status == "pass"
    dying = judged("dead", InMemorySource(bags_of_words(2)))
    assert (dying.status, dying.where) == ("fail", "0.weight")


def without_biases(columns: range, behind: tuple[int, ...] = (8, 20)) -> list[Arrays]:
    """A layer without biases whose gradient is zero but in one row, and the matrix behind it, zero in ``columns``."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(30):
        first, second = np.zeros((20, 6)), rng.standard_normal(behind)
        first[-1] = rng.standard_normal(6)
        second[:, columns.start : columns.stop] = 0.0
        made.append({"table": first, "2.weight": second, "2.bias": rng.standard_normal(behind[0])})
    return made


def test_dead_units_of_a_layer_without_biases_show_in_the_matrix_behind_it() -> None:
    outcome = judged("dead", InMemorySource(without_biases(range(19))))
    assert (outcome.status, outcome.where) == ("fail", "table")
    assert outcome.value == pytest.approx(0.95)
    assert judged("dead", InMemorySource(without_biases(range(19, 19)))).status == "pass"
    assert judged("dead", InMemorySource(without_biases(range(17), (8, 18)))).status == "pass"


class Absent(InMemorySource):
    """The first tensor has a gradient at every fourth step only."""

    def read_steps(self, steps: range, progress: Progress | None = None) -> Iterator[GradientStep]:
        for step in super().read_steps(steps, progress):
            present = np.ones(len(self.tensors), dtype=np.bool_)
            present[0] = step.index % 4 == 0
            yield replace(step, present=present)


def test_a_tensor_without_a_gradient_is_not_one_of_zero() -> None:
    absent = range(0, 40)
    assert judged("dead", Absent(run(40, {"0.weight": range(1, 40, 4)}))).status == "pass"
    assert judged("dead", Absent(run(40, {"0.weight": absent}))).steps == (0, 36)


def test_nan_norms_and_empty_tensors_tell_nothing() -> None:
    steps = run(20)
    for step in steps:
        step["empty"] = np.zeros(0)
    assert judged("dead", InMemorySource(steps)).status == "pass"
    for step in steps:
        step["0.bias"][0, 0] = np.nan
    assert judged("dead", InMemorySource(steps)).status == "skipped"
    log = NormSource(np.zeros((20, 2)))
    log.info = type(log.info)("norms.csv", "norm-log", "CSV", 20)
    assert judged("dead", log).status == "skipped"


def test_an_optimizer_remembers_that_a_layer_is_dead(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8), torch.nn.ReLU())
    model.append(torch.nn.Linear(8, 1))
    optimizer = torch.optim.Adam(model.parameters())

    def saved(name: str) -> Path:
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.randn(16, 4)).square().mean().backward()
            optimizer.step()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / name)
        return tmp_path / name

    assert judged("dead", saved("alive.pt")).status == "pass"
    torch.nn.init.constant_(model[2].bias, -10.0)
    optimizer = torch.optim.Adam(model.parameters())
    outcome = judged("dead", saved("dead.pt"))
    assert (outcome.status, outcome.where) == ("fail", "0.weight")
    assert outcome.value == pytest.approx(5 / 6)


@pytest.mark.parametrize(
    "name", ["ppo_cartpole.gradscope", "ppo_cartpole.zip", "a2c_cartpole.zip", "rsl_rl_run", "ppo_cartpole_gradients"]
)
def test_the_samples_pass(name: str) -> None:
    assert judged("dead", SAMPLES / name).status == "pass"
