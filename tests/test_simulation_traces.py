"""Policies replayed on a trace: group spectra at every step, tensor spectra at some."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from in_memory_source import Arrays, InMemorySource, RecordedSource, angle_deg, flatten
from trace_rows import described, row, write

import gradscope
from gradscope.errors import GradscopeError
from gradscope.inspection import inspect
from gradscope.simulation import simulate
from gradscope.views import VIEWS
from gradscope.views.choices import ViewChoices

GROUPS = {"actor": ["actor.0.weight", "actor.0.bias"], "critic": ["critic.0.weight"]}


def run(steps: int = 40, seed: int = 0) -> list[Arrays]:
    random = np.random.default_rng(seed)
    shapes = {"actor.0.weight": (8, 4), "actor.0.bias": (8,), "critic.0.weight": (6, 4)}
    return [
        {
            name: (random.normal(size=shape) * size).astype(np.float32)
            for (name, shape), size in zip(shapes.items(), random.uniform(0.1, 3, 3), strict=True)
        }
        for _ in range(steps)
    ]


def clipped(step: Arrays, names: list[str], v: float) -> tuple[np.ndarray, np.ndarray]:
    before = flatten([step[name] for name in names])
    return before, np.clip(before, -v, v)


@pytest.mark.parametrize("v", [0.05, 0.5, 2.0, 100.0])
def test_value_clipping_is_read_off_the_groups_at_every_step(v: float) -> None:
    steps = run()
    result = simulate(RecordedSource(steps, GROUPS), [f"value:{v}"]).results[0]
    names = [name for members in GROUPS.values() for name in members]
    joint = [clipped(step, names, v) for step in steps]
    angles = np.array([angle_deg(before, after) for before, after in joint])
    change = result.direction_change_deg
    assert change is not None
    error = result.direction_change_error_deg + 1e-9
    assert abs(change.max - angles.max()) <= error
    assert abs(change.mean - angles.mean()) <= error
    assert result.clip_rate == np.mean([np.abs(before).max() > v for before, _ in joint])
    elements = sum(int((np.abs(before) > v).sum()) for before, _ in joint)
    assert abs(result.clipped_elements - elements) <= result.clipped_elements_error
    assert (result.group_steps, result.layer_steps) == (40, 4)
    for group in result.groups:
        own = [clipped(step, GROUPS[group.name], v) for step in steps]
        expected = np.mean([angle_deg(before, after) for before, after in own])
        assert group.direction_change_deg.mean == pytest.approx(expected, abs=0.1)
        assert group.clip_rate == np.mean([np.abs(before).max() > v for before, _ in own])


def test_layers_come_from_the_steps_with_tensor_spectra_and_their_rates_from_all() -> None:
    steps, v = run(), 0.5
    result = simulate(RecordedSource(steps, GROUPS), [f"value:{v}"]).results[0]
    names = {"actor.0": GROUPS["actor"], "critic.0": GROUPS["critic"]}
    for layer in result.layers:
        own = [clipped(step, names[layer.name], v) for step in steps]
        sampled = own[::10]
        assert layer.clip_rate == np.mean([np.abs(before).max() > v for before, _ in own])
        angles = [angle_deg(before, after) for before, after in sampled]
        assert layer.direction_change_deg == pytest.approx(np.mean(angles), abs=0.1)
        elements = sum(int((np.abs(before) > v).sum()) for before, _ in sampled)
        assert abs(layer.clipped_elements - elements) <= layer.clipped_elements_error
    text = VIEWS["table"](simulate(RecordedSource(steps, GROUPS), [f"value:{v}"]), ViewChoices())
    assert "elements: over the 4 updates whose tensors' spectra were recorded" in " ".join(text.split())


def test_other_groups_come_from_the_steps_with_tensor_spectra() -> None:
    steps, v = run(), 0.5
    weights = [name for name in steps[0] if name.endswith("weight")]
    source = RecordedSource(steps, GROUPS)
    result = simulate(source, [f"value:{v}"], groups={"weights": "*.weight"}).results[0]
    group = next(group for group in result.groups if group.name == "weights")
    own = [clipped(step, weights, v) for step in steps]
    assert group.clip_rate == np.mean([np.abs(before).max() > v for before, _ in own])
    expected = np.mean([angle_deg(before, after) for before, after in own[::10]])
    assert group.direction_change_deg.mean == pytest.approx(expected, abs=0.1)
    assert (result.group_steps, result.layer_steps) == (4, 4)
    # The joint gradient has no such gap.
    whole = simulate(source, [f"value:{v}"]).results[0]
    assert result.direction_change_deg == whole.direction_change_deg
    with pytest.raises(GradscopeError, match="none of these steps holds the spectra"):
        simulate(source, [f"value:{v}"], groups={"weights": "*.weight"}, steps="1:9")


def test_unions_of_recorded_groups_are_known_at_every_step() -> None:
    steps = run()
    result = simulate(RecordedSource(steps, GROUPS), ["value:0.5"], groups={"all": "*"}).results[0]
    assert (result.group_steps, len(result.groups)) == (40, 1)
    assert result.groups[0].direction_change_deg == result.direction_change_deg


def test_without_any_tensor_spectrum_there_are_no_layers() -> None:
    result = simulate(RecordedSource(run(), GROUPS), ["value:0.5"], steps="1:9").results[0]
    assert (result.layers, result.layer_steps, result.group_steps) == ((), 0, 8)
    assert result.clipped_elements > 0


def test_full_detail_is_what_a_dump_tells() -> None:
    steps = run(12)
    full = simulate(RecordedSource(steps, GROUPS, tensor_every=1), ["value:0.5"]).results[0]
    dumps = simulate(InMemorySource(steps, GROUPS), ["value:0.5"]).results[0]
    assert full.layers == dumps.layers
    assert (full.layer_steps, dumps.layer_steps) == (12, 12)
    assert full.direction_change_deg is not None and dumps.direction_change_deg is not None
    assert full.direction_change_deg.mean == pytest.approx(dumps.direction_change_deg.mean, abs=0.05)


def test_a_trace_of_norms_refuses_what_needs_more() -> None:
    source = RecordedSource(run(), GROUPS, tensor_every=None)
    assert simulate(source, ["norm:1", "per-layer-norm:1"]).steps == 40
    with pytest.raises(GradscopeError, match="holds norms only") as caught:
        simulate(source, ["value:0.5"])
    assert caught.value.hint is not None and "--detail norms" in caught.value.hint


def test_agc_needs_whole_tensors() -> None:
    with pytest.raises(GradscopeError, match="a trace holds magnitudes") as caught:
        simulate(RecordedSource(run()), ["agc:0.01"])
    assert caught.value.hint is not None and "safetensors.torch.save_file" in caught.value.hint


def test_a_tensor_without_a_gradient_needs_no_spectrum() -> None:
    steps = run()
    for step in steps[5:]:
        step["critic.0.weight"] = np.zeros(0, np.float32)
    result = simulate(RecordedSource(steps, GROUPS), ["value:0.5"]).results[0]
    assert result.groups[1].clip_rate <= 5 / 40


def test_of_groups_that_overlap_the_first_to_divide_the_tensors_count() -> None:
    steps = run(12)
    twice = {"all": list(steps[0]), "critic": GROUPS["critic"]}
    result = simulate(RecordedSource(steps, twice), ["value:0.5"]).results[0]
    once = simulate(RecordedSource(steps), ["value:0.5"]).results[0]
    assert (result.direction_change_deg, result.clipped_elements) == (once.direction_change_deg, once.clipped_elements)
    overlapping = {"critic": GROUPS["critic"], "all": list(steps[0])}
    full = simulate(RecordedSource(steps, overlapping, tensor_every=1), ["value:0.5"]).results[0]
    dumps = simulate(InMemorySource(steps), ["value:0.5"]).results[0]
    assert abs(full.clipped_elements - dumps.clipped_elements) <= full.clipped_elements_error
    with pytest.raises(GradscopeError, match="some of its tensors only") as caught:
        simulate(RecordedSource(steps, overlapping), ["value:0.5"])
    assert caught.value.hint is not None and "--detail full" in caught.value.hint


def test_without_a_policy_a_trace_is_replayed_with_its_own_max_norm() -> None:
    limits = np.array([0.5, 2.0])
    simulation = simulate(RecordedSource(run(), GROUPS, limits=limits), [])
    assert [result.policy for result in simulation.results] == ["norm:0.5", "norm:2"]
    assert "max_norm 0.5, 2 is what the run itself clipped with" in simulation.notes[-1]
    alike = simulate(RecordedSource(run(), GROUPS, limits=1.0), [])
    assert [result.policy for result in alike.results] == ["norm:1"]
    assert simulate(RecordedSource(run(), GROUPS), []).results == ()
    assert simulate(InMemorySource(run()), []).results == ()


def test_gaps_between_the_numbers_of_steps_are_no_steps() -> None:
    source = RecordedSource(run(), GROUPS, limits=1.0, apart=10)
    simulation = simulate(source, ["norm:1"])
    assert simulation.results[0].recent.steps == (200, 390)
    assert (simulation.results[0].recent.length, simulation.recent_steps) == (20, 20)
    assert "of the last 20 updates" in simulation.findings[0]
    assert inspect(source).findings[0].startswith("actor: max_norm 1 clipped ")
    at = inspect(source, at=70).gradients
    assert at is not None and at.at is not None
    assert [row.step for row in at.at] == list(range(0, 80, 10))
    with pytest.raises(GradscopeError, match="no step that was read; the one before it is 70"):
        inspect(source, at=75)
    with pytest.raises(GradscopeError, match="steps run from 0 to 390"):
        inspect(source, at=400)


@pytest.mark.parametrize("v", [0.003, 0.05, 0.5, 2.0])
def test_angles_of_a_stored_trace_hold_the_truth_within_a_degree(tmp_path: Path, v: float) -> None:
    steps = run(30, seed=3)
    names = list(steps[0])
    metadata = described({name: array.shape for name, array in steps[0].items()}, GROUPS, framework="rsl_rl PPO")
    rows = [
        row(i, [step[name] for name in members], group, spectra="group" if i % 10 else "all", max_norm=1.0)
        for i, step in enumerate(steps)
        for group, members in enumerate(GROUPS.values())
    ]
    trace = write(tmp_path / "run.gradscope", metadata, rows)
    simulation = gradscope.simulate(trace, [f"value:{v}"])
    result = simulation.results[0]
    angles = np.array([angle_deg(*clipped(step, names, v)) for step in steps])
    change = result.direction_change_deg
    assert change is not None
    assert result.direction_change_error_deg <= 1.0
    for told, true in ((change.min, angles.min()), (change.mean, angles.mean()), (change.max, angles.max())):
        assert abs(told - true) <= result.direction_change_error_deg + 1e-6
    elements = sum(int((np.abs(flatten(list(step.values()))) > v).sum()) for step in steps)
    assert abs(result.clipped_elements - elements) <= result.clipped_elements_error
    assert (result.group_steps, result.layer_steps) == (30, 3)
    assert VIEWS["table"](simulation, ViewChoices(opening="Using it")).startswith("Using it: 30 updates, rsl_rl PPO\n")
    assert gradscope.inspect(trace).recorded is not None
    # Several policies share what was decoded.
    both = gradscope.simulate(trace, [f"value:{v}", "value:0.1"]).results
    assert both[0] == result
