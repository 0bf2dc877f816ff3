"""Which parameter a position in an optimizer belongs to: certain, or not told."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradscope.sources.checkpoints.parameter_names import (
    InOrder,
    decay_split,
    is_buffer,
    names_by_shape,
    names_in_order,
    top_level_parts,
)
from gradscope.tensors import TensorInfo

ACTOR_CRITIC = {
    "actor.weight": (4, 2),
    "actor.bias": (4,),
    "critic.weight": (4, 2),
    "critic.bias": (4,),
    "head.weight": (1, 4),
    "head.bias": (1,),
}


def infos(shapes: dict[str, tuple[int, ...]]) -> list[TensorInfo]:
    return [TensorInfo(name, shape, "float32") for name, shape in shapes.items()]


def test_the_whole_model_in_order() -> None:
    shapes = list(ACTOR_CRITIC.values())
    assert names_in_order(shapes, infos(ACTOR_CRITIC)) == list(ACTOR_CRITIC)


def test_a_parameter_that_never_stepped_keeps_its_place() -> None:
    shapes = [None if name.startswith("critic") else shape for name, shape in ACTOR_CRITIC.items()]
    assert names_in_order(shapes, infos(ACTOR_CRITIC)) == list(ACTOR_CRITIC)


def test_one_part_of_the_model() -> None:
    whole = infos(ACTOR_CRITIC)
    assert names_in_order([(1, 4), (1,)], whole, top_level_parts(whole)) == ["head.weight", "head.bias"]


def test_two_parts_that_fit_are_a_doubt() -> None:
    whole = infos(ACTOR_CRITIC)
    assert names_in_order([(4, 2), (4,)], whole, top_level_parts(whole)) is None


@pytest.mark.parametrize("shapes", [[(4, 2), (9,)], [(1,), (1, 4)], [None, None], [], [(4, 2)] * 9])
def test_other_shapes_are_not_told(shapes: Sequence[tuple[int, ...] | None]) -> None:
    whole = infos(ACTOR_CRITIC)
    assert names_in_order(shapes, whole, top_level_parts(whole)) is None


def test_frozen_parameters_are_skipped_where_only_one_way_is_left() -> None:
    model = {"a.weight": (3, 3), "frozen": (7,), "b.weight": (5, 3), "buffer": (7,), "b.bias": (5,)}
    assert names_in_order([(3, 3), (5, 3), (5,)], infos(model)) == ["a.weight", "b.weight", "b.bias"]
    assert names_in_order([(3, 3), (7,), (5,)], infos(model)) is None


@given(
    held=st.lists(st.sampled_from([(2,), (3,), (2, 2)]), max_size=8),
    keep=st.lists(st.booleans(), min_size=8, max_size=8),
)
def test_a_subset_is_named_exactly_when_it_can_be_placed_in_one_way(
    held: list[tuple[int, ...]], keep: list[bool]
) -> None:
    model = [TensorInfo(f"p{i}", shape, "float32") for i, shape in enumerate(held)]
    wanted = [shape for shape, kept in zip(held, keep, strict=False) if kept]
    placements = count_placements(wanted, held)
    named = names_in_order(wanted, model)
    truth = [info.name for info, kept in zip(model, keep, strict=False) if kept]
    assert named == (truth if wanted and placements == 1 else None)


def count_placements(wanted: Sequence[tuple[int, ...]], held: Sequence[tuple[int, ...]]) -> int:
    if not wanted:
        return 1
    places = [i for i, shape in enumerate(held) if shape == wanted[0]]
    return sum(count_placements(wanted[1:], held[i + 1 :]) for i in places)


# --- without an order ------------------------------------------------------------------------------------------------


def test_numbered_layers_are_in_the_order_of_their_numbers() -> None:
    stored = {f"h.{i}.mlp.weight": (8, 4) for i in (0, 1, 10, 2)} | {"embedding": (50, 4)}
    shapes = [(50, 4), (8, 4), (8, 4), (8, 4), (8, 4)]
    expected = ["embedding", "h.0.mlp.weight", "h.1.mlp.weight", "h.2.mlp.weight", "h.10.mlp.weight"]
    assert names_by_shape(shapes, infos(stored)) == expected


def test_two_parameters_of_one_shape_are_not_told_apart() -> None:
    stored = {"layers.0.q.weight": (4, 4), "layers.0.k.weight": (4, 4), "norm.weight": (4,)}
    assert names_by_shape([(4, 4), (4, 4), (4,)], infos(stored)) == [None, None, "norm.weight"]


def test_other_multisets_of_shapes_are_not_told() -> None:
    assert names_by_shape([(4, 4), (4,)], infos({"a": (4, 4)})) is None
    assert names_by_shape([(4, 4), None], infos({"a": (4, 4), "b": (4,)})) is None


@pytest.mark.parametrize("pattern", [r"bias|norm", None])
def test_weights_that_decay_come_first(pattern: str | None) -> None:
    stored = {"a.weight": (4, 4), "a.bias": (4,), "norm.weight": (4,)}
    decaying, rest = decay_split(infos(stored), pattern)
    assert [info.name for info in decaying] == ["a.weight"]
    assert [info.name for info in rest] == ["a.bias", "norm.weight"]


# --- what is no parameter --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["running_mean", "body.1.running_var", "body.1.num_batches_tracked", "actor.obs_normalizer._mean",
     "critic_obs_normalizer.count", "rnd.reward_normalizer.emp_norm._var", "qf0.0.ra_mean", "rotary_emb.inv_freq"],
)  # fmt: skip
def test_buffers_are_known_by_their_names(name: str) -> None:
    assert is_buffer(name)


@pytest.mark.parametrize("name", ["weight", "mean", "actor.std", "log_std", "running_mean.weight", "normalizer.weight"])
def test_parameters_are_no_buffers(name: str) -> None:
    assert not is_buffer(name)


def test_batch_norms_buffers_are_all_known() -> None:
    norm = torch.nn.BatchNorm1d(4)
    assert {name for name in norm.state_dict() if is_buffer(name)} == {name for name, _ in norm.named_buffers()}


def test_groups_are_named_as_one_list() -> None:
    naming = InOrder(infos(ACTOR_CRITIC))
    assert naming([[(4, 2), (4,)], [(4, 2), (4,), (1, 4), (1,)]]) == list(ACTOR_CRITIC)
