"""The summary of a job in GitHub Actions, a file that its steps append markdown to."""

from __future__ import annotations

import os

from gradscope.check_results import Check
from gradscope.views import VIEWS
from gradscope.views.choices import ViewChoices

# https://docs.github.com/en/actions/reference/workflows-and-actions/workflow-commands#adding-a-job-summary
VARIABLE = "GITHUB_STEP_SUMMARY"


def append_summary(result: Check) -> str | None:
    """Append the page of ``result`` to the summary, where there is one; the reason if that is not possible."""
    file = os.environ.get(VARIABLE)
    if not file:
        return None
    text = VIEWS["markdown"](result, ViewChoices()) + "\n"
    try:
        # The runner's file is a regular one; a pipe without a reader would wait for ever.
        descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NONBLOCK", 0), 0o666)
        with open(descriptor, "w", encoding="utf-8", errors="backslashreplace", newline="") as summary:
            summary.write(text)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else None
        return f"the job summary {file} cannot be written ({why or error})"
    return None
