"""JSON: the keys of the contract, and never NaN or Infinity."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, NoReturn

import pytest
from view_samples import checkpoint, gradients, policy, simulation

from gradscope import results
from gradscope.spread import Spread
from gradscope.views import VIEWS
from gradscope.views.choices import ViewChoices
from gradscope.views.json_view import plain

SPREAD = {"min", "p50", "mean", "p95", "p99", "max"}


def _refuse(constant: str) -> NoReturn:
    raise AssertionError(f"{constant} in JSON")


def loaded(result: results.Inspection | results.Simulation) -> Any:
    return json.loads(VIEWS["json"](result, ViewChoices(top=1)), parse_constant=_refuse)


def test_inspection_of_gradients_has_the_keys_of_the_contract() -> None:
    data = loaded(gradients())
    assert data["schema"] == "gradscope.inspect/1"
    assert {"source", "gradients", "weights", "optimizers"} <= data.keys()
    assert data["source"] == {
        "path": "grads",
        "kind": "gradients",
        "format": "gradient dumps (safetensors)",
        "steps": 128,
        "picked": None,
        "arguments": None,
    }
    found = data["gradients"]
    assert {"l2_norm", "max_abs", "numel", "zeros", "nonfinite", "nonfinite_steps"} <= found["global"].keys()
    assert found["global"]["l2_norm"].keys() == SPREAD
    assert {"name", "l2_norm", "numel"} <= found["groups"][0].keys()
    assert {"name", "l2_norm", "numel", "share"} <= found["layers"][0].keys()
    assert found["tensors"][0].keys() >= {
        "name", "layer", "group", "shape", "dtype", "numel", "l2_norm", "rms", "max_abs", "zeros", "nonfinite", "share",
    }  # fmt: skip
    assert found["tensors"][0]["shape"] == [64, 4]
    assert data["weights"] is None and data["optimizers"] == []


def test_inspection_of_a_checkpoint_has_the_keys_of_the_contract() -> None:
    data = loaded(checkpoint())
    assert data["gradients"] is None
    assert data["weights"]["global"] == {"l2_norm": 11.0, "numel": 9797}
    assert {"name", "shape", "dtype", "l2_norm"} <= data["weights"]["tensors"][0].keys()
    (optimizer,) = data["optimizers"]
    assert optimizer.keys() >= {
        "name", "type", "steps", "lr", "max_norm", "recent_norm", "mean_norm", "saturation", "clipped_share_at_most",
        "at_limit_share_at_least", "groups", "tensors",
    }  # fmt: skip
    assert optimizer["at_limit_share_at_least"] == {"0.99": 1.0, "0.9": 1.0}
    assert {"name", "max_norm", "recent_norm", "saturation"} <= optimizer["groups"][0].keys()
    assert {"name", "recent_norm", "mean_norm", "share"} <= optimizer["tensors"][0].keys()
    assert len(optimizer["tensors"]) == 12


def test_simulation_has_the_keys_of_the_contract() -> None:
    data = loaded(simulation(policy("value:0.01", 0.01, turned=10.0), sweep=True))
    assert data["schema"] == "gradscope.simulate/1"
    assert {"source", "steps", "nonfinite_steps", "norm", "results"} <= data.keys()
    assert data["norm"].keys() == SPREAD
    (result,) = data["results"]
    assert result.keys() >= {
        "policy", "threshold", "clip_rate", "clip_rate_ci95", "clipped_steps", "scale", "norm_ratio",
        "direction_change_deg", "direction_change_error_deg", "clipped_elements", "groups", "phases", "layers",
    }  # fmt: skip
    assert result["clip_rate_ci95"] == [0.68, 0.81]
    assert result["direction_change_deg"].keys() == SPREAD
    assert {"steps", "clip_rate", "norm", "scale"} <= result["phases"][0].keys()
    assert {"name", "clip_rate", "scale", "direction_change_deg", "clipped_elements"} <= result["layers"][0].keys()
    for suggested in (data["suggested_max_norm"], data["suggested_max_norm_overall"]):
        assert suggested.keys() == {"steps", "0.50", "0.10", "0.05", "0.01"}
    assert data["suggested_max_norm"]["steps"] == [7000, 7999]


def test_what_is_not_finite_is_a_string() -> None:
    spread = Spread(min=float("-inf"), p50=float("nan"), mean=0.1, p95=1e300, p99=5e-324, max=float("inf"))
    data = loaded(replace(simulation(), norm=spread))
    assert data["norm"] == {"min": "-inf", "p50": "nan", "mean": 0.1, "p95": 1e300, "p99": 5e-324, "max": "inf"}


def test_undecodable_names_survive() -> None:
    data = loaded(replace(simulation(), source=results.Source("a\udcff\x1b.pt", "gradients", "x", 1)))
    assert data["source"]["path"] == "a\udcff\x1b.pt"


def test_a_stranger_in_a_result_is_refused() -> None:
    with pytest.raises(TypeError, match="object"):
        plain({"a": object()})
