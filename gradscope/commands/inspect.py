"""``gradscope inspect``: what is in a file."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer

from gradscope.commands import options


class By(str, Enum):
    """What a row of the table stands for."""

    TENSOR = "tensor"
    LAYER = "layer"
    GROUP = "group"


class Sort(str, Enum):
    """What the rows are ordered by."""

    SHARE = "share"
    NORM = "norm"
    NAME = "name"
    ORDER = "order"


def inspect(
    paths: options.Paths = None,
    max_norm: Annotated[
        str | None,
        typer.Option(
            "--max-norm",
            "--max-grad-norm",
            metavar="X",
            help="The threshold for clip saturation, in place of what the checkpoint names.",
            rich_help_panel=options.READING,
        ),
    ] = None,
    at: Annotated[
        int | None,
        typer.Option("--at", metavar="STEP", help="One step, and the 20 before it.", rich_help_panel=options.READING),
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
    by: Annotated[By, typer.Option("--by", help="What a row stands for.", rich_help_panel=options.OUTPUT)] = By.LAYER,
    sort: Annotated[
        Sort,
        typer.Option(
            "--sort", help="Largest share or norm first, by name, or as in the file.", rich_help_panel=options.OUTPUT
        ),
    ] = Sort.SHARE,
    top: Annotated[
        int | None,
        typer.Option(
            "--top",
            metavar="N",
            min=1,
            help="Show N rows; without it, those that hold nearly all of the squared norm. JSON always has all.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = None,
    format_: options.OutputFormat = options.Format.TABLE,
    output: options.OutputFile = None,
    quiet: options.Quiet = False,
    no_color: options.NoColor = False,
    debug: options.Debug = False,
) -> None:
    """What is in a file: norms of gradients and weights by layer, and what the optimizer knows of the clipping.

    A checkpoint holds no gradients, but its optimizer remembers how large they were after clipping.
    """
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
    destination.refuse_unusable([*(paths or []), *([batch] if batch else [])])
    chosen_groups = options.parse_groups(groups)
    limit = None if max_norm is None else options.parse_number("--max-norm", max_norm)
    source, opening = choose_source(paths, as_, quiet, tag=tag, batch=captured)
    with reading(source, quiet, from_start=steps is None and at is None) as progress:
        # Loaded while the first step is being read: on a large file that is the time they take.
        from gradscope import inspection, views  # noqa: F401

        result = inspection.inspect(source, steps=steps, groups=chosen_groups, max_norm=limit, at=at, progress=progress)
    destination.show(result, opening, by=by.value, top=top, sort=sort.value)
