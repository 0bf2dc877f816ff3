"""Stable-Baselines3: ``model.learn(…, callback=RecordGradients("run.gradscope"))``."""

from __future__ import annotations

import os
from typing import Any

from gradscope.integrations.training_recorder import TrainingRecorder

try:
    from stable_baselines3.common.callbacks import BaseCallback
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"gradscope.integrations.sb3 needs stable-baselines3 ({error})") from None


class RecordGradients(BaseCallback):  # type: ignore[misc, unused-ignore]
    """Records the gradients of ``learn()``."""

    def __init__(self, path: str | os.PathLike[str], **options: Any) -> None:
        """Record to the directory ``path``; ``options`` and what is raised are those of ``gradscope.Recorder``."""
        super().__init__()
        self.recorder = TrainingRecorder(path, options)

    def _on_training_start(self) -> None:
        self.recorder.start()

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        self.recorder.stop()
