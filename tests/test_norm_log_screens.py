"""Logs of norms on the screen and in JSON: norms, and nothing that a log does not know."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest

import gradscope
from gradscope.errors import GradscopeError
from gradscope.views import VIEWS, Format
from gradscope.views.choices import ViewChoices


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Two series, logged at every 10th step."""
    path = tmp_path / "log.csv"
    norms = np.exp(np.random.default_rng(0).normal(size=(60, 2)))
    rows = [f"{10 * step},{a!r},{b!r}" for step, (a, b) in enumerate(norms.tolist())]
    path.write_text("\n".join(["step,grad_norm/actor,grad_norm/critic", *rows]) + "\n")
    return path


def told(result: gradscope.results.Inspection | gradscope.results.Simulation, format_: Format = "table") -> str:
    return VIEWS[format_](result, ViewChoices())


def test_one_series_is_one_row_without_elements_or_shares(log: Path) -> None:
    text = told(gradscope.inspect(log, tag="grad_norm/actor"))
    assert "A sample: the log holds 60 norms of the steps 0 to 590" in text
    assert text.index("A sample") < text.index("median norm")
    for nonsense in ("element", "parameter", "share", "100 %", "whole gradient", "layer", "█", "scalar"):
        assert nonsense not in text


def test_several_series_have_shares(log: Path) -> None:
    text = told(gradscope.inspect(log, tag="grad_norm/*"))
    assert "share" in text and "together" in text
    assert "element" not in text and "layer" not in text


@pytest.mark.parametrize("by", ["layer", "group", "tensor"])
def test_csv_has_a_row_per_series(log: Path, by: str) -> None:
    text = VIEWS["csv"](gradscope.inspect(log, tag="grad_norm/*"), ViewChoices(by=by))  # type: ignore[arg-type]
    rows = list(csv.DictReader(io.StringIO(text)))
    assert {row["name"] for row in rows} == {"grad_norm/actor", "grad_norm/critic"}
    assert {row["numel"] for row in rows} == {""}


def test_json_says_null_where_a_log_knows_nothing(log: Path) -> None:
    told_ = json.loads(told(gradscope.inspect(log, tag="grad_norm/*"), "json"))
    assert told_["source"]["kind"] == "norm-log"
    gradients = told_["gradients"]
    assert gradients["layers"] == []
    assert [gradients["global"][key] for key in ("numel", "max_abs", "zeros", "nonfinite")] == [None] * 4
    for tensor in gradients["tensors"]:
        assert [tensor[key] for key in ("shape", "dtype", "numel", "rms", "max_abs", "zeros")] == [None] * 6
        assert tensor["l2_norm"]["p50"] > 0
    assert told_["recorded"] is None


def test_one_step_is_found_by_its_number(log: Path) -> None:
    text = told(gradscope.inspect(log, tag="grad_norm/actor", at=70))
    assert "max |g|" not in text and "file" not in text
    with pytest.raises(GradscopeError, match="no step that was read; the one before it is 70"):
        gradscope.inspect(log, tag="grad_norm/actor", at=75)


def test_the_sample_stands_before_what_is_simulated(log: Path) -> None:
    simulation = gradscope.simulate(log, ["norm:1"], tag="grad_norm/*")
    text = told(simulation)
    assert text.index("A sample") < text.index("max_norm 1  ")
    assert "of the last 30 steps" in text
    assert simulation.results[0].layers == ()
    assert "--clip-value" not in told(gradscope.simulate(log, [], tag="grad_norm/*"))


@pytest.mark.parametrize("policy", ["value:1", "per-layer-norm:1", "per-tensor-norm:1", "block-rms:1", "agc:0.01"])
def test_what_needs_elements_names_record(log: Path, policy: str) -> None:
    with pytest.raises(GradscopeError, match="is a log of norms; this policy needs the gradients") as caught:
        gradscope.simulate(log, [policy], tag="grad_norm/actor")
    assert caught.value.hint is not None and caught.value.hint.startswith("record the run: gradscope record -- ")
