"""Stable-Baselines3 and sb3-contrib: the checkpoint's own algorithm trains on rows of a captured batch."""

from __future__ import annotations

import functools
import importlib
import math
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.optim import Optimizer

from gradscope.backward.captured import CapturedBatch
from gradscope.backward.engine import Engine
from gradscope.backward.imported import their_code
from gradscope.backward.library_training import (
    TrainingNotes,
    minibatch_seed,
    seeded,
    withheld_training,
)
from gradscope.backward.options import BatchOptions
from gradscope.backward.placement import device_of, dtype_of
from gradscope.errors import GradscopeError
from gradscope.sources.checkpoints.checkpoint_source import CheckpointSource
from gradscope.sources.formats.contents import read_contents
from gradscope.tensors import ClipGroup

LIBRARY = "stable_baselines3"
CAPTURE = "gradscope.integrations.sb3.save_{kind}(model, PATH) captures one"

# The columns of a batch of each kind; those of MaskablePPO and of n-step returns come on top.
ROLLOUT = ("observations", "actions", "values", "log_probs", "advantages", "returns")
REPLAY = ("observations", "actions", "next_observations", "dones", "rewards")

# What the buffers call a column, and what the samples that they hand out call it.
_SAMPLED_AS = {"values": "old_values", "log_probs": "old_log_prob"}

# Entries of ``data`` that training on a captured batch does not need: never unpickled, whatever they hold.
_NOT_NEEDED: Mapping[str, Any] = {
    "_last_obs": None,
    "_last_original_obs": None,
    "_last_episode_starts": None,
    "ep_info_buffer": None,
    "ep_success_buffer": None,
    "action_noise": None,
    "env": None,
    "train_freq": 1,
    "replay_buffer_class": None,
    "replay_buffer_kwargs": {},
    "rollout_buffer_class": None,
    "rollout_buffer_kwargs": {},
    "tensorboard_log": None,
}
# The captured rows stand in for the buffers, so those are made as small as they go.
_SMALL_BUFFERS: Mapping[str, Any] = {
    **{name: value for name, value in _NOT_NEEDED.items() if name.endswith(("_class", "_kwargs"))},
    "buffer_size": 1,
    "n_steps": 1,
    "n_envs": 1,
    "optimize_memory_usage": False,
    "verbose": 0,
    "seed": None,
}


@dataclass(frozen=True, slots=True)
class Algorithm:
    """Where an algorithm is to be imported from and what it learns from: a rollout or a replay."""

    package: str
    name: str
    kind: str


ALGORITHMS: Mapping[str, Algorithm] = {
    "PPO": Algorithm("stable_baselines3", "PPO", "rollout"),
    "A2C": Algorithm("stable_baselines3", "A2C", "rollout"),
    "MaskablePPO": Algorithm("sb3_contrib", "MaskablePPO", "rollout"),
    "DQN": Algorithm("stable_baselines3", "DQN", "replay"),
    "QR-DQN": Algorithm("sb3_contrib", "QRDQN", "replay"),
    "SAC": Algorithm("stable_baselines3", "SAC", "replay"),
    "TQC": Algorithm("sb3_contrib", "TQC", "replay"),
    "TD3": Algorithm("stable_baselines3", "TD3", "replay"),
    "DDPG": Algorithm("stable_baselines3", "DDPG", "replay"),
    "CrossQ": Algorithm("sb3_contrib", "CrossQ", "replay"),
}


def open_sb3(path: Path, source: CheckpointSource, batch: CapturedBatch, options: BatchOptions) -> Engine:
    """The algorithm of the checkpoint ``source`` at ``path``, ready to train on rows of ``batch``.

    Raises:
        GradscopeError: ``options.trust`` is not given, the batch is none of this algorithm's, the library is missing,
            or the checkpoint cannot be loaded.
    """
    label = source.info.format.removeprefix("SB3 ")
    if label not in ALGORITHMS:
        raise GradscopeError(
            str(path), f"is of {label}, whose gradients are not computed here (of {', '.join(ALGORITHMS)} they are)"
        )
    algorithm = ALGORITHMS[label]
    if not options.trust:
        raise _untrusted(path, label)
    _check_origin(batch, algorithm, label)
    class_ = _import(algorithm, label)
    remarks, model = _load(class_, path, options)
    _check_columns(batch, model, algorithm)
    return SB3Engine(model, batch, algorithm, label, options, remarks)


class SB3Engine:
    """``train()`` of an SB3 algorithm on chosen rows; an ``Engine``."""

    def __init__(
        self,
        model: Any,
        batch: CapturedBatch,
        algorithm: Algorithm,
        label: str,
        options: BatchOptions,
        remarks: tuple[str, ...] = (),
    ) -> None:
        self.format = f"SB3 {label}"
        self._model, self._algorithm, self._label, self._seed = model, algorithm, label, options.seed
        self._optimizers = _optimizers_of(model)
        self._columns = _on_device(batch, model, algorithm, options)
        self.rows = batch.rows
        size = None if label == "A2C" else getattr(model, "batch_size", None)
        self.minibatch_size = min(options.minibatch_size or size or batch.rows, batch.rows)
        self._updates = int(getattr(model, "_n_updates", 0))
        self._number: dict[bytes, int] = {}
        self._prepare()
        trained = {id(p) for optimizer in self._optimizers.values() for p in _trained(optimizer)}
        self._variables = _variables_of(model)
        named = {**dict(model.policy.named_parameters()), **self._variables}
        self.parameters: Mapping[str, Any] = {
            name: p for name, p in named.items() if id(p) in trained and p.requires_grad
        }
        self.notes = (*_notes(label, model), *remarks)
        # Eight rows tell which clip calls there are, and whether the batch fits at all.
        self.groups = self._groups(self._train(np.arange(min(8, batch.rows), dtype=np.int64)))

    def shuffled(self, epochs: int) -> list[NDArray[np.int64]]:
        """The order of ``RolloutBuffer.get``; a replay's rows were drawn at random and are shuffled in later epochs."""
        if self._algorithm.kind == "rollout":
            return [np.random.permutation(self.rows).astype(np.int64) for _ in range(epochs)]
        orders = [np.arange(self.rows, dtype=np.int64)]
        orders += [np.random.permutation(self.rows).astype(np.int64) for _ in range(epochs - 1)]
        starts = range(0, self.rows, self.minibatch_size)
        minibatches = [order[start : start + self.minibatch_size] for order in orders for start in starts]
        self._number = {rows.tobytes(): number for number, rows in enumerate(minibatches)}
        return orders

    def backward(self, rows: NDArray[np.int64]) -> None:
        """The gradients that ``train()`` hands to its optimizers on a minibatch of these rows.

        Raises:
            GradscopeError: the algorithm raised, a loss is no finite number, or nothing was trained.
        """
        notes = self._train(rows)
        logged = self._model.logger.name_to_value
        for name, value in logged.items():
            if "loss" in name and not math.isfinite(value):
                raise GradscopeError(f"{self._label}.train", f"{name.rpartition('/')[2]} is {value} on this minibatch")
        if not notes.stepped or all(parameter.grad is None for parameter in self.parameters.values()):
            raise GradscopeError(f"{self._label}.train", "computed no gradient on this minibatch")

    def _prepare(self) -> None:
        from stable_baselines3.common.logger import Logger

        self._model.set_logger(Logger(folder=None, output_formats=[]))
        if self._algorithm.kind == "rollout":
            self._model.n_epochs, self._model.target_kl = 1, None
        else:
            # The captured rows are normalised already.
            self._model._vec_normalize_env = None

    def _train(self, rows: NDArray[np.int64]) -> TrainingNotes:
        model, buffer = self._model, _StandIn(self._columns, rows)
        model.logger.name_to_value.clear()
        # An actor that is trained in every other update has its turn by the number of this one.
        model._n_updates = self._updates + self._number.get(rows.tobytes(), 0)
        with (
            seeded(minibatch_seed(self._seed, rows)),
            withheld_training([model.policy], self._optimizers.values(), self._variables.values()) as notes,
            their_code(f"{self._label}.train"),
            np.errstate(all="ignore"),
        ):
            if self._algorithm.kind == "rollout":
                model.rollout_buffer = buffer
                model.train()
            else:
                model.replay_buffer = buffer
                model.train(gradient_steps=1, batch_size=len(rows))
        return notes

    def _groups(self, notes: TrainingNotes) -> tuple[ClipGroup, ...]:
        """The clip calls' groups; what no call clips is one group for each optimizer."""
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        owner_of = {id(p): owner for owner, optimizer in self._optimizers.items() for p in _trained(optimizer)}
        calls = [(call.parameters, call.max_norm) for call in notes.clip_calls]
        rest = [(_trained(optimizer), math.inf) for optimizer in self._optimizers.values()]
        groups: list[ClipGroup] = []
        for parameters, max_norm in (*calls, *rest):
            members = {id(p) for p in parameters if id(p) in names}
            if members:
                first = next(key for key in names if key in members)
                listed = tuple(names.pop(key) for key in list(names) if key in members)
                # 0 and infinity stand for no clipping, as in the checkpoint.
                limit = max_norm if 0.0 < max_norm < math.inf else None
                groups.append(ClipGroup(owner_of[first], listed, limit))
        return tuple(groups)


class _StandIn:
    """A rollout or replay buffer that hands out one minibatch, once."""

    def __init__(self, columns: Mapping[str, Any], rows: NDArray[np.int64]) -> None:
        picked = torch.from_numpy(np.ascontiguousarray(rows))

        def pick(column: Any) -> Any:
            if isinstance(column, dict):
                return {key: pick(value) for key, value in column.items()}
            return column[picked.to(column.device)]

        self._samples = {name: pick(column) for name, column in columns.items()}

    def get(self, batch_size: int | None = None) -> Iterator[SimpleNamespace]:
        """The minibatch, as ``RolloutBuffer.get`` would yield it."""
        yield SimpleNamespace(**{_SAMPLED_AS.get(name, name): value for name, value in self._samples.items()})

    def sample(self, batch_size: int, env: Any = None) -> SimpleNamespace:
        """The minibatch, as ``ReplayBuffer.sample`` would draw it."""
        return SimpleNamespace(**{"discounts": None, **self._samples})

    @property
    def values(self) -> NDArray[Any]:
        """Read for the explained variance that SB3 logs."""
        return self._logged("values")

    @property
    def returns(self) -> NDArray[Any]:
        """Read for the explained variance that SB3 logs."""
        return self._logged("returns")

    def _logged(self, name: str) -> NDArray[Any]:
        numbers: NDArray[Any] = self._samples[name].double().cpu().numpy()
        return numbers


def _untrusted(path: Path, label: str) -> GradscopeError:
    tree = read_contents(path).tree
    data = tree["data"] if isinstance(tree, dict) else {}
    pickled = [name for name, entry in data.items() if isinstance(entry, dict) and ":serialized:" in entry]
    needed = [name for name in pickled if name not in _NOT_NEEDED]
    shown = ", ".join(needed[:6]) + (f" and {len(needed) - 6} more" if len(needed) > 6 else "")
    return GradscopeError(
        str(path),
        f"--batch would unpickle {shown or 'its entries'} of this file, from which SB3 builds the {label} policy and "
        "its schedules, and a pickle can run any code",
        "--trust if the file is yours",
    )


def _check_origin(batch: CapturedBatch, algorithm: Algorithm, label: str) -> None:
    origin = batch.metadata
    if origin.get("library", LIBRARY) != LIBRARY:
        raise GradscopeError(batch.path, f"was captured from {origin['library']}; the checkpoint is of SB3 {label}")
    if (kind := origin.get("kind", algorithm.kind)) != algorithm.kind:
        raise GradscopeError(
            batch.path,
            f"is a {kind} batch; {label} learns from a {algorithm.kind}",
            CAPTURE.format(kind=algorithm.kind),
        )
    if (captured := origin.get("algorithm", label)) != label:
        raise GradscopeError(batch.path, f"was captured from {captured}; the checkpoint is of {label}")


def _import(algorithm: Algorithm, label: str) -> Any:
    distribution = algorithm.package.replace("_", "-").replace("baselines-3", "baselines3")
    try:
        module = importlib.import_module(algorithm.package)
    except ImportError as error:
        raise GradscopeError(
            distribution,
            f"is needed for --batch on a checkpoint of SB3 {label} ({error})",
            f"pip install {distribution}",
        ) from None
    if not hasattr(module, algorithm.name):
        version = getattr(module, "__version__", "as installed")
        raise GradscopeError(distribution, f"{version} has no {algorithm.name}", f"pip install -U {distribution}")
    return getattr(module, algorithm.name)


def _load(class_: Any, path: Path, options: BatchOptions) -> tuple[tuple[str, ...], Any]:
    """The loaded algorithm, and what SB3 warned of meanwhile."""
    device, dtype = device_of(options), dtype_of(options)
    with (
        seeded(0),
        their_code(f"{class_.__name__}.load({str(path)!r})"),
        warnings.catch_warnings(record=True) as caught,
        _working_directory_importable(),
    ):
        warnings.simplefilter("always")
        model = class_.load(path, device=device, custom_objects=dict(_NOT_NEEDED), **_SMALL_BUFFERS)
        if dtype is not None:
            _cast(model, dtype)
    told = dict.fromkeys(str(warning.message).partition("\n")[0] for warning in caught if _is_of_sb3(warning))
    return tuple(told), model


def _is_of_sb3(warning: warnings.WarningMessage) -> bool:
    packages = {known.package for known in ALGORITHMS.values()}
    return issubclass(warning.category, UserWarning) and not packages.isdisjoint(Path(warning.filename).parts)


@contextmanager
def _working_directory_importable() -> Iterator[None]:
    """Custom policies are pickled by the name of their module, which lies beside the training script."""
    before = list(sys.path)
    sys.path.insert(0, "")
    try:
        yield
    finally:
        sys.path[:] = before


def _cast(model: Any, dtype: torch.dtype) -> None:
    """Let the model compute in ``dtype``: SB3 makes float32 of every observation, so each layer casts what it gets."""

    def cast(module: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs)

    model.policy.to(dtype)
    for module in model.policy.modules():
        if not next(module.children(), None):
            module.register_forward_pre_hook(cast)
    for name in ("log_ent_coef", "ent_coef_tensor"):
        if isinstance(variable := getattr(model, name, None), torch.Tensor):
            variable.data = variable.data.to(dtype)


def _optimizers_of(model: Any) -> dict[str, Optimizer]:
    """The optimizers by what they train, named as gradscope names them in the checkpoint."""
    found: dict[str, Optimizer] = {}
    for name in model._get_torch_save_params()[0]:
        part = functools.reduce(getattr, name.split("."), model)
        if isinstance(part, Optimizer):
            found[name.removesuffix("optimizer").rstrip("._")] = part
    return found


def _variables_of(model: Any) -> dict[str, torch.Tensor]:
    variables = {name: getattr(model, name, None) for name in model._get_torch_save_params()[1]}
    return {name: v for name, v in variables.items() if isinstance(v, torch.Tensor) and v.requires_grad}


def _trained(optimizer: Optimizer) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _notes(label: str, model: Any) -> Iterable[str]:
    if label in ("SAC", "TQC", "TD3", "DDPG", "CrossQ"):
        yield f"{label} trains its actor after its critic's step; no step is taken here, so it sees the file's critic."
    if (delay := getattr(model, "policy_delay", 1)) > 1:
        yield f"{label} trains its actor in one update of {delay}; the other minibatches have no gradient of it."


# --- the captured rows -----------------------------------------------------------------------------------------------


def _check_columns(batch: CapturedBatch, model: Any, algorithm: Algorithm) -> None:
    """The columns that this kind of batch must have, in the shapes of the model's spaces."""
    from stable_baselines3.common.preprocessing import get_action_dim, get_obs_shape

    needed = list(ROLLOUT if algorithm.kind == "rollout" else REPLAY)
    if algorithm.name == "MaskablePPO":
        needed.append("action_masks")
    expected: dict[str, tuple[int, ...] | None] = {}
    shape = get_obs_shape(model.observation_space)
    for name in needed:
        if not name.endswith("observations"):
            expected[name] = (get_action_dim(model.action_space),) if name == "actions" else None
        elif isinstance(shape, dict):
            expected |= {f"{name}.{key}": tuple(part) for key, part in shape.items()}
        else:
            expected[name] = tuple(shape)
    for name, rest in expected.items():
        if name not in batch.columns:
            raise GradscopeError(
                batch.path, f"has no column {name!r}, which {algorithm.name} needs", CAPTURE.format(kind=algorithm.kind)
            )
        found = tuple(batch.columns[name].shape[1:])
        if rest is not None and found != rest:
            raise GradscopeError(
                batch.path, f"its {name} are {_written(found)} per row; the checkpoint's are {_written(rest)}"
            )
        if rest is None and name != "action_masks" and math.prod(found) != 1:
            raise GradscopeError(batch.path, f"its {name} are {_written(found)} per row; one number is expected")


def _written(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) if shape else "one number"


def _on_device(batch: CapturedBatch, model: Any, algorithm: Algorithm, options: BatchOptions) -> dict[str, Any]:
    """The columns as the buffers' samples hold them; observations of several parts become mappings."""
    dtype = next(model.policy.parameters()).dtype
    flat = algorithm.kind == "rollout"
    columns: dict[str, Any] = {}
    for name, column in batch.tensors().items():
        whole, _, part = name.partition(".")
        if whole in ("observations", "next_observations"):
            # Left to SB3, which makes floats of them, or one-hot vectors.
            ready = column.to(dtype) if options.dtype and column.is_floating_point() else column
        elif whole == "actions":
            ready = column.to(dtype) if flat or column.is_floating_point() else column
        elif whole in (*ROLLOUT, *REPLAY, "discounts"):
            ready = column.to(dtype).reshape(batch.rows, *(() if flat else (1,)))
        else:
            ready = column
        ready = ready.to(model.device)
        if part:
            columns.setdefault(whole, {})[part] = ready
        else:
            columns[name] = ready
    return columns
