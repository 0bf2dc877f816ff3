"""``vanishing``, ``depth-decay`` and ``layer-dominance``: layers beside each other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from in_memory_source import Arrays, InMemorySource, NormSource, RecordedSource
from judged import SAMPLES, judged
from scipy import stats

from gradscope.health.rules.depth_decay import kendall_tau, theil_sen_slope

RULES = ("vanishing", "depth-decay", "layer-dominance")


def run(sizes: Mapping[str, float], steps: int = 20, shape: tuple[int, ...] = (4, 4), seed: int = 0) -> list[Arrays]:
    """Steps of one tensor per name whose gradient has about this root mean square."""
    rng = np.random.default_rng(seed)
    return [{name: size * rng.standard_normal(shape) for name, size in sizes.items()} for _ in range(steps)]


def stack(factor: float, depth: int, prefix: str = "", top: float = 1.0) -> dict[str, float]:
    """Layers whose gradient shrinks by ``factor`` a layer on the way to the input."""
    return {f"{prefix}{2 * i}.weight": top * factor ** -(depth - 1 - i) for i in range(depth)}


def medians(steps: list[Arrays]) -> dict[str, float]:
    return {name: float(np.median([np.linalg.norm(step[name]) for step in steps])) for name in steps[0]}


# --- vanishing -------------------------------------------------------------------------------------------------------


def test_a_layer_of_next_to_no_norm_vanishes() -> None:
    steps = run({"a.weight": 1e-14, "b.weight": 1.0})
    outcome = judged("vanishing", InMemorySource(steps))
    assert outcome.status == "fail"
    assert (outcome.where, outcome.limit, outcome.steps) == ("a", 1e-12, (0, 19))
    assert outcome.value == pytest.approx(medians(steps)["a.weight"])
    assert judged("vanishing", InMemorySource(steps), min=1e-15).status == "pass"


def test_a_layer_far_below_the_others_vanishes() -> None:
    steps = run({"a.weight": 1e-8, "b.weight": 1.0, "c.weight": 2.0})
    outcome = judged("vanishing", InMemorySource(steps))
    norms = medians(steps)
    assert outcome.status == "fail"
    assert outcome.where == "a"
    assert outcome.value == pytest.approx(norms["a.weight"] / norms["b.weight"])
    assert outcome.limit == 1e-6
    assert len(outcome.violations) == 1


def test_where_weights_are_known_the_gradient_counts_relative_to_them() -> None:
    steps = run({"a.weight": 1e-8, "b.weight": 1.0, "c.weight": 1.0})
    small = {"a.weight": (1e-7, 0.0), "b.weight": (1.0, 0.0), "c.weight": (1.0, 0.0)}
    weighed = RecordedSource(steps, updates=small)
    outcome = judged("vanishing", weighed, min=1e-20)
    norms = medians(steps)
    relative = sorted(norms[name] / small[name][0] for name in norms)
    assert outcome.status == "pass"
    assert outcome.value == pytest.approx(relative[0] / relative[1])
    assert "relative to its weights" in outcome.message
    assert judged("vanishing", RecordedSource(steps)).status == "fail"


def test_a_converged_run_is_small_all_over_and_passes() -> None:
    assert judged("vanishing", InMemorySource(run(dict.fromkeys("abcd", 1e-10)))).status == "pass"


def test_actor_and_critic_are_judged_apart() -> None:
    sizes = {f"critic.{i}.weight": 1e6 for i in range(4)} | {f"actor.{i}.weight": 1e-2 for i in range(3)}
    assert judged("vanishing", InMemorySource(run(sizes))).status == "pass"
    one = judged("vanishing", InMemorySource(run(sizes | {"actor.0.weight": 1e-9})))
    assert (one.status, one.where) == ("fail", "actor.0")


def test_two_layers_have_no_others() -> None:
    assert judged("vanishing", InMemorySource(run({"a.weight": 1e-9, "b.weight": 1.0}))).status == "pass"


def test_a_zero_gradient_is_not_a_small_one() -> None:
    assert judged("vanishing", InMemorySource(run({"a.w": 0.0, "b.w": 1.0, "c.w": 1.0, "d.w": 1.0}))).status == "pass"
    assert judged("vanishing", InMemorySource(run({"a.w": 0.0}))).status == "skipped"


# --- depth-decay -----------------------------------------------------------------------------------------------------


def test_the_decay_is_the_line_over_the_whole_depth() -> None:
    steps = run(stack(7.0, 12))
    outcome = judged("depth-decay", InMemorySource(steps))
    logs = np.log(np.array(list(medians(steps).values())) / 4.0)
    slope = stats.theilslopes(logs, np.arange(12)).slope
    assert outcome.status == "fail"
    assert outcome.value == pytest.approx(math.exp(11 * slope))
    assert outcome.where == "0"
    assert "From layer 22 back to 0" in outcome.message
    assert "over 12 layers" in outcome.message


def test_one_small_layer_is_no_decay() -> None:
    assert judged("depth-decay", InMemorySource(run(stack(1.0, 8) | {"0.weight": 1e-12}))).status == "pass"


def test_depth_must_explain_the_decay() -> None:
    rng = np.random.default_rng(3)
    for _ in range(20):
        sizes = {f"{i}.weight": 10.0 ** rng.uniform(-8, 0) for i in range(9)}
        logs = np.log(list(sizes.values()))
        fits = stats.kendalltau(logs, np.arange(9)).statistic >= 0.7
        decays = 8 * stats.theilslopes(logs, np.arange(9)).slope > math.log(1e4)
        outcome = judged("depth-decay", InMemorySource(run(sizes, steps=1, shape=(40, 40))))
        assert (outcome.status == "fail") == (fits and decays)


def test_chains_are_judged_apart_and_short_ones_not() -> None:
    sizes = stack(10.0, 6, "actor.") | stack(1.0, 6, "critic.") | stack(1e3, 4, "encoder.")
    outcome = judged("depth-decay", InMemorySource(run(sizes)))
    assert [reading.where for reading in outcome.violations] == ["actor.0"]
    assert judged("depth-decay", InMemorySource(run(stack(1e3, 4, "encoder.")))).status == "skipped"


def test_a_block_of_a_transformer_counts_as_one_layer() -> None:
    sizes: dict[str, float] = {"embed_tokens.weight": 1e-9}
    for i in range(6):
        for name, size in {"attn.q_proj": 1e-6, "attn.o_proj": 1.0, "mlp.0": 1e-3, "mlp.2": 2.0}.items():
            sizes[f"model.layers.{i}.{name}.weight"] = size
    outcome = judged("depth-decay", InMemorySource(run(sizes)))
    assert outcome.status == "pass"
    assert outcome.value == pytest.approx(1.0, abs=0.9)
    assert "over 6 layers" in outcome.message


def test_a_chain_inside_a_short_one_is_found() -> None:
    outcome = judged("depth-decay", InMemorySource(run(stack(10.0, 7, "net.0.") | {"net.1.weight": 1.0})))
    assert (outcome.status, outcome.where) == ("fail", "net.0.0")


def test_numbered_names_are_a_chain_and_biases_are_none() -> None:
    sizes = {f"fc{i}.weight": 10.0 ** (i - 6) for i in range(7)}
    assert judged("depth-decay", InMemorySource(run(sizes))).status == "fail"
    assert judged("depth-decay", InMemorySource(run(sizes, shape=(16,)))).status == "skipped"


def test_files_that_hold_ten_before_two_are_in_the_order_of_the_layers() -> None:
    sizes = stack(10.0, 9) | {"out.weight": 10.0}
    ordered, in_file = (judged("depth-decay", InMemorySource(run(by))) for by in (sizes, dict(sorted(sizes.items()))))
    assert list(dict(sorted(sizes.items())))[:3] == ["0.weight", "10.weight", "12.weight"]
    assert (in_file.status, in_file.where) == ("fail", "0")
    assert in_file.value == pytest.approx(ordered.value, rel=0.5)


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=12))
def test_slope_and_correlation_are_those_of_scipy(values: list[float]) -> None:
    array = np.array(values)
    assert theil_sen_slope(array) == pytest.approx(stats.theilslopes(array).slope, abs=1e-9)
    if len(set(values)) == len(values):
        assert kendall_tau(array) == pytest.approx(stats.kendalltau(array, np.arange(len(array))).statistic)


# --- layer-dominance -------------------------------------------------------------------------------------------------


def test_the_share_is_the_median_over_the_steps() -> None:
    steps = run({"a.weight": 50.0, "a.bias": 50.0, "b.weight": 1.0, "c.weight": 1.0})
    outcome = judged("layer-dominance", InMemorySource(steps))
    energies = [{name: float(np.sum(np.square(g))) for name, g in step.items()} for step in steps]
    shares = [(e["a.weight"] + e["a.bias"]) / sum(e.values()) for e in energies]
    assert outcome.status == "warn"
    assert outcome.where == "a"
    assert outcome.value == pytest.approx(np.median(shares))
    assert judged("layer-dominance", InMemorySource(steps), max=0.99999).status == "pass"


def test_two_layers_are_too_few_to_dominate() -> None:
    assert judged("layer-dominance", InMemorySource(run({"a.weight": 1e3, "b.weight": 1.0}))).status == "skipped"


# --- all of them -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_nothing_but_nan_or_zeros_or_norms_is_skipped(rule: str) -> None:
    names = {f"{i}.weight": math.nan for i in range(6)}
    assert judged(rule, InMemorySource(run(names))).status == "skipped"
    assert judged(rule, InMemorySource(run(dict.fromkeys(names, 0.0)))).status == "skipped"
    log = NormSource(np.ones((20, 6)))
    log.info = type(log.info)("norms.csv", "norm-log", "CSV", 20)
    assert judged(rule, log).status == "skipped"
    assert "log of norms" in judged(rule, log).message


@pytest.mark.parametrize("rule", RULES)
def test_empty_tensors_one_step_and_steps_with_nan_do_no_harm(rule: str) -> None:
    steps = run(stack(1.0, 6), steps=5)
    for step in steps:
        step["empty.weight"] = np.zeros((0, 4))
    steps[2]["0.weight"][0, 0] = np.nan
    assert judged(rule, InMemorySource(steps)).status == "pass"
    assert judged(rule, InMemorySource(steps[:1])).status == "pass"


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "name", ["ppo_cartpole.gradscope", "ppo_cartpole.zip", "a2c_cartpole.zip", "rsl_rl_run", "rsl_rl_run.gradscope"]
)
def test_the_samples_raise_no_alarm(rule: str, name: str) -> None:
    assert judged(rule, SAMPLES / name).status == ("skipped" if rule == "depth-decay" else "pass")


def checkpoint(path: Path, model: torch.nn.Module, steps: int = 5) -> Path:
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(torch.randn(32, 8)), torch.randn(32, 1)).backward()
        optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    return path


def sigmoid_stack(depth: int) -> torch.nn.Module:
    torch.manual_seed(depth)
    inner = [part for _ in range(depth - 2) for part in (torch.nn.Linear(16, 16), torch.nn.Sigmoid())]
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Sigmoid(), *inner, torch.nn.Linear(16, 1))


def test_an_optimizer_tells_of_layers_that_hardly_train(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "stack.pt", sigmoid_stack(16))
    decay, vanishing = judged("depth-decay", path), judged("vanishing", path)
    assert (decay.status, decay.where, vanishing.status) == ("fail", "0", "fail")
    assert "recent gradient norm" in vanishing.message
    shallow = checkpoint(tmp_path / "shallow.pt", sigmoid_stack(3))
    assert [judged(rule, shallow).status for rule in RULES] == ["pass", "skipped", "pass"]
