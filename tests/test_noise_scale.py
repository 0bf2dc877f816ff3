"""The gradient noise scale and the cosines between minibatches, against known covariances and brute force."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from gradscope.gradients import GradientStep, Progress
from gradscope.inspection import inspect
from gradscope.noise_scale import fieller, noise_scale
from gradscope.results import MinibatchNoise, NoiseScale
from gradscope.simulation import simulate
from gradscope.student_t import student_quantile
from gradscope.views.choices import ViewChoices
from gradscope.views.csv_view import inspection_csv
from gradscope.views.inspect_screen import inspect_screen
from gradscope.views.json_view import json_text
from gradscope.views.markdown import markdown_text
from tests.in_memory_source import Arrays, InMemorySource, flatten

FloatArray = NDArray[np.float64]


class MinibatchSource(InMemorySource):
    """``samples`` says of how many samples each step's gradient is the mean; None: not disjoint from another."""

    def __init__(self, steps: list[Arrays], samples: list[int | None], **settings: object) -> None:
        super().__init__(steps, **settings)  # type: ignore[arg-type]
        self._samples = samples

    def read_steps(self, steps: range, progress: Progress | None = None) -> Iterator[GradientStep]:
        for position, step in zip(steps, super().read_steps(steps, progress), strict=True):
            yield replace(step, samples=self._samples[position])


def minibatches(count: int, size: int, seed: int = 0, signal: float = 1.0) -> list[Arrays]:
    """Means of ``size`` samples with gradient (signal, …) and the variances of ``VARIANCES``."""
    rng = np.random.default_rng(seed)
    return [
        {
            name: signal + rng.standard_normal(len(variance)) * np.sqrt(variance / size)
            for name, variance in VARIANCES.items()
        }
        for _ in range(count)
    ]


# One sample's gradient in three tensors of two layers.
VARIANCES = {"first.weight": np.linspace(1, 9, 40), "first.bias": np.full(4, 20.0), "last.weight": np.full(6, 0.5)}


def true_scale(signal: float, *names: str) -> float:
    variances = np.concatenate([VARIANCES[name] for name in names or VARIANCES])
    return float(variances.sum() / (signal**2 * len(variances)))


def measured(steps: list[Arrays], size: int, **settings: object) -> MinibatchNoise:
    batch = inspect(MinibatchSource(steps, [size] * len(steps), **settings)).batch
    assert batch is not None
    return batch


@pytest.mark.parametrize("signal", [0.3, 1.0, 3.0])
def test_a_known_covariance_comes_out_within_its_interval(signal: float) -> None:
    inside, trials = {"all": 0, "first": 0, "last": 0}, 100
    for seed in range(trials):
        batch = measured(minibatches(48, 16, seed, signal), 16)
        truths = {
            "first": (batch.layers[0].noise_scale, true_scale(signal, "first.weight", "first.bias")),
            "last": (batch.layers[1].noise_scale, true_scale(signal, "last.weight")),
            "all": (batch.noise_scale, true_scale(signal)),
        }
        for name, (found, truth) in truths.items():
            assert found.ci95 is not None
            inside[name] += found.ci95[0] <= truth <= found.ci95[1]
    # 95 of 100 on average; fewer than 87 has a probability below 0.1 %.
    assert all(hits >= 87 for hits in inside.values()), inside


def test_signal_and_noise_are_unbiased() -> None:
    found = [measured(minibatches(4, 8, seed), 8).noise_scale for seed in range(1000)]
    signals, noises = (np.array([getattr(scale, name) for scale in found]) for name in ("signal", "noise"))
    numel, variance = sum(map(len, VARIANCES.values())), sum(v.sum() for v in VARIANCES.values())
    assert abs(signals.mean() - numel) < 4 * signals.std() / math.sqrt(len(found))
    assert abs(noises.mean() - variance) < 4 * noises.std() / math.sqrt(len(found))


def test_a_gradient_without_signal_is_not_told_apart_from_zero() -> None:
    scales = [measured(minibatches(32, 16, seed, signal=0.0), 16).noise_scale for seed in range(60)]
    assert sum(scale.ci95 is None for scale in scales) >= 53
    assert any(scale.estimate is None for scale in scales)
    # Noise alone excludes small noise scales.
    assert sum((scale.at_least or 0.0) > 16 for scale in scales) >= 57


def test_the_formulas_by_hand() -> None:
    # g1 = (3, 0), g2 = (1, 2): S = (9 + 5)/2 = 7, mean (2, 1), M = 5; |G|² = 2·5 − 7 = 3, tr Σ = 10·2·(7 − 5) = 40.
    scale = noise_scale(10, np.array([9.0, 5.0]), 20.0, None)
    assert scale == NoiseScale(pytest.approx(40 / 3), None, pytest.approx(3.0), pytest.approx(40.0))


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 12), st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.2, 5.0]))
def test_everything_equals_brute_force(count: int, seed: int, signal: float) -> None:
    steps = minibatches(count, 4, seed, signal)
    groups = {"one": ["first.bias", "last.weight"], "two": ["first.weight"]}
    batch = measured(steps, 4, groups=groups)
    layers = {"first": ["first.weight", "first.bias"], "last": ["last.weight"]}
    assert (batch.samples, batch.minibatch_size, batch.minibatches) == (4 * count, 4, count)
    check(batch.noise_scale, batch.mean_cosine, rows_of(steps, list(VARIANCES)))
    for layer in batch.layers:
        check(layer.noise_scale, layer.mean_cosine, rows_of(steps, layers[layer.name]))
    for group in batch.groups:
        check(group.noise_scale, None, rows_of(steps, groups[group.name]))


def rows_of(steps: list[Arrays], names: list[str]) -> FloatArray:
    return np.stack([flatten([step[name] for name in names]) for step in steps])


def check(found: NoiseScale, cosine: float | None, rows: FloatArray) -> None:
    """Signal as the mean product of all pairs, noise as the trace of the sample covariance, jackknifed by deletion."""
    signal, noise = pairwise(rows)
    assert found.signal == pytest.approx(signal, rel=1e-9, abs=1e-9)
    assert found.noise == pytest.approx(4 * noise, rel=1e-9)
    if cosine is not None:
        units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        assert cosine == pytest.approx(np.mean([a @ b for a, b in combinations(units, 2)]), abs=1e-12)
    if len(rows) >= 8:
        left_out = np.array([pairwise(np.delete(rows, i, axis=0)) for i in range(len(rows))]) * [1, 4]
        covariance = np.cov(left_out[:, ::-1].T, bias=True) * (len(rows) - 1)
        low, high = fieller(4 * noise, signal, covariance, student_quantile(0.975, len(rows) - 1))
        assert found.at_least == pytest.approx(low, rel=1e-6)
        expected = (low, high) if signal > 0 and math.isfinite(high) else None
        assert found.ci95 == (None if expected is None else pytest.approx(expected, rel=1e-6))
    else:
        assert found.ci95 is None


def pairwise(rows: FloatArray) -> tuple[float, float]:
    return float(np.mean([a @ b for a, b in combinations(rows, 2)])), float(np.trace(np.cov(rows.T)))


def test_fieller_holds_exactly_the_ratios_that_fit() -> None:
    rng = np.random.default_rng(1)
    for _ in range(300):
        root = rng.standard_normal((2, 2))
        above, below, covariance = abs(rng.normal(2)), rng.normal(1), root @ root.T * rng.choice([0.01, 0.3, 2.0])
        low, high = fieller(above, below, covariance, 2.0)
        for ratio in (low * 0.999, low * 1.001, *([high * 0.999, high * 1.001] if math.isfinite(high) else [])):
            fits = (above - ratio * below) ** 2 <= 4.0 * np.array([1, -ratio]) @ covariance @ np.array([1, -ratio])
            if low > 0 and below > 0:
                assert fits == (low <= ratio <= high), (above, below, covariance, ratio)


def test_what_is_of_another_size_overlaps_or_is_not_finite_takes_no_part() -> None:
    steps = minibatches(12, 16)
    alone = measured(steps, 16)
    broken = {name: np.full(len(v), np.nan) for name, v in VARIANCES.items()}
    more = [*steps[:5], broken, *steps[5:], steps[0], steps[3]]
    batch = inspect(MinibatchSource(more, [16] * 13 + [7, None])).batch
    assert batch == alone


def test_a_layer_counts_the_minibatches_at_which_it_had_a_gradient() -> None:
    steps = minibatches(16, 4)
    for step in steps[::2]:
        step["last.weight"] = np.zeros(6)

    class Delayed(MinibatchSource):
        def read_steps(self, steps: range, progress: Progress | None = None) -> Iterator[GradientStep]:
            for step in super().read_steps(steps, progress):
                yield replace(step, present=np.array([True, True, step.index % 2 == 1]))

    batch = inspect(Delayed(steps, [4] * 16)).batch
    assert batch is not None
    check(batch.layers[1].noise_scale, batch.layers[1].mean_cosine, rows_of(steps[1::2], ["last.weight"]))


def test_gradients_that_are_others_when_read_again_get_no_interval() -> None:
    class Changing(MinibatchSource):
        passes = 0

        def read_steps(self, steps: range, progress: Progress | None = None) -> Iterator[GradientStep]:
            self.passes += 1
            for step in super().read_steps(steps, progress):
                yield replace(step, sum_squares=step.sum_squares * self.passes)

    batch = inspect(Changing(minibatches(16, 4), [4] * 16)).batch
    assert batch is not None
    assert batch.noise_scale.estimate is not None
    assert batch.noise_scale.ci95 is None


def test_steps_that_are_no_minibatches_have_none() -> None:
    assert inspect(InMemorySource(minibatches(8, 4))).batch is None
    assert inspect(MinibatchSource(minibatches(1, 4), [4])).batch is None
    assert inspect(MinibatchSource(minibatches(8, 4), [4] * 8, elements=False)).batch is None


def test_simulate_tells_the_same_and_json_has_the_keys() -> None:
    source = MinibatchSource(minibatches(16, 4), [4] * 16)
    inspection = inspect(source)
    assert simulate(source, ["norm:0.5"]).batch == inspection.batch
    batch = json.loads(json_text(inspection))["batch"]
    assert batch["samples"] == 64
    assert batch["minibatch_size"] == 4
    assert batch["noise_scale"]["ci95"][0] < batch["noise_scale"]["estimate"] < batch["noise_scale"]["ci95"][1]
    assert -1 <= batch["mean_cosine"] <= 1
    assert [layer["name"] for layer in batch["layers"]] == ["first", "last"]
    assert {"noise_scale", "mean_cosine"} <= batch["layers"][0].keys()
    assert json.loads(json_text(inspect(InMemorySource(minibatches(2, 4)))))["batch"] is None


@pytest.mark.parametrize("size", [1e-140, 1e140])
def test_the_noise_scale_does_not_depend_on_the_unit(size: float) -> None:
    plain, scaled = minibatches(16, 4), minibatches(16, 4)
    for step in scaled:
        step.update({name: size * array for name, array in step.items()})
    one, other = measured(plain, 4), measured(scaled, 4)
    assert one.noise_scale.ci95 == pytest.approx(other.noise_scale.ci95)
    assert [layer.mean_cosine for layer in one.layers] == pytest.approx([layer.mean_cosine for layer in other.layers])


def test_equal_gradients_have_no_noise_and_zeros_no_signal() -> None:
    equal = measured([minibatches(1, 4)[0]] * 16, 4)
    assert equal.noise_scale.noise == pytest.approx(0.0, abs=1e-9)
    assert equal.mean_cosine == pytest.approx(1.0)
    zero = measured([{name: np.zeros(len(v)) for name, v in VARIANCES.items()}] * 16, 4)
    assert (zero.noise_scale.estimate, zero.noise_scale.ci95, zero.mean_cosine) == (None, None, None)


def said_of(signal: float, count: int = 48, **settings: object) -> str:
    """The sentence of a simulation at whose max_norm every step is clipped."""
    source = MinibatchSource(minibatches(count, 16, 0, signal), [16] * count, **settings)
    return " ".join(line for line in simulate(source, ["norm:0.001"]).findings if "minibatch" in line)


def test_the_sentence_says_what_is_cut() -> None:
    assert said_of(0.3).endswith("samples and a minibatch has 16: what max_norm 0.001 cuts is mostly noise.")
    assert said_of(3.0).endswith("samples and a minibatch has 16: what max_norm 0.001 cuts is mostly signal.")
    assert said_of(0.6).endswith("what max_norm 0.001 cuts is signal and noise.")
    assert said_of(0.0).startswith(
        "48 minibatches do not tell the true gradient apart from zero; the noise scale is at"
    )
    assert "(too few minibatches for an interval)" in said_of(3.0, count=5)


def test_each_clip_group_has_a_sentence_of_its_own() -> None:
    said = said_of(0.9, groups={"one": ["first.weight", "first.bias"], "two": ["last.weight"]})
    assert "one: the noise scale is" in said
    assert said.endswith("what max_norm 0.001 cuts is mostly signal.")
    assert "two: the noise scale is" in said


def test_what_nothing_cuts_is_only_described() -> None:
    source = MinibatchSource(minibatches(16, 16), [16] * 16)
    assert any(line.endswith("a minibatch has 16: its gradient is mostly signal.") for line in inspect(source).findings)


def test_tables_show_noise_scale_and_cosine_by_layer() -> None:
    inspection = inspect(MinibatchSource(minibatches(16, 16), [16] * 16))
    text = markdown_text(inspect_screen(inspection, ViewChoices()))
    assert "| noise scale | cosine |" in text
    header, first, *_ = (line.split(",") for line in inspection_csv(inspection, ViewChoices()).splitlines())
    row = dict(zip(header, first, strict=True))
    assert inspection.batch is not None
    layer = inspection.batch.layers[0]
    assert float(row["noise_scale"]) == layer.noise_scale.estimate
    assert float(row["mean_cosine"]) == layer.mean_cosine
    assert layer.noise_scale.ci95 == (float(row["noise_scale_low"]), float(row["noise_scale_high"]))
    assert "noise scale" not in markdown_text(inspect_screen(inspect(InMemorySource(minibatches(4, 4))), ViewChoices()))
