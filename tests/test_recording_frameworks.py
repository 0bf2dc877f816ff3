"""Unmodified training scripts under ``gradscope record``: what is recorded is right, and training does not notice.

Every script runs twice with one seed: under ``independent_norms.py``, which writes float64 norms of its own, and under
``gradscope record``.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gradscope.gradients import GradientSource, GradientStep
from gradscope.sources import open_source

TESTS = Path(__file__).parent
SCRIPTS = TESTS / "training_scripts"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
LIMIT_SECONDS = 120
_KEPT = tempfile.TemporaryDirectory(prefix="gradscope-recorded-")

LOOPS = ["never_clipping", "clipping_by_value", "lbfgs", "joint_norm", "accumulating", "two_optimizers"]
SCRIPT_OF: dict[str, list[str]] = {
    **{f"sb3-{algorithm}": ["sb3.py", algorithm] for algorithm in ("PPO", "A2C", "DQN", "SAC")},
    "rsl_rl": ["rsl_rl_ppo.py"],
    "lightning": ["lightning_fit.py"],
    "transformers": ["hf_trainer.py"],
    "amp": ["amp.py", "--overflow"],
    "amp-fused": ["amp.py", "--overflow", "--fused", "--clip", "none"],
    **{f"loop-{way}": ["loop.py", way] for way in LOOPS},
    "ddp": ["ddp.py"],
    "fsdp2": ["fsdp2.py"],
}
PARALLEL = {"ddp", "fsdp2"}


@dataclass
class Witnessed:
    """One clip call, or one step of an optimizer that nothing clips: norms by parameter index."""

    norms: dict[int, float]
    function: str | None
    max_norm: float | None
    returned: float | None
    stepped: bool = False


@dataclass
class Training:
    name: str
    trace: Path
    source: GradientSource
    steps: list[GradientStep]
    plain: dict[str, Any]
    recorded: dict[str, Any]
    witnessed: list[Witnessed]
    fingerprints: list[str | None]

    def names(self) -> dict[int, str]:
        """What the checkpoint calls the parameters: whose last values are those."""
        by_value: dict[str, str] = {}
        for name, weight in self.plain["weights"].items():
            by_value.setdefault(hashlib.sha256(weight.contiguous().numpy().tobytes()).hexdigest(), name)
        return {i: by_value[found] for i, found in enumerate(self.fingerprints) if found in by_value}

    def groups(self) -> dict[frozenset[str], list[Witnessed]]:
        """The witnessed calls of each clip group, in order; a group is named by its tensors that have gradients."""
        names, found = self.names(), {}
        for row in self.witnessed:
            key = frozenset(names.get(i, "?") for i in row.norms)
            found.setdefault(key, []).append(row)
        return found


def training(name: str) -> Training:
    """Both runs, at the same time."""
    folder = Path(tempfile.mkdtemp(prefix=name, dir=_KEPT.name))
    script, *arguments = SCRIPT_OF[name]
    launch = [sys.executable, *(TORCHRUN if name in PARALLEL else [])]
    command = [str(SCRIPTS / script), *arguments, "--seed", "5", "--out"]
    witness = [*launch, str(TESTS / "independent_norms.py"), "--to", str(folder / "events"), *command]
    record = [sys.executable, "-m", "gradscope", "record", "-o", str(folder / "run.gradscope"), "--", *launch, *command]
    run_together([*witness, str(folder / "plain.pt")], [*record, str(folder / "recorded.pt")])
    events = [json.loads(line) for line in (folder / "events.0").read_text().splitlines()]
    source = open_source(str(folder / "run.gradscope"))
    return Training(
        name=name,
        trace=folder / "run.gradscope",
        source=source,
        steps=list(source.read_steps(range(source.info.steps))),
        plain=torch.load(folder / "plain.pt"),
        recorded=torch.load(folder / "recorded.pt"),
        witnessed=witnessed_rows(events),
        fingerprints=events[-1]["fingerprints"],
    )


def run_together(*commands: list[str]) -> None:
    path = os.pathsep.join(filter(None, [str(TESTS.parent), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    with tempfile.TemporaryDirectory() as elsewhere:
        running = [
            subprocess.Popen(c, cwd=elsewhere, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            for c in commands
        ]
        for command, process in zip(commands, running, strict=True):
            said, _ = process.communicate(timeout=LIMIT_SECONDS)
            assert process.returncode == 0, f"{' '.join(command)}\n{said.decode()[-3000:]}"


def witnessed_rows(events: list[dict[str, Any]]) -> list[Witnessed]:
    clips = any(event["event"] == "clip" for event in events)
    rows: list[Witnessed] = []
    pending: list[Witnessed] = []
    for event in events:
        norms = {i: norm for i, norm in event.get("tensors", ()) if norm is not None}
        if event["event"] == "clip":
            row = Witnessed(norms, event["function"], event["max_norm"], event["returned"])
            if any(earlier.norms.keys() == norms.keys() for earlier in pending):
                # Nothing stepped since this group's last clip: the scaler found Inf and left the optimizer alone.
                pending = []
            joint = pending[-1] if pending and row.function == "clip_grads_with_norm_" else None
            if joint is not None and joint.returned == row.returned:
                joint.norms |= norms
                continue
            pending.append(row)
            rows.append(row)
        elif not clips and (event["event"] == "closure" or (event["event"] == "step" and not event["closure"])):
            # Of a closure that runs several times only the first gradient is that of the point stepped from.
            if not pending:
                pending.append(Witnessed(norms, None, None, None))
                rows.append(pending[-1])
        elif event["event"] == "stepped":
            for row in pending:
                row.stepped = event["changed"]
            pending = []
    return rows


def norm(values: Any) -> float:
    return float(np.sqrt(np.sum(np.square(np.asarray(list(values), dtype=np.float64)))))


def weights_are_bit_identical_to_an_unrecorded_run(run: Training) -> None:
    assert run.recorded["updates"] == run.plain["updates"] > 0
    assert list(run.recorded["weights"]) == list(run.plain["weights"])
    for tensor, weight in run.plain["weights"].items():
        assert run.recorded["weights"][tensor].numpy().tobytes() == weight.numpy().tobytes(), tensor


def every_step_is_recorded_once(run: Training) -> None:
    assert [step.index for step in run.steps] == list(range(len(run.steps)))
    calls = {len(rows) for rows in run.groups().values()}
    assert calls == {len(run.steps)}
    # -1: whether the optimizer stepped is not known.
    stepped = [step.recorded.stepped for step in run.steps if step.recorded is not None]
    assert sum((s == 1).all() for s in stepped) == run.plain["updates"]


def groups_and_names_are_those_of_the_checkpoint(run: Training) -> None:
    assert {recorded_names(run, g.tensors) for g in run.source.groups} == set(run.groups())


def recorded_names(run: Training, tensors: tuple[str, ...]) -> frozenset[str]:
    """Names of the tensors that ever had a gradient; ``?`` stands for those that the checkpoint does not hold."""
    index = {tensor.name: i for i, tensor in enumerate(run.source.tensors)}
    used = [t for t in tensors if any(s.sum_squares[index[t]] > 0 for s in run.steps)]
    return frozenset(t if t in run.plain["weights"] else "?" for t in used)


def norms_are_the_witness_s_to_1e_6(run: Training) -> None:
    names, groups = run.names(), run.groups()
    index = {tensor.name: i for i, tensor in enumerate(run.source.tensors)}
    for position, group in enumerate(run.source.groups):
        rows = groups[recorded_names(run, group.tensors)]
        places = [index[tensor] for tensor in group.tensors]
        for step, row in zip(run.steps, rows, strict=True):
            assert step.recorded is not None
            assert (step.recorded.stepped[position] == 1) == row.stepped
            limits = (step.recorded.max_norm[position], step.recorded.clip_value[position])
            expected = (
                (np.nan, row.max_norm) if row.function == "clip_grad_value_" else (row.max_norm or np.nan, np.nan)
            )
            assert limits == pytest.approx(expected, nan_ok=True)
            if not np.isfinite(norm(row.norms.values())):
                assert step.nan[places].sum() + step.inf[places].sum() > 0
                continue
            assert norm(np.sqrt(np.nan_to_num(step.sum_squares[places]))) == pytest.approx(
                norm(row.norms.values()), rel=1e-6
            )
            for number, known in row.norms.items():
                if number in names:
                    assert np.sqrt(step.sum_squares[index[names[number]]]) == pytest.approx(known, rel=1e-6)


def returned_norms_are_what_the_library_returned(run: Training) -> None:
    groups = run.groups()
    for position, group in enumerate(run.source.groups):
        rows = groups[recorded_names(run, group.tensors)]
        for step, row in zip(run.steps, rows, strict=True):
            assert step.recorded is not None
            returned = step.recorded.returned_norm[position]
            if row.returned is None:
                assert np.isnan(returned)
            else:
                # FSDP2's ranks each return their part, which adds up in float64 here and in float32 there.
                assert returned == pytest.approx(row.returned, rel=2e-7 if run.name == "fsdp2" else 0, nan_ok=True)
                assert not np.isfinite(returned) or returned == pytest.approx(norm(row.norms.values()), rel=1e-6)


def nothing_is_found_wrong(run: Training) -> None:
    assert json.loads((run.trace / "trace.json").read_text())["findings"] == []


# The names of the clip groups and their max_norm; a group of all that is trained is called after what its names share.
GROUPS = {
    "sb3-PPO": {"all": 0.5},
    "sb3-A2C": {"all": 0.5},
    "rsl_rl": {"actor": 0.5, "critic": 0.5},
    "loop-two_optimizers": {"0": 0.5, "2": 0.2},
    "loop-joint_norm": {"all": 0.5},
    "loop-clipping_by_value": {"all": None},
}


# One test per script: with several workers each would train it anew.
@pytest.mark.parametrize("name", SCRIPT_OF)
def test_recording(name: str) -> None:
    run = training(name)
    weights_are_bit_identical_to_an_unrecorded_run(run)
    every_step_is_recorded_once(run)
    groups_and_names_are_those_of_the_checkpoint(run)
    norms_are_the_witness_s_to_1e_6(run)
    returned_norms_are_what_the_library_returned(run)
    nothing_is_found_wrong(run)
    if name in GROUPS:
        assert {group.name: group.max_norm for group in run.source.groups} == GROUPS[name]
