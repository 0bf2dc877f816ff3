"""Stable-Baselines3: recording what ``learn()`` does, and capturing what it learns from.

``model.learn(…, callback=RecordGradients("run.gradscope"))``; ``save_rollout(model, "rollout.safetensors")``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from gradscope.backward.captured import write_batch
from gradscope.errors import GradscopeError
from gradscope.integrations.training_recorder import TrainingRecorder

try:
    from stable_baselines3 import __version__
    from stable_baselines3.common.callbacks import BaseCallback
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"gradscope.integrations.sb3 needs stable-baselines3 ({error})") from None

# What needs torch comes after SB3, whose absence is to be told first.
from gradscope.backward.library_training import seeded
from gradscope.backward.sb3 import ALGORITHMS, LIBRARY, REPLAY, ROLLOUT, Algorithm

if TYPE_CHECKING:
    from stable_baselines3.common.base_class import BaseAlgorithm
    from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm


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


class SaveRollout(BaseCallback):  # type: ignore[misc, unused-ignore]
    """Captures the batch at the end of ``learn()``: a rollout, or of an off-policy algorithm a sample of its replay."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Write to the file ``path``, as ``save_rollout`` and ``save_replay`` do."""
        super().__init__()
        self.path = path

    def _on_training_start(self) -> None:
        # Said before hours of training, not after.
        _algorithm_of(self.model)

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        save: Callable[[Any, Any], None] = save_replay
        if _algorithm_of(self.model).kind == "rollout":
            save = save_rollout
        save(self.model, self.path)


def save_rollout(model: BaseAlgorithm, path: str | os.PathLike[str]) -> None:
    """Write the last rollout of a PPO, A2C or MaskablePPO that has learned, for ``gradscope inspect CKPT --batch``.

    A safetensors file of [rows, ...] columns, rows = n_steps × n_envs, in the order in which SB3's permutation numbers
    them and in the buffer's dtypes: observations (one column ``observations.KEY`` for each part of a dict), actions,
    values, log_probs, advantages and returns (and action_masks).

    Raises:
        GradscopeError: no rollout has been collected, the algorithm learns from none, or ``path`` cannot be written.
    """
    _expect(model, "rollout")
    buffer: Any = getattr(model, "rollout_buffer", None)
    if buffer is None or not buffer.full:
        raise GradscopeError("save_rollout", "no rollout has been collected", "call it after model.learn(...)")
    columns: dict[str, NDArray[Any]] = {}
    for name in (*ROLLOUT, "action_masks"):
        column = getattr(buffer, name, None)
        if isinstance(column, dict):
            columns |= {f"{name}.{key}": _flat(buffer, part) for key, part in column.items()}
        elif column is not None:
            columns[name] = _flat(buffer, column)
    for name in ("values", "log_probs", "advantages", "returns"):
        columns[name] = columns[name].reshape(-1)
    write_batch(path, columns, _origin(model, "rollout", buffer_size=buffer.buffer_size, n_envs=buffer.n_envs))


def save_replay(
    model: OffPolicyAlgorithm, path: str | os.PathLike[str], rows: int | None = None, seed: int = 0
) -> None:
    """Write ``rows`` samples of the replay buffer of a DQN, SAC, TD3 or another off-policy algorithm.

    They are drawn as the algorithm draws its minibatches (with replacement, n-step returns and relabelled goals
    included) and normalised as for its training; ``rows`` None draws 100 minibatches.  A safetensors file of
    [rows, ...] columns: observations and next_observations (``observations.KEY`` for a dict), actions, dones, rewards
    (and discounts).

    Raises:
        GradscopeError: the buffer is empty, the algorithm has none, or ``path`` cannot be written.
    """
    _expect(model, "replay")
    buffer: Any = getattr(model, "replay_buffer", None)
    if buffer is None or buffer.size() == 0:
        raise GradscopeError("save_replay", "the replay buffer is empty", "call it after model.learn(...)")
    count = 100 * model.batch_size if rows is None else rows
    if count < 1:
        raise GradscopeError("save_replay", f"rows={count} must be at least 1")
    with seeded(seed):
        samples = buffer.sample(count, env=model._vec_normalize_env)
    columns: dict[str, NDArray[Any]] = {}
    for name in (*REPLAY, "discounts"):
        column = getattr(samples, name, None)
        if isinstance(column, dict):
            columns |= {f"{name}.{key}": part.cpu().numpy() for key, part in column.items()}
        elif column is not None:
            columns[name] = column.cpu().numpy()
    for name in {"dones", "rewards", "discounts"} & set(columns):
        columns[name] = columns[name].reshape(-1)
    write_batch(path, columns, _origin(model, "replay", buffer_size=buffer.buffer_size, n_envs=buffer.n_envs))


def _label(model: BaseAlgorithm) -> str:
    """The name of the SB3 class that ``model`` is of, or inherits from."""
    labels = {(known.package, known.name): label for label, known in ALGORITHMS.items()}
    for class_ in type(model).__mro__:
        if label := labels.get((class_.__module__.partition(".")[0], class_.__name__)):
            return label
    raise GradscopeError(type(model).__name__, f"its batches cannot be captured; those of {', '.join(ALGORITHMS)} can")


def _algorithm_of(model: BaseAlgorithm) -> Algorithm:
    return ALGORITHMS[_label(model)]


def _expect(model: BaseAlgorithm, kind: str) -> None:
    found = _algorithm_of(model)
    if found.kind != kind:
        raise GradscopeError(
            f"save_{kind}",
            f"{found.name} learns from a {found.kind}, not from a {kind}",
            f"save_{found.kind}(model, path)",
        )


def _origin(model: BaseAlgorithm, kind: str, **sizes: int) -> dict[str, Any]:
    return {"kind": kind, "library": LIBRARY, "version": __version__, "algorithm": _label(model), **sizes}


def _flat(buffer: Any, column: NDArray[Any]) -> NDArray[Any]:
    """[steps, envs, ...] as [envs × steps, ...]; a buffer that was trained on is so already."""
    flat: NDArray[Any] = column if buffer.generator_ready else buffer.swap_and_flatten(column)
    return flat
