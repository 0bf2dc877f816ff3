"""rsl_rl: ``record(runner, "run.gradscope")`` before ``runner.learn(…)``, ``save_rollout(runner, FILE)`` after it."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from typing import Any

from gradscope.backward.captured import write_batch
from gradscope.errors import GradscopeError
from gradscope.integrations.training_recorder import TrainingRecorder

# What RolloutStorage holds for PPO: the distribution's parameters are mu and sigma up to 4.x, a tuple from 5.0 on.
_COLUMNS = ("actions", "values", "returns", "advantages", "actions_log_prob", "mu", "sigma", "rewards", "dones")


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


def save_rollout(runner: Any, path: str | os.PathLike[str]) -> None:
    """Save the rollout of the last iteration of ``runner.learn()`` as a batch for ``--batch``, in safetensors.

    Columns are [steps × environments, size] in the order of rsl_rl's own generator of minibatches, in the storage's
    dtypes (bfloat16 as float32): ``observations.GROUP``, ``actions``, ``values``, ``returns``, ``advantages``
    (normalised as the training normalised them), ``actions_log_prob``, the parameters of the actions' distribution,
    ``rewards`` and ``dones``.

    Raises:
        GradscopeError: nothing was collected yet, a rollout is under way, the algorithm is not PPO, the policy is
            recurrent, or the file cannot be written.
    """
    algorithm = runner.alg
    storage: Any = getattr(algorithm, "storage", None)
    _require_rollout(algorithm, storage, str(path))
    write_batch(
        path,
        {name: _array(tensor.flatten(0, 1)) for name, tensor in _columns(storage)},
        {
            "kind": "rollout",
            "library": "rsl_rl",
            "library_version": _version(),
            "algorithm": type(algorithm).__name__,
            "steps": int(storage.num_transitions_per_env),
            "envs": int(storage.num_envs),
        },
    )


def _require_rollout(algorithm: Any, storage: Any, path: str) -> None:
    if getattr(storage, "training_type", None) != "rl":
        raise GradscopeError(path, f"{type(algorithm).__name__} keeps no rollout of PPO's; only that is saved")
    networks = (getattr(algorithm, name, None) for name in ("actor", "critic", "policy"))
    if any(getattr(network, "is_recurrent", False) for network in networks):
        raise GradscopeError(
            path,
            "the policy is recurrent: rsl_rl cuts its rollouts into trajectories, and no row stands for itself",
            "record the training instead: gradscope.integrations.rsl_rl.record(runner, PATH)",
        )
    # returns are zeros until the first rollout is complete; 5.0 on makes room for the distribution at its first step.
    if getattr(storage, "distribution_params", ()) is None or not storage.actions_log_prob.any():
        raise GradscopeError(path, "nothing has been collected yet", "call it after runner.learn()")
    if 0 < storage.step < storage.num_transitions_per_env:
        raise GradscopeError(
            path,
            f"a rollout is under way ({storage.step} of {storage.num_transitions_per_env} steps)",
            "call it after runner.learn()",
        )


def _columns(storage: Any) -> Iterator[tuple[str, Any]]:
    """Everything in the storage that a minibatch is made of, [steps, environments, ...] each."""
    for group, tensor in storage.observations.items():
        yield f"observations.{group}", tensor
    for name in _COLUMNS:
        if getattr(storage, name, None) is not None:
            yield name, getattr(storage, name)
    for number, tensor in enumerate(getattr(storage, "distribution_params", ())):
        yield f"distribution_params.{number}", tensor


def _array(tensor: Any) -> Any:
    """``tensor`` for numpy, which has no bfloat16."""
    return (tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor).detach().cpu().numpy()


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("rsl-rl-lib")
    except PackageNotFoundError:
        return "unknown"
