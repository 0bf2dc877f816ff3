"""Small real trainings with the real libraries, each run once and kept for the session.

Every function returns the path that its library wrote; nothing here knows gradscope.
"""

from __future__ import annotations

import copy
import functools
import importlib
import tempfile
from pathlib import Path
from typing import Any

import torch

# These networks are too small to share between threads, which would only wait for each other.
torch.set_num_threads(1)

_KEPT = tempfile.TemporaryDirectory(prefix="gradscope-trainings-")
OFF_POLICY = {"learning_starts": 50, "policy_kwargs": {"net_arch": [32, 32]}, "buffer_size": 1000}
DISCRETE, CONTINUOUS = "CartPole-v1", "Pendulum-v1"

SB3_RUNS: dict[str, tuple[str, str, dict[str, Any], int]] = {
    "PPO": ("stable_baselines3", DISCRETE, {"n_steps": 128, "batch_size": 32, "n_epochs": 4}, 1536),
    "A2C": ("stable_baselines3", DISCRETE, {}, 1500),
    "DQN": ("stable_baselines3", DISCRETE, {"learning_starts": 100, "buffer_size": 2000}, 1000),
    "SAC": ("stable_baselines3", CONTINUOUS, OFF_POLICY, 200),
    "TD3": ("stable_baselines3", CONTINUOUS, OFF_POLICY, 250),
    "DDPG": ("stable_baselines3", CONTINUOUS, OFF_POLICY, 150),
    "TQC": ("sb3_contrib", CONTINUOUS, OFF_POLICY, 150),
    "QRDQN": ("sb3_contrib", DISCRETE, OFF_POLICY, 400),
    "CrossQ": ("sb3_contrib", CONTINUOUS, OFF_POLICY, 120),
    "TRPO": ("sb3_contrib", DISCRETE, {"n_steps": 128}, 512),
    "ARS": ("sb3_contrib", DISCRETE, {"n_delta": 2}, 300),
    "RecurrentPPO": ("sb3_contrib", DISCRETE, {"n_steps": 64, "batch_size": 32, "n_epochs": 1}, 128),
}
SB3_POLICIES = {"ARS": "LinearPolicy", "RecurrentPPO": "MlpLstmPolicy"}


def _kept(name: str) -> Path:
    directory = Path(_KEPT.name) / name
    directory.mkdir(parents=True, exist_ok=True)
    return directory


@functools.cache
def sb3_checkpoint(algorithm: str) -> Path:
    """An SB3 or sb3-contrib zip with default clipping."""
    package, environment, settings, steps = SB3_RUNS[algorithm]
    make = getattr(importlib.import_module(package), algorithm)
    policy = SB3_POLICIES.get(algorithm, "MlpPolicy")
    # SB3 writes into the policy's settings.
    model = make(policy, environment, seed=0, device="cpu", **copy.deepcopy(settings))
    model.learn(steps)
    path = _kept("sb3") / f"{algorithm}.zip"
    model.save(path)
    return path


@functools.cache
def sb3_a2c_like_tensorflow() -> Path:
    """A2C with the RMSprop that starts at ones."""
    from stable_baselines3 import A2C
    from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike

    settings = {"optimizer_class": RMSpropTFLike, "optimizer_kwargs": {"eps": 1e-5, "alpha": 0.99}, "net_arch": [8]}
    model = A2C("MlpPolicy", DISCRETE, seed=0, device="cpu", policy_kwargs=settings)
    model.learn(4000)
    path = _kept("sb3") / "A2C-tf.zip"
    model.save(path)
    return path


@functools.cache
def sb3_logged_ppo() -> tuple[Path, tuple[float, ...]]:
    """A PPO run that is clipped in some of its steps, and the norm of each step's gradient before the clip."""
    from stable_baselines3 import PPO

    norms: list[float] = []
    clip = torch.nn.utils.clip_grad_norm_

    def logged(parameters: Any, max_norm: float, *args: Any, **kwargs: Any) -> torch.Tensor:
        held = list(parameters)
        norms.append(float(sum(p.grad.double().square().sum() for p in held if p.grad is not None)) ** 0.5)
        return clip(held, max_norm, *args, **kwargs)

    torch.nn.utils.clip_grad_norm_ = logged
    try:
        model = PPO("MlpPolicy", DISCRETE, n_steps=128, batch_size=32, n_epochs=8, max_grad_norm=12.0, seed=3)
        model.learn(4096)
    finally:
        torch.nn.utils.clip_grad_norm_ = clip
    path = _kept("sb3") / "PPO-logged.zip"
    model.save(path)
    return path, tuple(norms)


# --- rsl_rl ----------------------------------------------------------------------------------------------------------


def _rsl_rl_environment(image: bool) -> Any:
    from rsl_rl.env import VecEnv
    from tensordict import TensorDict

    class Chase(VecEnv):
        """Move a point to the origin; the reward is its distance, negated."""

        num_envs, num_actions, max_episode_length = 8, 2, 25
        device, cfg, step_dt = "cpu", {}, 0.02

        def __init__(self) -> None:
            self.random = torch.Generator().manual_seed(0)
            self.episode_length_buf = torch.zeros(self.num_envs, dtype=torch.long)
            self.place = torch.randn(self.num_envs, 4, generator=self.random)
            self.unwrapped = self

        def get_observations(self) -> TensorDict:
            observed = {"policy": self.place.clone()}
            if image:
                observed["image"] = self.place[:, :, None, None].expand(-1, 4, 8, 8).clone()
            return TensorDict(observed, batch_size=[self.num_envs])

        def step(self, actions: torch.Tensor) -> tuple[TensorDict, torch.Tensor, torch.Tensor, dict[str, Any]]:
            self.place[:, :2] += 0.1 * actions.clamp(-1, 1)
            self.episode_length_buf += 1
            done = self.episode_length_buf >= self.max_episode_length
            self.place[done] = torch.randn(int(done.sum()), 4, generator=self.random)
            self.episode_length_buf[done] = 0
            return self.get_observations(), -self.place[:, :2].norm(dim=1), done.long(), {"time_outs": done}

    return Chase()


def rsl_rl_settings(max_grad_norm: float, *, image: bool, curious: bool) -> dict[str, Any]:
    """What Isaac Lab writes to ``params/agent.yaml``, for a runner of rsl_rl 5."""
    network: dict[str, Any] = {"class_name": "MLPModel", "hidden_dims": [16], "obs_normalization": True}
    if image:
        cnn = {"output_channels": [4], "kernel_size": 3, "stride": 2}
        network |= {"class_name": "CNNModel", "cnn_cfg": cnn}
    algorithm: dict[str, Any] = {
        "class_name": "PPO",
        "num_learning_epochs": 4,
        "num_mini_batches": 4,
        "max_grad_norm": max_grad_norm,
    }
    if image:
        algorithm["share_cnn_encoders"] = True
    if curious:
        algorithm["rnd_cfg"] = {
            "weight": 0.1,
            "num_outputs": 3,
            "predictor_hidden_dims": [8],
            "target_hidden_dims": [8],
            "state_normalization": True,
            "reward_normalization": True,
        }
    observed = ["policy", "image"] if image else ["policy"]
    return {
        "num_steps_per_env": 16,
        "save_interval": 1000,
        "obs_groups": {"actor": observed, "critic": observed, "rnd_state": ["policy"]},
        "actor": network | {"distribution_cfg": {"class_name": "GaussianDistribution", "init_std": 1.0}},
        "critic": dict(network),
        "algorithm": algorithm,
        "logger": "tensorboard",
    }


@functools.cache
def rsl_rl_run(max_grad_norm: float = 1.0, image: bool = False, curious: bool = False) -> Path:
    """A run's directory of rsl_rl 5: ``model_*.pt`` and ``params/agent.yaml``."""
    import contextlib
    import io

    import yaml
    from rsl_rl.runners import OnPolicyRunner

    torch.manual_seed(0)
    run = _kept(f"rsl_rl-{max_grad_norm}-{image}-{curious}")
    settings = rsl_rl_settings(max_grad_norm, image=image, curious=curious)
    (run / "params").mkdir()
    (run / "params" / "agent.yaml").write_text(yaml.dump(settings))
    with contextlib.redirect_stdout(io.StringIO()):
        # Without a log directory no logger of files is set up.
        runner = OnPolicyRunner(_rsl_rl_environment(image), copy.deepcopy(settings), None, "cpu")
        for iterations in (5, 8):
            runner.learn(iterations)
            runner.save(str(run / f"model_{runner.current_learning_iteration}.pt"))
    return run


class PolicyOfRslRl3(torch.nn.Module):
    """The parameters and buffers of rsl_rl 3's ``ActorCritic``, in its order."""

    def __init__(self) -> None:
        super().__init__()

        def network(outputs: int) -> torch.nn.Sequential:
            return torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ELU(), torch.nn.Linear(16, outputs))

        self.actor = network(2)
        self.actor_obs_normalizer = torch.nn.Module()
        self.actor_obs_normalizer.register_buffer("_mean", torch.zeros(1, 4))
        self.actor_obs_normalizer.register_buffer("_var", torch.ones(1, 4))
        self.actor_obs_normalizer.register_buffer("count", torch.tensor(0))
        self.critic = network(1)
        self.std = torch.nn.Parameter(torch.ones(2))


@functools.cache
def rsl_rl_3_run(max_grad_norm: float = 1.0) -> Path:
    """A run's directory in the layout up to 3.x, trained and clipped as its ``PPO.update`` does."""
    torch.manual_seed(0)
    policy = PolicyOfRslRl3()
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-3)
    for _ in range(60):
        observed = torch.randn(32, 4)
        action = policy.actor(observed) + policy.std * torch.randn(32, 2)
        loss = (action - observed[:, :2]).square().mean() + (policy.critic(observed) - 5.0).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), max_grad_norm)
        optimizer.step()
    run = _kept("rsl_rl-3")
    states = {"model_state_dict": policy.state_dict(), "optimizer_state_dict": optimizer.state_dict()}
    torch.save({**states, "iter": 60, "infos": None}, run / "model_60.pt")
    (run / "params").mkdir()
    # Isaac Lab writes its settings' tuples and classes with Python tags.
    (run / "params" / "agent.yaml").write_text(
        "seed: 42\n"
        "policy:\n  class_name: ActorCritic\n  actor_hidden_dims: !!python/tuple [16]\n"
        f"algorithm:\n  class_name: PPO\n  max_grad_norm: {max_grad_norm}\n"
        "  extra: !!python/object/apply:os.system ['false']\n"
    )
    return run


# --- Lightning and Transformers --------------------------------------------------------------------------------------


@functools.cache
def lightning_checkpoint(optimizers: int = 1) -> Path:
    """A ``.ckpt`` of a real fit with one optimizer, or with one for each of two networks."""
    import lightning
    from torch.utils.data import DataLoader, TensorDataset

    class Regression(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.save_hyperparameters({"width": 8})
            self.automatic_optimization = optimizers == 1
            self.body = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU())
            self.head = torch.nn.Linear(8, 1)

        def loss(self, batch: list[torch.Tensor]) -> torch.Tensor:
            return (self.head(self.body(batch[0])) - batch[1]).square().mean()

        def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor | None:
            loss = self.loss(batch)
            if self.automatic_optimization:
                return loss
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()
            return None

        def configure_optimizers(self) -> Any:
            if optimizers == 1:
                return torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=0.01)
            body = torch.optim.Adam(self.body.parameters(), lr=1e-3)
            return body, torch.optim.SGD(self.head.parameters(), lr=1e-2, momentum=0.9)

    torch.manual_seed(0)
    data = TensorDataset(torch.randn(64, 4), torch.randn(64, 1))
    trainer = lightning.Trainer(
        max_epochs=4,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Regression(), DataLoader(data, batch_size=8))
    path = _kept("lightning") / f"{optimizers}.ckpt"
    trainer.save_checkpoint(path)
    return path


@functools.cache
def transformers_checkpoint(optim: str = "adamw_torch", max_grad_norm: float = 0.25) -> Path:
    """A Trainer's output directory with one ``checkpoint-N`` of a tiny GPT-2."""
    import transformers
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_positions=24, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    rows = [{"input_ids": (ids := torch.randint(0, 50, (8,))), "labels": ids} for _ in range(32)]
    output = _kept(f"transformers-{optim}")
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=12,
        save_steps=12,
        per_device_train_batch_size=4,
        max_grad_norm=max_grad_norm,
        weight_decay=0.01,
        optim=optim,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
        save_strategy="steps",
    )
    Trainer(model=GPT2LMHeadModel(config), args=arguments, train_dataset=rows).train()
    return output
