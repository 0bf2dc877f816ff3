"""Running a command as if nobody watched: its input and output, its signals and its end are what they would have been.

The command runs in gradscope's own process group, so that the terminal treats both as one job: Ctrl-C reaches the
command, Ctrl-Z stops both, ``fg`` wakes both.  gradscope itself only waits, and passes on what was sent to it alone.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from gradscope.errors import GradscopeError
from gradscope.recording.settings import VARIABLE, RecordSettings

BOOTSTRAP = Path(__file__).parent / "bootstrap"
_PASSED_ON = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")
# Python ignores these for itself; a program that it starts should not find them ignored.
_IGNORED_BY_PYTHON = ("SIGPIPE", "SIGXFZ", "SIGXFSZ")


def find_program(name: str) -> str:
    """The path of the program that a shell would run for ``name``.

    Raises GradscopeError if there is none.
    """
    if not hasattr(os, "posix_spawn"):
        raise GradscopeError("gradscope record", "needs Linux or macOS", "gradscope.Recorder works everywhere")
    found = shutil.which(name)
    if found is not None:
        return found
    script = f"gradscope record -- python {name}" if name.endswith(".py") else None
    if os.path.isdir(name):
        raise GradscopeError(name, "is a directory, not a command")
    if os.path.exists(name):
        why = "is not on PATH" if os.access(name, os.X_OK) else "is not executable"
        raise GradscopeError(name, why, script or f"gradscope record -- {os.path.join('.', name)}")
    raise GradscopeError(name, "no such command", script if script and os.path.exists(name) else None)


def recorded_environment(settings: RecordSettings, environment: Mapping[str, str]) -> dict[str, str]:
    """``environment`` for a command whose Python processes, and those that they start, are to be recorded."""
    paths = [str(BOOTSTRAP), *filter(None, [environment.get("PYTHONPATH")])]
    return {**environment, "PYTHONPATH": os.pathsep.join(paths), VARIABLE: settings.to_environment()}


def run_command(program: str, command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run ``command``, whose program is at the path ``program``, to its end: its exit code, or -N if signal N ended it.

    Raises GradscopeError if it cannot be started.
    """
    passed_on = {getattr(signal, name) for name in _PASSED_ON}
    # What is ignored here (nohup, a shell's background job) the command ignores too.
    watched = {number for number in passed_on if signal.getsignal(number) is not signal.SIG_IGN} | {signal.SIGCHLD}
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    try:
        child = _start(program, command, environment, mask)
        try:
            return _wait(child, watched)
        finally:
            # A Ctrl-C was the command's; what is still to be said about it follows.
            while pending := signal.sigpending() & watched:
                signal.sigwait(pending)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _start(
    program: str, command: Sequence[str], environment: Mapping[str, str], mask: set[int | signal.Signals]
) -> int:
    restored = [getattr(signal, name) for name in _IGNORED_BY_PYTHON if hasattr(signal, name)]
    try:
        return os.posix_spawn(program, list(command), dict(environment), setsigmask=mask, setsigdef=restored)
    except OSError as error:
        raise GradscopeError(command[0], f"cannot be run: {error.strerror}") from None


def _wait(child: int, watched: set[signal.Signals]) -> int:
    """Wait for the process ``child``; the signals in ``watched`` are blocked, so that none can come in between."""
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        number, to_this_process_alone = _next_signal(watched)
        if number != signal.SIGCHLD and to_this_process_alone:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, number)


def _next_signal(watched: set[signal.Signals]) -> tuple[int, bool]:
    """The next signal, and whether it was sent to this process, and not by the terminal to its whole foreground job."""
    if hasattr(signal, "sigwaitinfo"):
        received = signal.sigwaitinfo(watched)
        # Positive: from the kernel, not by kill(2).
        return received.si_signo, received.si_code <= 0
    number = signal.sigwait(watched)
    return number, number not in (signal.SIGINT, signal.SIGQUIT)


def end_like(code: int) -> int:
    """The exit code for a command that ended with ``code`` as ``run_command`` returns it.

    Where a signal ended the command it ends this process too, as ``timeout`` does, so that a shell loop stops at
    Ctrl-C; where it cannot (the first process of a container), the code is the shell's, 128 + N.
    """
    if code >= 0:
        return code
    import resource

    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.flush()
    # One core dump, the command's, is enough.
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    with contextlib.suppress(OSError):
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
    return 128 - code
