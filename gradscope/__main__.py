"""The program ``gradscope``: run a command, end with the right line and exit code."""

from __future__ import annotations

import itertools
import os
import sys


def main() -> int:
    """Run the command line; 0 done, 1 an unhealthy run, 2 unusable input or options, 130 interrupted.

    ``record`` ends as the command that it ran.
    """
    debug = "--debug" in itertools.takewhile(lambda word: word != "--", sys.argv[1:])
    if sys.argv[1:2] != ["record"] and not any(word.startswith("--batch") for word in sys.argv):
        # No matrix is multiplied here: numpy need not start a thread for every core.  A recorded command may want them.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        from gradscope.commands.app import run

        return run(sys.argv[1:])
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # noqa: BLE001 - the one place where everything ends
        return _failed(error, debug)


def _failed(error: Exception, debug: bool) -> int:
    from gradscope.commands.failures import failure_lines

    if debug:
        import traceback

        traceback.print_exception(error)
    print(*failure_lines(error), sep="\n", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
