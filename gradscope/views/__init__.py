"""From a result to one output each: table, JSON, CSV, markdown.

Adding an output adds a file and one entry below.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Literal

from gradscope.results import Inspection, Simulation
from gradscope.views.choices import ViewChoices
from gradscope.views.csv_view import inspection_csv, simulation_csv
from gradscope.views.inspect_screen import inspect_screen
from gradscope.views.json_view import json_text
from gradscope.views.markdown import markdown_text
from gradscope.views.screen import Screen
from gradscope.views.simulate_screen import simulate_screen
from gradscope.views.terminal import terminal_text

Result = Inspection | Simulation
Format = Literal["table", "json", "csv", "markdown"]


def screen(result: Result, choices: ViewChoices) -> Screen:
    """What the two formats for people show."""
    return inspect_screen(result, choices) if isinstance(result, Inspection) else simulate_screen(result, choices)


def _csv_text(result: Result, choices: ViewChoices) -> str:
    return inspection_csv(result, choices) if isinstance(result, Inspection) else simulation_csv(result)


VIEWS: Mapping[Format, Callable[[Result, ViewChoices], str]] = {
    "table": lambda result, choices: terminal_text(screen(result, choices), choices),
    "json": lambda result, _: json_text(result),
    "csv": _csv_text,
    # A page has no width: nothing is left out of its tables.
    "markdown": lambda result, choices: markdown_text(screen(result, replace(choices, width=sys.maxsize))),
}
