"""Train and write every file of this folder with the real libraries, on one thread and with fixed seeds.

    pip install stable-baselines3==2.9.2 rsl-rl-lib==5.5.1 torch==2.13.0 safetensors pyyaml gradscope
    python sample_ckpts/make_samples.py [FOLDER]

takes two minutes on one CPU core.  With the same library versions on the same kind of CPU a second run writes the
same bytes: what the libraries store of the clock, of memory addresses and of the machine is replaced by constants.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
import yaml
from rsl_rl.env import VecEnv
from rsl_rl.runners import OnPolicyRunner
from safetensors.torch import save
from stable_baselines3 import A2C, PPO, __version__
from tensordict import TensorDict

from gradscope import Recorder
from gradscope.integrations import rsl_rl as rsl_rl_integration
from gradscope.integrations.sb3 import save_rollout

HERE = Path(__file__).parent

# As in the example of SB3's documentation; rounded up to 13 rollouts of 2048 steps, 4160 updates.
PPO_TIMESTEPS = 25_000
A2C_TIMESTEPS = 20_000

# 50 rollouts of 320 updates.  125 shares no factor with a rollout's 32 minibatches, so every minibatch has its turn.
DUMP_TIMESTEPS = 50 * 2048
DUMP_EVERY = 125
# The traces of the two trainings: every 7th update, which shares no factor with their minibatches.
RECORD_EVERY = 7
DUMP_NET = {"pi": [32, 32], "vf": [32, 32]}

# What Isaac Lab dumps into params/agent.yaml for its cart-pole task: same keys, order and values, but for the device.
AGENT = {
    "seed": 42,
    "device": "cpu",
    "num_steps_per_env": 16,
    "max_iterations": 150,
    "obs_groups": {"actor": ["policy"], "critic": ["policy"]},
    "clip_actions": None,
    "save_interval": 50,
    "experiment_name": "cartpole",
    "run_name": "",
    "logger": "tensorboard",
    "neptune_project": "isaaclab",
    "wandb_project": "isaaclab",
    "resume": False,
    "load_run": ".*",
    "load_checkpoint": "model_.*.pt",
    "class_name": "OnPolicyRunner",
    "actor": {
        "class_name": "MLPModel",
        "hidden_dims": [32, 32],
        "activation": "elu",
        "obs_normalization": False,
        "distribution_cfg": {"class_name": "GaussianDistribution", "init_std": 1.0, "std_type": "scalar"},
    },
    "critic": {
        "class_name": "MLPModel",
        "hidden_dims": [32, 32],
        "activation": "elu",
        "obs_normalization": False,
        "distribution_cfg": None,
    },
    "algorithm": {
        "class_name": "PPO",
        "num_learning_epochs": 5,
        "num_mini_batches": 4,
        "learning_rate": 0.001,
        "schedule": "adaptive",
        "gamma": 0.99,
        "lam": 0.95,
        "entropy_coef": 0.005,
        "desired_kl": 0.01,
        "max_grad_norm": 1.0,
        "optimizer": "adam",
        "value_loss_coef": 1.0,
        "use_clipped_value_loss": True,
        "clip_param": 0.2,
        "normalize_advantage_per_mini_batch": False,
        "rnd_cfg": None,
        "symmetry_cfg": None,
    },
}


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE
    folder.mkdir(parents=True, exist_ok=True)
    with recorded(folder / "ppo_cartpole.gradscope"):
        write_sb3_checkpoint(
            PPO, PPO_TIMESTEPS, folder / "ppo_cartpole.zip", folder / "ppo_cartpole_rollout.safetensors"
        )
    write_sb3_checkpoint(A2C, A2C_TIMESTEPS, folder / "a2c_cartpole.zip")
    with recorded(folder / "rsl_rl_run.gradscope"):
        write_rsl_rl_run(folder / "rsl_rl_run")
    write_gradient_dumps(folder / "ppo_cartpole_gradients")


# --- Stable-Baselines3 -----------------------------------------------------------------------------------------------


def write_sb3_checkpoint(
    algorithm: type[PPO] | type[A2C], timesteps: int, path: Path, rollout: Path | None = None
) -> None:
    """Train with the library's default hyper-parameters and save with its own ``save``; and the last rollout."""
    model = algorithm("MlpPolicy", "CartPole-v1", seed=0, device="cpu")
    model.learn(timesteps)
    if rollout is not None:
        save_rollout(model, rollout)
    model.start_time = 0
    for episode in model.ep_info_buffer or ():
        episode["t"] = 0.0
    saved = io.BytesIO()
    model.save(saved)
    path.write_bytes(_without_clock_and_machine(saved))


def _without_clock_and_machine(saved: io.BytesIO) -> bytes:
    repacked = io.BytesIO()
    with zipfile.ZipFile(saved) as old, zipfile.ZipFile(repacked, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name == "data":
                content = re.sub(rb" at 0x[0-9a-f]+", b" at 0x0", content)
            if name == "system_info.txt":
                content = re.sub(rb"- OS: .*", b"- OS: Linux", content)
            # SB3 writes tensors with 64-bit sizes and text without; readers must be able to tell, so keep it.
            with new.open(zipfile.ZipInfo(name), "w", force_zip64=name.endswith(".pth")) as member:
                member.write(content)
    return repacked.getvalue()


# --- recorded runs ---------------------------------------------------------------------------------------------------


@contextmanager
def recorded(path: Path) -> Iterator[None]:
    """Record what trains meanwhile, as ``gradscope record --every 7`` does."""
    shutil.rmtree(path, ignore_errors=True)
    command = ["python", "sample_ckpts/make_samples.py"]
    with Recorder(path, every=RECORD_EVERY, command=command):
        yield
    _without_clock(path)


def _without_clock(trace: Path) -> None:
    """Set every time and number of a process to 0, and make one batch of those that the clock had parted."""
    stream = trace / "rank-00000.arrows"
    with pa.OSFile(str(stream)) as source:
        rows = pa.ipc.open_stream(source).read_all().combine_chunks()
    time = rows.schema.get_field_index("time")
    rows = rows.set_column(time, rows.schema.field(time), pa.array([0.0] * len(rows)))
    with pa.OSFile(str(stream), "wb") as sink, pa.ipc.new_stream(sink, rows.schema) as writer:
        writer.write_table(rows)
    metadata = json.loads((trace / "trace.json").read_text())
    metadata.update(run="sample", pid=0, started=0.0, ended=0.0)
    metadata["versions"].pop("gradscope")
    metadata["versions"]["torch"] = metadata["versions"]["torch"].split("+")[0]
    (trace / "trace.json").write_text(json.dumps(metadata, indent=1) + "\n")


# --- gradient dumps --------------------------------------------------------------------------------------------------


def write_gradient_dumps(folder: Path) -> None:
    """Every ``DUMP_EVERY``-th gradient of one SB3 PPO run, as it was when the run was about to clip it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    model = PPO("MlpPolicy", "CartPole-v1", seed=1, device="cpu", policy_kwargs={"net_arch": DUMP_NET})

    def dump(update: int, max_norm: float) -> None:
        if update % DUMP_EVERY == 0:
            gradients = {name: p.grad for name, p in model.policy.named_parameters() if p.grad is not None}
            metadata = {
                "library": f"stable_baselines3 {__version__}",
                "torch": torch.__version__.split("+")[0],
                "update": str(update),
                "max_grad_norm": str(max_norm),
            }
            (folder / f"step_{update:05d}.safetensors").write_bytes(_with_sorted_metadata(save(gradients, metadata)))

    with before_every_clip(dump):
        model.learn(DUMP_TIMESTEPS)


@contextmanager
def before_every_clip(call: Callable[[int, float], None]) -> Iterator[None]:
    """Call ``call(update, max_norm)`` with the update's number, from 0, before each ``clip_grad_norm_``."""
    clip_grad_norm_ = torch.nn.utils.clip_grad_norm_
    updates = 0

    def observed(parameters: Any, max_norm: float, *args: Any, **options: Any) -> torch.Tensor:
        nonlocal updates
        call(updates, max_norm)
        updates += 1
        return clip_grad_norm_(parameters, max_norm, *args, **options)

    torch.nn.utils.clip_grad_norm_ = observed
    try:
        yield
    finally:
        torch.nn.utils.clip_grad_norm_ = clip_grad_norm_


def _with_sorted_metadata(file: bytes) -> bytes:
    """safetensors writes its metadata in the order of a hash table that is seeded anew in every process."""
    size = int.from_bytes(file[:8], "little")
    header = json.loads(file[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    return file[:8] + json.dumps(header, separators=(",", ":")).encode().ljust(size) + file[8 + size :]


# --- rsl_rl ----------------------------------------------------------------------------------------------------------


class CartPole(VecEnv):
    """The cart-pole of Barto, Sutton and Anderson (1983) with a continuous force, 64 at a time.

    Constants as in Gymnasium's CartPole; reward as in Isaac Lab's: 1 alive, -2 on falling, minus the squared angle.
    """

    def __init__(self) -> None:
        self.num_envs = 64
        self.num_actions = 1
        self.max_episode_length = 300
        self.device = "cpu"
        self.cfg: dict[str, Any] = {}
        self.episode_length_buf = torch.zeros(self.num_envs, dtype=torch.long)
        self.state = self._start(self.num_envs)

    def get_observations(self) -> TensorDict:
        return TensorDict({"policy": self.state.clone()}, batch_size=[self.num_envs])

    def step(self, actions: torch.Tensor) -> tuple[TensorDict, torch.Tensor, torch.Tensor, dict[str, Any]]:
        _, velocity, angle, spin = self.state.unbind(1)
        force = 10.0 * actions[:, 0].clamp(-1.0, 1.0)
        sine, cosine = angle.sin(), angle.cos()
        push = (force + 0.05 * spin.square() * sine) / 1.1
        torque = (9.8 * sine - cosine * push) / (0.5 * (4.0 / 3.0 - 0.1 * cosine.square() / 1.1))
        acceleration = push - 0.05 * torque * cosine / 1.1
        rate = torch.stack([velocity, acceleration, spin, torque], dim=1)
        self.state = self.state + 0.02 * rate
        self.episode_length_buf += 1

        fallen = (self.state[:, 0].abs() > 2.4) | (self.state[:, 2].abs() > 0.25)
        timed_out = self.episode_length_buf >= self.max_episode_length
        done = fallen | timed_out
        rewards = torch.where(fallen, -2.0, 1.0 - self.state[:, 2].square())
        self.state = torch.where(done[:, None], self._start(self.num_envs), self.state)
        self.episode_length_buf[done] = 0
        return self.get_observations(), rewards, done, {"time_outs": timed_out}

    def _start(self, count: int) -> torch.Tensor:
        return 0.1 * torch.rand(count, 4) - 0.05


def write_rsl_rl_run(folder: Path) -> None:
    """A run folder as Isaac Lab's ``train.py`` leaves it, without TensorBoard's events and the git state.

    With it the last rollout, from which the updates before ``model_149.pt`` learned.
    """
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "params").mkdir(parents=True)
    # Dumped before training, as Isaac Lab does: the runner changes the dictionary it is given.
    (folder / "params" / "agent.yaml").write_text(yaml.dump(AGENT, default_flow_style=False, sort_keys=False))
    torch.manual_seed(AGENT["seed"])
    with tempfile.TemporaryDirectory() as log_dir:
        runner = OnPolicyRunner(CartPole(), json.loads(json.dumps(AGENT)), log_dir, device="cpu")
        runner.learn(AGENT["max_iterations"], init_at_random_ep_len=True)
        for checkpoint in Path(log_dir).glob("model_*.pt"):
            shutil.copyfile(checkpoint, folder / checkpoint.name)
    rsl_rl_integration.save_rollout(runner, folder / "rollout.safetensors")


if __name__ == "__main__":
    main()
