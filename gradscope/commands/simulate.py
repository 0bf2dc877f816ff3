"""``gradscope simulate``: what a clip policy would have done."""

from __future__ import annotations

from typing import Annotated

import typer

from gradscope.commands import options, policy_options


def simulate(
    paths: options.Paths = None,
    max_norm: policy_options.MaxNorm = None,
    clip_value: policy_options.ClipValue = None,
    policy: policy_options.AnyPolicy = None,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Add a ladder of max_norm.", rich_help_panel=options.POLICIES)
    ] = False,
    convention: policy_options.Convention = policy_options.ConventionName.EXACT,
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
    chosen = policy_options.chosen_policies(max_norm or (), clip_value or (), policy or ())
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
