"""Runs at the start of every Python that a recorded command starts, and attaches the recorder when torch is imported.

``gradscope record`` puts this directory in front of PYTHONPATH.  Where this file hides another ``sitecustomize``, that
one runs as it would have; a Python that never imports torch loads nothing more.  It may be the Python of another
environment, and an older one: nothing newer than Python 3.6 stands here.
"""

import os
import sys


class _FirstImportOfTorch:
    """A finder that finds nothing, but learns that torch is about to be imported."""

    asked = False

    def find_spec(self, name: str, path: object = None, target: object = None) -> object:
        """Attach at the first question for torch, then let the others answer it."""
        if name != "torch" or self.asked:
            return None
        self.asked = True
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        _attach()
        from importlib.util import find_spec

        return find_spec(name)


def _attach() -> None:
    try:
        from gradscope.recording.attaching import attach_when_torch_is_imported
    except Exception as error:  # noqa: BLE001 - whatever this environment lacks, training goes on
        _say_that_it_cannot_be_imported(error)
    else:
        attach_when_torch_is_imported()


def _say_that_it_cannot_be_imported(error: Exception) -> None:
    import json

    try:
        note = os.path.join(json.loads(os.environ["GRADSCOPE_RECORD"])["notes"], "not-installed")
        # Created once for the whole command, so that one process of many speaks.
        with open(note, "x") as out:
            out.write(sys.executable)
        sys.stderr.write(f"gradscope: not recording: {sys.executable} cannot import gradscope ({error})\n")
    except (OSError, ValueError, KeyError):
        pass


def _run_the_hidden_one() -> None:
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) != here]
    this = sys.modules.pop("sitecustomize", None)
    try:
        import sitecustomize  # type: ignore[import-not-found]  # noqa: F401
    except ImportError as error:
        if error.name != "sitecustomize":
            raise
        if this is not None:
            sys.modules["sitecustomize"] = this


try:
    _run_the_hidden_one()
finally:
    if os.environ.get("GRADSCOPE_RECORD"):
        if "torch" in sys.modules:
            _attach()
        else:
            sys.meta_path.insert(0, _FirstImportOfTorch())  # type: ignore[arg-type]
