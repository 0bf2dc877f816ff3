"""Clip groups that are not there at every step, that share tensors, or that are clipped at infinity."""

from __future__ import annotations

import csv
import io
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from recorded import record
from trace_rows import described, row, write

from gradscope import results
from gradscope.clipping.adaptive import RunningPercentile
from gradscope.gradients import GradientSource
from gradscope.inspection import inspect
from gradscope.simulation import simulate
from gradscope.sources import open_source
from gradscope.views import VIEWS
from gradscope.views.choices import ViewChoices

SHAPES = {"D.weight": (4, 2), "D.bias": (4,), "G.weight": (3, 2)}
GROUPS = {"D": ["D.weight", "D.bias"], "G": ["G.weight"]}
STEPS = 60
RANDOM = np.random.default_rng(3)
D = [[RANDOM.normal(size=(4, 2)), RANDOM.normal(size=4)] for _ in range(STEPS)]
# The generator steps at every third step.
G = {step: RANDOM.normal(size=(3, 2)) * RANDOM.uniform(0.1, 3) for step in range(2, STEPS, 3)}


def norm_of(*gradients: np.ndarray) -> float:
    return float(np.sqrt(sum((g**2).sum() for g in gradients)))


D_NORMS = np.array([norm_of(*gradients) for gradients in D])
G_NORMS = np.array([norm_of(gradient) for gradient in G.values()])


def gan(directory: Path, limit: float = 2.0, spectra: str = "all") -> GradientSource:
    rows = []
    for step in range(STEPS):
        # At one step the optimizer has no bias to move.
        rows.append(row(step, [D[step][0], None if step == 5 else D[step][1]], spectra=spectra))
        if step in G:
            rows.append(row(step, [G[step]], group=1, max_norm=limit, returned_norm=norm_of(G[step]), spectra=spectra))
    return open_source(write(directory / "gan.gradscope", described(SHAPES, GROUPS), rows))


def two_passes(directory: Path) -> tuple[GradientSource, np.ndarray, np.ndarray]:
    """Two clip calls on the same parameters, with other gradients."""
    firsts = [RANDOM.normal(size=(4, 2)) for _ in range(40)]
    seconds = [3 * RANDOM.normal(size=(4, 2)) for _ in range(40)]
    rows = []
    for step, (one, other) in enumerate(zip(firsts, seconds, strict=True)):
        rows.append(row(step, [one], max_norm=2.0, returned_norm=norm_of(one)))
        rows.append(row(step, [other], group=1, max_norm=2.0, returned_norm=norm_of(other)))
    metadata = described({"weight": (4, 2)}, {"all": ["weight"], "all (sam.py:9)": ["weight"]})
    source = open_source(write(directory / "sam.gradscope", metadata, rows))
    return source, np.array([norm_of(g) for g in firsts]), np.array([norm_of(g) for g in seconds])


def summary(inspection: results.Inspection) -> results.GradientSummary:
    assert inspection.gradients is not None
    return inspection.gradients


def test_norms_are_over_the_steps_at_which_there_was_a_gradient(tmp_path: Path) -> None:
    found = summary(inspect(gan(tmp_path)))
    discriminator, generator = found.groups
    assert (discriminator.steps, generator.steps, found.global_.steps) == (STEPS, len(G), STEPS)
    assert generator.l2_norm.p50 == pytest.approx(np.median(G_NORMS))
    assert generator.l2_norm.min == pytest.approx(G_NORMS.min())
    assert [(layer.name, layer.steps) for layer in found.layers] == [("D", STEPS), ("G", len(G))]
    weight, bias, of_generator = found.tensors
    assert (weight.steps, bias.steps, of_generator.steps) == (STEPS, STEPS - 1, len(G))
    assert of_generator.l2_norm.mean == pytest.approx(G_NORMS.mean())
    assert of_generator.rms == pytest.approx(np.sqrt(np.mean(G_NORMS**2) / 6))
    assert (bias.zeros, of_generator.zeros) == (0, 0)
    # What the step as a whole holds is as it was.
    joint = np.sqrt(D_NORMS**2 + np.array([norm_of(G[s]) if s in G else 0.0 for s in range(STEPS)]) ** 2)
    joint[5] = np.sqrt(joint[5] ** 2 - (D[5][1] ** 2).sum())
    assert found.global_.l2_norm.p50 == pytest.approx(np.median(joint))


def test_groups_made_by_glob_have_their_own_steps_too(tmp_path: Path) -> None:
    (generator, rest) = summary(inspect(gan(tmp_path), groups={"generator": "G.*"})).groups
    assert (generator.steps, rest.steps) == (len(G), STEPS)
    assert generator.l2_norm.p50 == pytest.approx(np.median(G_NORMS))


@pytest.mark.parametrize("convention", ["exact", "torch"])
def test_a_policy_is_told_over_a_groups_own_steps(tmp_path: Path, convention: str) -> None:
    result = simulate(gan(tmp_path), ["norm:2"], convention=convention).results[0]  # type: ignore[arg-type]
    generator = result.groups[1]
    assert (generator.steps, generator.clip_rate) == (len(G), (G_NORMS > 2).mean())
    assert generator.norm.p50 == pytest.approx(np.median(G_NORMS))
    assert generator.scale.mean == pytest.approx(np.minimum(1, 2 / G_NORMS).mean(), rel=1e-5)
    assert result.layers[1].steps == len(G)
    assert result.layers[1].clip_rate == generator.clip_rate
    assert result.layers[1].scale == pytest.approx(generator.scale.mean)
    there = np.array([norm_of(G[step]) if step in G else 0.0 for step in range(STEPS)])
    discriminator = D_NORMS.copy()
    discriminator[5] = norm_of(D[5][0])
    assert result.clip_rate == ((discriminator > 2) | (there > 2)).mean()


def test_clipping_by_value_is_told_over_a_groups_own_steps(tmp_path: Path) -> None:
    result = simulate(gan(tmp_path), ["value:0.8"]).results[0]
    kept = [float((np.clip(g, -0.8, 0.8) * g).sum() / (g * g).sum()) for g in G.values()]
    generator = result.groups[1]
    assert generator.clip_rate == np.mean([np.abs(g).max() > 0.8 for g in G.values()])
    assert generator.scale.mean == pytest.approx(np.mean(kept), rel=0.01)
    assert result.layers[1].scale == pytest.approx(np.mean(kept), rel=0.01)
    assert (generator.steps, result.layers[1].steps) == (len(G), len(G))


def test_a_history_holds_a_groups_own_steps(tmp_path: Path) -> None:
    result = simulate(gan(tmp_path), ["autoclip:50", "zclip:2"])
    limits = np.array([*map(RunningPercentile(50).after, G_NORMS.tolist())])
    assert result.results[0].groups[1].clip_rate == (limits < G_NORMS).mean()
    # The warm-up of 25 steps is longer than the generator's run: those are capped at 1.
    assert result.results[1].groups[1].clip_rate == (G_NORMS > 1).mean()


def test_groups_that_share_tensors_have_their_own_numbers(tmp_path: Path) -> None:
    source, firsts, seconds = two_passes(tmp_path)
    inspection = inspect(source)
    one, other = summary(inspection).groups
    assert one.l2_norm.p50 == pytest.approx(np.median(firsts))
    assert other.l2_norm.p50 == pytest.approx(np.median(seconds))
    energies = (firsts**2).sum(), (seconds**2).sum()
    assert (one.share, other.share) == pytest.approx([energy / sum(energies) for energy in energies])
    assert inspection.recorded is not None
    assert [group.clip_rate for group in inspection.recorded.groups] == [(firsts > 2).mean(), (seconds > 2).mean()]
    assert inspection.recorded.overall.clip_rate == ((firsts > 2) | (seconds > 2)).mean()
    assert not any("dominates" in finding for finding in inspection.findings)
    last = summary(inspect(source, at=39)).groups
    assert [group.l2_norm.max for group in last] == pytest.approx([firsts[-1], seconds[-1]])


def test_policies_are_told_of_groups_that_share_tensors(tmp_path: Path) -> None:
    source, firsts, seconds = two_passes(tmp_path)
    result = simulate(source, ["norm:3", "per-tensor-norm:3"], sweep=True)
    one, other = result.results[0].groups
    assert (one.clip_rate, other.clip_rate) == ((firsts > 3).mean(), (seconds > 3).mean())
    assert other.scale.mean == pytest.approx(np.minimum(1, 3 / seconds).mean())
    assert (other.direction_change_deg.max, other.norm.p50) == pytest.approx((0.0, np.median(seconds)))
    largest = np.maximum(firsts, seconds)
    assert result.results[0].clip_rate == (largest > 3).mean()
    # Of what met the second call, tensors' norms are not known.
    one, other = result.results[1].groups
    assert one.clip_rate == (firsts > 3).mean()
    assert np.isnan(other.clip_rate)
    assert other.norm.p50 == pytest.approx(np.median(seconds))
    assert result.suggested_max_norm_overall["0.10"] == pytest.approx(np.sort(largest)[-5])
    assert [rung.clip_rate for rung in result.sweep if rung.max_norm == 3.0] == [(largest > 3).mean()]


def test_clipping_at_infinity_is_no_limit(tmp_path: Path) -> None:
    def run(name: str, limits: list[float]) -> GradientSource:
        rows = [
            row(step, [D[step][0], D[step][1]], max_norm=limit, returned_norm=float(D_NORMS[step]))
            for step, limit in enumerate(limits)
        ]
        return open_source(write(tmp_path / name, described({k: SHAPES[k] for k in GROUPS["D"]}), rows))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        only = inspect(run("only.gradscope", [np.inf] * 30))
        mixed = inspect(run("mixed.gradscope", [2.0, np.inf] * 15))
    assert "The run did not clip its gradients." in only.findings
    assert VIEWS["table"](only, ViewChoices()).endswith("--max-norm 0.5\n")
    assert mixed.recorded is not None
    overall = mixed.recorded.overall
    assert (overall.max_norm, overall.max_norm_changes, overall.steps) == (2.0, 0, 15)
    assert overall.clip_rate == (D_NORMS[:30:2] > 2).mean()
    assert run("group.gradscope", [2.0, np.inf] * 15).groups[0].max_norm == 2.0


def test_screens_say_over_how_many_steps(tmp_path: Path) -> None:
    source = gan(tmp_path)
    shown = VIEWS["table"](inspect(source), ViewChoices(width=100))
    assert re.search(r"^  clip group +updates +max_norm", shown, re.M)
    assert re.search(r"^  D +60 ", shown, re.M)
    assert re.search(rf"^  G +{len(G)} +2 ", shown, re.M)
    assert re.search(r"^  layer +updates +median norm", shown, re.M)
    for policies in (["norm:2"], ["norm:2", "norm:1"]):
        simulated = VIEWS["table"](simulate(source, policies), ViewChoices(width=100))
        assert re.search(r"^  clip group +updates ", simulated, re.M)
        assert re.search(rf"^  G +{len(G)} ", simulated, re.M)
    every = {"all": ["D.weight"]}
    rows = [row(step, [D[step][0]], max_norm=2.0) for step in range(30)]
    whole = open_source(write(tmp_path / "whole.gradscope", described({"D.weight": (4, 2)}, every), rows))
    assert "updates  " not in VIEWS["table"](inspect(whole), ViewChoices())


def test_what_never_had_a_gradient_has_no_number(tmp_path: Path) -> None:
    rows = [row(step, [D[step][0], None], max_norm=2.0, spectra="all") for step in range(30)]
    shapes = {name: SHAPES[name] for name in GROUPS["D"]}
    source = open_source(write(tmp_path / "frozen.gradscope", described(shapes), rows))
    inspection = inspect(source)
    bias = summary(inspection).tensors[1]
    assert (bias.steps, bias.zeros, bias.share, bias.rms) == (0, 0, 0.0, 0.0)
    assert np.isnan(bias.l2_norm.p50)
    assert not any("zero in every step" in finding for finding in inspection.findings)
    shown = VIEWS["table"](inspection, ViewChoices(by="tensor", top=9, sort="order"))
    assert re.search(r"^  D.bias +0 +– ", shown, re.M)
    assert "nan" not in shown
    simulated = simulate(source, ["per-tensor-norm:1", "value:0.5"], groups={"bias": "*.bias"})
    _, group = simulated.results[0].groups
    assert (group.steps, np.isnan(group.clip_rate)) == (0, True)
    assert "nan" not in VIEWS["table"](simulated, ViewChoices())


def test_csv_says_what_a_run_clipped_of_its_groups(tmp_path: Path) -> None:
    source = gan(tmp_path)
    text = VIEWS["csv"](inspect(source), ViewChoices(by="group"))
    _, generator = csv.DictReader(io.StringIO(text))
    assert (generator["steps"], generator["max_norm"], generator["limited_steps"]) == (str(len(G)), "2.0", str(len(G)))
    assert float(generator["clip_rate"]) == (G_NORMS > 2).mean()
    regrouped = VIEWS["csv"](inspect(source, groups={"g": "G.*"}), ViewChoices(by="group"))
    assert "max_norm" not in regrouped
    told = list(csv.DictReader(io.StringIO(VIEWS["csv"](simulate(source, ["norm:2"]), ViewChoices()))))
    assert [line["steps"] for line in told if line["name"] == "G"] == [str(len(G))] * 2


def test_a_layer_without_spectra_at_its_steps_has_its_rate_alone(tmp_path: Path) -> None:
    rows = [row(step, [D[step][0]], spectra="all" if step % 10 == 0 else "group") for step in range(STEPS)]
    rows += [row(step, [G[step]], group=1) for step in G if step % 10]
    metadata = described(
        {name: SHAPES[name] for name in ("D.weight", "G.weight")}, {"D": ["D.weight"], "G": GROUPS["G"]}
    )
    source = open_source(write(tmp_path / "gan.gradscope", metadata, sorted(rows, key=lambda row: row.step)))
    simulation = simulate(source, ["value:0.8"])
    layer = simulation.results[0].layers[1]
    assert layer.clip_rate == np.mean([np.abs(g).max() > 0.8 for step, g in G.items() if step % 10])
    assert np.isnan(layer.scale)
    assert re.search(r"^  G +[0-9.]+ % +– +–", VIEWS["table"](simulation, ViewChoices()), re.M)


def test_a_norm_logged_at_infinity_and_a_clip_beside_it(tmp_path: Path) -> None:
    """A training loop's own idiom: clip at infinity to have the norm, then clip."""
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    norms = []

    def train() -> None:
        for _ in range(30):
            optimizer.zero_grad()
            model(torch.randn(8, 4)).pow(2).mean().backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf"))))
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()

    torch.manual_seed(0)
    record(tmp_path, train)
    run = inspect(open_source(tmp_path / "run.gradscope")).recorded
    assert run is not None
    assert (run.overall.max_norm, run.overall.max_norm_changes) == (0.5, 0)
    assert run.overall.clip_rate == (np.array(norms) > 0.5).mean()


def kept_by(gradient: np.ndarray, v: float) -> float:
    return float((np.clip(gradient, -v, v) * gradient).sum() / (gradient**2).sum())


def test_clipping_by_value_is_told_of_groups_that_share_tensors(tmp_path: Path) -> None:
    firsts, seconds = [D[step][0] for step in range(40)], [4 * D[step][0][::-1] for step in range(1, 41)]
    passes = [pair for step in range(40) for pair in (row(step, [firsts[step]]), row(step, [seconds[step]], group=1))]
    metadata = described({"weight": (4, 2)}, {"all": ["weight"], "second": ["weight"]})
    result = simulate(open_source(write(tmp_path / "sam.gradscope", metadata, passes)), ["value:1.5"]).results[0]
    for group, gradients in zip(result.groups, (firsts, seconds), strict=True):
        assert group.clip_rate == np.mean([np.abs(g).max() > 1.5 for g in gradients])
        assert group.scale.mean == pytest.approx(np.mean([kept_by(g, 1.5) for g in gradients]), rel=0.01)
    assert result.clip_rate == np.mean([np.abs(b).max() > 1.5 for b in np.maximum(np.abs(firsts), np.abs(seconds))])


def test_clipping_by_value_where_one_call_follows_another(tmp_path: Path) -> None:
    """The same parameters are clipped by one line for a while, then by another."""
    rows = [row(step, [D[step][0]], group=int(step >= 25), max_norm=1.0) for step in range(50)]
    metadata = described({"weight": (4, 2)}, {"warm-up": ["weight"], "main": ["weight"]})
    source = open_source(write(tmp_path / "run.gradscope", metadata, rows))
    result = simulate(source, ["value:1", "norm:2"])
    by_value, by_norm = result.results
    assert by_value.scale.mean == pytest.approx(np.mean([kept_by(D[step][0], 1.0) for step in range(50)]), rel=0.01)
    for number, group in enumerate(by_value.groups):
        own = [D[step][0] for step in range(25 * number, 25 * number + 25)]
        assert (group.steps, by_norm.groups[number].steps) == (25, 25)
        assert group.clip_rate == np.mean([np.abs(g).max() > 1.0 for g in own])
        assert group.scale.mean == pytest.approx(np.mean([kept_by(g, 1.0) for g in own]), rel=0.01)
        assert by_norm.groups[number].clip_rate == np.mean([norm_of(g) > 2.0 for g in own])
