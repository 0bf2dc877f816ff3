"""The options that commands share, each written down once."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer

from gradscope.errors import GradscopeError

READING, POLICIES, OUTPUT = "What to read", "Policies", "Output"


class Format(str, Enum):
    """The forms a result can take."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"
    MARKDOWN = "markdown"


class ReadAs(str, Enum):
    """What a bare mapping of tensors holds."""

    GRADIENTS = "gradients"
    WEIGHTS = "weights"


Paths = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="PATH",
        show_default=False,
        help="A gradient dump, a directory or a glob of them (one step each), a checkpoint, a trace, or a log of norms "
        "(TensorBoard, trainer_state.json, W&B, CSV, JSON, Parquet). Without one: source in "
        r"\[tool.gradscope] of the nearest pyproject.toml, else the newest *.gradscope.",
    ),
]
Steps = Annotated[
    str | None,
    typer.Option(
        "--steps",
        metavar="A:B",
        help="Only these steps, as in Python: -1000: is the last thousand.",
        rich_help_panel=READING,
    ),
]
Groups = Annotated[
    list[str] | None,
    typer.Option(
        "--groups",
        metavar="NAME=GLOB...",
        help="Clip groups by tensor name: actor='*policy*' critic='*value*'. The rest forms one more.",
        rich_help_panel=READING,
    ),
]
As = Annotated[
    ReadAs | None,
    typer.Option("--as", help="What a bare mapping of tensors holds.", rich_help_panel=READING),
]
Tag = Annotated[
    str | None,
    typer.Option(
        "--tag",
        metavar="NAME",
        help="The series of a log of norms, or a glob for several; without it, what is called a gradient norm.",
        rich_help_panel=READING,
    ),
]
OutputFormat = Annotated[Format, typer.Option("--format", help="How to write the result.", rich_help_panel=OUTPUT)]
OutputFile = Annotated[
    str | None,
    typer.Option(
        "-o", "--output", metavar="FILE", help="Write to FILE instead of the terminal.", rich_help_panel=OUTPUT
    ),
]
Quiet = Annotated[
    bool,
    typer.Option("-q", "--quiet", help="Only the result: no progress, no word on the source.", rich_help_panel=OUTPUT),
]
NoColor = Annotated[
    bool, typer.Option("--no-color", help="No colours; NO_COLOR does the same.", rich_help_panel=OUTPUT)
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel=OUTPUT)]


def parse_number(option: str, text: str) -> float:
    """``text`` as a number; whether it is a useful one is not this function's business.

    Raises GradscopeError.
    """
    try:
        return float(text)
    except ValueError:
        hint = "separate several values by spaces" if "," in text else None
        raise GradscopeError(f"{option} {text}", "not a number", hint) from None


def parse_groups(groups: list[str] | None) -> dict[str, str] | None:
    """``["actor=*policy*"]`` as name → glob.

    Raises GradscopeError for another form and for a name given twice.
    """
    if not groups:
        return None
    parsed: dict[str, str] = {}
    for text in groups:
        name, equals, glob = text.partition("=")
        if not (name and equals and glob):
            raise GradscopeError(f"--groups {text}", "not of the form NAME=GLOB", "for example actor='*policy*'")
        if name in parsed:
            raise GradscopeError(f"--groups {text}", f"the group {name} is given twice")
        parsed[name] = glob
    return parsed
