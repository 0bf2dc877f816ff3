"""``--steps`` and ``--groups``."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradscope.errors import GradscopeError
from gradscope.roles import role_of
from gradscope.selection import regroup, select_steps
from gradscope.tensors import TensorInfo

ENDS = st.none() | st.integers(-30, 30)


@given(ENDS, ENDS, st.integers(1, 25))
def test_steps_follow_python_slices(start: int | None, stop: int | None, total: int) -> None:
    text = f"{'' if start is None else start}:{'' if stop is None else stop}"
    expected = list(range(total))[start:stop]
    if expected:
        assert list(select_steps(text, total)) == expected
    else:
        with pytest.raises(GradscopeError, match="selects none"):
            select_steps(text, total)


@pytest.mark.parametrize("text", ["5", "1:2:3", "a:b", "", "--1:", "1.5:"])
def test_another_form_is_refused(text: str) -> None:
    with pytest.raises(GradscopeError, match="not of the form A:B"):
        select_steps(text, 10)


TENSORS = [TensorInfo(name, (2,), "float32") for name in ("actor.0.weight", "actor.0.bias", "critic.0.weight", "std")]


def test_the_first_matching_glob_takes_a_tensor_and_the_others_are_the_rest() -> None:
    groups = regroup(TENSORS, {"bias": "*.bias", "actor": "actor.*"})
    assert [(g.name, g.tensors) for g in groups] == [
        ("bias", ("actor.0.bias",)),
        ("actor", ("actor.0.weight",)),
        ("rest", ("critic.0.weight", "std")),
    ]


def test_a_glob_without_tensors_is_an_error() -> None:
    with pytest.raises(GradscopeError, match="matches no tensor"):
        regroup(TENSORS, {"actor": "pi.*"})


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("mlp_extractor.policy_net.0", "actor"),
        ("mlp_extractor.value_net.2", "critic"),
        ("action_net", "actor"),
        ("log_std", "actor"),
        ("critic.mlp.0.weight", "critic"),
        ("actor.mlp.0.weight", "actor"),
        ("features_extractor.cnn.0", None),
        ("transformer.h.0.mlp", None),
    ],
)
def test_roles(name: str, role: str | None) -> None:
    assert role_of(name) == role
