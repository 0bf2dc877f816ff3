"""rsl_rl's PPO on a captured rollout: its own ``update()``, minibatch by minibatch, and its clip groups."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gradscope.backward.agent_settings import read_settings
from gradscope.backward.captured import CapturedBatch
from gradscope.backward.imported import their_code
from gradscope.backward.library_training import (
    ClipCall,
    minibatch_seed,
    seeded,
    withheld_training,
)
from gradscope.backward.options import BatchOptions
from gradscope.backward.placement import device_of, dtype_of
from gradscope.backward.rsl_rl_training import (
    OBSERVATIONS,
    algorithm_of,
    load_weights,
    networks_of,
    require_own_classes,
)
from gradscope.errors import GradscopeError
from gradscope.gradients import GradientSource
from gradscope.sources.checkpoints.scalars import max_norm_of
from gradscope.tensors import ClipGroup

PARAMS = "distribution_params."
# What rsl_rl's generator of minibatches hands out beside observations and the distribution's parameters.
COLUMNS = ("actions", "values", "returns", "advantages", "actions_log_prob")
CAPTURE = "capture one with gradscope.integrations.rsl_rl.save_rollout(runner, path) after runner.learn()"


def open_rsl_rl(path: Path, source: GradientSource, batch: CapturedBatch, options: BatchOptions) -> RslRlEngine:
    """The training that left the checkpoint ``source``, ready to compute gradients on ``batch``.

    Raises:
        GradscopeError: rsl_rl, ``agent.yaml`` or something in it is missing, the batch is no rollout of rsl_rl's, or
            weights, observations and settings do not fit each other.
    """
    checkpoint = Path(source.info.path)
    _require_rsl_rl()
    _require_rollout(batch)
    if not source.info.format.endswith("PPO"):
        raise GradscopeError(
            str(checkpoint),
            f"is of {source.info.format}, and of rsl_rl's algorithms only PPO's gradients are computed",
            "give --model and --loss",
        )
    agent = checkpoint.parent / "params" / "agent.yaml"
    settings = read_settings(agent)
    require_own_classes(settings, agent, options.trust)
    device, dtype = str(device_of(options)), dtype_of(options)
    columns = {name: _placed(column, device, dtype) for name, column in batch.tensors().items()}
    algorithm, notes = algorithm_of(settings, agent, columns, device)
    parts = networks_of(algorithm)
    load_weights(parts, checkpoint, agent, columns)
    for part in parts.values():
        part.train()
        if dtype is not None:
            part.to(dtype)
    return RslRlEngine(algorithm, parts, columns, batch, options, notes)


class RslRlEngine:
    """rsl_rl's PPO with a checkpoint's weights and a captured rollout: an ``Engine``."""

    format = "rsl_rl PPO"

    def __init__(
        self,
        algorithm: Any,
        parts: Mapping[str, nn.Module],
        columns: Mapping[str, Tensor],
        batch: CapturedBatch,
        options: BatchOptions,
        notes: tuple[str, ...],
    ) -> None:
        """Run one minibatch, whose clip calls tell the clip groups.

        Raises:
            GradscopeError: rsl_rl's ``update()`` raised, with its message.
        """
        self._algorithm, self._parts, self._columns = algorithm, dict(parts), columns
        self._batch, self._seed = batch, options.seed
        self.rows = batch.rows
        self.minibatch_size = options.minibatch_size or max(1, batch.rows // algorithm.num_mini_batches)
        trained = {id(parameter) for group in algorithm.optimizer.param_groups for parameter in group["params"]}
        named: dict[int, tuple[str, nn.Parameter]] = {}
        for part, model in self._parts.items():
            for name, parameter in model.named_parameters(prefix=part):
                if id(parameter) in trained and parameter.requires_grad:
                    # What both networks hold goes by its first name.
                    named.setdefault(id(parameter), (name, parameter))
        self.parameters = dict(named.values())
        algorithm.num_learning_epochs = algorithm.num_mini_batches = 1
        clips, _ = self._update(np.arange(min(self.minibatch_size, self.rows), dtype=np.int64))
        self.groups = tuple(self._clip_group(clip, number) for number, clip in enumerate(clips))
        self.notes = (*notes, *self._flat_losses())
        if options.epochs > 1:
            self.notes += ("rsl_rl shuffles once for all its epochs; here every epoch is shuffled anew.",)

    def shuffled(self, epochs: int) -> list[NDArray[np.int64]]:
        """As ``RolloutStorage.mini_batch_generator`` draws them: whole minibatches only, so the last rows are left out.

        rsl_rl repeats one order in all epochs of an update; with weights that stay that would repeat the gradients,
        so every epoch is drawn as a new update draws its own.
        """
        whole = self.rows // self.minibatch_size * self.minibatch_size
        device = self._algorithm.device
        return [torch.randperm(whole, device=device).cpu().numpy() for _ in range(epochs)]

    def backward(self, rows: NDArray[np.int64]) -> None:
        """Run ``update()`` on exactly these rows, in their order; clipping and the optimizer's step are left out.

        Raises:
            GradscopeError: a loss is NaN or Inf, or ``update()`` raised.
        """
        _, losses = self._update(rows)
        wrong = [f"{name} loss is {value}" for name, value in losses.items() if not math.isfinite(value)]
        if wrong:
            raise GradscopeError(self._batch.path, f"the {', the '.join(wrong)} on a minibatch of {len(rows):,} rows")

    def _update(self, rows: NDArray[np.int64]) -> tuple[list[ClipCall], dict[str, float]]:
        algorithm = self._algorithm
        algorithm.storage = self._storage(rows)
        learning_rate = algorithm.learning_rate
        try:
            with (
                seeded(minibatch_seed(self._seed, rows)),
                withheld_training(self._parts.values(), [algorithm.optimizer]) as done,
                _in_order(),
                their_code(f"rsl_rl's {type(algorithm).__name__}.update()"),
            ):
                losses = algorithm.update()
        finally:
            algorithm.learning_rate = learning_rate
        return done.clip_calls, {name: float(value) for name, value in (losses or {}).items() if value is not None}

    def _storage(self, rows: NDArray[np.int64]) -> Any:
        """A rollout of one step of as many environments as there are rows."""
        from rsl_rl.storage import RolloutStorage
        from tensordict import TensorDict

        index = torch.from_numpy(np.ascontiguousarray(rows)).to(self._algorithm.device)
        taken = {name: column[index] for name, column in self._columns.items()}
        groups = {name.removeprefix(OBSERVATIONS): v for name, v in taken.items() if name.startswith(OBSERVATIONS)}
        observations = TensorDict(groups, batch_size=[len(rows)])
        shape = tuple(taken["actions"].shape[1:])
        storage = RolloutStorage("rl", len(rows), 1, observations, shape, self._algorithm.device)
        storage.observations = observations.unsqueeze(0)
        for name in (*COLUMNS, "dones", "rewards", "mu", "sigma"):
            if name in taken:
                setattr(storage, name, taken[name].unsqueeze(0))
        # mu and sigma up to 4.x; only the learning rate depends on them.
        names = [name for name in sorted(taken) if name.startswith(PARAMS)] or ["mu", "sigma"]
        storage.distribution_params = tuple(taken[name].unsqueeze(0) for name in names)
        return storage

    def _flat_losses(self) -> Iterator[str]:
        """What there is to say of clip groups that the first rows give no gradient."""
        for group in self.groups:
            gradients = (self.parameters[name].grad for name in group.tensors)
            if not any(bool(gradient.any()) for gradient in gradients if gradient is not None):
                yield (
                    f"The {group.name} has no gradient on the first rows: PPO's loss is flat where an output is more "
                    f"than clip_param ({self._algorithm.clip_param:g}) from what it was in the rollout."
                )

    def _clip_group(self, clip: ClipCall, number: int) -> ClipGroup:
        name_of = {id(parameter): name for name, parameter in self.parameters.items()}
        members = {id(parameter) for parameter in clip.parameters}
        part = next((n for n, m in self._parts.items() if {id(p) for p in m.parameters()} == members), None)
        name = f"group {number}" if part is None else part or "policy"
        held = tuple(name_of[key] for key in dict.fromkeys(map(id, clip.parameters)) if key in name_of)
        max_norm, _ = max_norm_of(clip.max_norm, "agent.yaml")
        return ClipGroup(name, held, max_norm)


def _require_rsl_rl() -> None:
    try:
        import rsl_rl.algorithms  # noqa: F401
    except ModuleNotFoundError as error:
        raise GradscopeError(
            "rsl_rl", f"is needed for the loss of its checkpoints ({error})", "pip install rsl-rl-lib"
        ) from None


def _require_rollout(batch: CapturedBatch) -> None:
    said = batch.metadata
    if said.get("library", "rsl_rl") != "rsl_rl" or said.get("kind", "rollout") != "rollout":
        raise GradscopeError(
            batch.path,
            f"is a {said.get('kind', 'batch')} of {said.get('library', 'an unknown library')}, "
            "and an rsl_rl checkpoint needs a rollout of rsl_rl's",
            CAPTURE,
        )
    missing = [name for name in COLUMNS if name not in batch.columns]
    if not any(name.startswith(OBSERVATIONS) for name in batch.columns):
        missing.insert(0, f"{OBSERVATIONS}GROUP")
    if not any(name.startswith(PARAMS) for name in batch.columns) and not {"mu", "sigma"} <= batch.columns.keys():
        missing.append(f"{PARAMS}0")
    if missing:
        raise GradscopeError(batch.path, f"is no rollout of rsl_rl's: it has no {', '.join(missing)}", CAPTURE)
    shapes = {name: tuple(batch.columns[name].shape) for name in COLUMNS}
    for name, shape in shapes.items():
        if len(shape) != 2 or (name != "actions" and shape[1] != 1):
            expected = "[rows, actions]" if name == "actions" else "[rows, 1]"
            raise GradscopeError(
                batch.path, f"its column {name!r} is {list(shape)}, where rsl_rl has {expected}", CAPTURE
            )


def _placed(column: Tensor, device: str, dtype: torch.dtype | None) -> Tensor:
    return column.to(device, dtype if dtype is not None and column.is_floating_point() else None)


@contextmanager
def _in_order() -> Iterator[None]:
    """Let rsl_rl's generator, which shuffles before it cuts, hand out the rows in the order in which they stand."""
    randperm = torch.randperm
    torch.randperm = lambda n, **options: torch.arange(n, device=options.get("device"))
    try:
        yield
    finally:
        torch.randperm = randperm
