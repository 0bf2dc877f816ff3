"""How often ``drift`` takes one healthy run for another, and whether it sees what is wrong.

    python -m benchmarks.drift_false_alarms [--seeds 22] [--sick-seeds 4] [--other-seeds 4] [--folder DIR]

Every run is a real, short training on one thread, recorded to DIR and found there the next time.  Healthy runs, which
differ in their seed alone, are judged against baselines of one and of three others of the same training; so are runs
with something wrong, each against every healthy one.  A false alarm is a healthy run that fails.  Pairs that share a
run are not independent, so the interval is that of pairs that share none.  For comparison, how many neighbouring seeds
have global norms that ``gradscope compare`` calls different, since it knows the noise within runs alone.  Ends with 1
if there was a false alarm or something wrong was not seen.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gradscope.comparison.comparing import compare
from gradscope.health.baselines import Baseline
from gradscope.health.evidence import Evidence
from gradscope.health.rule import Limits
from gradscope.health.rules.drift import DRIFT
from gradscope.health.run_courses import RunCourses
from gradscope.intervals import wilson_interval
from gradscope.sources.opening import open_source

SICK = {
    "ppo": ("lr3", "lr10", "init5", "init0"),
    "transformer": ("lr3", "lr10", "init5", "init0", "nonorm"),
}
ABOUT = {
    "lr3": "learning rate x 3",
    "lr10": "learning rate x 10",
    "init5": "initial weights x 5",
    "init0": "initial weights 0",
    "nonorm": "LayerNorm removed",
}
BASELINES = (1, 3)


def train_ppo(variant: str, seed: int, path: Path) -> None:
    """SB3's PPO on CartPole."""
    import torch
    from stable_baselines3 import PPO

    import gradscope

    rate = 3e-4 * {"lr3": 3, "lr10": 10}.get(variant, 1)
    model = PPO("MlpPolicy", "CartPole-v1", n_steps=512, seed=seed, device="cpu", learning_rate=rate)
    extractor = model.policy.mlp_extractor
    if variant in ("init5", "init0"):
        with torch.no_grad():
            for layer in extractor.modules():
                if isinstance(layer, torch.nn.Linear):
                    layer.weight.mul_(int(variant[4:]))
    with gradscope.Recorder(path, quiet=True):
        model.learn(4096)


def train_transformer(variant: str, seed: int, path: Path) -> None:
    """Two blocks that learn to say a short sequence backwards, with AdamW and clipping at 1."""
    import torch
    from torch import nn

    import gradscope

    torch.manual_seed(seed)
    vocabulary, length, width = 32, 16, 64

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            norm: Callable[[], Any] = nn.Identity if variant == "nonorm" else (lambda: nn.LayerNorm(width))
            self.norm1, self.norm2 = norm(), norm()
            self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def forward(self, x: Any) -> Any:
            h = self.norm1(x)
            x = x + self.attention(h, h, h, need_weights=False)[0]
            return x + self.down(torch.nn.functional.gelu(self.up(self.norm2(x))))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(vocabulary, width)
            self.position = nn.Parameter(torch.randn(length, width) * 0.02)
            self.blocks = nn.Sequential(Block(), Block())
            self.norm = nn.Identity() if variant == "nonorm" else nn.LayerNorm(width)
            self.head = nn.Linear(width, vocabulary)

        def forward(self, x: Any) -> Any:
            return self.head(self.norm(self.blocks(self.embedding(x) + self.position)))

    model = Model()
    if variant in ("init5", "init0"):
        with torch.no_grad():
            for name, weight in model.blocks.named_parameters():
                if name.endswith(("up.weight", "down.weight", "proj_weight")):
                    weight.mul_(int(variant[4:]))
    rate = 1e-3 * {"lr3": 3, "lr10": 10}.get(variant, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    with gradscope.Recorder(path, quiet=True):
        for _ in range(400):
            x = torch.randint(vocabulary, (32, length))
            loss: Any = nn.functional.cross_entropy(model(x).flatten(0, 1), x.flip(1).flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()


TRAININGS = {"ppo": train_ppo, "transformer": train_transformer}


def train_other(name: str, seed: int, path: Path) -> None:
    """One of the healthy trainings that the rules are calibrated with."""
    from benchmarks import trainings

    trainings.train(name, seed, path)


def recorded(kind: str, variant: str, seed: int, folder: Path) -> Evidence:
    """One training, recorded in a process of its own where that is not done yet."""
    path = folder / f"{kind}-{variant}-{seed}.gradscope"
    if not path.exists():
        making = path.with_name(f"making-{path.name}")
        command = [
            sys.executable,
            "-m",
            "benchmarks.drift_false_alarms",
            "--train",
            kind,
            variant,
            str(seed),
            str(making),
        ]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        making.rename(path)
    return Evidence.gather(open_source(str(path)))


def fails(run: Evidence, usual: Sequence[RunCourses]) -> bool:
    """Whether ``run`` has drifted, by the rule's default limits."""
    verdict = DRIFT.judge(replace(run, baseline=Baseline("baseline", tuple(usual))), Limits(DRIFT.defaults()))
    if verdict.skipped is not None:
        raise SystemExit(f"{run.source.info.path}: {verdict.skipped}")
    return bool(verdict.violations)


def false_alarms(healthy: Sequence[Evidence], runs: int) -> tuple[int, int, int, int]:
    """Alarms and judgements: of all (for one run; else 300 at random), and of those that share no run."""
    courses = [of(run) for run in healthy]
    places = range(len(healthy))
    chance = random.Random(0)
    tried = (
        list(itertools.permutations(places, 2))
        if runs == 1
        else [tuple(chance.sample(places, runs + 1)) for _ in range(300)]
    )
    apart = [tuple(range(i, i + runs + 1)) for i in range(0, len(healthy) - runs, runs + 1)]
    alarms = [[fails(healthy[one], [courses[i] for i in rest]) for one, *rest in those] for those in (tried, apart)]
    return sum(alarms[0]), len(tried), sum(alarms[1]), len(apart)


def seen(sick: Sequence[Evidence], healthy: Sequence[Evidence], runs: int) -> float:
    """The share of judgements of ``sick`` runs that fail, against baselines of neighbouring healthy ones."""
    courses = [of(run) for run in healthy]
    found = [
        fails(run, [courses[(first + i) % len(courses)] for i in range(runs)])
        for run in sick
        for first in range(len(courses))
    ]
    return sum(found) / len(found)


def beyond_noise(healthy: Sequence[Evidence]) -> tuple[int, int]:
    """Pairs of neighbouring seeds whose global norms differ beyond the noise within the runs, and all such pairs."""
    compared = [compare(one.source, other.source).overall for one, other in itertools.pairwise(healthy)]
    return sum(unit is not None and unit.verdict == "differs" for unit in compared), len(compared)


def of(run: Evidence) -> RunCourses:
    """What a baseline keeps of ``run``."""
    courses = RunCourses.of(run)
    assert courses is not None
    return courses


def measure(options: argparse.Namespace, folder: Path) -> Iterator[bool]:
    """Print a line for each training and what is wrong with it; whether each is as it should be."""
    from benchmarks import trainings

    total = {runs: [0, 0] for runs in BASELINES}
    every, differing = 0, [0, 0]
    others = [training.name for training in trainings.HEALTHY if training.name not in SICK]
    for kind in [*SICK, *(others if options.other_seeds > max(BASELINES) - 1 else ())]:
        seeds = options.seeds if kind in SICK else options.other_seeds
        healthy = [recorded(kind, "healthy", seed, folder) for seed in range(seeds)]
        for runs in BASELINES:
            if len(healthy) <= runs:
                continue
            alarms, tried, alarms_apart, apart = false_alarms(healthy, runs)
            every += tried if runs == 1 else 0
            total[runs][0] += alarms_apart
            total[runs][1] += apart
            print(f"{kind:26} baseline of {runs}: {alarms} false alarms in {tried} ({seeds} seeds)", flush=True)
            yield alarms == 0
        differing = [sum(numbers) for numbers in zip(differing, beyond_noise(healthy), strict=True)]
        for variant in SICK.get(kind, ()):
            sick = [recorded(kind, variant, 100 + seed, folder) for seed in range(options.sick_seeds)]
            shares = [seen(sick, healthy, runs) for runs in BASELINES]
            told = ", ".join(f"{share:.1%} (baseline of {runs})" for share, runs in zip(shares, BASELINES, strict=True))
            print(f"  {ABOUT[variant]:24} seen in {told}", flush=True)
            yield min(shares) == 1.0
    print(
        f"gradscope compare: {differing[0]} of {differing[1]} pairs of neighbouring seeds differ in their global norm"
    )
    print(f"baseline of 1: {every} judgements of one seed by another")
    for runs, (alarms, apart) in total.items():
        low, high = wilson_interval(alarms / apart, apart) if apart else (0.0, math.nan)
        share = f"{low:.1%} to {high:.1%} with 95 % confidence"
        print(f"baseline of {runs}: {alarms} false alarms in {apart} judgements that share no run: {share}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=22)
    parser.add_argument("--sick-seeds", type=int, default=4)
    parser.add_argument("--other-seeds", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="where recordings are kept (default: nowhere)")
    parser.add_argument("--train", nargs=4, metavar=("KIND", "VARIANT", "SEED", "PATH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        import torch

        torch.set_num_threads(1)
        kind, variant, seed, path = options.train
        TRAININGS.get(kind, lambda _, s, p: train_other(kind, s, p))(variant, int(seed), Path(path))
        return 0
    if options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
        return 0 if all([*measure(options, options.folder)]) else 1
    with tempfile.TemporaryDirectory(prefix="gradscope-drift-") as folder:
        return 0 if all([*measure(options, Path(folder))]) else 1


if __name__ == "__main__":
    sys.exit(main())
