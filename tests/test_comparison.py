"""Two sources side by side, against numbers computed in plain numpy."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import gradscope
from gradscope.comparison.change import Change, constant_change
from gradscope.comparison.clip_rates import rate_difference
from gradscope.comparison.comparing import compare
from gradscope.comparison.familiar_ratios import familiar_ratios
from gradscope.comparison.findings import bounds
from gradscope.comparison.matched_names import match_tensors
from gradscope.comparison.spectrum_shapes import Shape, distance
from gradscope.comparison_results import ClipRate, UnitComparison
from gradscope.differences import difference
from gradscope.errors import GradscopeError
from gradscope.gradients import GradientSource
from gradscope.intervals import wilson_interval
from gradscope.spectrum import MagnitudeSpectrum
from gradscope.tensors import TensorInfo
from tests.in_memory_source import Arrays, InMemorySource, NormSource, RecordedSource

LAYERS = ("body.0", "body.2", "head")


def steps_of(
    seed: int, n: int = 60, scale: float = 1.0, head: float = 1.0, prefix: str = "", zeros: float = 0.0
) -> list[Arrays]:
    random = np.random.default_rng(seed)
    steps = []
    for _ in range(n):
        size = math.exp(random.normal(0, 0.3))
        step: Arrays = {}
        for layer in LAYERS:
            for part, shape in (("weight", (16, 8)), ("bias", (16,))):
                array = random.standard_normal(shape) * size * scale * (head if layer == "head" else 1.0)
                array[random.random(shape) < zeros] = 0.0
                step[f"{prefix}{layer}.{part}"] = array.astype(np.float32)
        steps.append(step)
    return steps


def by_name(units: tuple[UnitComparison, ...]) -> dict[str, UnitComparison]:
    return {unit.name: unit for unit in units}


def norm_of(step: Arrays, layer: str) -> float:
    return math.sqrt(sum(float(np.square(a.astype(np.float64)).sum()) for name, a in step.items() if layer in name))


def test_norms_and_ratios_are_those_of_numpy() -> None:
    a, b = steps_of(1), steps_of(3, head=3.0)
    comparison = compare(InMemorySource(a), InMemorySource(b))
    head = by_name(comparison.layers)["head"]
    logs = [np.log([norm_of(step, "head") for step in steps]) for steps in (a, b)]
    assert head.typical.a == pytest.approx(math.exp(logs[0].mean()), rel=1e-6)
    assert head.typical.b == pytest.approx(math.exp(logs[1].mean()), rel=1e-6)
    assert head.l2_norm is not None
    assert head.l2_norm.b.p50 == pytest.approx(np.median(np.exp(logs[1])), rel=1e-6)
    assert head.ratio is not None and head.ratio_ci95 is not None
    # Fractions of a run count alike, so the ratio is nearly, not exactly, that of the means.
    assert head.ratio == pytest.approx(head.typical.b / head.typical.a, rel=0.05)
    assert head.ratio_ci95[0] < 3.0 < head.ratio_ci95[1]
    assert head.verdict == "differs"
    assert comparison.layers[0] is head
    assert {by_name(comparison.layers)[name].verdict for name in ("body.0", "body.2")} == {"within noise"}
    assert comparison.verdict == "differs"
    assert "1 of 3 layers differs beyond noise, head" in " ".join(comparison.findings)


def test_two_draws_of_the_same_are_within_noise() -> None:
    comparison = compare(InMemorySource(steps_of(1)), InMemorySource(steps_of(3)))
    assert comparison.verdict == "within noise"
    assert {unit.verdict for unit in comparison.layers + comparison.tensors} == {"within noise"}
    assert comparison.constant_ratio is None


def test_the_same_is_identical() -> None:
    comparison = compare(InMemorySource(steps_of(1)), InMemorySource(steps_of(1)))
    assert comparison.verdict == "identical"
    assert "Identical" in comparison.findings[0]
    changed = steps_of(1)
    changed[7]["head.bias"][3] = 0.0
    assert compare(InMemorySource(steps_of(1)), InMemorySource(changed)).verdict != "identical"


@pytest.mark.parametrize(
    ("factor", "said"),
    [
        (4.0, "4 accumulation steps or 4 ranks"),
        (65536.0, "a loss scale of 65,536"),
        (1 / 1024, "1,024"),
        (2.0, "2 acc"),
    ],
)
def test_a_constant_factor_is_named(factor: float, said: str) -> None:
    comparison = compare(InMemorySource(steps_of(1)), InMemorySource(steps_of(1, scale=factor)))
    constant = comparison.constant_ratio
    assert constant is not None and constant.exact
    assert constant.ratio == pytest.approx(factor, rel=1e-3)
    assert said in " ".join(constant.explanations)
    assert said in " ".join(comparison.findings)


def test_one_step_each_is_enough_for_a_constant_factor() -> None:
    comparison = compare(InMemorySource(steps_of(1, n=1)), InMemorySource(steps_of(1, n=1, scale=8.0)))
    assert comparison.constant_ratio is not None
    assert comparison.constant_ratio.ratio == pytest.approx(8.0)
    other = compare(InMemorySource(steps_of(1, n=1)), InMemorySource(steps_of(2, n=1)))
    assert other.verdict == "unknown"
    assert other.constant_ratio is None


def test_a_factor_between_runs_of_other_data_is_found_within_its_interval() -> None:
    comparison = compare(InMemorySource(steps_of(6, n=300)), InMemorySource(steps_of(5, n=300, scale=2.0)))
    constant = comparison.constant_ratio
    assert constant is not None and not constant.exact and constant.ci95 is not None
    assert constant.ci95[0] < 2.0 < constant.ci95[1]
    assert any("√4" in text for text in constant.explanations)
    # One layer that is otherwise leaves no common factor.
    other = compare(InMemorySource(steps_of(6, n=300)), InMemorySource(steps_of(5, n=300, scale=2.0, head=2.0)))
    assert other.constant_ratio is None


def test_sum_and_mean_over_ranks() -> None:
    """Four ranks' gradients, summed and averaged; a single rank's noise is twice that of their mean."""
    random = np.random.default_rng(0)
    ranks = [[{"w.weight": random.standard_normal((64, 32)), "v.weight": random.standard_normal(500)} for _ in range(4)]
             for _ in range(40)]  # fmt: skip
    mean = [{name: sum(rank[name] for rank in step) / 4 for name in step[0]} for step in ranks]
    total = [{name: sum(rank[name] for rank in step) for name in step[0]} for step in ranks]
    single = [step[0] for step in ranks]

    def on_four(steps: list[Arrays]) -> GradientSource:
        source = InMemorySource(steps)
        source.ranks = 4
        return source

    summed = compare(on_four(mean), on_four(total)).constant_ratio
    assert summed is not None and summed.ratio == pytest.approx(4.0)
    assert len(summed.explanations) == 1 and "the 4 ranks" in summed.explanations[0]
    alone = compare(on_four(mean), InMemorySource(single)).constant_ratio
    assert alone is not None and alone.ratio == pytest.approx(2.0, rel=0.03)
    assert len(alone.explanations) == 1 and "√4" in alone.explanations[0]


def test_what_known_ranks_decide() -> None:
    def said(ratio: float, ranks: tuple[int | None, int | None]) -> str:
        return " ".join(familiar_ratios(ratio, ratio, ratio, ranks, exact=True))

    assert "ranks" not in said(4.0, (1, 1)) and "4 accumulation steps" in said(4.0, (1, 1))
    assert "8 ranks" in said(8.0, (8, 8)) and "accumulation" not in said(8.0, (8, 8))
    assert "2 ranks in B against 8 in A" not in said(3.0, (2, 8))
    assert "√4" in said(2.0, (2, 8)) or "2 ranks" in said(2.0, (2, 8))
    assert said(1.37, (None, None)) == ""
    assert said(1.0, (None, None)) == ""


def test_a_wrapper_before_the_names_is_looked_past_and_said() -> None:
    comparison = compare(InMemorySource(steps_of(1)), InMemorySource(steps_of(1, prefix="module._orig_mod.")))
    assert comparison.verdict == "identical"
    assert comparison.renamed == "body.0.weight is module._orig_mod.body.0.weight"
    assert by_name(comparison.layers)["head"].name_in_b == "module._orig_mod.head"
    assert any("past a prefix" in finding for finding in comparison.findings)


def test_names_match_by_one_prefix_and_never_by_their_ends() -> None:
    def infos(*names: str) -> list[TensorInfo]:
        return [TensorInfo(name, (2,), "float32") for name in names]

    assert match_tensors(infos("a.w", "b.w"), infos("policy.a.w", "policy.b.w")).pairs == ((0, 0), (1, 1))
    assert match_tensors(infos("0.w", "2.w"), infos("actor.0.w", "critic.2.w")).pairs == ()
    assert match_tensors(infos("x.w", "only"), infos("x.w")).only_a == ("only",)
    reshaped = match_tensors([TensorInfo("w", (2,), "float32")], [TensorInfo("w", (3,), "float32")])
    assert reshaped.pairs == () and reshaped.reshaped == ((0, 0),)
    assert reshaped.only_a == reshaped.only_b == ()


def test_what_only_one_side_has_is_named_and_left_out() -> None:
    less = [{name: array for name, array in step.items() if "body.2" not in name} for step in steps_of(1)]
    comparison = compare(InMemorySource(steps_of(1)), InMemorySource(less))
    assert comparison.only.a == ("body.2.weight", "body.2.bias")
    assert comparison.only.b == ()
    assert comparison.verdict == "differs" or comparison.overall is not None
    assert set(by_name(comparison.layers)) == {"body.0", "head"}
    with pytest.raises(GradscopeError, match="shares no tensor"):
        compare(InMemorySource(steps_of(1)), InMemorySource([{"other": np.ones(3)}]))


def test_policies_and_recorded_clip_rates_side_by_side() -> None:
    a, b = steps_of(1), steps_of(2, scale=3.0)
    sides = [RecordedSource(steps, limits=limit) for steps, limit in ((a, 20.0), (b, 20.0))]
    comparison = compare(*sides, policies=["norm:25", "value:1"])
    norms = [np.array([norm_of(step, "") for step in steps]) for steps in (a, b)]
    recorded = comparison.recorded[0]
    assert recorded.rate.a.clip_rate == pytest.approx((norms[0] > 20).mean())
    assert recorded.rate.b.clip_rate == pytest.approx((norms[1] > 20).mean())
    assert recorded.max_norm.a == recorded.max_norm.b == 20.0
    by_norm, by_value = comparison.policies
    assert by_norm.rate.a.clip_rate == pytest.approx((norms[0] > 25).mean())
    assert by_norm.rate.b.clip_rate == pytest.approx((norms[1] > 25).mean())
    assert by_norm.differs
    assert by_norm.difference_ci95 is not None and by_norm.difference_ci95[0] > 0
    assert by_value.direction_change_deg is not None
    angles = []
    for step in b:
        g = torch.cat([torch.from_numpy(x).double().flatten() for x in step.values()])
        c = g.clamp(-1, 1)
        angles.append(math.degrees(math.acos(float(g @ c / (g.norm() * c.norm())))))
    assert by_value.direction_change_deg.b == pytest.approx(np.median(angles), abs=0.3)


def test_newcombe_against_his_paper() -> None:
    """Newcombe 1998, table II, comparison (a), method 10: 56/70 − 48/80 = 0.2, 0.0524 to 0.3339."""
    a, b = (ClipRate(r / n, wilson_interval(r / n, n), n, n) for r, n in ((48, 80), (56, 70)))
    between = rate_difference(a, b)
    assert between == pytest.approx((0.0524, 0.3339), abs=5e-5)


def ar1(random: np.random.Generator, n: int, rho: float) -> NDArray[np.float64]:
    noise = random.standard_normal(n + 100)
    series = np.zeros(n + 100)
    for t in range(1, n + 100):
        series[t] = rho * series[t - 1] + noise[t]
    return series[100:]


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_the_interval_covers_the_truth(rho: float) -> None:
    random = np.random.default_rng(3)
    hits = 0
    for _ in range(300):
        low, high = Change(difference(ar1(random, 400, rho), ar1(random, 400, rho) + 0.7)).interval()
        hits += low <= 0.7 <= high
    assert 0.90 <= hits / 300 <= 0.995


def test_a_common_change_is_what_all_intervals_hold() -> None:
    random = np.random.default_rng(1)
    changes = [
        Change(difference(random.standard_normal(400) / 10, random.standard_normal(400) / 10 + 1)) for _ in range(5)
    ]
    common = constant_change(changes)
    assert common is not None
    assert common[1] <= 1.0 <= common[2]
    far = Change(difference(random.standard_normal(400) / 10, random.standard_normal(400) / 10 + 2))
    assert constant_change([*changes, far]) is None


def test_shapes_are_as_far_apart_as_scipy_says() -> None:
    """Magnitudes that are all doubled in their lower half: the distance of two samples of log2|g|, sorted."""
    random = np.random.default_rng(0)
    a, b = random.standard_normal(20_000), random.standard_t(3, 20_000)
    logs = [np.sort(np.log2(np.abs(x) / np.sqrt(np.mean(x * x)))) for x in (a, b)]
    expected = float(np.abs(logs[0] - logs[1]).mean())
    found = distance(Shape.of(MagnitudeSpectrum.of(a)), Shape.of(MagnitudeSpectrum.of(1000 * b)))
    assert found == pytest.approx(expected, abs=0.02)
    assert distance(Shape.of(MagnitudeSpectrum.of(a)), Shape.of(MagnitudeSpectrum.of(3 * a))) < 0.05  # type: ignore[operator]
    assert distance(Shape(), Shape.of(MagnitudeSpectrum.of(a))) is None


def test_another_shape_and_more_zeros_are_found() -> None:
    random = np.random.default_rng(5)
    heavy = [
        {name: (random.standard_normal(array.shape) ** 3 if "head" in name else array) for name, array in step.items()}
        for step in steps_of(2, n=40)
    ]
    comparison = compare(InMemorySource(steps_of(1, n=40)), InMemorySource(heavy))
    assert by_name(comparison.layers)["head"].shape_differs
    assert not by_name(comparison.layers)["body.0"].shape_differs
    sparse = compare(InMemorySource(steps_of(1, n=40)), InMemorySource(steps_of(2, n=40, zeros=0.5)))
    head = by_name(sparse.layers)["head"]
    assert head.zeros_differ and head.zeros is not None
    assert head.zeros.b == pytest.approx(0.5, abs=0.03)
    assert any("Zeros differ" in finding for finding in sparse.findings)


def test_nonfinite_steps_are_counted_and_left_out() -> None:
    broken = steps_of(3)
    broken[3]["head.weight"][0, 0] = np.nan
    comparison = compare(InMemorySource(steps_of(1)), InMemorySource(broken))
    assert (comparison.nonfinite_steps.a, comparison.nonfinite_steps.b) == (0, 1)
    assert "B holds NaN or Inf at 1 of 60 steps" in comparison.findings[0]
    assert comparison.overall is not None and comparison.overall.ratio is not None
    assert comparison.verdict == "within noise"


def test_runs_without_a_finite_step_are_told_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    broken = steps_of(3, n=20)
    for step in broken:
        step["head.bias"][0] = np.nan
    comparison = compare(InMemorySource(broken), InMemorySource(broken))
    assert (comparison.nonfinite_steps.a, comparison.nonfinite_steps.b) == (20, 20)
    assert comparison.overall is not None and comparison.overall.ratio is None
    assert not [warning for warning in recwarn if issubclass(warning.category, RuntimeWarning)]


def test_updates_of_zero_are_known_to_be_zero() -> None:
    def run(update: float) -> RecordedSource:
        return RecordedSource(steps_of(1), updates={f"{layer}.weight": (2.0, update) for layer in LAYERS})

    comparison = compare(run(0.0), run(0.1))
    for unit in comparison.tensors:
        if unit.name.endswith("weight"):
            assert unit.update_ratio is not None
            assert (unit.update_ratio.a, unit.update_ratio.b) == (0.0, pytest.approx(0.05))


def test_norms_at_both_ends_of_float64_are_compared() -> None:
    steps = [{"a.w": np.array([size])} for size in np.exp(np.random.default_rng(0).normal(0, 0.1, 64))]
    tiny, huge = ([{"a.w": step["a.w"] * scale} for step in steps] for scale in (1e-161, 1e153))
    comparison = compare(InMemorySource(tiny), InMemorySource(huge))
    assert comparison.overall is not None
    assert comparison.overall.ratio == math.inf
    assert comparison.verdict == "differs"


def test_zeros_are_compared_where_they_lie() -> None:
    # In half of its run either side has more zeros, at a step that counts for nothing because of a NaN elsewhere.
    a, b = (
        [{"a.w": np.array([1.0] * 8) * (np.arange(8) >= (4 if i >= 32 else 0)), "b.w": np.ones(2)} for i in range(64)]
        for _ in range(2)
    )
    for step in b[:32:2]:
        step["b.w"] = np.array([np.nan, 1.0])
    comparison = compare(InMemorySource(a), InMemorySource(b))
    assert not by_name(comparison.layers)["a"].zeros_differ


def test_a_layer_that_died_differs() -> None:
    dead = steps_of(2)
    for step in dead:
        step["head.weight"][:] = 0.0
        step["head.bias"][:] = 0.0
    comparison = compare(InMemorySource(steps_of(1)), InMemorySource(dead))
    head = comparison.layers[0]
    assert (head.name, head.ratio, head.verdict, head.typical.b) == ("head", None, "differs", 0.0)
    assert "zero in B" in " ".join(comparison.findings)


def test_norms_alone_are_compared() -> None:
    random = np.random.default_rng(0)
    a, b = np.exp(random.normal(0, 0.2, (200, 3))), np.exp(random.normal(0, 0.2, (200, 3)))
    comparison = compare(NormSource(a), NormSource(b * [1.0, 1.0, 2.0]))
    assert {unit.name: unit.verdict for unit in comparison.layers} == {
        "t0": "within noise",
        "t1": "within noise",
        "t2": "differs",
    }


def train(seed: int, lr: float, steps: int = 128) -> list[Arrays]:
    """Gradients of a small network that has learned a noisy function, in the stretch where nothing changes any more."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, 24), torch.nn.Tanh(), torch.nn.Linear(24, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    found: list[Arrays] = []
    for step in range(150 + steps):
        x = torch.randn(32, 4)
        y = x[:, :1] * x[:, 1:2] + 0.5 * torch.randn(32, 1)
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(x), y).backward()
        if step >= 150:
            found.append({name: p.grad.numpy().copy() for name, p in model.named_parameters() if p.grad is not None})
        optimizer.step()
    return found


def test_two_seeds_of_a_real_training_and_another_loss() -> None:
    one = InMemorySource(train(0, 0.05))
    same = compare(one, InMemorySource(train(1, 0.05)))
    overall = same.overall
    assert overall is not None and overall.ratio is not None
    assert 0.7 < overall.ratio < 1.4
    other = train(2, 0.05)
    for step in other:
        for name in step:
            step[name] = 3.0 * step[name]
    differs = compare(one, InMemorySource(other))
    assert differs.verdict == "differs"
    assert all(unit.verdict == "differs" for unit in differs.layers)
    assert differs.overall is not None and differs.overall.ratio_ci95 is not None
    assert differs.overall.ratio_ci95[0] > 1.5


def adam_checkpoint(path: Path, seed: int, clip: float, lr: float = 1e-3) -> list[Arrays]:
    """A training checkpoint of Adam, and the gradients that it saw before clipping."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(6, 12), torch.nn.ReLU(), torch.nn.Linear(12, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, betas=(0.9, 0.99))
    steps: list[Arrays] = []
    for _ in range(600):
        x = torch.randn(16, 6)
        optimizer.zero_grad()
        (model(x) - x.sum(1, keepdim=True)).square().mean().backward()
        steps.append({n: p.grad.numpy().copy() for n, p in model.named_parameters() if p.grad is not None})
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    return steps


def test_checkpoints_and_runs_meet_in_recent_norms(tmp_path: Path) -> None:
    steps = adam_checkpoint(tmp_path / "a.pt", 0, clip=0.5)
    adam_checkpoint(tmp_path / "b.pt", 1, clip=0.5, lr=3e-3)
    both = gradscope.compare(tmp_path / "a.pt", tmp_path / "b.pt")
    assert both.measure == "recent_norm"
    weights = torch.load(tmp_path / "a.pt")["model"]
    first = by_name(both.layers)["0"]
    expected = math.sqrt(sum(float(weights[f"0.{part}"].double().square().sum()) for part in ("weight", "bias")))
    assert first.weight_norm is not None and first.weight_norm.a == pytest.approx(expected, rel=1e-6)
    assert any("lr 0.001 in A, 0.003 in B" in finding for finding in both.findings)
    assert both.overall is not None and both.overall.ratio_ci95 is None

    run = RecordedSource(steps, limits=0.5)
    from gradscope.sources import open_source

    mixed = compare(open_source(tmp_path / "a.pt"), run)
    assert mixed.measure == "recent_norm"
    assert mixed.overall is not None
    # What Adam averaged is what the same average of the clipped gradients is.
    assert mixed.overall.ratio == pytest.approx(1.0, abs=2e-3)
    assert all(unit.ratio == pytest.approx(1.0, abs=5e-3) for unit in mixed.tensors)
    assert any("after their own clipping" in note for note in mixed.notes)


def test_a_checkpoint_against_itself_is_identical(tmp_path: Path) -> None:
    adam_checkpoint(tmp_path / "a.pt", 0, clip=0.5)
    comparison = gradscope.compare(tmp_path / "a.pt", tmp_path / "a.pt")
    assert comparison.verdict == "identical"


def test_a_norm_log_meets_a_run_in_the_global_norm(tmp_path: Path) -> None:
    steps = steps_of(1)
    rows = [f"{i},{norm_of(step, '')!r}" for i, step in enumerate(steps)]
    (tmp_path / "log.csv").write_text("step,grad_norm\n" + "\n".join(rows) + "\n")
    from gradscope.sources import open_source

    log = open_source(tmp_path / "log.csv")
    comparison = compare(log, InMemorySource(steps), policies=["norm:20", "value:1"])
    assert comparison.layers == comparison.tensors == ()
    assert comparison.overall is not None
    assert comparison.overall.ratio == pytest.approx(1.0)
    assert comparison.findings[0] == "Identical, as far as norms tell: they are the same at all 60 steps."
    assert [clip.policy for clip in comparison.policies] == ["norm:20"]
    assert any("clip_value 1 is not compared" in note for note in comparison.notes)
    assert any("knows no layers" in note for note in comparison.notes)


def test_the_steps_of_both_are_picked() -> None:
    comparison = compare(InMemorySource(steps_of(1)), InMemorySource(steps_of(2)), steps="-20:")
    assert (comparison.steps.a, comparison.steps.b) == (20, 20)
    groups = compare(InMemorySource(steps_of(1)), InMemorySource(steps_of(2)), groups={"end": "head*"}).groups
    assert {unit.name for unit in groups} == {"end", "rest"}


def autoregression(random: np.random.Generator, n: int, phi: float) -> NDArray[np.float64]:
    values = np.zeros(n + 200)
    for i, new in enumerate(random.standard_normal(n + 199)):
        values[i + 1] = phi * values[i] + 0.3 * new
    return values[200:]


@pytest.mark.parametrize(("n", "phi", "most"), [(5, 0.9, 0.0), (12, 0.5, 0.0), (20, 0.5, 0.1), (200, 0.9, 0.06)])
def test_runs_of_one_distribution_seldom_differ(n: int, phi: float, most: float) -> None:
    random = np.random.default_rng(7)
    found = [Change(difference(*(autoregression(random, n, phi) for _ in "ab"))).probability for _ in range(200)]
    assert np.mean(np.array(found) <= 0.05) <= most


@pytest.mark.parametrize("n", [1, 3, 12])
def test_too_few_steps_are_said_to_be_too_few(n: int) -> None:
    for few, others in ((n, 60), (60, n), (n, n)):
        comparison = compare(
            InMemorySource(steps_of(1, n=few, zeros=0.1)), InMemorySource(steps_of(2, n=others, head=2.0, zeros=0.2))
        )
        assert comparison.verdict == "unknown"
        assert {unit.ratio_ci95 for unit in comparison.layers} == {None}
        assert "; too few independent steps to tell whether that is noise." in comparison.findings[0]


def test_an_interval_that_says_nothing_is_not_told() -> None:
    random = np.random.default_rng(3)
    drift = np.exp(np.cumsum(random.normal(0, 0.4, (80, 2)), axis=0))
    comparison = compare(NormSource(drift), NormSource(np.exp(np.cumsum(random.normal(0, 0.4, (80, 2)), axis=0))))
    for unit in comparison.layers:
        assert unit.ratio_ci95 is None or unit.ratio_ci95[1] <= 100.0 * unit.ratio_ci95[0] or unit.verdict == "differs"
    assert any(unit.verdict == "unknown" and unit.ratio_ci95 is None for unit in comparison.layers)


def test_a_loss_scale_is_named_across_seeds() -> None:
    random = np.random.default_rng(0)
    a, b = np.exp(random.normal(0, 0.05, (2, 400, 3)))
    comparison = compare(NormSource(a), NormSource(b * 1024.0 * 1.03))
    constant = comparison.constant_ratio
    assert constant is not None and not constant.exact
    assert "a loss scale of 1,024" in constant.explanations[0]


def test_seeds_are_spoken_of_where_they_may_be_what_differs() -> None:
    differing = compare(InMemorySource(steps_of(1)), InMemorySource(steps_of(3, head=4.0)))
    exact = compare(InMemorySource(steps_of(1)), InMemorySource(steps_of(1, scale=4.0)))
    assert [any("Two seeds" in note for note in comparison.notes) for comparison in (differing, exact)] == [True, False]


def test_equal_clip_rates_are_no_matter_of_noise() -> None:
    comparison = compare(
        RecordedSource(steps_of(1), limits=20.0), RecordedSource(steps_of(1), limits=20.0), policies=["norm:0.001"]
    )
    assert "max_norm 0.001 would clip 100 % of both." in comparison.findings
    other = compare(RecordedSource(steps_of(1), limits=0.01), RecordedSource(steps_of(2), limits=0.02))
    assert "Both clipped 100 % of their updates: A at max_norm 0.01, B at max_norm 0.02." in other.findings


def test_nothing_is_said_to_differ_within_noise() -> None:
    comparison = compare(InMemorySource(steps_of(1)), InMemorySource(steps_of(3)))
    assert comparison.findings[0].startswith("The global norm does not differ beyond noise: ")


@pytest.mark.parametrize(
    ("interval", "text"),
    [((0.897, 1.0041), "0.897 to 1.004"), ((0.99971, 1.0004), "0.9997 to 1.0004"), ((1.0, 1.0), "1.00000 to 1.00000")],
)
def test_the_ends_of_an_interval_are_told_apart(interval: tuple[float, float], text: str) -> None:
    assert bounds(interval) == text
