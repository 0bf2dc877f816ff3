"""The options that commands share, each written down once."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradscope.errors import GradscopeError

if TYPE_CHECKING:
    from gradscope.backward.options import BatchOptions

READING, BATCH, POLICIES, OUTPUT = "What to read", "Gradients of a captured batch", "Policies", "Output"


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
Batch = Annotated[
    str | None,
    typer.Option(
        "--batch",
        metavar="FILE",
        help="Compute the gradients of this batch (safetensors, npz or pt), one step per minibatch.",
        rich_help_panel=BATCH,
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODULE:FACTORY",
        help="Makes the model, whose weights are the checkpoint's. SB3 and rsl_rl checkpoints need none.",
        rich_help_panel=BATCH,
    ),
]
Loss = Annotated[
    str | None,
    typer.Option(
        "--loss",
        metavar="MODULE:FUNCTION",
        help="loss(model, batch): a scalar, or one loss for each row.",
        rich_help_panel=BATCH,
    ),
]
MinibatchSize = Annotated[
    int | None,
    typer.Option(
        "--minibatch-size",
        metavar="N",
        min=1,
        help="Rows in a step; without it, as in the training, or all.",
        rich_help_panel=BATCH,
    ),
]
Epochs = Annotated[
    int, typer.Option("--epochs", metavar="N", min=1, help="How often the rows are shuffled.", rich_help_panel=BATCH)
]
Seed = Annotated[
    int,
    typer.Option(
        "--seed", metavar="N", min=0, help="Of the shuffling, and of what the loss draws.", rich_help_panel=BATCH
    ),
]
Trust = Annotated[
    bool, typer.Option("--trust", help="Unpickle what an SB3 checkpoint holds: code can run.", rich_help_panel=BATCH)
]
Device = Annotated[
    str, typer.Option("--device", metavar="NAME", help="Where to compute: cpu, cuda, cuda:1.", rich_help_panel=BATCH)
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="NAME",
        help="Compute in float64, float32, bfloat16 or float16.",
        show_default="the model's own",
        rich_help_panel=BATCH,
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


def captured_batch(batch: str | None, **given: Any) -> BatchOptions | None:
    """The options of a captured batch; None without one.

    Raises GradscopeError where one of them stands alone, or is out of range.
    """
    from gradscope.backward.options import batch_options

    return batch_options(batch, **given)


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
