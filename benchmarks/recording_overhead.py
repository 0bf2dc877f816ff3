"""What recording costs a training: ``python -m benchmarks.recording_overhead [ppo|learn|transformer|small-batch]``.

One process trains in blocks, and every block of a round does the same work from the same state: once as it is, once
while gradscope records, once under each peer.  Drift of the machine hits all blocks of a round alike, so the paired
ratios count; the unrecorded block comes twice a round, and how much its two ratios differ is the noise of the figure.

Prints one JSON object a figure; ``python -m benchmarks`` makes rows of them.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np
import torch
from stable_baselines3 import PPO
from torch.optim.optimizer import register_optimizer_step_post_hook

from gradscope import Recorder

# Enough to contain several flushes of a trace, and few enough for the machine to stay the same over a round.
PPO_EPOCHS = 20
# The first third of a second makes files, tables and room for copies, once in a run; ``learn`` contains it.
PPO_WARM_UP = 8
LEARN_TIMESTEPS = 4096
# Every tenth step measures more than the others.
TRANSFORMER_STEPS = 10
LENGTH, VOCABULARY = 128, 1000
LARGE_BATCH = 16

# What they add stands elsewhere than in clip and step.
NORM_AND_ITEM, WANDB = PEERS = ("norm().item()", "wandb.watch(log_freq=1)")

Mode = Callable[[torch.nn.Module], AbstractContextManager[None]]


@dataclass
class Timer:
    """Seconds in ``clip_grad_norm_`` and ``optimizer.step``, hooks included; how many steps."""

    seconds: float = 0.0
    updates: int = 0

    def around(self, function: Callable[..., Any], counts: bool) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **options)
            self.seconds += time.perf_counter() - start
            self.updates += counts
            return result

        return timed


@dataclass
class Block:
    """Per update: wall ``seconds``, those ``inside`` clip and step; CPU seconds of the process and of other threads."""

    seconds: float
    cpu: float
    inside: float
    other_threads: float


def timed_block(timer: Timer, train: Callable[[], None]) -> Block:
    timer.seconds, timer.updates = 0.0, 0
    start, cpu, own = time.perf_counter(), time.process_time(), time.thread_time()
    train()
    seconds, cpu, own = time.perf_counter() - start, time.process_time() - cpu, time.thread_time() - own
    return Block(*(total / timer.updates for total in (seconds, cpu, timer.seconds, cpu - own)))


@contextlib.contextmanager
def unrecorded(_: torch.nn.Module) -> Iterator[None]:
    yield


def recorded(**options: Any) -> Mode:
    @contextlib.contextmanager
    def record(_: torch.nn.Module) -> Iterator[None]:
        made: list[int] = []
        counting = register_optimizer_step_post_hook(lambda *_: made.append(1))
        with tempfile.TemporaryDirectory() as folder:
            with Recorder(f"{folder}/run.gradscope", quiet=True, **options) as recorder:
                yield
            counting.remove()
            if recorder.steps != len(made):
                sys.exit(f"{recorder.steps} of {len(made)} steps were recorded: nothing was measured")

    return record


@contextlib.contextmanager
def norm_and_item(_: torch.nn.Module) -> Iterator[None]:
    """What one writes by hand: every parameter's norm, before the clip."""
    clip = torch.nn.utils.clip_grad_norm_
    norms: list[float] = []

    def observed(parameters: Any, *args: Any, **options: Any) -> torch.Tensor:
        held = list(parameters)
        norms[:] = [p.grad.norm().item() for p in held if p.grad is not None]
        return clip(held, *args, **options)

    torch.nn.utils.clip_grad_norm_ = observed
    try:
        yield
    finally:
        torch.nn.utils.clip_grad_norm_ = clip


def watched_by_wandb(folder: str) -> Mode | None:
    if importlib.util.find_spec("wandb") is None:
        print("wandb is not installed (pip install wandb): its rows are left out", file=sys.stderr)
        return None
    os.environ |= {"WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}
    import wandb

    run = wandb.init(mode="offline", dir=folder, project="overhead")

    @contextlib.contextmanager
    def watch(model: torch.nn.Module) -> Iterator[None]:
        run.watch(model, log="gradients", log_freq=1)
        try:
            yield
        finally:
            run.unwatch(model)

    return watch


RECORDED: dict[str, Mode] = {
    "nothing": unrecorded,
    "default": recorded(),
    "--detail full": recorded(detail="full"),
    "nothing again": unrecorded,
}


def beside_peers(what: str, folder: str, rounds: int, run: Callable[[Mode], Block], limits: dict[str, float]) -> None:
    """What recording costs and what the peers do; wandb last, since its threads stay in the process."""
    report(what, alternate({**RECORDED, NORM_AND_ITEM: norm_and_item}, rounds, run), limits)
    wandb = watched_by_wandb(folder)
    if wandb is not None:
        report(what, alternate({"nothing": unrecorded, WANDB: wandb}, max(2, rounds // 4), run), limits)


def alternate(modes: dict[str, Mode], rounds: int, run: Callable[[Mode], Block]) -> dict[str, list[Block]]:
    """One block of each mode a round, every round in another order."""
    blocks: dict[str, list[Block]] = {name: [] for name in modes}
    names = list(modes)
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            blocks[name].append(run(modes[name]))
    return blocks


def report(what: str, blocks: dict[str, list[Block]], limits: dict[str, float]) -> None:
    """A line per mode: the median of the paired ratios, in per cent over no recording."""
    base = blocks["nothing"]
    step = median(own.seconds for own in base)
    for name, found in blocks.items():
        if name == "nothing":
            continue
        pairs = list(zip(found, base, strict=True))
        shares = [100 * (one.seconds / own.seconds - 1) for one, own in pairs]
        cpu = median(100 * (one.cpu / own.cpu - 1) for one, own in pairs)
        hook = median(1e6 * (one.inside - own.inside) for one, own in pairs)
        others = median(1e6 * (one.other_threads - own.other_threads) for one, own in pairs)
        low, _, high = quantiles(shares, n=4)
        detail = f"quartiles {low:+.2f} to {high:+.2f} of {len(shares)} rounds; of the CPU's time {cpu:+.2f} %"
        if name not in PEERS:
            detail += (
                f"; in clip and step {hook:+.1f} µs, other threads {others:+.1f} µs, of {1e6 * step:.0f} µs a step"
            )
        print(
            json.dumps(
                {
                    "what": f"{what}, {name}",
                    "measured": median(shares),
                    "unit": "%",
                    "limit": limits.get(name),
                    "detail": detail,
                }
            ),
            flush=True,
        )


def ppo(folder: str, rounds: int) -> None:
    """The training step of SB3's PPO: ``train()`` on one rollout, again and again."""
    torch.set_num_threads(1)
    model = PPO("MlpPolicy", "CartPole-v1", seed=0, device="cpu")
    train = model.train
    # A rollout is collected and the loggers are set up; what learn() trained is put back before every block.
    weights = copy.deepcopy(model.policy.state_dict())
    optimizer = copy.deepcopy(model.policy.optimizer.state_dict())
    model.learn(2048)
    timer = Timer()
    clip = torch.nn.utils.clip_grad_norm_
    torch.nn.utils.clip_grad_norm_ = timer.around(clip, counts=False)
    model.policy.optimizer.step = timer.around(model.policy.optimizer.step, counts=True)  # type: ignore[method-assign]

    def start_over(epochs: int) -> None:
        model.policy.load_state_dict(weights)
        model.policy.optimizer.load_state_dict(copy.deepcopy(optimizer))
        np.random.seed(0)
        model.n_epochs = epochs

    def run(mode: Mode) -> Block:
        with mode(model.policy):
            start_over(PPO_WARM_UP)
            train()
            start_over(PPO_EPOCHS)
            return timed_block(timer, train)

    run(unrecorded)
    limits = {"default": 2.0, "--detail full": 4.0}
    beside_peers("PPO training step", folder, rounds, run, limits)
    torch.nn.utils.clip_grad_norm_ = clip


def learn(folder: str, rounds: int) -> None:
    """All of ``learn()``, rollouts and the start and end of recording included."""
    torch.set_num_threads(1)

    def run(mode: Mode) -> Block:
        model = PPO("MlpPolicy", "CartPole-v1", seed=0, device="cpu")
        timer = Timer()
        model.policy.optimizer.step = timer.around(model.policy.optimizer.step, counts=True)  # type: ignore[method-assign]

        def whole() -> None:
            with mode(model.policy):
                model.learn(LEARN_TIMESTEPS)

        return timed_block(timer, whole)

    run(unrecorded)
    beside_peers("PPO learn()", folder, rounds, run, {})


class Transformer(torch.nn.Module):
    """A decoder of 26 million parameters: 8 layers of width 512."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCABULARY, 512)
        layer = torch.nn.TransformerEncoderLayer(512, 8, 2048, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = torch.nn.TransformerEncoder(layer, 8, enable_nested_tensor=False)
        self.head = torch.nn.Linear(512, VOCABULARY)
        self.register_buffer("mask", torch.nn.Transformer.generate_square_subsequent_mask(LENGTH))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(self.embedding(tokens), mask=self.mask, is_causal=True))  # type: ignore[no-any-return]


def transformer(folder: str, rounds: int, batch_size: int = LARGE_BATCH) -> None:
    """A network that is large for a CPU, so that what recording does per element shows."""
    torch.manual_seed(0)
    model = Transformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    batches = torch.randint(VOCABULARY, (TRANSFORMER_STEPS, batch_size, LENGTH + 1))
    timer = Timer()
    clip = timer.around(torch.nn.utils.clip_grad_norm_, counts=False)
    step = timer.around(optimizer.step, counts=True)

    def train(steps: int = TRANSFORMER_STEPS) -> None:
        for batch in batches[:steps]:
            optimizer.zero_grad()
            logits = model(batch[:, :-1])
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
            loss.backward()  # type: ignore[no-untyped-call]
            clip(model.parameters(), 1.0)
            step()

    def run(mode: Mode) -> Block:
        with mode(model):
            train(1)
            return timed_block(timer, train)

    run(unrecorded)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    limits = {"default": 2.0, "--detail full": 4.0} if batch_size == LARGE_BATCH else {}
    what = f"transformer of {size:.0f} M parameters, {batch_size * LENGTH:,} tokens"
    report(what, alternate(RECORDED, rounds, run), limits)


def small_batch(folder: str, rounds: int) -> None:
    """The same with a quarter of the tokens: recording costs as much, of a step of a quarter of the time.

    It has no limit: merely to read the gradient takes more than 2 % of a step that is short enough.
    """
    transformer(folder, rounds, batch_size=4)


PARTS = {
    "ppo": (ppo, 20),
    "learn": (learn, 6),
    "transformer": (transformer, 3),
    "small-batch": (small_batch, 8),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recording_overhead", description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all")
    parser.add_argument("--rounds", type=int, help="blocks of every mode")
    options = parser.parse_args()
    # wandb's own process may still be writing at the end.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        Path(folder, "wandb").mkdir()
        for name in options.parts or PARTS:
            part, rounds = PARTS[name]
            part(folder, options.rounds or rounds)


if __name__ == "__main__":
    main()
