"""Stable-Baselines3 as its documentation trains it: ``sb3.py PPO --out weights.pt``."""

import argparse

import stable_baselines3
import torch

OFF_POLICY = {"learning_starts": 50, "buffer_size": 1000}
RUNS = {
    "PPO": ("CartPole-v1", {"n_steps": 128, "batch_size": 32, "n_epochs": 4}, 512),
    "A2C": ("CartPole-v1", {}, 300),
    "DQN": ("CartPole-v1", OFF_POLICY, 250),
    "SAC": ("Pendulum-v1", OFF_POLICY | {"policy_kwargs": {"net_arch": [32, 32]}}, 100),
}

parser = argparse.ArgumentParser()
parser.add_argument("algorithm", choices=RUNS)
parser.add_argument("--out")
parser.add_argument("--seed", type=int, default=0)
options = parser.parse_args()

environment, settings, timesteps = RUNS[options.algorithm]
make = getattr(stable_baselines3, options.algorithm)
model = make("MlpPolicy", environment, seed=options.seed, device="cpu", **settings)
model.learn(timesteps)

optimizer = model.actor.optimizer if options.algorithm == "SAC" else model.policy.optimizer
updates = int(next(iter(optimizer.state.values()))["step"])
torch.save({"weights": model.policy.state_dict(), "updates": updates}, options.out)
