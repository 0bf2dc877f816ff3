"""What ``--model`` and ``--loss`` name: somebody's own code, imported from the working directory."""

from __future__ import annotations

import difflib
import importlib
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gradscope.backward.library_training import foreign_code, raised
from gradscope.errors import GradscopeError

EXAMPLE = "for example train:make_model"
LOOKED_FOR = "it is looked for in the working directory, then where Python looks"
_NAME = re.compile(r"(\w+(?:\.\w+)*):(\w+(?:\.\w+)*)")


def imported(name: str, option: str) -> Any:
    """What ``name`` (``MODULE:NAME``) stands for; the working directory comes first on ``sys.path``.

    Raises:
        GradscopeError: it is not of that form, there is no such module or name, or importing it fails.
    """
    what = f"{option} {name}"
    match = _NAME.fullmatch(name)
    if match is None:
        raise GradscopeError(what, "is not of the form MODULE:NAME", _corrected(name) or EXAMPLE)
    module_name, attribute = match.groups()
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    with their_code(what):
        module = _module(module_name, what, _corrected(name))
    found = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            public = (known for known in dir(found) if not known.startswith("_"))
            raise GradscopeError(what, f"{module_name} has no {attribute}", _nearest(part, public))
        found = getattr(found, part)
    return found


@contextmanager
def their_code(what: str) -> Iterator[None]:
    """Turn whatever the code inside raises, the end of the program too, into one line that begins with ``what``.

    Raises:
        GradscopeError: with the exception's own message.
    """
    try:
        with foreign_code(what):
            yield
    except SystemExit as error:
        raise GradscopeError(what, f"ended the program (sys.exit({error.code!r}))") from error
    except (GradscopeError, KeyboardInterrupt):
        raise
    # Somebody's own need be no Exception.
    except BaseException as error:
        raise raised(what, error) from error


def _module(name: str, what: str, correction: str | None) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # One that the module itself wants is its own affair.
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        hint = correction or _nearest(name, _modules_here())
        raise GradscopeError(what, f"there is no module {error.name}", hint or LOOKED_FOR) from error


def _modules_here() -> list[str]:
    here = Path.cwd()
    return [path.stem for path in here.glob("*.py")] + [path.parent.name for path in here.glob("*/__init__.py")]


def _nearest(word: str, known: Iterable[str]) -> str | None:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {close[0]}?" if close else None


def _corrected(name: str) -> str | None:
    """A hint for whoever wrote the path of a file."""
    path = re.fullmatch(r"(.+)\.py:(\w+)", name)
    if path is None:
        return None
    module = re.sub(r"[/\\]+", ".", re.sub(r"^(\./)+", "", path[1]))
    return f"a module is named without its suffix: {module}:{path[2]}"
