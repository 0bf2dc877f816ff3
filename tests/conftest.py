"""What every test finds."""

from __future__ import annotations

import signal

import pytest


@pytest.fixture(autouse=True, scope="session")
def nothing_is_ignored() -> None:
    """Signals that a background job or nohup ignores would be ignored by every command that a test starts."""
    for name in ("SIGINT", "SIGHUP", "SIGQUIT"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL)
