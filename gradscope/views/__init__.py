"""From a result to one output each: for people, for programs, for CI.

A new kind of result adds an entry to ``_OF_RESULT``; a new output adds a file and an entry to what has it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal, get_args

from gradscope.check_results import Check
from gradscope.comparison_results import Comparison
from gradscope.results import Inspection, Simulation
from gradscope.views.check_screen import check_page, check_screen
from gradscope.views.choices import ViewChoices
from gradscope.views.compare_screen import compare_csv, compare_screen
from gradscope.views.csv_view import check_csv, inspection_csv, simulation_csv
from gradscope.views.github import github_text
from gradscope.views.inspect_screen import inspect_screen
from gradscope.views.json_view import check_json, json_text
from gradscope.views.junit import junit_text
from gradscope.views.markdown import markdown_text
from gradscope.views.sarif import sarif_text
from gradscope.views.screen import Screen
from gradscope.views.simulate_screen import simulate_screen
from gradscope.views.terminal import terminal_text

Result = Inspection | Simulation | Check | Comparison
Format = Literal["table", "json", "csv", "markdown", "junit", "sarif", "github"]
# Each takes the type of result that it stands for below.
View = Callable[[Any, ViewChoices], str]
_Screen = Callable[[Any, ViewChoices], Screen]


def _for_people(screen: _Screen, page: _Screen | None = None) -> dict[Format, View]:
    """A screen for the terminal and a page in markdown, which is the same where no other is given."""
    shown = page or screen
    return {
        "table": lambda result, choices: terminal_text(screen(result, choices), choices),
        # A page has no width: nothing is left out of its tables.
        "markdown": lambda result, choices: markdown_text(shown(result, replace(choices, width=sys.maxsize))),
    }


_OF_RESULT: Mapping[type[Result], Mapping[Format, View]] = {
    Inspection: {
        **_for_people(inspect_screen),
        "json": lambda result, _: json_text(result),
        "csv": inspection_csv,
    },
    Simulation: {
        **_for_people(simulate_screen),
        "json": lambda result, _: json_text(result),
        "csv": lambda result, _: simulation_csv(result),
    },
    Check: {
        **_for_people(check_screen, check_page),
        "json": lambda result, _: check_json(result),
        "csv": lambda result, _: check_csv(result),
        "junit": lambda result, _: junit_text(result),
        "sarif": lambda result, _: sarif_text(result),
        "github": lambda result, _: github_text(result),
    },
    Comparison: {
        **_for_people(compare_screen),
        "json": lambda result, _: json_text(result),
        "csv": compare_csv,
    },
}


def _view(wanted: Format, result: Result, choices: ViewChoices) -> str:
    return _OF_RESULT[type(result)][wanted](result, choices)


def formats_of(result: type[Result]) -> tuple[Format, ...]:
    """The formats that a kind of result has."""
    return tuple(_OF_RESULT[result])


VIEWS: Mapping[Format, Callable[[Result, ViewChoices], str]] = {name: partial(_view, name) for name in get_args(Format)}
