"""rsl_rl's PPO on a captured rollout: its networks, its ``update()``, its clip groups.

Actor, critic and algorithm are made by rsl_rl's own classes from ``params/agent.yaml``; the weights come from the
checkpoint by gradscope's reader, so nothing is unpickled.  From 3.0 on, whichever version is installed.
"""

from __future__ import annotations

import contextlib
import copy
import io
import math
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gradscope.backward.agent_settings import foreign_names, read_settings, unknown_names
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
from gradscope.backward.stored_elements import as_torch, elements_of
from gradscope.errors import GradscopeError
from gradscope.gradients import GradientSource
from gradscope.sources.checkpoints.scalars import mapping_of, max_norm_of
from gradscope.sources.formats.contents import read_contents
from gradscope.sources.formats.tree import UnreadableTensor, named_leaves
from gradscope.tensors import ClipGroup

OBSERVATIONS = "observations."
PARAMS = "distribution_params."
# What rsl_rl's generator of minibatches hands out beside observations and the distribution's parameters.
COLUMNS = ("actions", "values", "returns", "advantages", "actions_log_prob")
CAPTURE = "capture one with gradscope.integrations.rsl_rl.save_rollout(runner, path) after runner.learn()"
RECURRENT = "the policy is recurrent: its rollouts are cut into trajectories, and no row stands for itself"
ANOTHER_VERSION = (
    "where the run's rsl_rl was of another version, install that one (4.0 parted policy into actor and critic)"
)
_SHOWN = 3


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
            f"is of {source.info.format}, and only PPO's gradients are computed",
            "give --model and --loss",
        )
    agent = checkpoint.parent / "params" / "agent.yaml"
    settings = read_settings(agent)
    _require_own_classes(settings, agent, options.trust)
    device, dtype = str(device_of(options)), dtype_of(options)
    columns = {name: _placed(column, device, dtype) for name, column in batch.tensors().items()}
    algorithm, notes = _algorithm(settings, agent, columns, device)
    parts = _parts(algorithm)
    _load_weights(parts, checkpoint, agent, columns)
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
                _same_buffers(self._parts.values()),
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
        parameters = [taken[name].unsqueeze(0) for name in sorted(taken) if name.startswith(PARAMS)]
        if parameters:
            storage.distribution_params = tuple(parameters)
        return storage

    def _flat_losses(self) -> Iterator[str]:
        """What there is to say of clip groups that the first rows give no gradient."""
        for group in self.groups:
            gradients = (self.parameters[name].grad for name in group.tensors)
            if not any(bool(gradient.any()) for gradient in gradients if gradient is not None):
                yield (
                    f"The gradient of the {group.name} is zero on the first rows: PPO's loss is flat where an output "
                    f"has left clip_param ({self._algorithm.clip_param:g}), as it does in the updates after the rollout."
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


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("rsl-rl-lib")
    except PackageNotFoundError:
        return "of unknown version"


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
    if missing:
        raise GradscopeError(batch.path, f"is no rollout of rsl_rl's: it has no {', '.join(missing)}", CAPTURE)
    flat = [name for name in COLUMNS if batch.columns[name].ndim != 2]
    if flat:
        name = flat[0]
        raise GradscopeError(
            batch.path, f"its column {name!r} has shape {list(batch.columns[name].shape)} where rsl_rl has [rows, size]"
        )


def _require_own_classes(settings: Mapping[str, Any], agent: Path, trust: bool) -> None:
    """That the sections are there from which the installed rsl_rl makes a training, and name only what may be run."""
    missing = [name for name in _sections() if not isinstance(settings.get(name), dict)]
    missing += [
        f"{name}.class_name"
        for name in _sections()
        if name not in missing and not isinstance(settings[name].get("class_name"), str)
    ]
    if missing:
        raise GradscopeError(
            str(agent),
            f"has no {' and no '.join(missing)}, from which rsl_rl {_version()} makes the networks and the loss",
            ANOTHER_VERSION,
        )
    sections = {name: settings[name] for name in _sections()}
    if unknown := unknown_names(sections):
        raise GradscopeError(
            str(agent), f"names what rsl_rl {_version()} does not have ({_listed(unknown)})", ANOTHER_VERSION
        )
    foreign = foreign_names(sections)
    if foreign and not trust:
        raise GradscopeError(
            str(agent),
            f"names code outside rsl_rl ({_listed(foreign)}), which rsl_rl would import and run to make the networks "
            "and the loss",
            "if the file and that code are yours: --trust",
        )
    if foreign and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


def _sections() -> tuple[str, ...]:
    """What ``agent.yaml`` says of the networks and the loss; up to 3.x one policy held both networks."""
    return ("algorithm", "actor", "critic") if _makes_itself() else ("algorithm", "policy")


def _makes_itself() -> bool:
    """Whether the algorithm has a constructor of its own, from 4.0 on; the runner made it before."""
    from rsl_rl.algorithms import PPO

    return hasattr(PPO, "construct_algorithm")


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _placed(column: Tensor, device: str, dtype: torch.dtype | None) -> Tensor:
    return column.to(device, dtype if dtype is not None and column.is_floating_point() else None)


# --- rsl_rl's own classes --------------------------------------------------------------------------------------------


def _algorithm(
    settings: dict[str, Any], agent: Path, columns: Mapping[str, Tensor], device: str
) -> tuple[Any, tuple[str, ...]]:
    """The algorithm as rsl_rl makes it at the start of a training, and what was left out."""
    from tensordict import TensorDict

    configuration, notes = _for_one_minibatch(settings, agent)
    observations = TensorDict(
        {name.removeprefix(OBSERVATIONS): c[:1] for name, c in columns.items() if name.startswith(OBSERVATIONS)},
        batch_size=[1],
    )
    _require_observations(configuration["obs_groups"], observations, agent)
    environment = SimpleNamespace(
        num_envs=1,
        num_actions=int(columns["actions"].shape[1]),
        device=device,
        cfg={},
        get_observations=lambda: observations,
    )
    try:
        with _quietly(), their_code(f"rsl_rl {_version()} with {agent}"):
            algorithm = _made(observations, environment, configuration, device)
    except GradscopeError as error:
        raise GradscopeError(error.what, error.why, ANOTHER_VERSION) from error.__cause__
    minibatches = algorithm.num_mini_batches
    if not isinstance(minibatches, int) or minibatches < 1:
        raise GradscopeError(str(agent), f"its num_mini_batches is {minibatches!r}, which is no number of minibatches")
    if any(model.is_recurrent for model in _parts(algorithm).values()):
        raise GradscopeError(str(agent), RECURRENT, "gradscope record takes the gradients from the training itself")
    return algorithm, notes


def _made(observations: Any, environment: Any, configuration: dict[str, Any], device: str) -> Any:
    if not _makes_itself():
        from rsl_rl.runners import OnPolicyRunner

        return OnPolicyRunner(environment, configuration, None, device).alg
    from rsl_rl.utils import resolve_callable

    maker: Any = resolve_callable(configuration["algorithm"]["class_name"])
    return maker.construct_algorithm(observations, environment, configuration, device)


def _for_one_minibatch(settings: Mapping[str, Any], agent: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A copy of ``settings`` without what has no part in the gradient of actor and critic, and what that was."""
    kept = copy.deepcopy(dict(settings))
    notes: tuple[str, ...] = ()
    algorithm = kept["algorithm"]
    if algorithm.get("rnd_cfg"):
        algorithm["rnd_cfg"] = None
        notes += ("rsl_rl trains the curiosity network (rnd) with its own optimizer and no clip: it is left out.",)
    symmetry = algorithm.get("symmetry_cfg")
    if isinstance(symmetry, dict) and not (symmetry.get("use_data_augmentation") or symmetry.get("use_mirror_loss")):
        algorithm["symmetry_cfg"] = None
    if not isinstance(kept.setdefault("obs_groups", {}), dict):
        raise GradscopeError(str(agent), "its obs_groups is no mapping of observation sets to groups")
    # The compiled networks compute the same, and the storage of the training is not needed.
    kept |= {"multi_gpu": None, "torch_compile_mode": None, "num_steps_per_env": 1, "logger": "tensorboard"}
    return kept, notes


def _require_observations(sets: Mapping[str, Any], observations: Any, agent: Path) -> None:
    held = list(observations.keys())
    for name in ("actor", "critic", "policy"):
        groups = sets.get(name)
        missing = [str(group) for group in groups if group not in held] if isinstance(groups, list) else []
        if missing:
            raise GradscopeError(
                str(agent),
                f"gives the {name} the observation group {missing[0]!r}, and the batch holds {', '.join(held)}",
            )


def _parts(algorithm: Any) -> dict[str, Any]:
    """Actor and critic; up to 3.x the policy that holds both, whose own names already tell them apart."""
    if hasattr(algorithm, "policy"):
        return {"": algorithm.policy}
    return {"actor": algorithm.actor, "critic": algorithm.critic}


# --- the checkpoint's weights ----------------------------------------------------------------------------------------


def _load_weights(parts: Mapping[str, nn.Module], checkpoint: Path, agent: Path, columns: Mapping[str, Tensor]) -> None:
    content = mapping_of(read_contents(checkpoint).tree) or {}
    for part, model in parts.items():
        stored = content.get(f"{part or 'model'}_state_dict")
        if stored is None:
            layout = (
                "one policy (rsl_rl up to 3.x)" if "model_state_dict" in content else "actor and critic apart (4.0 on)"
            )
            raise GradscopeError(
                str(checkpoint),
                f"holds {layout}, and rsl_rl {_version()} is installed, which makes them otherwise",
                ANOTHER_VERSION,
            )
        prefix = f"{part}." if part else ""
        weights = dict(_tensors(stored, checkpoint))
        made = model.state_dict()
        _require_names(made, weights, prefix, checkpoint, agent)
        _require_shapes(made, weights, prefix, checkpoint, agent, columns)
        model.load_state_dict(weights)


def _tensors(stored: Any, checkpoint: Path) -> Iterator[tuple[str, Tensor]]:
    for name, leaf in named_leaves(stored, str(checkpoint)):
        if isinstance(leaf, UnreadableTensor):
            raise GradscopeError(str(checkpoint), f"its tensor {name} cannot be read ({leaf.reason})")
        if leaf is not None:
            yield name, as_torch(elements_of(leaf, str(checkpoint)))


def _require_names(made: Iterable[str], stored: Iterable[str], prefix: str, checkpoint: Path, agent: Path) -> None:
    lacking, beside = sorted(set(made) - set(stored)), sorted(set(stored) - set(made))
    if not lacking and not beside:
        return
    shown = _listed([prefix + name for name in lacking or beside])
    raise GradscopeError(
        str(checkpoint),
        f"{'lacks' if lacking else 'has'} {shown}, which the model that rsl_rl {_version()} makes from {agent} "
        f"{'has' if lacking else 'lacks'}",
    )


def _require_shapes(
    made: Mapping[str, Tensor],
    stored: Mapping[str, Tensor],
    prefix: str,
    checkpoint: Path,
    agent: Path,
    columns: Mapping[str, Tensor],
) -> None:
    name = next((name for name in made if made[name].shape != stored[name].shape), None)
    if name is None:
        return
    sizes = [
        f"{column.removeprefix(OBSERVATIONS)} {list(tensor.shape[1:])}"
        for column, tensor in columns.items()
        if column.startswith(OBSERVATIONS) or column == "actions"
    ]
    raise GradscopeError(
        str(checkpoint),
        f"its {prefix}{name} is {list(stored[name].shape)}, and {agent} makes it {list(made[name].shape)} with the "
        f"sizes in the batch ({', '.join(sizes)})",
    )


# --- running update() without a trace --------------------------------------------------------------------------------


@contextmanager
def _in_order() -> Iterator[None]:
    """Let rsl_rl's generator, which shuffles before it cuts, hand out the rows in the order in which they stand."""
    randperm = torch.randperm
    torch.randperm = lambda n, **options: torch.arange(n, device=options.get("device"))
    try:
        yield
    finally:
        torch.randperm = randperm


@contextmanager
def _same_buffers(parts: Iterable[nn.Module]) -> Iterator[None]:
    """Put back the buffers that ``update()`` exchanges for others; what is in them is put back elsewhere."""
    kept = [(module, dict(module._buffers)) for part in parts for module in part.modules()]
    try:
        yield
    finally:
        for module, buffers in kept:
            module._buffers.update(buffers)


@contextmanager
def _quietly() -> Iterator[None]:
    """rsl_rl prints the networks that it makes, and warns of settings that it completes."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
