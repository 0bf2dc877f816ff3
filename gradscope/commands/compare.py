"""``gradscope compare``: two sources side by side."""

from __future__ import annotations

from typing import Annotated

import typer

from gradscope.clipping.catalogue import POLICIES
from gradscope.commands import options
from gradscope.commands.inspect import By
from gradscope.commands.simulate import ConventionName, chosen_policies


def compare(
    a: Annotated[
        str,
        typer.Argument(
            metavar="A",
            show_default=False,
            help="A gradient dump, a directory or a glob of them, a checkpoint, a trace, or a log of norms.",
        ),
    ],
    b: Annotated[str, typer.Argument(metavar="B", show_default=False, help="What to compare it with: any of these.")],
    max_norm: Annotated[
        list[str] | None,
        typer.Option(
            "--max-norm",
            "--max-grad-norm",
            metavar="X...",
            help="How often max_norm X would clip each side.",
            rich_help_panel=options.POLICIES,
        ),
    ] = None,
    clip_value: Annotated[
        list[str] | None,
        typer.Option(
            "--clip-value",
            metavar="X...",
            help=r"The same for a clamp of every element to \[-X, X].",
            rich_help_panel=options.POLICIES,
        ),
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            "--policy",
            metavar="NAME:ARGS...",
            help=f"Any policy: {', '.join(rule.usage for rule in POLICIES)}.".replace("[", r"\["),
            rich_help_panel=options.POLICIES,
        ),
    ] = None,
    convention: Annotated[
        ConventionName,
        typer.Option(
            "--convention",
            help="Scale by min(1, max_norm/n), or as torch does by min(1, max_norm/(n + 1e-6)).",
            rich_help_panel=options.POLICIES,
        ),
    ] = ConventionName.EXACT,
    steps: options.Steps = None,
    groups: options.Groups = None,
    as_: options.As = None,
    tag: options.Tag = None,
    by: Annotated[By, typer.Option("--by", help="What a row stands for.", rich_help_panel=options.OUTPUT)] = By.LAYER,
    top: Annotated[
        int | None,
        typer.Option("--top", metavar="N", min=1, help="Show N rows.", rich_help_panel=options.OUTPUT),
    ] = None,
    format_: options.OutputFormat = options.Format.TABLE,
    output: options.OutputFile = None,
    quiet: options.Quiet = False,
    no_color: options.NoColor = False,
    debug: options.Debug = False,
) -> None:
    """Two sources side by side, per layer, what differs most beyond noise first.

    Any two of gradient dumps, checkpoints, traces and logs of norms: what both hold is compared.
    """
    chosen = chosen_policies(max_norm or (), clip_value or (), policy or ())
    chosen_groups = options.parse_groups(groups)

    from gradscope.commands.destination import Destination
    from gradscope.commands.reading import reading
    from gradscope.sources.opening_pair import open_pair

    destination = Destination(format_.value, output, no_color, quiet)
    destination.refuse_unusable([a, b])
    one, other = open_pair(a, b, as_=as_.value if as_ else None, tag=tag)
    with reading(one, quiet, from_start=False) as progress:
        from gradscope.comparison import comparing

        result = comparing.compare(
            one,
            other,
            policies=chosen,
            steps=steps,
            groups=chosen_groups,
            convention=convention.value,
            progress=progress,
        )
    destination.show(result, "", by=by.value, top=top)
