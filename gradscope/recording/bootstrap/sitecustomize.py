"""Runs at the start of every Python that a recorded command starts, and attaches the recorder when torch is imported.

``gradscope record`` puts this directory in front of PYTHONPATH.  Where this file hides another ``sitecustomize``, that
one runs as it would have; a Python that never imports torch loads nothing more.  It may be any Python of any
environment: this file keeps to old syntax.
"""

import os
import sys


class _FirstImportOfTorch(object):  # noqa: UP004
    """A finder that finds nothing, but learns that torch is about to be imported."""

    def find_spec(self, name, path=None, target=None):  # type: ignore[no-untyped-def]
        """Attach at the first question for torch, then let the others answer it."""
        if name != "torch" or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        _attach()
        from importlib.util import find_spec

        return find_spec(name)


def _attach():  # type: ignore[no-untyped-def]
    try:
        from gradscope.recording.attaching import attach_when_torch_is_imported
    except Exception as error:  # noqa: BLE001 - whatever this environment lacks, training goes on
        _say_that_it_cannot_be_imported(error)
    else:
        attach_when_torch_is_imported()


def _say_that_it_cannot_be_imported(error):  # type: ignore[no-untyped-def]
    import json

    try:
        notes = json.loads(os.environ["GRADSCOPE_RECORD"])["notes"]
        # Created once for the whole command, so that one process of many speaks.
        with os.fdopen(os.open(os.path.join(notes, "not-installed"), os.O_CREAT | os.O_EXCL | os.O_WRONLY), "w") as out:
            out.write(sys.executable)
        sys.stderr.write("gradscope: not recording: %s has no gradscope (%s)\n" % (sys.executable, error))  # noqa: UP031
    except (OSError, ValueError, KeyError):
        pass


def _run_the_hidden_one():  # type: ignore[no-untyped-def]
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) != here]
    this = sys.modules.pop("sitecustomize", None)
    try:
        import sitecustomize  # type: ignore[import-not-found]  # noqa: F401
    except ImportError as error:
        if getattr(error, "name", "sitecustomize") != "sitecustomize":
            raise
        if this is not None:
            sys.modules["sitecustomize"] = this


try:
    _run_the_hidden_one()  # type: ignore[no-untyped-call]
finally:
    if os.environ.get("GRADSCOPE_RECORD"):
        if "torch" in sys.modules:
            _attach()  # type: ignore[no-untyped-call]
        else:
            sys.meta_path.insert(0, _FirstImportOfTorch())  # type: ignore[arg-type]
