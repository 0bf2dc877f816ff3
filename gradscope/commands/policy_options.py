"""The options that name policies, and what they name."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Annotated

import typer

from gradscope.clipping.catalogue import POLICIES
from gradscope.clipping.parsing import check_notation
from gradscope.commands.options import POLICIES as PANEL
from gradscope.commands.options import parse_number
from gradscope.errors import GradscopeError


class ConventionName(str, Enum):
    """How a norm is clipped."""

    EXACT = "exact"
    TORCH = "torch"


MaxNorm = Annotated[
    list[str] | None,
    typer.Option(
        "--max-norm",
        "--max-grad-norm",
        metavar="X...",
        help="Clip by norm at X: one norm over each clip group.",
        rich_help_panel=PANEL,
    ),
]
ClipValue = Annotated[
    list[str] | None,
    typer.Option("--clip-value", metavar="X...", help=r"Clamp every element to \[-X, X].", rich_help_panel=PANEL),
]
AnyPolicy = Annotated[
    list[str] | None,
    typer.Option(
        "--policy",
        metavar="NAME:ARGS...",
        help=f"Any policy: {', '.join(rule.usage for rule in POLICIES)}.".replace("[", r"\["),
        rich_help_panel=PANEL,
    ),
]
Convention = Annotated[
    ConventionName,
    typer.Option(
        "--convention",
        help="Scale by min(1, max_norm/n), or as torch does by min(1, max_norm/(n + 1e-6)).",
        rich_help_panel=PANEL,
    ),
]


def chosen_policies(max_norms: Sequence[str], clip_values: Sequence[str], policies: Sequence[str]) -> list[str]:
    """The policies in their general notation, all checked, so that a slip is told before a long read.

    Raises GradscopeError in the words of the option that was used.
    """
    chosen = []
    for option, name, values in (("--max-norm", "norm", max_norms), ("--clip-value", "value", clip_values)):
        for value in values:
            parse_number(option, value)
            try:
                check_notation(f"{name}:{value}")
            except GradscopeError as error:
                raise GradscopeError(f"{option} {value}", error.why) from None
            chosen.append(f"{name}:{value}")
    for text in policies:
        check_notation(text)
        chosen.append(text)
    return chosen
