"""What ``inspect`` tells of a run that was recorded: its own clipping, and what the updates did to the weights."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
from in_memory_source import Arrays, InMemorySource, RecordedSource

from gradscope import results
from gradscope.inspection import inspect
from gradscope.simulation import simulate
from gradscope.views import VIEWS
from gradscope.views.choices import ViewChoices

GROUPS = {"actor": ["actor.weight"], "critic": ["critic.weight"]}


def run_of(actor: np.ndarray, critic: np.ndarray | None = None) -> list[Arrays]:
    """One step per entry, whose tensors have these norms."""
    critic = np.ones_like(actor) if critic is None else critic
    return [
        {"actor.weight": np.array([a, 0.0]), "critic.weight": np.array([0.0, c])}
        for a, c in zip(actor, critic, strict=True)
    ]


def recorded(inspection: results.Inspection) -> results.RecordedRun:
    assert inspection.recorded is not None
    return inspection.recorded


def table(inspection: results.Inspection, width: int = 80) -> str:
    return VIEWS["table"](inspection, ViewChoices(width=width))


def norms(steps: int, seed: int = 0) -> np.ndarray:
    return np.exp(np.random.default_rng(seed).normal(size=steps))


def test_one_group_clips_the_joint_norm() -> None:
    actor, critic = norms(400), norms(400, seed=1)
    inspection = inspect(RecordedSource(run_of(actor, critic), limits=1.5))
    clipped = np.hypot(actor, critic) > 1.5
    overall = recorded(inspection).overall
    assert (overall.max_norm, overall.max_norm_changes, overall.clip_value) == (1.5, 0, None)
    assert (overall.steps, overall.clipped_steps, overall.clip_rate) == (400, clipped.sum(), clipped.mean())
    assert (overall.recent.steps, overall.recent.clip_rate) == ((200, 399), clipped[200:].mean())
    (group,) = recorded(inspection).groups
    assert (group.clip_rate, group.clip_rate_ci95) == (overall.clip_rate, overall.clip_rate_ci95)
    percents = f"{100 * clipped.mean():.1f} %", f"{100 * clipped[200:].mean():.1f} %"
    assert re.search(
        rf"^max_norm 1.5 clipped {percents[0]} of 400 updates \({percents[1]} \[\d+–\d+\] of the last 200\)\.$",
        inspection.findings[0],
    )


def test_groups_are_told_apart() -> None:
    actor, critic = norms(100), norms(100, seed=1)
    inspection = inspect(RecordedSource(run_of(actor, critic), GROUPS, limits=np.array([1.0, np.nan])))
    run = recorded(inspection)
    assert [group.name for group in run.groups] == ["actor", "critic"]
    assert run.groups[0].clip_rate == (actor > 1.0).mean() == run.overall.clip_rate
    assert (run.groups[1].steps, run.groups[1].max_norm) == (0, None)
    assert math.isnan(run.groups[1].clip_rate)
    assert inspection.findings[0].startswith("actor: max_norm 1 clipped ")
    assert "critic was not clipped." in inspection.findings
    assert re.search(r"^  actor +1 +\d+\.\d % +\d+\.\d % +\d", table(inspection), re.M)
    both = recorded(inspect(RecordedSource(run_of(actor, critic), GROUPS, limits=np.array([1.0, 2.0]))))
    assert both.overall.clip_rate == ((actor > 1.0) | (critic > 2.0)).mean()
    assert both.overall.max_norm is None


def test_many_groups_are_told_of_together() -> None:
    steps = [{f"l{i}.w": np.array([float(i)]) for i in range(5)} for _ in range(30)]
    groups = {f"g{i}": [f"l{i}.w"] for i in range(5)}
    findings = inspect(RecordedSource([*steps, {name: np.zeros(1) for name in steps[0]}], groups, limits=3.5)).findings
    assert findings[0].startswith("max_norm 3.5 clipped 96.8 % of 31 updates (95.0 %")
    assert findings[0].endswith(" of the last 20); each counts where one of 5 groups was.")


def test_a_limit_below_all_norms_normalises() -> None:
    findings = inspect(RecordedSource(run_of(norms(30)), limits=1e-3)).findings
    assert "max_norm 0.001 clipped all 30 updates: it normalises the gradients; it is no safety net." in findings


def test_a_limit_that_changes_is_the_one_of_its_step() -> None:
    actor = norms(100)
    limits = np.where(np.arange(100) < 60, 2.0, 0.5)[:, None]
    inspection = inspect(RecordedSource(run_of(actor, np.zeros(100)), limits=limits))
    overall = recorded(inspection).overall
    assert overall.clip_rate == (actor > limits[:, 0]).mean()
    assert (overall.first_max_norm, overall.max_norm, overall.max_norm_changes) == (2.0, 0.5, 1)
    assert inspection.findings[0].startswith("max_norm (from 2 to 0.5 in 1 change) clipped ")


def test_the_librarys_own_decision_may_differ() -> None:
    actor = np.array([0.4998, 0.5002, 0.7, 0.1] * 10)
    returned = np.array([0.5039, 0.5, 0.7, 0.1] * 10)[:, None]
    inspection = inspect(RecordedSource(run_of(actor, np.zeros(40)), limits=0.5, returned=returned))
    assert recorded(inspection).overall.decisions_differ == 20
    said = "At 20 of 40 updates the norm that the library computed is on the other side of max_norm than the exact one."
    assert said in inspection.findings


def test_a_limit_that_nobody_typed_is_rounded_and_a_number_is_no_name() -> None:
    limits = np.array([2.0**-13, np.nan])
    inspection = inspect(
        RecordedSource(run_of(norms(30)), {"0": ["actor.weight"], "2": ["critic.weight"]}, limits=limits)
    )
    assert inspection.findings[0].startswith("clip group 0: max_norm 0.000122 clipped all 30 updates")
    assert "clip group 2 was not clipped." in inspection.findings
    assert re.search(r"^  0 +0\.000122 +100 %", table(inspection), re.M)


def test_a_largest_magnitude_is_not_compared_as_an_l2_norm() -> None:
    steps = [{"w": np.array([0.6, 0.6])}, {"w": np.array([1.2, 0.0])}] * 10
    run = recorded(inspect(RecordedSource(steps, limits=0.8, returned=0.6, norm_type=math.inf)))
    assert run.overall.clip_rate == 0.5
    assert run.overall.decisions_differ == 0


def test_what_is_clipped_twice_is_judged_by_the_norm_that_was_returned() -> None:
    actor = np.array([0.6, 3.0] * 10)
    groups = {"all": ["actor.weight", "critic.weight"], "actor": ["actor.weight"]}
    returned = np.column_stack([actor, np.minimum(actor, 1.0)])
    limits = np.array([1.0, 2.0])
    source = RecordedSource(run_of(actor, np.zeros(20)), groups, limits=limits, returned=returned)
    inspection = inspect(source)
    run = recorded(inspection)
    assert [group.clip_rate for group in run.groups] == [0.5, 0.0]
    assert run.overall.decisions_differ == 0
    assert not any("dominates" in finding for finding in inspection.findings)


def test_clipping_by_value_counts_too() -> None:
    inspection = inspect(RecordedSource(run_of(norms(50), np.zeros(50)), clip_value=1.0))
    assert recorded(inspection).overall.clip_rate == (norms(50) > 1.0).mean()
    assert inspection.findings[0].startswith("clip_value 1 clipped ")


def test_a_run_that_never_clips() -> None:
    assert "The run did not clip its gradients." in inspect(RecordedSource(run_of(norms(30)))).findings
    above = inspect(RecordedSource(run_of(norms(30)), limits=1e6))
    assert "max_norm 1e+06 clipped none of the 30 updates." in above.findings


def test_steps_that_are_not_finite_are_no_part_of_the_rate() -> None:
    actor = np.array([1.0, np.inf, 3.0, 3.0])
    stepped = np.array([1, 0, 1, -1], np.int8)[:, None]
    inspection = inspect(RecordedSource(run_of(actor, np.zeros(4)), limits=2.0, stepped=stepped))
    run = recorded(inspection)
    assert (run.overall.steps, run.overall.clip_rate, run.steps_skipped) == (3, 2 / 3, 1)
    assert run.nonfinite_skipped == 1
    assert "The optimizer did not step at it." in inspection.findings
    assert not any("would have made every gradient" in finding for finding in inspection.findings)
    stepped[2] = 0
    inspection = inspect(RecordedSource(run_of(actor, np.zeros(4)), limits=2.0, stepped=stepped))
    assert "The optimizer skipped 2 of the updates." in inspection.findings
    findings = simulate(RecordedSource(run_of(actor, np.zeros(4)), limits=2.0, stepped=stepped), []).findings
    assert "The optimizer did not step at it." in findings
    unknown = recorded(inspect(RecordedSource(run_of(actor, np.zeros(4)), stepped=-1)))
    assert unknown.steps_skipped is None


def test_a_change_of_size_is_told() -> None:
    size = np.where(np.arange(600) < 400, 20.0, 0.5) * np.exp(0.1 * np.random.default_rng(0).normal(size=600))
    inspection = inspect(RecordedSource(run_of(size, np.zeros(600)), limits=1.0))
    phases = recorded(inspection).phases
    assert [phase.steps for phase in phases] == [(0, 399), (400, 599)]
    assert phases[1].median_norm == pytest.approx(np.median(size[400:]))
    shrank = [
        finding for finding in inspection.findings if finding.startswith("The gradients shrank: since update 400")
    ]
    assert len(shrank) == 1


def test_updates_are_set_against_the_weights() -> None:
    steps = run_of(norms(30))
    source = RecordedSource(steps, updates={"actor.weight": (2.0, 0.004), "critic.weight": (0.0, 0.1)})
    gradients = inspect(source).gradients
    assert gradients is not None
    assert [layer.update_ratio for layer in gradients.layers] == [pytest.approx(0.002), None]
    assert gradients.tensors[0].update_ratio == pytest.approx(0.002)
    text = table(inspect(source))
    assert re.search(r"^  layer .* share +update/weight", text, re.M)
    assert re.search(r"^  actor .* 0\.0020", text, re.M)
    assert "update_ratio" in VIEWS["csv"](inspect(source), ViewChoices())
    assert "update/weight" not in table(inspect(RecordedSource(steps)))


def test_a_tensor_without_gradients_is_not_called_zero() -> None:
    steps = [{"a.w": np.ones(2), "b.w": np.zeros(2)} for _ in range(3)]
    source = RecordedSource(steps)
    assert "b.w is zero in every step." in inspect(source).findings


def test_json_has_the_recorded_run_and_nothing_of_it_elsewhere() -> None:
    inspection = inspect(RecordedSource(run_of(norms(30)), limits=1.0))
    told = json.loads(VIEWS["json"](inspection, ViewChoices()))["recorded"]
    assert told["overall"]["max_norm"] == 1.0
    assert told["steps_skipped"] == 0
    assert {"name", "clip_rate", "clip_rate_ci95", "recent", "decisions_differ"} <= set(told["groups"][0])
    assert inspect(InMemorySource(run_of(norms(30)))).recorded is None
    assert inspect(RecordedSource(run_of(norms(30)), limits=1.0), at=7).recorded is None


def test_the_way_on_takes_the_max_norms_of_the_run() -> None:
    steps = run_of(norms(30))
    assert table(inspect(RecordedSource(steps, limits=1.5))).endswith("simulate run.gradscope --max-norm 1.5\n")
    apart = inspect(RecordedSource(steps, GROUPS, limits=np.array([1.0, 2.5])))
    assert table(apart).endswith("simulate run.gradscope --max-norm 1 2.5\n")


def test_what_is_wrong_with_the_run_comes_first() -> None:
    source = RecordedSource(run_of(norms(30)), limits=1.0)
    source.findings = ("The clip leaves out critic.weight.",)
    assert inspect(source).findings[0] == "The clip leaves out critic.weight."


@pytest.mark.parametrize("width", [60, 72, 80, 120])
def test_nothing_is_wider_than_the_screen(width: int) -> None:
    groups = {"a group with a long name, as call sites make them": ["actor.weight"], "critic": ["critic.weight"]}
    updates = dict.fromkeys(("actor.weight", "critic.weight"), (2.0, 1e-05))
    source = RecordedSource(
        run_of(norms(90)), groups, limits=np.array([1e-5, 12345.0]), clip_value=0.25, updates=updates
    )
    assert max(map(len, table(inspect(source), width).splitlines())) <= width
