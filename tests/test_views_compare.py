"""A comparison as people and programs see it."""

from __future__ import annotations

import json

import pytest

from gradscope.comparison.comparing import compare
from gradscope.comparison_results import Comparison
from gradscope.views import VIEWS
from gradscope.views.choices import ViewChoices
from tests.in_memory_source import InMemorySource, RecordedSource
from tests.test_comparison import steps_of


@pytest.fixture(scope="module")
def differing() -> Comparison:
    a, b = RecordedSource(steps_of(1), limits=20.0), RecordedSource(steps_of(3, head=4.0), limits=20.0)
    return compare(a, b, policies=["value:1"])


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("by", ["layer", "tensor", "group"])
def test_the_table_fits_and_what_differs_comes_first(differing: Comparison, width: int, by: str) -> None:
    text = VIEWS["table"](differing, ViewChoices(by=by, width=width))  # type: ignore[arg-type]
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    assert lines[0].startswith("A: run.gradscope: 60 updates")
    head = next(i for i, line in enumerate(lines) if line.startswith("  " + by[:4]) or line.startswith("  clip group"))
    if by == "layer":
        assert lines[head + 1].split()[0] == "head"
        assert lines[head + 1].rstrip().endswith("differs")
        assert "within noise" in lines[head + 2]


def test_every_number_of_the_table_is_the_result_s(differing: Comparison) -> None:
    text = VIEWS["markdown"](differing, ViewChoices())
    head = differing.layers[0]
    row = next(line for line in text.splitlines() if line.startswith("| head "))
    cells = [cell.strip() for cell in row.split("|")]
    assert float(cells[4].removesuffix("×")) == pytest.approx(head.ratio, rel=5e-3)
    assert head.ratio_ci95 is not None
    assert float(cells[5].split("–")[0]) == pytest.approx(head.ratio_ci95[0], rel=5e-3)
    assert "| recorded" not in text and "| as recorded |" in text


def test_few_rows_fold_the_rest(differing: Comparison) -> None:
    text = VIEWS["table"](differing, ViewChoices(by="tensor", top=2))
    assert "4 more tensors" in text


def test_json_keys_stand(differing: Comparison) -> None:
    told = json.loads(VIEWS["json"](differing, ViewChoices()))
    assert list(told) == [
        "schema", "sources", "verdict", "findings", "notes", "measure", "paired", "steps", "nonfinite_steps", "overall",
        "groups", "layers", "tensors", "only", "reshaped", "renamed", "constant_ratio", "recorded", "policies",
        "optimizers",
    ]  # fmt: skip
    assert told["recorded"][0]["rate"]["a"]["clip_rate"] == differing.recorded[0].rate.a.clip_rate


def test_the_same_twice_needs_no_noise() -> None:
    same = compare(InMemorySource(steps_of(1)), InMemorySource(steps_of(1)))
    text = VIEWS["table"](same, ViewChoices())
    assert "Identical" in text and "95 %" not in text
    assert "identical" in text.splitlines()[-4] or "identical" in text


def test_without_unicode_all_is_ascii(differing: Comparison) -> None:
    assert VIEWS["table"](differing, ViewChoices(unicode=False)).isascii()
