"""CSV: one flat table with full precision."""

from __future__ import annotations

import csv
import io
from dataclasses import replace

import pytest
from view_samples import LAYERS, checkpoint, gradients, policy, simulation

from gradscope import results
from gradscope.spread import Spread
from gradscope.views import VIEWS
from gradscope.views.choices import ViewChoices


def records(result: results.Inspection | results.Simulation, **choices: object) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(VIEWS["csv"](result, ViewChoices(**choices)), newline=""), strict=True))


@pytest.mark.parametrize(("by", "rows"), [("tensor", 12), ("layer", 6), ("group", 1)])
def test_one_row_per_tensor_layer_or_group(by: str, rows: int) -> None:
    assert len(records(gradients(), by=by)) == rows
    assert len(records(checkpoint(), by=by)) == rows


def test_gradients_are_written_exactly() -> None:
    row = records(gradients(), by="tensor", sort="order")[0]
    assert row["name"] == "mlp_extractor.value_net.0.weight"
    assert float(row["l2_norm_p50"]) == 0.444 * 0.8
    assert row["shape"] == "64x4" and row["dtype"] == "float32" and row["nonfinite"] == "0"


def test_top_and_sort_apply() -> None:
    assert [row["name"] for row in records(gradients(), sort="name", top=2)] == sorted(LAYERS)[:2]


def test_layers_of_an_optimizer_combine_their_tensors() -> None:
    row = next(row for row in records(checkpoint()) if row["name"] == "value_net")
    assert float(row["recent_norm"]) == pytest.approx(0.073)
    assert float(row["share"]) == pytest.approx(0.0215)


def test_weights_alone() -> None:
    rows = records(replace(checkpoint(), optimizers=()), by="tensor")
    assert len(rows) == 12
    assert float(rows[0]["l2_norm"]) == 2.0


def test_a_simulation_has_one_row_per_policy_and_scope() -> None:
    rows = records(simulation(policy("norm:0.5", 0.5), policy("value:0.01", 0.01, turned=10.0), sweep=True))
    scopes = [row["scope"] for row in rows if row["policy"] == "value:0.01"]
    assert scopes == ["overall", "recent", "group", "phase", "phase", *["layer"] * 6]
    overall = rows[0]
    assert (overall["policy"], overall["clip_rate"], overall["clip_rate_low"]) == ("norm:0.5", "0.75", "0.68")
    assert sum(row["scope"] == "sweep" for row in rows) == 10
    suggested = next(row for row in rows if row["scope"] == "suggested" and row["clip_rate"] == "0.1")
    assert suggested["threshold"] == "0.8052"


def test_without_policies_the_norms_are_there() -> None:
    assert float(records(simulation())[0]["norm_max"]) == pytest.approx(9.9)


def test_escapes_in_names_do_not_reach_a_terminal() -> None:
    made = replace(policy("value:0.01", 0.01), layers=(results.PolicyLayer("\x1b[31mred\x9b\u202e", 1.0, 1.0, 0.0, 1),))
    text = VIEWS["csv"](simulation(made), ViewChoices())
    assert r"\x1b[31mred\x9b\u202e" in text
    assert text.replace("\r\n", "").isprintable()


def test_awkward_names_and_numbers() -> None:
    layers = (results.LayerNorm('a,"b"\r\nc', Spread.constant(float("nan")), 1, 1.0),)
    base = gradients(1)
    assert base.gradients is not None
    (row,) = records(replace(base, gradients=replace(base.gradients, layers=layers)))
    assert row["name"] == r'a,"b"\r\nc'
    assert row["l2_norm_max"] == "nan"


def test_the_rows_say_which_steps_were_read_and_what_is_a_mean() -> None:
    read = {"steps": (50, 59), "0.50": 1.0, "0.10": 2.0, "0.05": 3.0, "0.01": 4.0}
    picked = replace(simulation(policy("value:0.01", 0.01, turned=10.0)), steps=10, suggested_max_norm_overall=read)
    for result in (picked, replace(picked, results=())):
        overall = records(result)[0]
        assert (overall["first_step"], overall["last_step"]) == ("50", "59")
    layer = next(row for row in records(picked) if row["scope"] == "layer")
    assert layer["scale_p50"] == layer["direction_change_deg_p50"] == ""
    assert float(layer["scale_mean"]) == pytest.approx(picked.results[0].layers[0].scale)
    assert float(layer["direction_change_deg_mean"]) == picked.results[0].layers[0].direction_change_deg
