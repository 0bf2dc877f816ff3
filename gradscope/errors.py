"""The one exception that gradscope raises on purpose."""

from __future__ import annotations


class GradscopeError(Exception):
    """Unusable input or options.

    The command line prints it as ``error: WHAT: WHY``, then ``hint: HINT`` if there is one, and ends with exit
    code 2.  ``what`` names the file, option or tensor; ``why`` says in one line what is wrong with it.
    """

    def __init__(self, what: str, why: str, hint: str | None = None) -> None:
        super().__init__(f"{what}: {why}")
        self.what = what
        self.why = why
        self.hint = hint
