"""rsl_rl's PPO as the settings of a run and a checkpoint make it: its own classes, the checkpoint's weights.

Actor, critic and algorithm are made by rsl_rl's own classes from ``params/agent.yaml``; the weights come from the
checkpoint by gradscope's reader, so nothing is unpickled.  From 3.0 on, whichever version is installed.
"""

from __future__ import annotations

import contextlib
import copy
import io
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from gradscope.backward.agent_settings import foreign_names, unknown_names
from gradscope.backward.imported import their_code
from gradscope.backward.stored_elements import as_torch, elements_of
from gradscope.errors import GradscopeError
from gradscope.sources.checkpoints.scalars import mapping_of
from gradscope.sources.formats.contents import read_contents
from gradscope.sources.formats.tree import UnreadableTensor, named_leaves

OBSERVATIONS = "observations."
RECURRENT = "the policy is recurrent: its rollouts are cut into trajectories, and no row stands for itself"
ANOTHER_VERSION = (
    "where the run's rsl_rl was of another version, install that one (4.0 parted policy into actor and critic)"
)
_SHOWN = 3


def algorithm_of(
    settings: dict[str, Any], agent: Path, columns: Mapping[str, Tensor], device: str
) -> tuple[Any, tuple[str, ...]]:
    """The algorithm as rsl_rl makes it at the start of a training, and what was left out.

    ``columns`` are those of a captured rollout, whose sizes are those of the environment's observations and actions.

    Raises:
        GradscopeError: ``settings`` (in the file ``agent``) do not fit the columns or the installed version, or the
            policy is recurrent.
    """
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
    if any(model.is_recurrent for model in networks_of(algorithm).values()):
        raise GradscopeError(str(agent), RECURRENT, "gradscope record takes the gradients from the training itself")
    return algorithm, notes


def networks_of(algorithm: Any) -> dict[str, Any]:
    """Actor and critic; up to 3.x the policy that holds both, whose own names already tell them apart."""
    if hasattr(algorithm, "policy"):
        return {"": algorithm.policy}
    return {"actor": algorithm.actor, "critic": algorithm.critic}


def require_own_classes(settings: Mapping[str, Any], agent: Path, trust: bool) -> None:
    """Check that the sections are there from which the installed rsl_rl makes a training.

    Raises:
        GradscopeError: one is missing or names what this version does not have; or code outside rsl_rl, without
            ``trust``.
    """
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


@contextmanager
def _quietly() -> Iterator[None]:
    """rsl_rl prints the networks that it makes, and warns of settings that it completes."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("rsl-rl-lib")
    except PackageNotFoundError:
        return "of unknown version"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


# --- the checkpoint's weights ----------------------------------------------------------------------------------------


def load_weights(parts: Mapping[str, nn.Module], checkpoint: Path, agent: Path, columns: Mapping[str, Tensor]) -> None:
    """Put the weights and buffers of ``checkpoint`` into the networks ``parts``.

    Raises:
        GradscopeError: it is of another layout, or names or shapes differ.
    """
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
