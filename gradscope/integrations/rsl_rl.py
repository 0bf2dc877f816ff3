"""rsl_rl: ``record(runner, "run.gradscope")``, then ``runner.learn(…)``."""

from __future__ import annotations

import functools
import os
from typing import Any

from gradscope.integrations.training_recorder import TrainingRecorder


def record(runner: Any, path: str | os.PathLike[str], **options: Any) -> TrainingRecorder:
    """Record the gradients of ``runner.learn()`` from now on, to the directory ``path``.

    ``runner`` is an ``OnPolicyRunner`` or another of rsl_rl's, whatever its version; ``options`` are those of
    ``gradscope.Recorder``, which says what is raised.
    """
    recorder = TrainingRecorder(path, options)
    learn = runner.learn

    @functools.wraps(learn)
    def recorded_learn(*args: Any, **kwargs: Any) -> Any:
        recorder.start()
        try:
            return learn(*args, **kwargs)
        finally:
            recorder.stop()

    runner.learn = recorded_learn
    return recorder
