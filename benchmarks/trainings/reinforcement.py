"""Stable-Baselines3 as it is: agents on the classic control tasks."""

from __future__ import annotations

from typing import Any

import stable_baselines3
from sb3_contrib import RecurrentPPO
from stable_baselines3.common.base_class import BaseAlgorithm

PPO_LEARNING_RATE = 3e-4


def ppo(seed: int, timesteps: int = 8192, **settings: Any) -> None:
    """PPO on CartPole with its default settings, and those given."""
    _learn(stable_baselines3.PPO("MlpPolicy", "CartPole-v1", seed=seed, device="cpu", **settings), timesteps)


def ppo_learning_rate(seed: int) -> None:
    """The same at a hundred times its learning rate."""
    ppo(seed, learning_rate=100 * PPO_LEARNING_RATE)


def ppo_max_norm_zero(seed: int) -> None:
    """The same with ``max_grad_norm=0``."""
    ppo(seed, 4096, max_grad_norm=0.0)


def ppo_pendulum(seed: int, **settings: Any) -> None:
    """PPO on Pendulum: rewards of hundreds, so that the critic's gradient is large."""
    _learn(stable_baselines3.PPO("MlpPolicy", "Pendulum-v1", seed=seed, device="cpu", **settings), 6144)


def ppo_pendulum_learning_rate(seed: int) -> None:
    """The same at a hundred times its learning rate."""
    ppo_pendulum(seed, learning_rate=100 * PPO_LEARNING_RATE)


def recurrent_ppo(seed: int) -> None:
    """PPO with an LSTM policy."""
    model = RecurrentPPO("MlpLstmPolicy", "CartPole-v1", seed=seed, device="cpu", n_steps=128, n_epochs=4)
    _learn(model, 1024)


def a2c(seed: int) -> None:
    """A2C on CartPole: RMSprop, five steps a batch."""
    _learn(stable_baselines3.A2C("MlpPolicy", "CartPole-v1", seed=seed, device="cpu"), 5000)


def dqn(seed: int) -> None:
    """DQN on CartPole."""
    model = stable_baselines3.DQN("MlpPolicy", "CartPole-v1", seed=seed, device="cpu", learning_starts=500)
    _learn(model, 4000)


def sac(seed: int) -> None:
    """SAC on Pendulum: three optimizers, no clipping."""
    _learn(stable_baselines3.SAC("MlpPolicy", "Pendulum-v1", seed=seed, device="cpu", learning_starts=100), 400)


def _learn(model: BaseAlgorithm, timesteps: int) -> None:
    model.learn(timesteps)
