"""``gradscope check``: whether a run is healthy, as an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer

from gradscope.commands import options
from gradscope.errors import GradscopeError
from gradscope.printable import printable

if TYPE_CHECKING:
    from gradscope.check_results import Check
    from gradscope.commands.destination import Destination
    from gradscope.gradients import GradientSource
    from gradscope.health.baselines import Baseline
    from gradscope.health.evidence import Evidence
    from gradscope.health.settings import CheckSettings
    from gradscope.views import Format

RULES = "Rules"


class CheckFormat(str, Enum):
    """The forms a check can take."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"
    JUNIT = "junit"
    SARIF = "sarif"
    GITHUB = "github"
    MARKDOWN = "markdown"


class FailOnName(str, Enum):
    """From which severity on a violated rule is a failure."""

    ERROR = "error"
    WARN = "warn"


def check(
    paths: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PATH",
            show_default=False,
            help="A trace, a checkpoint, a log of norms or gradient dumps; several are judged one by one, single "
            r"dumps together as steps of a run. Without one: source in \[tool.gradscope] of the nearest "
            "pyproject.toml, else the newest *.gradscope.",
        ),
    ] = None,
    rule: Annotated[
        list[str] | None,
        typer.Option(
            "--rule",
            metavar="NAME.LIMIT=VALUE...",
            help="Another limit, such as clip-rate.max=0.5, or NAME.severity=warn.",
            rich_help_panel=RULES,
        ),
    ] = None,
    select: Annotated[
        list[str] | None,
        typer.Option(
            "--select",
            metavar="NAME...",
            help="Only these rules, in place of those that the project selects and ignores.",
            rich_help_panel=RULES,
        ),
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option("--ignore", metavar="NAME...", help="Not these rules.", rich_help_panel=RULES),
    ] = None,
    strict: Annotated[
        bool | None,
        typer.Option(
            "--strict/--no-strict",
            help="A rule that cannot answer is a failure.",
            show_default=False,
            rich_help_panel=RULES,
        ),
    ] = None,
    fail_on: Annotated[
        FailOnName | None,
        typer.Option(
            "--fail-on", help="What is a failure: errors, or warnings too.", show_default="error", rich_help_panel=RULES
        ),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            "--baseline", metavar="FILE", help="Compare with what --save-baseline wrote.", rich_help_panel=RULES
        ),
    ] = None,
    save_baseline: Annotated[
        str | None,
        typer.Option(
            "--save-baseline",
            metavar="FILE",
            help="Write down what is normal; several PATHs are seeds of one training.",
            rich_help_panel=RULES,
        ),
    ] = None,
    list_rules: Annotated[
        bool,
        typer.Option("--list-rules", help="Print the rules with limits, formula and source.", rich_help_panel=RULES),
    ] = False,
    steps: options.Steps = None,
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
    format_: Annotated[
        CheckFormat | None,
        typer.Option(
            "--format",
            help="How to write the result.",
            show_default="table; github in GitHub Actions",
            rich_help_panel=options.OUTPUT,
        ),
    ] = None,
    output: options.OutputFile = None,
    quiet: options.Quiet = False,
    no_color: options.NoColor = False,
    debug: options.Debug = False,
) -> int:
    """Whether the gradients are healthy: exit code 0, or 1 where a rule failed.

    Limits are set by --rule, or under \\[tool.gradscope.check] of the nearest pyproject.toml: clip-rate.max = 0.5.

    A rule that cannot answer is skipped, and says why. Options with ... take several values.
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
    from gradscope.commands.check_settings import asked_settings
    from gradscope.commands.destination import Destination
    from gradscope.commands.reading import choose_sources, left_alone
    from gradscope.health.checking import judge, wanted_baseline

    settings = asked_settings(
        rules=rule or (),
        select=select,
        ignore=ignore,
        strict=strict,
        fail_on=fail_on.value if fail_on else None,
        baseline=baseline,
        save_baseline=save_baseline,
    )
    form = format_.value if format_ else _usual_format(output, list_rules)
    destination = Destination(form, output, no_color, quiet)
    inputs = [*(paths or []), *(str(file) for file in (batch, settings.baseline) if file)]
    destination.refuse_unusable(inputs)
    if list_rules:
        _list_rules(settings, destination)
        return 0
    _refuse_unusable(save_baseline, output, inputs)
    # A baseline that is damaged is told before a long read.
    usual = wanted_baseline(settings)
    sources, opening = choose_sources(paths, as_, quiet, tag, captured)
    if save_baseline is not None:
        _refuse_without_gradients(save_baseline, sources)
    gathered = [_gathered(source, steps, usual, quiet) for source in sources]
    with left_alone():
        # A rule may read again what it judges: of a captured batch, by anybody's model.
        result = judge(gathered, settings)
    destination.show(result, opening)
    if form == "github":
        _append_summary(result)
    if save_baseline is not None:
        _save_baseline(save_baseline, gathered, result, quiet)
    return 0 if result else 1


def _usual_format(output: str | None, list_rules: bool) -> Format:
    """Annotations where GitHub Actions reads what is printed."""
    return "github" if os.environ.get("GITHUB_ACTIONS") == "true" and output is None and not list_rules else "table"


def _gathered(source: GradientSource, steps: str | None, baseline: Baseline | None, quiet: bool) -> Evidence:
    from gradscope.commands.reading import reading

    with reading(source, quiet, from_start=steps is None) as progress:
        # Loaded while the first step is being read: on a large file that is the time they take.
        from gradscope import views  # noqa: F401
        from gradscope.health.evidence import Evidence

        return Evidence.gather(source, steps=steps, baseline=baseline, progress=progress)


def _list_rules(settings: CheckSettings, destination: Destination) -> None:
    from gradscope.health.checking import rule_texts
    from gradscope.views.rules_view import rules_json, rules_markdown, rules_text

    rules = rule_texts(settings)
    if destination.format == "table":
        destination.write(rules_text(rules, destination.width))
    elif destination.format == "markdown":
        destination.write(rules_markdown(rules))
    elif destination.format == "json":
        destination.write(rules_json(rules))
    else:
        raise GradscopeError(
            f"--format {destination.format}", "is none for rules", "--list-rules: table, json, markdown"
        )


def _append_summary(result: Check) -> None:
    from gradscope.commands.job_summary import append_summary

    if (why := append_summary(result)) is not None:
        _say(f"warning: {why}")


def _refuse_unusable(save_baseline: str | None, output: str | None, inputs: Sequence[str]) -> None:
    """Find out before a long read that the baseline cannot be written.  Raises GradscopeError."""
    if save_baseline is None:
        return
    from gradscope.commands.check_settings import same_file
    from gradscope.commands.overwriting import refuse_overwriting

    if not save_baseline:
        raise GradscopeError("--save-baseline", "needs the name of a file")
    what = f"--save-baseline {save_baseline}"
    if os.path.isdir(save_baseline):
        raise GradscopeError(what, "is a directory")
    if os.path.exists(save_baseline) and not os.path.isfile(save_baseline):
        raise GradscopeError(what, "is not a regular file")
    parent = os.path.dirname(os.path.realpath(save_baseline))
    if not os.path.isdir(parent):
        raise GradscopeError(what, f"there is no directory {parent}")
    if output is not None and same_file(save_baseline, output):
        raise GradscopeError(what, "is what -o writes, too")
    try:
        refuse_overwriting(save_baseline, inputs)
    except GradscopeError as error:
        raise GradscopeError(what, error.why, error.hint) from None


def _refuse_without_gradients(save_baseline: str, sources: Sequence[GradientSource]) -> None:
    for source in sources:
        if not source.tensors:
            why = f"{source.info.path} holds no gradients to make a baseline of"
            raise GradscopeError(f"--save-baseline {save_baseline}", why, "record a run: gradscope record")


def _save_baseline(file: str, gathered: Sequence[Evidence], result: Check, quiet: bool) -> None:
    from pathlib import Path

    from gradscope.health.baselines import save_baseline

    save_baseline(Path(file), gathered)
    if not result:
        _say(f"warning: {file} is the baseline of what failed this check")
    elif not quiet:
        _say(f"Wrote {file}")


def _say(sentence: str) -> None:
    if sys.stderr is not None:
        with suppress(OSError):
            print(printable(sentence), file=sys.stderr)
