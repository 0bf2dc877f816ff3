"""Run the commands of the README in a terminal of 80 columns and keep what they show as SVG.

    python docs/make_screenshots.py

needs gradscope installed and a POSIX system (it uses a pseudo-terminal).
"""

from __future__ import annotations

import os
import pty
import subprocess
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

HERE = Path(__file__).parent
SCREENS = {
    "simulate.svg": "gradscope simulate --max-norm 0.5",
    "inspect.svg": "gradscope inspect sample_ckpts/ppo_cartpole.zip",
}


def main() -> None:
    """Write every screenshot."""
    for name, command in SCREENS.items():
        console = Console(record=True, width=80, file=open(os.devnull, "w"))  # noqa: SIM115
        console.print(Text.from_ansi(f"$ {command}\n{in_a_terminal(command)}"))
        console.save_svg(str(HERE / name), title=command, theme=MONOKAI)


def in_a_terminal(command: str) -> str:
    """What ``command`` prints to a terminal of 80 columns, escape sequences included."""
    terminal, end = pty.openpty()
    environment = {**os.environ, "COLUMNS": "80", "TERM": "xterm-256color"}
    with subprocess.Popen(command.split(), stdout=end, stderr=end, cwd=HERE.parent, env=environment):
        os.close(end)
        shown = b""
        # The other end of a closed terminal raises EIO instead of ending.
        while chunk := read_or_nothing(terminal):
            shown += chunk
    return shown.decode().replace("\r\n", "\n")


def read_or_nothing(terminal: int) -> bytes:
    """The next bytes, none at the end."""
    try:
        return os.read(terminal, 65536)
    except OSError:
        return b""


if __name__ == "__main__":
    main()
