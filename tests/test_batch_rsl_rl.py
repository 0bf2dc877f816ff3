"""Gradients of a captured rsl_rl rollout: what rsl_rl's own ``update()`` computes on the same rows."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from real_training import _kept, _rsl_rl_environment, rsl_rl_3_run, rsl_rl_settings
from safetensors.numpy import load_file, save_file

from gradscope import GradscopeError
from gradscope.backward.batch_gradients import BatchGradients, open_batch
from gradscope.backward.options import BatchOptions
from gradscope.integrations.rsl_rl import save_rollout
from gradscope.sources.opening import open_source

ROOT = Path(__file__).parent.parent
SAMPLE = ROOT / "sample_ckpts" / "rsl_rl_run"
torch.set_num_threads(1)


def runner_of(settings: dict[str, Any], image: bool = False) -> Any:
    from rsl_rl.runners import OnPolicyRunner

    with contextlib.redirect_stdout(io.StringIO()):
        return OnPolicyRunner(_rsl_rl_environment(image), copy.deepcopy(settings), None, "cpu")


@dataclass(frozen=True)
class Run:
    """A directory with a checkpoint, its settings and its last rollout, and the runner that left them."""

    path: Path
    runner: Any

    @property
    def batch(self) -> Path:
        return self.path / "rollout.safetensors"

    def opened(self, **options: Any) -> BatchGradients:
        return open_batch(open_source(self.path / "model_2.pt"), BatchOptions(self.batch, **options))


@functools.cache
def trained(kind: str) -> Run:
    """Three iterations of rsl_rl's PPO, of which the last rollout is captured."""
    settings = rsl_rl_settings(0.5, image=kind == "image", curious=kind == "curious")
    if kind == "normalised":
        settings["algorithm"] |= {"normalize_advantage_per_mini_batch": True, "entropy_coef": 0.02}
        settings["actor"]["distribution_cfg"] = {"class_name": "BetaDistribution"}
    if kind == "not divisible":
        settings["algorithm"]["num_mini_batches"] = 3
    torch.manual_seed(0)
    path = _kept(f"rsl_rl-batch-{kind}")
    (path / "params").mkdir()
    (path / "params" / "agent.yaml").write_text(yaml.dump(settings))
    runner = runner_of(settings, image=kind == "image")
    with contextlib.redirect_stdout(io.StringIO()):
        runner.learn(3)
    runner.save(str(path / "model_2.pt"))
    save_rollout(runner, path / "rollout.safetensors")
    return Run(path, runner)


# --- the same gradients, taken from rsl_rl by other means -------------------------------------------------------------


@contextmanager
def clipping_is_no_more() -> Iterator[None]:
    """A ``clip_grad_norm_`` that changes nothing; rsl_rl uses what it returns for nothing."""
    before = torch.nn.utils.clip_grad_norm_
    torch.nn.utils.clip_grad_norm_ = lambda *given, **options: torch.zeros(())
    try:
        yield
    finally:
        torch.nn.utils.clip_grad_norm_ = before


def gradients_of_update(run: Run, minibatches: int, seed: int) -> list[dict[str, np.ndarray]]:
    """The gradients that one epoch of ``update()`` hands to an optimizer that does not step, one for each minibatch.

    The runner still holds the storage of its last rollout and the weights that it saved.
    """
    algorithm = run.runner.alg
    networks = {"actor": algorithm.actor, "critic": algorithm.critic}
    saved = {part: copy.deepcopy(network.state_dict()) for part, network in networks.items()}
    algorithm.num_mini_batches, algorithm.num_learning_epochs = minibatches, 1
    collected: list[dict[str, np.ndarray]] = []

    def collect(closure: Any = None) -> None:
        named = {f"{n}.{name}": p for n, network in networks.items() for name, p in network.named_parameters()}
        collected.append({name: p.grad.double().numpy().copy() for name, p in named.items() if p.grad is not None})

    algorithm.optimizer.step = collect
    torch.manual_seed(seed)
    with clipping_is_no_more():
        algorithm.update()
    del algorithm.optimizer.step
    for part, network in networks.items():
        # update() has shown the observations to the normalisers.
        network.load_state_dict(saved[part])
    return collected


def gradients_of_batch(source: BatchGradients) -> list[dict[str, np.ndarray]]:
    return [
        {info.name: step.read(i).astype(np.float64) for i, info in enumerate(source.tensors)}
        for step in source.read_steps(range(source.info.steps))
        if step.read is not None
    ]


def worst_difference(found: list[dict[str, np.ndarray]], expected: list[dict[str, np.ndarray]]) -> float:
    """The largest norm of a difference between two gradients, relative to the gradient's norm."""
    assert len(found) == len(expected) > 0
    worst = 0.0
    for one, other in zip(found, expected, strict=True):
        missing = other.keys() - one.keys()
        # What both networks hold is one tensor, named once.
        assert all(name.startswith("critic.cnns.") for name in missing) and one.keys() <= other.keys()
        norm = np.sqrt(sum(np.square(other[name]).sum() for name in one))
        difference = np.sqrt(sum(np.square(one[name] - other[name]).sum() for name in one))
        assert norm > 0
        worst = max(worst, difference / norm)
    return worst


@pytest.mark.parametrize("kind", ["plain", "normalised", "curious", "image"])
def test_gradients_are_those_of_rsl_rls_own_update(kind: str) -> None:
    run = trained(kind)
    found = gradients_of_batch(run.opened(seed=3))
    assert worst_difference(found, gradients_of_update(run, minibatches=4, seed=3)) < 1e-6


def test_gradients_of_the_whole_rollout_are_those_of_one_minibatch() -> None:
    run = trained("plain")
    found = gradients_of_batch(run.opened(minibatch_size=128, seed=1))
    assert worst_difference(found, gradients_of_update(run, minibatches=1, seed=1)) < 1e-6


def test_rows_that_fill_no_minibatch_are_left_out_as_rsl_rl_leaves_them_out() -> None:
    run = trained("not divisible")
    source = run.opened(seed=5)
    assert [len(rows) for rows in source.minibatches] == [42, 42, 42]
    found = gradients_of_batch(source)
    assert worst_difference(found, gradients_of_update(run, minibatches=3, seed=5)) < 1e-6


def test_float64_gradients_come_close_to_those_of_the_training() -> None:
    run = trained("plain")
    source = run.opened(seed=3, dtype="float64")
    assert {info.dtype for info in source.tensors} == {"float64"}
    difference = worst_difference(gradients_of_batch(source), gradients_of_update(run, minibatches=4, seed=3))
    assert 0 < difference < 1e-5


def test_reading_again_gives_the_same_gradients_and_changes_nothing() -> None:
    source = trained("curious").opened(epochs=2)
    assert source.info.steps == 8
    engine: Any = source.engine
    models = list(engine._parts.values())
    before = [copy.deepcopy(model.state_dict()) for model in models]
    state = torch.get_rng_state()
    first, second = gradients_of_batch(source), gradients_of_batch(source)
    assert worst_difference(first, second) == 0.0
    assert torch.equal(state, torch.get_rng_state())
    for model, kept in zip(models, before, strict=True):
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, kept[name]), name


def test_actor_and_critic_are_clip_groups_with_the_trainings_max_norm() -> None:
    source = trained("image").opened()
    assert [(group.name, group.max_norm) for group in source.groups] == [("actor", 0.5), ("critic", 0.5)]
    actor, critic = (set(group.tensors) for group in source.groups)
    assert actor & critic == {name for name in actor if ".cnns." in name} != set()
    assert actor | critic == {info.name for info in source.tensors}


def test_the_curiosity_network_is_left_out_in_words() -> None:
    source = trained("curious").opened()
    assert not [info.name for info in source.tensors if info.name.startswith("rnd")]
    assert any("rnd" in note for note in source.notes)


def test_every_epoch_is_shuffled_anew_in_words() -> None:
    source = trained("plain").opened(epochs=2, seed=2)
    orders = np.concatenate(source.minibatches).reshape(2, -1)
    assert np.array_equal(np.sort(orders[0]), np.arange(128)) and np.array_equal(np.sort(orders[1]), np.arange(128))
    assert not np.array_equal(*orders)
    assert any("shuffled anew" in note for note in source.notes)


# --- capturing --------------------------------------------------------------------------------------------------------


def test_a_captured_rollout_holds_the_storage_in_the_generators_order() -> None:
    run = trained("plain")
    storage = run.runner.alg.storage
    columns = load_file(run.batch)
    assert columns["observations.policy"].shape == (16 * 8, 4)
    for step, environment in ((0, 0), (3, 5), (15, 7)):
        row = step * 8 + environment
        assert np.array_equal(columns["observations.policy"][row], storage.observations["policy"][step, environment])
        assert np.array_equal(columns["advantages"][row], storage.advantages[step, environment])
        assert np.array_equal(columns["distribution_params.1"][row], storage.distribution_params[1][step, environment])


def test_the_metadata_say_what_it_is() -> None:
    from safetensors import safe_open

    with safe_open(trained("plain").batch, "np") as file:
        said = json.loads(file.metadata()["gradscope.batch"])
    assert said == {
        "kind": "rollout",
        "library": "rsl_rl",
        "library_version": "5.5.1",
        "algorithm": "PPO",
        "steps": 16,
        "envs": 8,
    }


def test_saving_before_anything_was_collected_is_an_error(tmp_path: Path) -> None:
    runner = runner_of(rsl_rl_settings(0.5, image=False, curious=False))
    with pytest.raises(GradscopeError, match="nothing has been collected yet"):
        save_rollout(runner, tmp_path / "rollout.safetensors")
    assert not list(tmp_path.iterdir())


def test_saving_in_the_middle_of_a_rollout_is_an_error(tmp_path: Path) -> None:
    runner = copy.copy(trained("plain").runner)
    runner.alg = copy.copy(runner.alg)
    runner.alg.storage = copy.copy(runner.alg.storage)
    runner.alg.storage.step = 5
    with pytest.raises(GradscopeError, match=r"a rollout is under way \(5 of 16 steps\)"):
        save_rollout(runner, tmp_path / "rollout.safetensors")


def test_saving_the_rollout_of_a_recurrent_policy_is_an_error(tmp_path: Path) -> None:
    settings = rsl_rl_settings(0.5, image=False, curious=False)
    for part in ("actor", "critic"):
        settings[part] |= {"class_name": "RNNModel", "rnn_type": "gru", "rnn_hidden_dim": 8, "rnn_num_layers": 1}
    runner = runner_of(settings)
    with contextlib.redirect_stdout(io.StringIO()):
        runner.learn(1)
    with pytest.raises(GradscopeError, match="the policy is recurrent"):
        save_rollout(runner, tmp_path / "rollout.safetensors")


# --- what does not fit ------------------------------------------------------------------------------------------------


def altered(tmp_path: Path, **changes: Any) -> Run:
    """The plain run with other settings: ``section__key=value``; ``...`` takes the key away."""
    run = trained("plain")
    settings = yaml.safe_load((run.path / "params" / "agent.yaml").read_text())
    for name, value in changes.items():
        *sections, key = name.split("__")
        section = functools.reduce(lambda part, step: part[step], sections, settings)
        section.pop(key)
        if value is not ...:
            section[key] = value
    (tmp_path / "params").mkdir()
    (tmp_path / "params" / "agent.yaml").write_text(yaml.dump(settings))
    for name in ("model_2.pt", "rollout.safetensors"):
        (tmp_path / name).write_bytes((run.path / name).read_bytes())
    return replace(run, path=tmp_path)


def with_columns(run: Run, **columns: np.ndarray | None) -> None:
    """Exchange columns of the captured rollout (``_`` for a dot); None takes one away."""
    held = load_file(run.batch)
    for name, column in columns.items():
        held.pop(name.replace("__", "."), None)
        if column is not None:
            held[name.replace("__", ".")] = column
    save_file(held, run.batch)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"actor": ...}, "has no actor, from which rsl_rl 5.5.1 makes"),
        ({"critic__class_name": ...}, "has no critic.class_name"),
        ({"actor__class_name": "ActorCritic"}, r"names what rsl_rl 5.5.1 does not have \(class_name: ActorCritic\)"),
        ({"actor__hidden_dims": [16, 16]}, r"lacks actor.mlp.4.bias, actor.mlp.4.weight, which the model"),
        ({"actor__hidden_dims": [24]}, r"its actor.mlp.0.weight is \[16, 4\], and .* makes it \[24, 4\]"),
        ({"actor__obs_normalization": False}, r"has actor.obs_normalizer._mean, .* and 1 more, which"),
        ({"algorithm__max_grad_norm": "soon"}, "raised"),
        ({"algorithm__num_mini_batches": "many"}, "num_mini_batches"),
        (
            {"obs_groups__actor": ["camera"]},
            "gives the actor the observation group 'camera', and the batch holds policy",
        ),
    ],
)
def test_settings_that_do_not_fit_are_named(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(GradscopeError, match=said) as caught:
        altered(tmp_path, **changes).opened()
    assert "\n" not in str(caught.value)


def test_a_missing_agent_yaml_is_named_with_what_to_do(tmp_path: Path) -> None:
    run = altered(tmp_path)
    (tmp_path / "params" / "agent.yaml").unlink()
    with pytest.raises(GradscopeError, match=r"agent.yaml: is missing") as caught:
        run.opened()
    assert caught.value.hint is not None and "--model" in caught.value.hint


@pytest.mark.parametrize("text", ["- 1\n", "{", "a: !!python/tuple\n", "x: " + "[" * 5000])
def test_an_agent_yaml_that_is_none_ends_in_one_line(tmp_path: Path, text: str) -> None:
    run = altered(tmp_path)
    (tmp_path / "params" / "agent.yaml").write_text(text)
    with pytest.raises(GradscopeError, match=r"agent\.yaml: ") as caught:
        run.opened()
    assert "\n" not in str(caught.value)


def test_python_tags_of_isaac_lab_are_only_read(tmp_path: Path) -> None:
    run = altered(tmp_path)
    text = (tmp_path / "params" / "agent.yaml").read_text()
    text = text.replace("hidden_dims: &id001", "hidden_dims: &id001 !!python/tuple")
    text += f"later: !!python/object/apply:os.mkdir ['{tmp_path}/made']\nkind: !!python/name:os.system ''\n"
    assert "!!python/tuple" in text
    (tmp_path / "params" / "agent.yaml").write_text(text)
    assert run.opened().info.steps == 4
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("place", ["actor__class_name", "algorithm__class_name", "actor__distribution_cfg__class_name"])
@pytest.mark.parametrize("name", ["own_code:Model", "own_code.Model", "rsl_rl.utils.utils:importlib.import_module"])
def test_code_outside_rsl_rl_is_not_imported_without_trust(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, name: str
) -> None:
    (tmp_path / "own_code.py").write_text("open('executed', 'w')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(GradscopeError, match="names code outside rsl_rl") as caught:
        altered(tmp_path, **{place: name}).opened()
    assert name in str(caught.value) and "--trust" in (caught.value.hint or "")
    assert not (tmp_path / "executed").exists()


def test_a_trusted_model_of_ones_own_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_rsl_rl_model.py").write_text(
        "from rsl_rl.models import MLPModel\nclass Doubled(MLPModel):\n"
        "    def get_latent(self, *given):\n        return 2 * super().get_latent(*given)\n"
    )
    monkeypatch.chdir(tmp_path)
    run = altered(tmp_path, actor__class_name="own_rsl_rl_model:Doubled")
    doubled, plain = gradients_of_batch(run.opened(trust=True))[0], gradients_of_batch(trained("plain").opened())[0]
    assert all(np.array_equal(doubled[name], plain[name]) for name in plain if name.startswith("critic."))
    assert not np.allclose(doubled["actor.mlp.0.weight"], plain["actor.mlp.0.weight"])


def test_a_gradient_that_clipping_makes_zero_is_told(tmp_path: Path) -> None:
    run = altered(tmp_path)
    held = load_file(run.batch)
    # The critic has come closer to what it should say, by more than clip_param.
    with_columns(run, values=held["values"] + 10, returns=held["values"] - 10)
    source = run.opened()
    assert any("The critic has no gradient" in note for note in source.notes)
    assert all(not gradient["critic.mlp.0.weight"].any() for gradient in gradients_of_batch(source))


def test_a_batch_of_another_library_is_named(tmp_path: Path) -> None:
    run = altered(tmp_path)
    said = {"gradscope.batch": json.dumps({"kind": "replay", "library": "stable_baselines3", "algorithm": "SAC"})}
    save_file(load_file(run.batch), run.batch, said)
    with pytest.raises(GradscopeError, match="is a replay of stable_baselines3") as caught:
        run.opened()
    assert "save_rollout" in (caught.value.hint or "")


def test_a_batch_without_a_column_is_named(tmp_path: Path) -> None:
    run = altered(tmp_path)
    with_columns(run, returns=None, values=None)
    with pytest.raises(GradscopeError, match="is no rollout of rsl_rl's: it has no values, returns"):
        run.opened()


def test_a_column_of_another_shape_is_named(tmp_path: Path) -> None:
    run = altered(tmp_path)
    with_columns(run, values=np.zeros((128, 3), np.float32))
    with pytest.raises(GradscopeError, match=r"its column 'values' is \[128, 3\], where rsl_rl has \[rows, 1\]"):
        run.opened()


def test_a_rollout_with_mu_and_sigma_of_older_versions_serves(tmp_path: Path) -> None:
    run = altered(tmp_path)
    held = load_file(run.batch)
    older = {"mu": held["distribution_params.0"], "sigma": held["distribution_params.1"]}
    with_columns(run, **older, distribution_params__0=None, distribution_params__1=None)
    difference = worst_difference(gradients_of_batch(run.opened()), gradients_of_batch(trained("plain").opened()))
    assert difference == 0.0


def test_rsl_rl_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    run = trained("plain")
    monkeypatch.setitem(sys.modules, "rsl_rl.algorithms", None)
    with pytest.raises(GradscopeError, match="rsl_rl: is needed") as caught:
        run.opened()
    assert caught.value.hint == "pip install rsl-rl-lib"


def test_observations_of_another_size_are_named(tmp_path: Path) -> None:
    run = altered(tmp_path)
    with_columns(run, observations__policy=np.zeros((128, 7), np.float32))
    with pytest.raises(GradscopeError, match=r"_mean is \[1, 4\].* makes it \[1, 7\].*policy \[7\]"):
        run.opened()


def test_actions_of_another_size_are_named(tmp_path: Path) -> None:
    run = altered(tmp_path)
    with_columns(run, actions=np.zeros((128, 3), np.float32))
    with pytest.raises(GradscopeError, match=r"its actor\.\S+ is .*actions \[3\]"):
        run.opened()


def test_a_loss_that_is_nan_is_an_error(tmp_path: Path) -> None:
    run = altered(tmp_path)
    with_columns(run, returns=np.full((128, 1), np.nan, np.float32))
    source = run.opened()
    with pytest.raises(GradscopeError, match="the value loss is nan"):
        gradients_of_batch(source)


def test_a_checkpoint_of_rsl_rl_3_says_which_version_it_needs() -> None:
    checkpoint = open_source(rsl_rl_3_run() / "model_60.pt")
    with pytest.raises(GradscopeError, match=r"has no actor and no critic, from which rsl_rl 5\.5\.1") as caught:
        open_batch(checkpoint, BatchOptions(trained("plain").batch))
    assert "another version" in (caught.value.hint or "")


# --- the sample, end to end -------------------------------------------------------------------------------------------


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gradscope", *arguments], capture_output=True, text=True, cwd=ROOT, check=False
    )


def test_the_sample_gives_gradients_on_the_command_line() -> None:
    batch = ("--batch", str(SAMPLE / "rollout.safetensors"), "--format", "json")
    inspected = command("inspect", str(SAMPLE), *batch)
    assert inspected.returncode == 0, inspected.stderr
    found = json.loads(inspected.stdout)
    assert found["source"]["kind"] == "gradients" and found["source"]["steps"] == 4
    assert [group["name"] for group in found["gradients"]["groups"]] == ["actor", "critic"]
    simulated = command("simulate", str(SAMPLE), "--max-norm", "1", *batch)
    assert simulated.returncode == 0, simulated.stderr
    result = json.loads(simulated.stdout)["results"][0]
    assert 0 <= result["clip_rate"] <= 1 and [group["name"] for group in result["groups"]] == ["actor", "critic"]
