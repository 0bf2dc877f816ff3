"""The commands, put together."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from gradscope.commands.check import check
from gradscope.commands.compare import compare
from gradscope.commands.export import export
from gradscope.commands.inspect import inspect
from gradscope.commands.record import record
from gradscope.commands.several_values import SeveralValues
from gradscope.commands.simulate import simulate
from gradscope.errors import GradscopeError
from gradscope.nearest import nearest


class _Commands(TyperGroup):
    """The commands; a name that is none of them gets a hint."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse; the first word that is no option must be a command."""
        rest = super().parse_args(ctx, args)
        command = next((argument for argument in args if not argument.startswith("-")), None)
        if command is not None and command not in self.commands:
            if os.path.exists(command):
                raise GradscopeError(command, "no command", f"gradscope inspect {command} tells what is in it")
            known = nearest(command, self.commands) or f"the commands are {', '.join(self.commands)}"
            raise GradscopeError(command, "no such command", known)
        return rest


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(cls=SeveralValues)(inspect)
app.command(cls=SeveralValues)(simulate)
app.command(cls=SeveralValues)(check)
app.command(cls=SeveralValues)(compare)
# Options behind the command's first word are the command's.
app.command(context_settings={"allow_interspersed_args": False})(record)
app.command()(export)


@app.callback(invoke_without_command=True)
def gradscope(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and end.")] = False,
) -> None:
    """How large are the gradients, how often does a threshold clip them, and what does that do to their direction?

    Every command takes gradient dumps (safetensors, pt, npz, npy; a directory is a sequence of steps) and checkpoints.
    """
    if version:
        from gradscope import __version__

        print(f"gradscope {__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


def run(arguments: list[str]) -> int:
    """Run ``arguments``; the exit code.

    Raises GradscopeError and typer's own usage errors.
    """
    code = typer.main.get_command(app).main(args=arguments, prog_name="gradscope", standalone_mode=False)
    if sys.stdout is not None:
        sys.stdout.flush()
    return code if isinstance(code, int) else 0
