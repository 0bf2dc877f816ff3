"""A process of a recorded command: its recorder starts as soon as torch is imported."""

from __future__ import annotations

import atexit
import sys
from functools import partial
from typing import TYPE_CHECKING

from gradscope.errors import GradscopeError
from gradscope.recording.settings import NOTHING, STOPPED, TORCH_IMPORTED, RecordSettings

if TYPE_CHECKING:
    from types import ModuleType

    from gradscope.recording.recorder import Recorder


def attach_when_torch_is_imported() -> None:
    """Start the recorder that the environment asks for right after ``import torch``, or now if that has happened.

    It starts before the importing code can bind any function of torch.  Where the environment asks for none, nothing
    happens.  Never raises: what is wrong is told on stderr, once for the whole command, and training goes on.
    """
    try:
        settings = RecordSettings.from_environment()
    except GradscopeError as error:
        print(f"gradscope: not recording: {error}", file=sys.stderr)
        return
    if settings is None:
        return
    from wrapt import register_post_import_hook

    register_post_import_hook(partial(_attach, settings), "torch")


def _attach(settings: RecordSettings, torch: ModuleType) -> None:
    settings.leave_note(TORCH_IMPORTED)
    try:
        recorder = _recorder(settings)
        recorder.start()
    except Exception as error:  # noqa: BLE001 - an error here would be one of `import torch`
        why = f"{type(error).__name__}: {error}"
        if settings.leave_note(STOPPED, why):
            print(f"gradscope: not recording: {why}", file=sys.stderr)
        return
    stop = partial(_stop, recorder, settings)
    atexit.register(stop)
    # A forked worker of multiprocessing ends without atexit, and has forgotten what was to be finalized in its parent.
    from multiprocessing import util

    util.register_after_fork(recorder, lambda _: util.Finalize(None, stop, exitpriority=0))


def _stop(recorder: Recorder, settings: RecordSettings) -> None:
    recorder.stop()
    if recorder.optimizers_stepped and (why := recorder.why_nothing_was_recorded) is not None:
        settings.leave_note(NOTHING, why)


def _recorder(settings: RecordSettings) -> Recorder:
    from gradscope.recording.recorder import Recorder

    return Recorder(
        settings.path,
        every=settings.every,
        start=settings.start,
        max_steps=settings.max_steps,
        include=settings.include,
        detail=settings.detail,
        stop_on=settings.stop_on,
        force=settings.force,
        command=settings.command,
        launched=settings,
    )
