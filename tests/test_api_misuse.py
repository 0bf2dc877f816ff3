"""Arguments of the Python API that cannot be meant: one GradscopeError that says what is accepted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import gradscope
from gradscope.errors import GradscopeError

GRADIENTS = {"a": np.array([3.0, 4.0])}


@pytest.mark.parametrize("policies", [[0.5], 0.5, None, [None], {"norm": 0.5}])
def test_policies(policies: Any) -> None:
    with pytest.raises(GradscopeError):
        gradscope.simulate(GRADIENTS, policies)


def test_a_single_policy_needs_no_list() -> None:
    (result,) = gradscope.simulate(GRADIENTS, "norm:0.5").results
    assert (result.policy, result.clipped_steps) == ("norm:0.5", 1)


@pytest.mark.parametrize("groups", [{"a": 3}, {1: "a"}, ["a=*"], "a=*"])
@pytest.mark.parametrize("command", [gradscope.inspect, gradscope.simulate])
def test_groups(command: Any, groups: Any) -> None:
    with pytest.raises(GradscopeError, match="must map names to globs"):
        command(GRADIENTS, groups=groups)


@pytest.mark.parametrize("steps", [3, 1.5, (0, 1), slice("a", None), slice(0, 1, 0), slice(None, None, -1)])
@pytest.mark.parametrize("command", [gradscope.inspect, gradscope.simulate])
def test_steps(command: Any, steps: Any) -> None:
    with pytest.raises(GradscopeError, match="--steps"):
        command(GRADIENTS, steps=steps)


@pytest.mark.parametrize("max_norm", ["0.5", 0, -1.0, float("nan"), float("inf"), [0.5]])
def test_max_norm(max_norm: Any) -> None:
    with pytest.raises(GradscopeError, match="--max-norm"):
        gradscope.inspect(GRADIENTS, max_norm=max_norm)


@pytest.mark.parametrize("at", ["0", 0.5, 1, -2])
def test_at(at: Any) -> None:
    with pytest.raises(GradscopeError, match="--at"):
        gradscope.inspect(GRADIENTS, at=at)
