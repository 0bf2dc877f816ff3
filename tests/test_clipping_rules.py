"""Every policy's rule on numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from in_memory_source import Arrays, InMemorySource, angle_deg

from gradscope import results
from gradscope.errors import GradscopeError
from gradscope.simulation import simulate


def only(source: InMemorySource, policy: str, convention: str = "exact") -> results.PolicyResult:
    return simulate(source, [policy], convention=convention).results[0]  # type: ignore[arg-type]


def one_step(**arrays: list[float]) -> InMemorySource:
    return InMemorySource([{name.replace("_", "."): np.array(values) for name, values in arrays.items()}])


# Norms 3, 4 and 12; layers a (norm 5) and b; joint norm 13.
THREE = {"a.weight": np.array([3.0, 0.0]), "a.bias": np.array([4.0]), "b.weight": np.array([[0.0, 12.0]])}


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_the_example_of_the_two_elements(dtype: str) -> None:
    stored = np.array([10, 0.1], dtype=dtype)
    source = InMemorySource([{"w": stored}])
    value, norm = only(source, "value:0.5"), only(source, "norm:0.5")
    assert value.direction_change_deg is not None
    expected = 10.7370 if dtype != "float16" else angle_deg(stored.astype(np.float64), np.array([0.5, stored[1]]))
    assert value.direction_change_deg.max == pytest.approx(expected, abs=5e-5)
    assert value.direction_change_error_deg <= 0.1
    assert (value.clipped_elements, value.clipped_steps) == (1.0, 1)
    assert norm.direction_change_deg == results.Spread.constant(0.0)
    assert norm.scale.max == pytest.approx(0.0499975, abs=5e-8)
    assert (norm.policy, norm.threshold, norm.clip_rate, norm.clipped_elements) == ("norm:0.5", 0.5, 1.0, 0.0)


def test_norm_over_the_groups_and_over_all() -> None:
    source = InMemorySource([THREE], groups={"actor": ["a.weight", "a.bias"], "critic": ["b.weight"]})
    apart, joint = only(source, "norm:6"), only(source, "joint-norm:6")
    # c = (3, 4, 6): g·c = 97, ‖g‖² = 169, ‖c‖² = 61.
    assert apart.direction_change_deg is not None
    assert apart.direction_change_deg.max == pytest.approx(math.degrees(math.acos(97 / math.sqrt(169 * 61))), rel=1e-12)
    assert apart.scale.max == pytest.approx(97 / 169, rel=1e-14)
    assert apart.norm_ratio.max == pytest.approx(math.sqrt(61 / 169), rel=1e-14)
    assert [(group.name, group.clip_rate, group.scale.max) for group in apart.groups] == [
        ("actor", 0.0, 1.0),
        ("critic", 1.0, 0.5),
    ]
    assert [group.share for group in apart.groups] == [pytest.approx(25 / 169), pytest.approx(144 / 169)]
    assert joint.scale.max == pytest.approx(6 / 13, rel=1e-14)
    assert joint.direction_change_deg == results.Spread.constant(0.0)
    assert [group.clip_rate for group in joint.groups] == [1.0, 1.0]


def test_norm_per_layer_and_per_tensor() -> None:
    source = InMemorySource([THREE])
    layers = only(source, "per-layer-norm:4").layers
    assert [(layer.name, layer.clip_rate, layer.scale) for layer in layers] == [
        ("a", 1.0, pytest.approx(4 / 5)),
        ("b", 1.0, pytest.approx(4 / 12)),
    ]
    tensors = only(source, "per-tensor-norm:3")
    # c = (3, 3, 3): in layer a g·c = 21 of 25 and ‖c‖² = 18.
    assert [layer.scale for layer in tensors.layers] == [pytest.approx(21 / 25), pytest.approx(1 / 4)]
    assert tensors.layers[0].direction_change_deg == pytest.approx(
        math.degrees(math.acos(21 / math.sqrt(25 * 18))), rel=1e-12
    )
    assert [layer.clip_rate for layer in tensors.layers] == [1.0, 1.0]


def test_value_clamps_each_element() -> None:
    result = only(InMemorySource([THREE]), "value:3.5")
    # c = (3, 3.5, 3.5): g·c = 65, ‖c‖² = 33.5.
    assert result.direction_change_deg is not None
    assert result.direction_change_deg.max == pytest.approx(
        math.degrees(math.acos(65 / math.sqrt(169 * 33.5))), abs=result.direction_change_error_deg + 1e-9
    )
    assert result.scale.max == pytest.approx(65 / 169, rel=1e-3)
    assert result.clipped_elements == 2.0
    assert [(layer.clip_rate, layer.clipped_elements) for layer in result.layers] == [(1.0, 1.0), (1.0, 1.0)]


def test_block_rms_divides_by_the_root_of_the_element_count() -> None:
    result = only(InMemorySource([THREE]), "block-rms:3", convention="torch")
    # rms: 3/√2, 4 and 12/√2.
    assert [layer.scale for layer in result.layers] == [
        pytest.approx((9 + 16 * 3 / 4) / 25),
        pytest.approx(3 * math.sqrt(2) / 12),
    ]


def test_agc_compares_each_output_unit_with_its_weights() -> None:
    gradient = {"w": np.array([[3.0, 4.0], [0.3, 0.4]]), "b": np.array([0.6, 0.8])}
    weights = {"w": np.array([[0.0, 10.0], [60.0, 80.0]]), "b": np.array([0.0, 0.0])}
    result = only(InMemorySource([gradient], weights=weights), "agc:0.1,2")
    # Limits: 0.1·10 for the first row, 0.1·100 for the second, 0.1·eps for the bias of zeros.
    kept = 25 * 0.2 + 0.25 * 1 + 1 * 0.2
    assert result.scale.max == pytest.approx(kept / 26.25, rel=1e-14)
    assert [layer.scale for layer in result.layers] == [pytest.approx((5 + 0.25) / 25.25), pytest.approx(0.2)]
    assert result.clip_rate == 1.0


def test_autoclip_clips_at_the_percentile_so_far() -> None:
    source = InMemorySource([{"w": np.array([size])} for size in (4.0, 2.0, 5.0)])
    result = only(source, "autoclip:25")
    assert (result.clipped_steps, result.threshold) == (1, None)
    assert result.scale.min == pytest.approx(3 / 5)


def test_skip_leaves_no_direction_behind() -> None:
    source = InMemorySource([{"w": np.array([size, 0.0])} for size in (1.0, 3.0, 2.0)])
    some = only(source, "skip:2")
    assert (some.clipped_steps, some.scale.min, some.norm_ratio.min) == (1, 0.0, 0.0)
    assert some.direction_change_deg == results.Spread.constant(0.0)
    every = only(source, "skip:0.5")
    assert every.clip_rate == 1.0
    assert every.direction_change_deg is None


def test_a_tie_is_not_clipped_by_either_convention() -> None:
    source = one_step(w=[3.0, 4.0])
    assert only(source, "norm:5").clip_rate == 0.0
    tied = only(source, "norm:5", convention="torch")
    assert tied.clip_rate == 0.0
    assert tied.scale.max == pytest.approx(5 / (5 + 1e-6), rel=1e-15)
    assert only(source, "value:4").clip_rate == 0.0
    assert only(source, "norm:4.999999999").clip_rate == 1.0


@pytest.mark.parametrize(
    "policy", ["norm:0.5", "per-tensor-norm:1", "value:0.1", "block-rms:1", "autoclip:50", "zclip:2"]
)
def test_a_zero_gradient_stays_as_it_is(policy: str) -> None:
    result = only(one_step(w=[0.0, 0.0]), policy, convention="torch")
    assert (result.clip_rate, result.scale.max, result.norm_ratio.max) == (0.0, 1.0, 1.0)
    assert result.direction_change_deg == results.Spread.constant(0.0)


def test_agc_needs_weights_of_the_same_shapes_and_whole_tensors() -> None:
    gradient: Arrays = {"w": np.ones((2, 2))}
    for source, why in [
        (InMemorySource([gradient]), "without the weights"),
        (InMemorySource([gradient], weights={"v": np.ones((2, 2))}), "weights' side lacks it"),
        (InMemorySource([gradient], weights={"w": np.ones(4)}), r"has it as \(4,\)"),
        (InMemorySource([gradient], weights={"w": np.full((2, 2), np.nan)}), "holds NaN or Inf"),
        (InMemorySource([gradient], weights={"w": np.ones((2, 2))}, elements=False), "no whole tensors"),
    ]:
        with pytest.raises(GradscopeError, match=why):
            only(source, "agc:0.01")
