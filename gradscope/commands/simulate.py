"""``gradscope simulate``: what a clip policy would have done."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Annotated

import typer

from gradscope.clipping.catalogue import POLICIES
from gradscope.clipping.parsing import check_notation
from gradscope.commands import options
from gradscope.errors import GradscopeError


class ConventionName(str, Enum):
    """How a norm is clipped."""

    EXACT = "exact"
    TORCH = "torch"


def simulate(
    paths: options.Paths = None,
    max_norm: Annotated[
        list[str] | None,
        typer.Option(
            "--max-norm",
            "--max-grad-norm",
            metavar="X...",
            help="Clip by norm at X: one norm over each clip group.",
            rich_help_panel=options.POLICIES,
        ),
    ] = None,
    clip_value: Annotated[
        list[str] | None,
        typer.Option(
            "--clip-value", metavar="X...", help=r"Clamp every element to \[-X, X].", rich_help_panel=options.POLICIES
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
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Add a ladder of max_norm.", rich_help_panel=options.POLICIES)
    ] = False,
    convention: Annotated[
        ConventionName,
        typer.Option(
            "--convention",
            help="Scale by min(1, max_norm/n), or as torch does by min(1, max_norm/(n + 1e-6)).",
            rich_help_panel=options.POLICIES,
        ),
    ] = ConventionName.EXACT,
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights", metavar="FILE", help="The parameters, which agc needs.", rich_help_panel=options.READING
        ),
    ] = None,
    steps: options.Steps = None,
    groups: options.Groups = None,
    as_: options.As = None,
    tag: options.Tag = None,
    batch: options.Batch = None,
    model: options.Model = None,
    loss: options.Loss = None,
    minibatch_size: options.MinibatchSize = None,
    epochs: options.Epochs = 1,
    seed: options.Seed = 0,
    trust: options.Trust = False,
    device: options.Device = "cpu",
    dtype: options.Dtype = None,
    format_: options.OutputFormat = options.Format.TABLE,
    output: options.OutputFile = None,
    quiet: options.Quiet = False,
    no_color: options.NoColor = False,
    debug: options.Debug = False,
) -> None:
    """How often each policy would have clipped, and what that does to length and direction of the gradient.

    Ends with the max_norm that would clip 10, 5, 1 and 50 % of the steps. Options with ... take several values.

    Without a policy, a recorded run is replayed with its own max_norm.
    """
    chosen = chosen_policies(max_norm or (), clip_value or (), policy or ())
    chosen_groups = options.parse_groups(groups)
    captured = options.captured_batch(
        batch,
        model=model,
        loss=loss,
        minibatch_size=minibatch_size,
        epochs=epochs,
        seed=seed,
        trust=trust,
        device=device,
        dtype=dtype,
    )

    from gradscope.commands.destination import Destination
    from gradscope.commands.reading import choose_source, reading

    destination = Destination(format_.value, output, no_color, quiet)
    destination.refuse_unusable([*(paths or []), *(file for file in (weights, batch) if file)])
    source, opening = choose_source(paths, as_, quiet, weights, tag, captured)
    with reading(source, quiet, from_start=steps is None) as progress:
        # Loaded while the first step is being read: on a large file that is the time they take.
        from gradscope import simulation, views  # noqa: F401

        result = simulation.simulate(
            source,
            chosen,
            steps=steps,
            groups=chosen_groups,
            convention=convention.value,
            sweep=sweep,
            progress=progress,
        )
    destination.show(result, opening)


def chosen_policies(max_norms: Sequence[str], clip_values: Sequence[str], policies: Sequence[str]) -> list[str]:
    """The policies in their general notation, all checked, so that a slip is told before a long read.

    Raises GradscopeError in the words of the option that was used.
    """
    chosen = []
    for option, name, values in (("--max-norm", "norm", max_norms), ("--clip-value", "value", clip_values)):
        for value in values:
            options.parse_number(option, value)
            try:
                check_notation(f"{name}:{value}")
            except GradscopeError as error:
                raise GradscopeError(f"{option} {value}", error.why) from None
            chosen.append(f"{name}:{value}")
    for text in policies:
        check_notation(text)
        chosen.append(text)
    return chosen
