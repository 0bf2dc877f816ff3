"""Markdown: findings as a list, tables that GitHub reads, names shown as they are."""

from __future__ import annotations

import re
from dataclasses import replace

from view_samples import checkpoint, gradients, policy, simulation

from gradscope import results
from gradscope.spread import Spread
from gradscope.views import VIEWS
from gradscope.views.choices import ViewChoices


def markdown(result: results.Inspection | results.Simulation) -> str:
    return VIEWS["markdown"](result, ViewChoices())


def cells(line: str) -> list[str]:
    return re.split(r"(?<!\\)\|", line.strip().strip("|"))


def test_every_row_has_as_many_cells_as_its_header() -> None:
    for result in (checkpoint(), gradients(), simulation(policy("norm:1", 1), policy("value:1", 1), sweep=True)):
        tables = [part.splitlines() for part in markdown(result).split("\n\n") if part.startswith("|")]
        assert tables
        for lines in tables:
            assert len({len(cells(line)) for line in lines}) == 1
            assert set(lines[1]) <= set("|-:")


def test_findings_are_a_list() -> None:
    text = markdown(simulation(policy("norm:0.5", 0.5)))
    assert "\n- max_norm 0.5 clips 25.0 %" in text
    assert text.rstrip().endswith("Replay: another threshold would have trained another policy.")


def test_names_cannot_break_out_of_their_cell() -> None:
    layers = (results.LayerNorm("a|b\n<img src=x>`*", Spread.constant(1.0), 1, 1.0),)
    base = gradients(1)
    assert base.gradients is not None
    text = markdown(replace(base, gradients=replace(base.gradients, layers=layers)))
    assert r"a\|b\\n\<img src=x\>\`\*" in text
    assert r"\_\_x\_" in markdown(replace(base, notes=("__x_",)))
