"""``gradscope compare``: two sources side by side."""

from __future__ import annotations

from typing import Annotated

import typer

from gradscope.commands import options, policy_options
from gradscope.commands.inspect import By


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
    max_norm: policy_options.MaxNorm = None,
    clip_value: policy_options.ClipValue = None,
    policy: policy_options.AnyPolicy = None,
    convention: policy_options.Convention = policy_options.ConventionName.EXACT,
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

    Any two of gradient dumps, checkpoints, traces and logs of norms: what both hold is compared, and what a policy
    would have clipped of each. Options with ... take several values.
    """
    chosen = policy_options.chosen_policies(max_norm or (), clip_value or (), policy or ())
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
