"""Gradients of a captured SB3 batch against SB3's own ``train()`` on the same rows, run here without gradscope."""

from __future__ import annotations

import functools
import importlib
import json
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.buffers import DictRolloutBuffer, ReplayBuffer, RolloutBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from gradscope.__main__ import main
from gradscope.backward.batch_gradients import BatchGradients, open_batch
from gradscope.backward.library_training import minibatch_seed
from gradscope.backward.options import BatchOptions
from gradscope.errors import GradscopeError
from gradscope.integrations.sb3 import SaveRollout, save_replay, save_rollout
from gradscope.sources import open_source

# These networks are too small to share between threads, which would only wait for each other.
torch.set_num_threads(1)

KEPT = tempfile.TemporaryDirectory(prefix="gradscope-sb3-batches-")
NET = {"net_arch": [16, 16]}
OFF_POLICY: dict[str, Any] = {"learning_starts": 20, "policy_kwargs": NET, "buffer_size": 500, "batch_size": 16}
RUNS: dict[str, tuple[str, str, dict[str, Any], int]] = {
    "PPO": (
        "stable_baselines3",
        "CartPole-v1",
        {"n_steps": 40, "batch_size": 32, "n_epochs": 2, "policy_kwargs": NET, "clip_range_vf": 0.2, "target_kl": 1e-9},
        80,
    ),
    "A2C": ("stable_baselines3", "CartPole-v1", {"n_steps": 20, "policy_kwargs": NET}, 80),
    "MaskablePPO": ("sb3_contrib", "CartPole-v1", {"n_steps": 20, "batch_size": 20, "policy_kwargs": NET}, 20),
    "DQN": ("stable_baselines3", "CartPole-v1", OFF_POLICY, 100),
    "QRDQN": ("sb3_contrib", "CartPole-v1", {**OFF_POLICY, "max_grad_norm": 10}, 60),
    "SAC": ("stable_baselines3", "Pendulum-v1", OFF_POLICY, 60),
    "TQC": ("sb3_contrib", "Pendulum-v1", OFF_POLICY, 40),
    "TD3": ("stable_baselines3", "Pendulum-v1", OFF_POLICY, 61),
    "DDPG": ("stable_baselines3", "Pendulum-v1", OFF_POLICY, 40),
    "CrossQ": ("sb3_contrib", "Pendulum-v1", OFF_POLICY, 40),
}
ROLLOUTS = ("PPO", "A2C", "MaskablePPO")
REPLAYS = tuple(name for name in RUNS if name not in ROLLOUTS)
Gradients = dict[str, NDArray[np.float64]]
Command = Callable[..., tuple[int, str, str]]
SAMPLES = Path(__file__).parent.parent / "sample_ckpts"


def class_of(algorithm: str) -> Any:
    return getattr(importlib.import_module(RUNS[algorithm][0]), algorithm)


@functools.cache
def run(algorithm: str) -> tuple[Path, Path]:
    """A short training's checkpoint, and the batch captured at its end."""
    _, environment, settings, steps = RUNS[algorithm]
    two_envs = make_vec_env(environment, n_envs=2 if algorithm in ROLLOUTS else 1, seed=0)
    # A copy: SB3 writes into the policy's settings.
    settings = {**settings, "policy_kwargs": dict(NET)}
    model = class_of(algorithm)("MlpPolicy", two_envs, seed=0, device="cpu", **settings)
    model.learn(steps, **({"use_masking": False} if algorithm == "MaskablePPO" else {}))
    checkpoint, batch = Path(KEPT.name) / f"{algorithm}.zip", Path(KEPT.name) / f"{algorithm}.safetensors"
    model.save(checkpoint)
    if algorithm in ROLLOUTS:
        save_rollout(model, batch)
    else:
        save_replay(model, batch, rows=50, seed=3)
    return checkpoint, batch


def opened(algorithm: str, **options: Any) -> BatchGradients:
    checkpoint, batch = run(algorithm)
    return open_batch(open_source(str(checkpoint)), BatchOptions(batch=batch, trust=True, **options))


def found_by_gradscope(source: BatchGradients) -> list[Gradients]:
    found = []
    for step in source.read_steps(range(source.info.steps)):
        present = np.ones(len(source.tensors), bool) if step.present is None else step.present
        assert step.read is not None
        found.append(
            {info.name: step.read(i).astype(np.float64) for i, info in enumerate(source.tensors) if present[i]}
        )
    return found


# --- SB3's own train(), intercepted ----------------------------------------------------------------------------------


def gradients_of_sb3(model: Any, monkeypatch: pytest.MonkeyPatch) -> Gradients:
    """Run ``model.train()`` and return what each optimizer was given, clipping neutralised."""
    names = {id(p): name for name, p in model.policy.named_parameters()}
    if getattr(model, "log_ent_coef", None) is not None:
        names[id(model.log_ent_coef)] = "log_ent_coef"
    given: Gradients = {}

    def step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            if parameter.grad is not None:
                given[names[id(parameter)]] = parameter.grad.double().numpy().copy()

    with monkeypatch.context() as patched:
        patched.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: torch.tensor(1.0))
        patched.setattr(torch.optim.Adam, "step", step)
        patched.setattr(torch.optim.RMSprop, "step", step)
        if hasattr(model, "replay_buffer"):
            model.train(gradient_steps=1, batch_size=model.batch_size)
        else:
            model.train()
    return given


def prepared(algorithm: str, checkpoint: Path) -> Any:
    from stable_baselines3.common.logger import Logger

    model = class_of(algorithm).load(checkpoint, device="cpu")
    model.set_logger(Logger(None, []))
    model.n_epochs, model.target_kl = 1, None
    return model


def fill(buffer: Any, columns: Mapping[str, NDArray[Any]], rows: NDArray[np.int64]) -> None:
    for name, column in columns.items():
        if "." in name:
            whole, part = name.split(".")
            getattr(buffer, whole)[part][:, 0] = column[rows]
        else:
            getattr(buffer, name)[:, 0] = column[rows]
    buffer.pos, buffer.full = len(rows), True


def rollout_gradients(
    model: Any, columns: Mapping[str, NDArray[Any]], rows: NDArray[np.int64], monkeypatch: pytest.MonkeyPatch
) -> Gradients:
    kind = type(model.rollout_buffer)
    model.rollout_buffer = kind(len(rows), model.observation_space, model.action_space, device="cpu")
    fill(model.rollout_buffer, columns, rows)
    model.batch_size = len(rows)
    return gradients_of_sb3(model, monkeypatch)


def replay_gradients(
    model: Any, columns: Mapping[str, NDArray[Any]], rows: NDArray[np.int64], monkeypatch: pytest.MonkeyPatch
) -> Gradients:
    buffer = ReplayBuffer(len(rows), model.observation_space, model.action_space, device="cpu")
    fill(buffer, columns, rows)
    buffer.sample = lambda size, env=None: buffer._get_samples(np.arange(size), env)  # type: ignore[method-assign,assignment]
    model.replay_buffer, model.batch_size = buffer, len(rows)
    torch.manual_seed(minibatch_seed(7, rows))
    return gradients_of_sb3(model, monkeypatch)


def assert_same(found: Gradients, expected: Gradients) -> None:
    assert set(found) == set(expected)
    norm = np.sqrt(sum(float((g**2).sum()) for g in expected.values()))
    off = np.sqrt(sum(float(((found[name] - expected[name]) ** 2).sum()) for name in expected))
    assert norm > 0
    assert off <= 1e-6 * norm


@pytest.mark.parametrize("algorithm", ROLLOUTS)
def test_rollout_gradients_are_those_of_train(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, batch = run(algorithm)
    columns = load_file(batch)
    count = len(columns["returns"])
    source = opened(algorithm, seed=7, epochs=2)
    size = {"PPO": 32, "A2C": count, "MaskablePPO": 20}[algorithm]
    np.random.seed(7)
    orders = [np.random.permutation(count) for _ in range(2)]
    minibatches = [order[start : start + size] for order in orders for start in range(0, count, size)]
    found = found_by_gradscope(source)
    assert len(found) == len(minibatches) == source.info.steps
    for gradients, rows in zip(found, minibatches, strict=True):
        assert_same(gradients, rollout_gradients(prepared(algorithm, checkpoint), columns, rows, monkeypatch))


@pytest.mark.parametrize("algorithm", REPLAYS)
def test_replay_gradients_are_those_of_train(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, batch = run(algorithm)
    columns = load_file(batch)
    found = found_by_gradscope(opened(algorithm, seed=7))
    minibatches = [np.arange(start, min(start + 16, 50)) for start in range(0, 50, 16)]
    assert len(found) == len(minibatches)
    for number, (gradients, rows) in enumerate(zip(found, minibatches, strict=True)):
        model = prepared(algorithm, checkpoint)
        model._n_updates += number
        assert_same(gradients, replay_gradients(model, columns, rows, monkeypatch))


def test_delayed_actor_has_its_turn_in_every_second_minibatch() -> None:
    found = found_by_gradscope(opened("TD3", epochs=3))
    with_actor = [any(name.startswith("actor.") for name in gradients) for gradients in found]
    assert with_actor in ([True, False] * 6, [False, True] * 6)


def test_later_epochs_of_a_replay_are_shuffled() -> None:
    found = found_by_gradscope(opened("DQN", epochs=2, minibatch_size=25))
    assert len(found) == 4
    assert len({float(np.sum(next(iter(gradients.values())) ** 2)) for gradients in found}) == 4


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [
        ("PPO", {"policy": 0.5}),
        ("A2C", {"policy": 0.5}),
        ("DQN", {"policy": 10.0}),
        ("SAC", {"actor": None, "critic": None, "ent_coef": None}),
        ("TD3", {"actor": None, "critic": None}),
    ],
)
def test_clip_groups_are_those_of_the_clip_calls(algorithm: str, expected: dict[str, float | None]) -> None:
    source = opened(algorithm)
    assert {group.name: group.max_norm for group in source.groups} == expected
    assert sorted(name for group in source.groups for name in group.tensors) == sorted(t.name for t in source.tensors)
    if len(source.groups) > 1:
        assert all(name.startswith((group.name, "log_ent")) for group in source.groups for name in group.tensors)


@pytest.mark.parametrize("algorithm", ["PPO", "SAC", "TD3"])
def test_nothing_is_trained_and_minibatches_may_be_computed_again(algorithm: str) -> None:
    source = opened(algorithm, seed=5)
    engine: Any = source.engine
    before = {name: value.clone() for name, value in engine._model.policy.state_dict().items()}
    first = found_by_gradscope(source)
    outside = torch.get_rng_state()
    again = list(reversed([next(iter(source.read_steps(range(i, i + 1)))) for i in reversed(range(len(first)))]))
    assert torch.equal(outside, torch.get_rng_state())
    for gradients, step in zip(first, again, strict=True):
        assert step.read is not None
        for i, info in enumerate(source.tensors):
            if info.name in gradients:
                assert np.array_equal(gradients[info.name], step.read(i))
    for name, value in engine._model.policy.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_double_precision_agrees_with_single() -> None:
    single, double = found_by_gradscope(opened("PPO")), found_by_gradscope(opened("PPO", dtype="float64"))
    for one, other in zip(single, double, strict=True):
        for name in one:
            assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5)
    assert any((one[name] != other[name]).any() for one, other in zip(single, double, strict=True) for name in one)


# --- capturing -------------------------------------------------------------------------------------------------------


def test_rollout_rows_are_in_the_order_of_sb3() -> None:
    model = PPO("MlpPolicy", make_vec_env("CartPole-v1", 3, seed=1), n_steps=8, batch_size=24, n_epochs=1, device="cpu")
    model.learn(24)
    path = Path(KEPT.name) / "order.safetensors"
    save_rollout(model, path)
    trained = load_file(path)
    # The same buffer before SB3 flattened it: [steps, envs, ...], row = env × steps + step.
    buffer = model.rollout_buffer
    assert isinstance(buffer, RolloutBuffer) and buffer.generator_ready
    for name in ("observations", "actions", "values", "log_probs", "advantages", "returns"):
        flat = getattr(buffer, name)
        assert np.array_equal(trained[name], flat.reshape(trained[name].shape))
        setattr(buffer, name, flat.reshape(3, 8, *flat.shape[1:]).swapaxes(0, 1))
    buffer.generator_ready = False
    save_rollout(model, path)
    assert all(np.array_equal(column, trained[name]) for name, column in load_file(path).items())
    with safe_open(path, "np") as file:
        told = json.loads(file.metadata()["gradscope.batch"])
    assert (told["kind"], told["algorithm"], told["buffer_size"], told["n_envs"]) == ("rollout", "PPO", 8, 3)


class TwoParts(gymnasium.Env):
    observation_space = gymnasium.spaces.Dict(
        {"place": gymnasium.spaces.Box(-1, 1, (3,)), "kind": gymnasium.spaces.Discrete(4)}
    )
    action_space = gymnasium.spaces.MultiDiscrete([2, 3])

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self._seen(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self._seen(), float(self.np_random.normal()), bool(self.np_random.random() < 0.2), False, {}

    def _seen(self) -> dict[str, Any]:
        return {"place": self.np_random.random(3, np.float32), "kind": int(self.np_random.integers(4))}


def test_observations_of_several_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = PPO("MultiInputPolicy", TwoParts(), n_steps=24, batch_size=24, n_epochs=1, seed=0, device="cpu")
    checkpoint, batch = Path(KEPT.name) / "parts.zip", Path(KEPT.name) / "parts.safetensors"
    model.learn(24, callback=SaveRollout(batch))
    model.save(checkpoint)
    columns = load_file(batch)
    assert {"observations.place", "observations.kind"} < set(columns)
    source = open_batch(open_source(str(checkpoint)), BatchOptions(batch=batch, trust=True))
    (found,) = found_by_gradscope(source)
    fresh = prepared("PPO", checkpoint)
    assert isinstance(fresh.rollout_buffer, DictRolloutBuffer)
    assert_same(found, rollout_gradients(fresh, columns, np.arange(24), monkeypatch))


def test_replay_samples_are_normalised_and_discounted_as_for_training() -> None:
    env = VecNormalize(make_vec_env("CartPole-v1", 1, seed=0))
    model = DQN("MlpPolicy", env, seed=0, device="cpu", n_steps=3, **{**OFF_POLICY, "policy_kwargs": dict(NET)})
    path = Path(KEPT.name) / "normalised.safetensors"
    model.learn(80, callback=SaveRollout(path))
    assert len(load_file(path)["rewards"]) == 100 * model.batch_size
    state = np.random.get_state()[1].copy()  # type: ignore[index]
    save_replay(model, path, rows=12, seed=4)
    assert np.array_equal(np.random.get_state()[1], state)  # type: ignore[index]
    np.random.seed(4)
    assert model.replay_buffer is not None
    expected = model.replay_buffer.sample(12, env=env)
    columns = load_file(path)
    assert set(columns) == {"observations", "actions", "next_observations", "dones", "rewards", "discounts"}
    for name, column in columns.items():
        assert np.array_equal(column, getattr(expected, name).numpy().reshape(column.shape))


def test_capturing_before_learning_or_from_the_wrong_buffer_says_so(tmp_path: Path) -> None:
    ppo, dqn = PPO("MlpPolicy", "CartPole-v1", device="cpu"), DQN("MlpPolicy", "CartPole-v1", device="cpu")
    with pytest.raises(GradscopeError, match="no rollout has been collected"):
        save_rollout(ppo, tmp_path / "a")
    with pytest.raises(GradscopeError, match="the replay buffer is empty"):
        save_replay(dqn, tmp_path / "a")
    with pytest.raises(GradscopeError, match="DQN learns from a replay, not from a rollout"):
        save_rollout(dqn, tmp_path / "a")
    with pytest.raises(GradscopeError, match="PPO learns from a rollout, not from a replay"):
        save_replay(ppo, tmp_path / "a")  # type: ignore[arg-type]
    from sb3_contrib import RecurrentPPO

    with pytest.raises(GradscopeError, match="RecurrentPPO: its batches cannot be captured"):
        save_rollout(RecurrentPPO("MlpLstmPolicy", "CartPole-v1", device="cpu"), tmp_path / "a")
    assert not list(tmp_path.iterdir())


# --- bad input -------------------------------------------------------------------------------------------------------


def test_without_trust_nothing_is_unpickled(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> Any:
        raise AssertionError("unpickled")

    monkeypatch.setattr("cloudpickle.loads", refused)
    checkpoint, batch = run("PPO")
    with pytest.raises(GradscopeError) as caught:
        open_batch(open_source(str(checkpoint)), BatchOptions(batch=batch))
    assert "would unpickle policy_class, observation_space, action_space, clip_range" in str(caught.value)
    assert "can run any code" in str(caught.value)
    assert "_last_obs" not in str(caught.value)
    assert caught.value.hint is not None and "--trust" in caught.value.hint


def changed(algorithm: str, tmp_path: Path, metadata: bool = True, **columns: NDArray[Any] | None) -> Path:
    """The batch of ``algorithm`` with some columns replaced, or dropped."""
    batch = run(algorithm)[1]
    with safe_open(batch, "np") as file:
        told = file.metadata() if metadata else None
    kept = {**load_file(batch), **columns}
    path = tmp_path / "changed.safetensors"
    save_file({name: column for name, column in kept.items() if column is not None}, path, told)
    return path


def refusal(algorithm: str, batch: Path, **options: Any) -> str:
    with pytest.raises(GradscopeError) as caught:
        source = open_batch(open_source(str(run(algorithm)[0])), BatchOptions(batch=batch, trust=True, **options))
        list(source.read_steps(range(source.info.steps)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_batch_of_another_kind_or_algorithm_is_refused(tmp_path: Path) -> None:
    assert "is a replay batch; PPO learns from a rollout" in refusal("PPO", run("DQN")[1])
    assert "was captured from A2C; the checkpoint is of PPO" in refusal("PPO", run("A2C")[1])
    assert "was captured from TD3; the checkpoint is of SAC" in refusal("SAC", run("TD3")[1])
    save_file({"x": np.zeros((3, 2))}, tmp_path / "x.safetensors")
    assert "has no column 'observations', which PPO needs" in refusal("PPO", tmp_path / "x.safetensors")


def test_columns_that_do_not_fit_are_named(tmp_path: Path) -> None:
    rows = len(load_file(run("PPO")[1])["returns"])
    wide = np.zeros((rows, 6), np.float32)
    path = changed("PPO", tmp_path, observations=wide)
    assert refusal("PPO", path).endswith("its observations are 6 per row; the checkpoint's are 4")
    assert "its actions are 6 per row" in refusal("PPO", changed("PPO", tmp_path, actions=wide))
    assert "has no column 'returns'" in refusal("PPO", changed("PPO", tmp_path, returns=None))
    assert "its values are 6 per row; one number is expected" in refusal("PPO", changed("PPO", tmp_path, values=wide))


def test_a_loss_that_is_no_number_and_an_algorithm_that_raises_end_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # rsl_rl switches it off for the whole process.
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", True)
    rows = len(load_file(run("PPO")[1])["returns"])
    path = changed("PPO", tmp_path, returns=np.full(rows, np.nan, np.float32))
    assert "value_loss is nan" in refusal("PPO", path)
    path = changed("PPO", tmp_path, observations=np.full((rows, 4), np.nan, np.float32))
    assert refusal("PPO", path).startswith("PPO.train: raised ValueError: Expected parameter logits")


def test_a_batch_without_metadata_will_do(tmp_path: Path) -> None:
    bare = open_batch(
        open_source(str(run("PPO")[0])), BatchOptions(batch=changed("PPO", tmp_path, metadata=False), trust=True)
    )
    for one, other in zip(found_by_gradscope(bare), found_by_gradscope(opened("PPO")), strict=True):
        assert all(np.array_equal(one[name], other[name]) for name in other)


def test_algorithms_without_a_training_step_of_their_own_are_refused() -> None:
    from real_training import sb3_checkpoint

    with pytest.raises(GradscopeError, match="is of TRPO, whose gradients are not computed here"):
        open_batch(open_source(str(sb3_checkpoint("TRPO"))), BatchOptions(batch=run("PPO")[1], trust=True))


def test_a_checkpoint_that_sb3_cannot_load_ends_in_its_own_words(tmp_path: Path) -> None:
    class Mine(PPO):
        pass

    model = Mine("MlpPolicy", "CartPole-v1", device="cpu", n_steps=8, batch_size=8, policy_kwargs=dict(NET))
    model.save(tmp_path / "mine.zip")
    broken = tmp_path / "mine.zip"

    with zipfile.ZipFile(broken) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    data = json.loads(parts["data"])
    data["policy_class"][":serialized:"] = "gASVEAAAAAAAAACMBG5vd2iUjANhbnmUk5Qu"
    with zipfile.ZipFile(broken, "w") as archive:
        for name, content in {**parts, "data": json.dumps(data).encode()}.items():
            archive.writestr(name, content)
    with pytest.raises(GradscopeError, match=r"PPO\.load.*raised ModuleNotFoundError: No module named 'nowh'"):
        open_batch(open_source(str(broken)), BatchOptions(batch=run("PPO")[1], trust=True))


def test_a_custom_policy_is_found_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "policy_of_mine.py").write_text(
        "from stable_baselines3.ppo import MlpPolicy\n\n\nclass MyPolicy(MlpPolicy):\n    pass\n"
    )
    with monkeypatch.context() as training:
        training.syspath_prepend(tmp_path)
        policy = importlib.import_module("policy_of_mine").MyPolicy
        model = PPO(policy, "CartPole-v1", n_steps=8, batch_size=8, n_epochs=1, device="cpu")
        model.learn(8, callback=SaveRollout(tmp_path / "batch.safetensors"))
        model.save(tmp_path / "mine.zip")
    monkeypatch.delitem(sys.modules, "policy_of_mine")
    options = BatchOptions(batch=tmp_path / "batch.safetensors", trust=True)
    with pytest.raises(GradscopeError, match="raised ModuleNotFoundError: No module named 'policy_of_mine'"):
        open_batch(open_source(str(tmp_path / "mine.zip")), options)
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    assert open_batch(open_source(str(tmp_path / "mine.zip")), options).info.steps == 1
    assert sys.path == before


# --- the command line, on the sample ---------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run the command line in this process: exit code, stdout, stderr."""

    def _command(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["gradscope", *map(str, arguments)])
        code = main()
        return code, *capsys.readouterr()

    return _command


def test_commands_on_the_sample_rollout(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, batch = SAMPLES / "ppo_cartpole.zip", SAMPLES / "ppo_cartpole_rollout.safetensors"
    np.random.seed(0)
    order, columns = np.random.permutation(2048), load_file(batch)
    # No step is taken, so one model serves all minibatches.
    model, norms = prepared("PPO", checkpoint), []
    for start in range(0, 2048, 64):
        gradients = rollout_gradients(model, columns, order[start : start + 64], monkeypatch)
        norms.append(np.sqrt(sum(float((gradient**2).sum()) for gradient in gradients.values())))
    middle = str(float(np.median(norms)))
    # A kernel may sum another way from one process to the next.
    expected = pytest.approx([min(norms), float(np.median(norms)), max(norms)], rel=1e-5)

    given = ("--batch", batch, "--trust", "--format", "json")
    code, out, _ = command("inspect", checkpoint, *given)
    found = json.loads(out)
    assert code == 0
    assert (found["source"]["kind"], found["source"]["steps"]) == ("gradients", 32)
    spread = found["gradients"]["global"]["l2_norm"]
    assert [spread["min"], spread["p50"], spread["max"]] == expected

    code, out, _ = command("simulate", checkpoint, *given, "--max-norm", "0.5", "--max-norm", middle)
    every, half = json.loads(out)["results"]
    assert code == 0
    assert every["clip_rate"] == 1.0 == np.mean(np.array(norms) > 0.5)
    assert half["clip_rate"] == 0.5


def test_without_trust_the_command_ends_with_one_line(command: Command) -> None:
    code, out, err = command(
        "inspect", SAMPLES / "ppo_cartpole.zip", "--batch", SAMPLES / "ppo_cartpole_rollout.safetensors"
    )
    assert (code, out) == (2, "")
    error, hint = err.splitlines()
    assert error.startswith("error: ") and "would unpickle policy_class, observation_space" in error
    assert hint == "hint: --trust if the file is yours"
