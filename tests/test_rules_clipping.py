"""``clip-rate``, ``saturation``, ``direction-change`` against clipping worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from judged import SAMPLES, judged, skipped

from gradscope.errors import GradscopeError
from gradscope.health.settings import CheckSettings
from tests.in_memory_source import Arrays, InMemorySource, NormSource, RecordedSource, angle_deg

GROUPS = {"actor": ["actor.weight"], "critic": ["critic.weight"]}


def steps_of(norms: np.ndarray, critic: float = 1.0) -> list[Arrays]:
    return [
        {"actor.weight": np.array([norm, 0.0, 0.0]), "critic.weight": np.array([critic * norm, 0.0])} for norm in norms
    ]


def independent(count: int, share: float, seed: int = 0) -> np.ndarray:
    """Norms of which ``share`` are 2, the others 0.5."""
    return np.where(np.random.default_rng(seed).random(count) < share, 2.0, 0.5)


def test_a_gradient_that_is_always_clipped_warns() -> None:
    norms = 2.0 + np.random.default_rng(0).random(400)
    verdict = judged("clip-rate", RecordedSource(steps_of(norms), limits=1.0))
    (found,) = verdict.violations
    assert (found.value, found.limit, found.where, found.steps) == (1.0, 0.95, None, (200, 399))
    assert "acts as a learning rate" in found.message
    assert verdict.status == "warn"


def test_clipping_every_step_warns_however_they_hang_together() -> None:
    growing = np.linspace(2.0, 3.0, 40)
    source = RecordedSource(steps_of(growing), limits=1.0)
    (found,) = judged("clip-rate", source).violations
    assert (found.value, found.steps) == (1.0, (20, 39))
    assert "every one of the last 20 steps" in found.message
    assert not judged("clip-rate", source, max=1.0).violations


def test_the_rate_is_that_of_the_newest_part() -> None:
    norms = np.concatenate([np.full(200, 3.0), independent(200, 0.3)])
    verdict = judged("clip-rate", RecordedSource(steps_of(norms, 0.0), limits=1.0))
    assert verdict.status == "pass"
    assert verdict.value == pytest.approx((norms[200:] > 1.0).mean())


def test_a_rate_whose_interval_holds_the_limit_passes() -> None:
    norms = np.where(np.arange(200) % 33 == 7, 0.5, 2.0)
    assert (norms[100:] > 1.0).mean() > 0.95
    verdict = judged("clip-rate", RecordedSource(steps_of(norms, 0.0), limits=1.0))
    assert not verdict.violations
    # What is shown beside the limit lies within it, as a pass must.
    assert verdict.status == "pass" and verdict.value is not None and verdict.value <= 0.95
    assert judged("clip-rate", RecordedSource(steps_of(norms, 0.0), limits=1.0), max=0.5).violations


def test_too_few_independent_steps_pass_and_say_so() -> None:
    verdict = judged("clip-rate", RecordedSource(steps_of(np.linspace(2, 3, 8)), limits=1.0))
    assert verdict.status == "pass"
    assert "too few" in verdict.message
    single = judged("clip-rate", RecordedSource(steps_of(np.array([2.0])), limits=1.0))
    assert not single.violations


def test_a_rate_below_min_warns_only_where_it_is_asked_for() -> None:
    source = RecordedSource(steps_of(0.5 + 0.1 * np.random.default_rng(2).random(400)), limits=1.0)
    assert judged("clip-rate", source).status == "pass"
    (found,) = judged("clip-rate", source, min=0.1).violations
    assert (found.value, found.limit) == (0.0, 0.1)


def test_groups_that_differ_are_told_apart() -> None:
    norms = 2.0 + np.random.default_rng(0).random(400)
    verdict = judged("clip-rate", RecordedSource(steps_of(norms, critic=0.1), GROUPS, limits=1.0))
    assert [found.where for found in verdict.violations] == ["actor"]


def test_where_no_clip_rate_is_known() -> None:
    steps = steps_of(np.full(30, 2.0))
    assert skipped(judged("clip-rate", RecordedSource(steps))) == "the run clips nothing"
    assert skipped(judged("clip-rate", RecordedSource(steps, limits=0.0))) == "max_norm is not positive"
    for source in (InMemorySource(steps), NormSource(np.ones((5, 2)))):
        assert skipped(judged("clip-rate", source)) == "only a recorded run tells what it clipped"
    assert judged("clip-rate", SAMPLES / "ppo_cartpole.zip").status == "skipped"


def test_saturation_is_that_of_the_report() -> None:
    outcome = judged("saturation", SAMPLES / "ppo_cartpole.zip")
    (found,) = outcome.violations
    assert found.value == pytest.approx(1.0, abs=1e-4)
    assert found.where == "policy"
    assert "nearly every gradient was clipped at max_norm 0.5" in found.message
    assert outcome.status == "warn"
    nearest = judged("saturation", SAMPLES / "rsl_rl_run")
    assert nearest.status == "pass"
    assert 0.9 < (nearest.value or 0.0) < 0.99
    assert judged("saturation", SAMPLES / "rsl_rl_run", max=0.9).violations


def test_a_recording_and_a_dump_have_no_saturation() -> None:
    assert "clip rate" in judged("saturation", SAMPLES / "ppo_cartpole.gradscope").message
    assert judged("saturation", SAMPLES / "ppo_cartpole.gradscope").status == "skipped"
    assert skipped(judged("saturation", SAMPLES / "ppo_cartpole_gradients")) == "the source holds no optimizer state"


def gradients(count: int = 9, seed: int = 3) -> list[Arrays]:
    rng = np.random.default_rng(seed)
    return [{"actor.weight": rng.normal(size=50), "critic.weight": rng.standard_cauchy(80)} for _ in range(count)]


def median_angle(steps: list[Arrays], name: str, limit: float) -> float:
    return float(np.median([angle_deg(step[name], np.clip(step[name], -limit, limit)) for step in steps]))


def test_the_value_clipping_in_force_is_judged_per_clip_group() -> None:
    steps = gradients()
    verdict = judged("direction-change", RecordedSource(steps, GROUPS, clip_value=0.5))
    expected = {name: median_angle(steps, f"{name}.weight", 0.5) for name in GROUPS}
    assert expected["actor"] < 30.0 < expected["critic"]
    (found,) = verdict.violations
    assert found.where == "critic"
    assert found.value == pytest.approx(expected["critic"], abs=0.5)
    assert verdict.status == "fail"
    both = judged("direction-change", RecordedSource(steps, GROUPS, clip_value=0.5), max=1.0).violations
    assert {f.where: f.value for f in both} == pytest.approx(expected, abs=0.5)


def test_norm_clipping_keeps_the_direction() -> None:
    verdict = judged("direction-change", RecordedSource(gradients(), GROUPS, limits=0.1))
    assert verdict.status == "pass"
    assert (verdict.value, verdict.limit) == (0.0, 30.0)


def test_a_policy_can_be_asked_about() -> None:
    steps = gradients()
    source = InMemorySource(steps, GROUPS)
    assert judged("direction-change", source).status == "skipped"
    (found,) = judged("direction-change", source, policy="value:0.5").violations
    assert found.value == pytest.approx(median_angle(steps, "critic.weight", 0.5), abs=1e-4)
    assert judged("direction-change", source, policy="norm:0.5").status == "pass"


@pytest.mark.parametrize("policy", ["value", "valu:1", "value:x", "value:-1"])
def test_a_bad_policy_is_refused_before_anything_is_read(policy: str) -> None:
    for good in ("value:0.5", ""):
        assert CheckSettings().with_rule("direction-change.policy", good).limits["direction-change"]["policy"] == good
    with pytest.raises(GradscopeError):
        CheckSettings().with_rule("direction-change.policy", policy)


def test_where_no_angle_is_known() -> None:
    assert skipped(judged("direction-change", RecordedSource(gradients(), GROUPS))) == "the run clips nothing"
    norms = RecordedSource(gradients(), GROUPS, clip_value=0.5, tensor_every=None)
    assert judged("direction-change", norms).status == "skipped"
    assert skipped(judged("direction-change", SAMPLES / "ppo_cartpole.zip")) == "the source holds no gradients"
