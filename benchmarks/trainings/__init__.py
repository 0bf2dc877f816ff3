"""Small real trainings, healthy and sick, each recorded as a user would record it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.trainings import half_precision, images, reinforcement, text
from gradscope import Recorder


@dataclass(frozen=True)
class Training:
    """A training by name.

    ``disease`` are the rules of which one has to fail, since each names what is wrong with it; none: it is healthy, and
    no rule may fail.  ``train`` takes a seed.
    """

    name: str
    about: str
    train: Callable[[int], None]
    disease: tuple[str, ...] = ()


HEALTHY = (
    Training("ppo", "SB3 PPO, CartPole, defaults", reinforcement.ppo),
    Training("transformer", "transformer, AdamW, warm-up, max_norm 1", text.transformer),
    Training("ppo-pendulum", "SB3 PPO, Pendulum, defaults", reinforcement.ppo_pendulum),
    Training("recurrent-ppo", "RecurrentPPO, CartPole", reinforcement.recurrent_ppo),
    Training("a2c", "SB3 A2C, CartPole, defaults", reinforcement.a2c),
    Training("dqn", "SB3 DQN, CartPole", reinforcement.dqn),
    Training("sac", "SB3 SAC, Pendulum", reinforcement.sac),
    Training("transformer-unclipped", "transformer, not clipped", text.transformer_unclipped),
    Training("transformer-accumulating", "transformer, 4 batches accumulated", text.transformer_accumulating),
    Training("lstm", "LSTM, Adam, max_norm 1", text.lstm),
    Training("mlp", "MLP, 3 layers, Adam", images.mlp),
    Training("mlp-he", "MLP, 8 layers, He initialisation", images.mlp_deeper),
    Training("residual", "50 residual layers, LayerNorm", images.residual),
    Training("momentum", "MLP, momentum SGD, not clipped", images.momentum),
    Training("convolutional", "CNN, BatchNorm, momentum SGD", images.convolutional),
    Training("fp16-scaled", "autoencoder, float16 with GradScaler", half_precision.scaled),
)

SICK = (
    Training("ppo-lr", "PPO, CartPole, learning rate × 100", reinforcement.ppo_learning_rate, ("update-ratio",)),
    Training(
        "ppo-pendulum-lr",
        "PPO, Pendulum, learning rate × 100",
        reinforcement.ppo_pendulum_learning_rate,
        ("update-ratio",),
    ),
    Training("transformer-lr", "transformer, learning rate × 100", text.transformer_learning_rate, ("update-ratio",)),
    Training("no-normalisation", "50 layers, no normalisation", images.no_normalisation, ("depth-decay", "vanishing")),
    Training("sigmoid", "15 layers of sigmoids", images.sigmoid_stack, ("depth-decay", "vanishing")),
    Training("dead-relu", "dead ReLU: one layer's biases at −20", images.dead_relu_bias, ("dead",)),
    Training("dead-relu-most", "dead ReLU: 3/4 of the units of each layer", images.dead_relu_most, ("dead",)),
    Training("dead-relu-rate", "dead ReLU: too high a learning rate", images.dead_relu_rate, ("dead",)),
    Training("fp16-unscaled", "float16 autocast, no loss scale", half_precision.autocast_unscaled, ("underflow",)),
    Training("fp16-weights", "model.half(), no loss scale", half_precision.weights_in_half, ("underflow",)),
    Training("scaled-clip", "clip before unscale_", half_precision.clipped_before_unscale, ("scaled-clip",)),
    Training("half-clipped", "clip covers half the parameters", text.transformer_half_clipped, ("coverage",)),
    Training("nan", "NaN batch at step 60", text.transformer_nan, ("nonfinite",)),
    Training("max-norm-zero", "transformer, max_norm = 0", text.transformer_max_norm_zero, ("bad-threshold",)),
    Training("ppo-max-norm-zero", "PPO, max_grad_norm = 0", reinforcement.ppo_max_norm_zero, ("bad-threshold",)),
)

TRAININGS = {training.name: training for training in HEALTHY + SICK}


def train(name: str, seed: int, trace_path: str | os.PathLike[str]) -> None:
    """Train ``name`` from ``seed`` and record it to ``trace_path``.

    In one thread: these networks are too small to share.
    """
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    with Recorder(trace_path, quiet=True, force=True):
        TRAININGS[name].train(seed)
