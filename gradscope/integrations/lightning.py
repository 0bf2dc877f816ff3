"""Lightning: ``Trainer(callbacks=[RecordGradients("run.gradscope")])``."""

from __future__ import annotations

import os
from typing import Any

from gradscope.integrations.training_recorder import TrainingRecorder

try:
    from lightning.pytorch import Callback
except ModuleNotFoundError:
    try:
        from pytorch_lightning import Callback  # type: ignore[assignment, unused-ignore]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"gradscope.integrations.lightning needs lightning ({error})") from None


class RecordGradients(Callback):  # type: ignore[misc, unused-ignore]
    """Records the gradients of ``fit()``."""

    def __init__(self, path: str | os.PathLike[str], **options: Any) -> None:
        """Record to the directory ``path``; ``options`` and what is raised are those of ``gradscope.Recorder``."""
        super().__init__()
        self.recorder = TrainingRecorder(path, options)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Start recording."""
        self.recorder.start()

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Stop recording."""
        self.recorder.stop()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Stop recording."""
        self.recorder.stop()
