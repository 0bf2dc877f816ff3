"""rsl_rl's PPO on a small vectorised environment: actor and critic are clipped one after the other."""

import argparse

import torch
from rsl_rl.env import VecEnv
from rsl_rl.runners import OnPolicyRunner
from tensordict import TensorDict

ITERATIONS = 6
SETTINGS = {
    "num_steps_per_env": 16,
    "save_interval": 1000,
    "obs_groups": {"actor": ["policy"], "critic": ["policy"]},
    "actor": {
        "class_name": "MLPModel",
        "hidden_dims": [16, 16],
        "distribution_cfg": {"class_name": "GaussianDistribution", "init_std": 1.0},
    },
    "critic": {"class_name": "MLPModel", "hidden_dims": [16, 16]},
    "algorithm": {"class_name": "PPO", "num_learning_epochs": 3, "num_mini_batches": 4, "max_grad_norm": 0.5},
    "logger": "tensorboard",
}


class Chase(VecEnv):
    """Move a point to the origin; the reward is its distance, negated."""

    num_envs, num_actions, max_episode_length = 8, 2, 25
    device, cfg = "cpu", {}

    def __init__(self, seed):
        self.random = torch.Generator().manual_seed(seed)
        self.episode_length_buf = torch.zeros(self.num_envs, dtype=torch.long)
        self.place = torch.randn(self.num_envs, 4, generator=self.random)

    def get_observations(self):
        return TensorDict({"policy": self.place.clone()}, batch_size=[self.num_envs])

    def step(self, actions):
        self.place[:, :2] += 0.1 * actions.clamp(-1, 1)
        self.episode_length_buf += 1
        done = self.episode_length_buf >= self.max_episode_length
        self.place[done] = torch.randn(int(done.sum()), 4, generator=self.random)
        self.episode_length_buf[done] = 0
        return self.get_observations(), -self.place[:, :2].norm(dim=1), done.long(), {"time_outs": done}


parser = argparse.ArgumentParser()
parser.add_argument("--out")
parser.add_argument("--seed", type=int, default=0)
options = parser.parse_args()

torch.manual_seed(options.seed)
runner = OnPolicyRunner(Chase(options.seed), SETTINGS, None, "cpu")
runner.learn(ITERATIONS)

networks = {"actor": runner.alg.actor, "critic": runner.alg.critic}
weights = {
    f"{part}.{name}": value for part, network in networks.items() for name, value in network.state_dict().items()
}
updates = int(next(iter(runner.alg.optimizer.state.values()))["step"])
torch.save({"weights": weights, "updates": updates}, options.out)
