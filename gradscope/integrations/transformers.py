"""Transformers: ``Trainer(…, callbacks=[RecordGradients("run.gradscope")])``."""

from __future__ import annotations

import os
from typing import Any

from gradscope.integrations.training_recorder import TrainingRecorder

try:
    from transformers.trainer_callback import TrainerCallback
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"gradscope.integrations.transformers needs transformers ({error})") from None


class RecordGradients(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Records the gradients of ``Trainer.train()``."""

    def __init__(self, path: str | os.PathLike[str], **options: Any) -> None:
        """Record to the directory ``path``; ``options`` and what is raised are those of ``gradscope.Recorder``."""
        self.recorder = TrainingRecorder(path, options)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start recording."""
        self.recorder.start()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop recording."""
        self.recorder.stop()
